"""The tokens of a conversation: of a prompt up to where the assistant speaks, and of a whole one with what it has to learn."""

import datetime
import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lm_jax.data.hugging_face_tokenizer import HuggingFace
from lm_jax.data.tokenizer import Tokenizer
from lm_jax.errors import UserError
from lm_jax.generate.chat_template import Message, Template, shown, user
from lm_jax.generate.chat_words import Filled, fill, names_of
from lm_jax.generate.render_template import Job, render

TAUGHT = datetime.datetime(2025, 1, 1)  # what `strftime_now` shows in training: a run that resumes finds the same rows


class Tokens(NamedTuple):
    """int32 ids [N], and [N, 2] the characters of a text that each stands for."""

    ids: np.ndarray
    offsets: np.ndarray


def tokens_of(filled: Filled, start: int, stop: int, tokenizer: HuggingFace) -> Tokens:
    """The tokens of filled.text[start:stop]; names of special tokens are these tokens where the template wrote them.

    Names that somebody typed in a message are encoded apart and stay text.
    """
    spelled = sorted((span.start, span.stop) for span in filled.spans if span.part.spells)
    edges = itertools.chain(*(pair for pair in spelled if start <= pair[0] and pair[1] <= stop))
    found = [Tokens(np.zeros(0, np.int32), np.zeros((0, 2), int))]
    for k, (a, b) in enumerate(itertools.pairwise([start, *edges, stop])):
        if a < b:
            found.append(_encode_part(filled.text, a, b, tokenizer, apart=k % 2 == 1, begins=a == k == 0))
    return Tokens(*map(np.concatenate, zip(*found, strict=True)))


def _encode_part(text: str, a: int, b: int, tokenizer: HuggingFace, apart: bool, begins: bool) -> Tokens:
    """The tokens of text[a:b].

    Where `begins` is False it is encoded behind a line break: some tokenizers put a space before a text.
    """

    def encode(words: str) -> Tokens:
        if not apart:
            return Tokens(*tokenizer.place_control(words))
        ids = tokenizer.encode(words)
        return Tokens(ids, np.tile([0, len(words)], (len(ids), 1)))

    found, shift = encode(text[a:b]), a
    if not begins:
        lead, longer = encode("\n").ids, encode("\n" + text[a:b])
        if np.array_equal(longer.ids[: len(lead)], lead):
            found, shift = Tokens(longer.ids[len(lead) :], longer.offsets[len(lead) :]), a - 1
    return Tokens(found.ids, found.offsets + shift)


def encode(template: Template, messages: Sequence[Message], tokenizer: Tokenizer, now=None) -> np.ndarray:
    """int32 ids of a conversation, up to where the assistant speaks. Raises UserError."""
    known = with_controls(tokenizer)
    filled = fill(template, messages, True, known, now)
    return tokens_of(filled, 0, len(filled.text), known).ids


def with_controls(tokenizer: Tokenizer) -> HuggingFace:
    """The tokenizer, if it knows control tokens by name. Raises UserError."""
    if not isinstance(tokenizer, HuggingFace):
        raise UserError("a chat template needs the tokenizer.json that it was made for")
    return tokenizer


class Turns(NamedTuple):
    """A whole conversation: int32 ids [N], and bool [N] what the assistant has to write: its words and the end of each turn.

    `unlearnt` are the messages of the assistant that are not among it.
    """

    ids: np.ndarray
    is_answer: np.ndarray
    unlearnt: tuple[int, ...] = ()


def encode_turns(template: Template, messages: Sequence[Message], tokenizer: Tokenizer) -> Turns:
    """A conversation with the assistant's turns told apart.

    What {% generation %} marks is the assistant's, where a template has such a block. Elsewhere a turn is learnt that stands
    there as it was written when it was the last; before it stand the ids that `encode` gives a model there. Templates that
    leave out earlier thoughts, or mark the last turn, write others anew: these are read, not learnt.
    Raises UserError where words are lost, where no turn is learnt, and where nothing says where one begins or ends.
    """
    known = with_controls(tokenizer)
    filled = fill(template, messages, False, known, TAUGHT)
    if filled.generation:
        return marked_turns(filled, known)
    own = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
    texts = render(shown(template, known), [Job(messages[: k + n], not n) for k in own for n in (0, 1)], TAUGHT)
    borders, unlearnt = [], []
    for k, before, after in zip(own, texts[::2], texts[1::2], strict=True):
        if messages[k].get("tool_calls"):
            raise UserError(
                f"message {k + 1} calls tools: it is learnt where the template marks it with {{% generation %}}"
            )
        found = answer_in(filled, k, before, after, known)
        borders += found
        unlearnt += [] if found else [k]
    if (
        not borders and own and own[-1] + 1 < len(messages)
    ):  # what follows the last answer has changed it, and is not learnt
        return encode_turns(template, messages[: own[-1] + 1], tokenizer)
    if not borders:
        raise UserError(
            f"the chat template writes the turns before message {max(own, default=0) + 1} in another way once it has been said: "
            "nothing can be learnt"
        )
    return parted_turns(filled, borders, tuple(unlearnt), known)


