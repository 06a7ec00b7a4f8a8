"""Vectors of words from text files, as word2vec and GloVe write them, for the rows of an embedding table."""

from typing import NamedTuple

import numpy as np

from lm_jax import regular_files
from lm_jax.data.tokenizer import Tokenizer
from lm_jax.errors import UserError

LONGEST = 2**20  # bytes of a line


class WordVectors(NamedTuple):
    """Vectors for the pieces that are words of the file; the other rows are zero."""

    path: str
    table: np.ndarray  # float32 [pieces, dim]
    found: np.ndarray  # bool [pieces]


def read(path: str, tokenizer: Tokenizer, dim: int) -> WordVectors:
    """The vectors of a file, one word and its numbers a line, with or without a first line "words dim".

    A piece takes the vector of its text without spaces around it, the first in the file. Raises UserError for another width,
    for a line that is no word with numbers, and where no piece is a word of the file.
    """
    wanted: dict[str, list[int]] = {}
    for i in range(tokenizer.vocab_size):
        if text := tokenizer.decode([i]).strip():
            wanted.setdefault(text, []).append(i)
    table, found = np.zeros((tokenizer.vocab_size, dim), np.float32), np.zeros(tokenizer.vocab_size, bool)
    try:
        file = regular_files.opened(path)
    except OSError as error:
        raise UserError(f"config.train.init_from = {path!r} cannot be read: {error.strerror}") from None
    with file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST), b""), 1):
            word, numbers = _parts(path, number, line)
            if number == 1 and word.isdigit() and len(numbers) == 1:
                numbers = [b"0"] * int(numbers[0]) if numbers[0].isdigit() and len(numbers[0]) < 7 else numbers
                _check_width(path, number, len(numbers), dim)
                continue
            _check_width(path, number, len(numbers), dim)
            pieces = wanted.pop(word, [])
            if pieces:
                table[pieces], found[pieces] = _floats(path, number, numbers), True
    if not found.any():
        raise UserError(f"config.train.init_from = {path!r}: none of its words is a piece of this tokenizer")
    return WordVectors(path, table, found)


def _parts(path: str, number: int, line: bytes) -> tuple[str, list[bytes]]:
    try:
        word, *numbers = line.rstrip().split(b" ")
        if line.rstrip() and (line.endswith(b"\n") or len(line) < LONGEST):
            return word.decode(), numbers
    except UnicodeDecodeError:
        pass
    raise UserError(
        f"config.train.init_from = {path!r} line {number}: no word with its numbers\n"
        "expected word vectors as text (word2vec, GloVe), a word and its numbers a line; a model is named by its folder"
    )


def _check_width(path: str, number: int, width: int, dim: int) -> None:
    if width != dim:
        raise UserError(
            f"config.train.init_from = {path!r} line {number}: {width} numbers, config.model.model_dim = {dim}"
            + (f"\ntake --config.model.model_dim={width}" if number == 1 and width else "")
        )


def _floats(path: str, number: int, numbers: list[bytes]) -> np.ndarray:
    try:
        vector = np.array(numbers).astype(np.float32)
    except ValueError:
        vector = np.array([np.nan], np.float32)
    if not np.isfinite(vector).all():
        raise UserError(f"config.train.init_from = {path!r} line {number}: not all are finite numbers")
    return vector
