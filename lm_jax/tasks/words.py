"""Words -> tokens, each word by itself, so that every word knows its tokens and every token its word, whatever the tokenizer.

A tokenizer that marks the space before a word gets that space; what it leaves out altogether stands as one unknown token, so
that no word is without one.
"""

import itertools
import re
from typing import NamedTuple

import numpy as np

from lm_jax.data.tokenizer import Tokenizer

UNIT = re.compile(r"\s*(\w+|[^\w\s])")  # a word or a mark, and the space before it


class Unit(NamedTuple):
    """A word or a mark of a text: characters [start, stop), and `text` with the space before it."""

    text: str
    start: int
    stop: int


def units(text: str) -> list[Unit]:
    """The words and punctuation marks of a text, with their character positions."""
    return [Unit(found[0], found.start(1), found.end(1)) for found in UNIT.finditer(text)]


def spaced(words: tuple[str, ...]) -> list[str]:
    """Words as they stand in a line."""
    return [word if k == 0 else f" {word}" for k, word in enumerate(words)]


def tokens_of_words(texts: list[list[str]], tokenizer: Tokenizer) -> list[list[np.ndarray]]:
    """Of each text the token ids of each of its words, at least one a word; equal words are encoded once."""
    distinct = list(dict.fromkeys(itertools.chain.from_iterable(texts)))
    unknown = np.array([tokenizer.special.get("[UNK]", tokenizer.document_id)], np.int32)
    known = {
        word: ids if len(ids) else unknown for word, ids in zip(distinct, tokenizer.encode_batch(distinct), strict=True)
    }
    return [[known[word] for word in words] for words in texts]