def marked_turns(filled: Filled, tokenizer: HuggingFace) -> Turns:
    """The conversation; every token that overlaps what {% generation %} marks is learnt."""
    ids, offsets = tokens_of(filled, 0, len(filled.text), tokenizer)
    is_answer = np.zeros(len(ids), bool)
    for start, stop in filled.generation:
        is_answer |= (offsets[:, 0] < stop) & (offsets[:, 1] > start)
    if not is_answer.any():
        raise UserError(
            "the chat template marks nothing of this conversation with {% generation %}: nothing can be learnt"
        )
    return Turns(ids, is_answer)


def parted_turns(filled: Filled, borders: list[int], unlearnt: tuple[int, ...], tokenizer: HuggingFace) -> Turns:
    """The conversation; what is between every other two borders is learnt. A token across a border is split there."""
    end = len(filled.text)
    ids = tokens_of(filled, 0, end, tokenizer).ids
    befores = [tokens_of(filled, 0, border, tokenizer).ids for border in borders]
    parts = np.split(ids, [len(part) for part in befores])
    if not all(np.array_equal(ids[: len(part)], part) for part in befores):
        parts = [tokens_of(filled, a, b, tokenizer).ids for a, b in itertools.pairwise([0, *borders, end])]
    is_answer = [np.full(len(part), number % 2 == 1) for number, part in enumerate(parts)]
    return Turns(np.concatenate(parts), np.concatenate(is_answer), unlearnt)


def answer_in(filled: Filled, k: int, before: str, after: str, tokenizer: HuggingFace) -> list[int]:
    """Where in a text the assistant's message k begins and ends, [] where it is not as it was first written.

    It ends with the first control token behind its words. `before` is the text that the model was given; `after` is the
    text that was written when that message was the last. Raises UserError.
    """
    text, start = filled.text, len(before)
    if not (after.startswith(before) and text.startswith(before)):
        return []
    words = [span for span in filled.spans if span.part.message == k and span.part.must]
    if len({id(span.part) for span in words}) < len(words):
        raise UserError(f"the chat template writes message {k + 1} more than once: which is learnt cannot be told")
    first, last = (words[0].start, words[-1].stop) if words else (start, start)
    lead = re.sub("<think>.*?(</think>|$)", "", text[start:first], flags=re.DOTALL)
    if lead.strip() or first < start:
        raise UserError(
            "the chat template has no marker of where the assistant begins (it ignores add_generation_prompt)"
        )
    end = end_of_control(text, last, len(after), tokenizer)
    if end and text[: end[1]] == after[: end[1]]:
        return [start, end[1]]
    if not end and text.startswith(after):
        raise UserError(
            "the chat template has no marker of where the assistant ends: no control token follows its words"
        )
    return []


def end_of_control(text: str, start: int, stop: int, tokenizer: HuggingFace) -> tuple[str, int] | None:
    """The first special token of text[start:stop] and where it ends; without one, the first token that was added."""
    found = (names.search(text, start, stop) for names in names_of(tokenizer))
    return next(((control[0], control.end()) for control in found if control), None)


def ends_of_turn(template: Template, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The id of the control token that a template writes behind what an assistant said; () where it is only text."""
    known = with_controls(tokenizer)
    said = [user("a"), {"role": "assistant", "content": "b"}]
    try:
        filled = fill(template, said, False, known)
    except UserError:  # it takes no such conversation: what it says of others is seen where they are written
        return ()
    stop = max(span.stop for span in filled.spans)
    end = end_of_control(filled.text, stop, len(filled.text), known)
    return (known.added[end[0]],) if end else ()
