"""Whose words are whose in a filled-in chat template: what people say never becomes a control token, and is never lost.

A template is filled in twice: with what was said, which gives the text, and with private characters of Unicode around every
part of it, which tell where in the text each part stands.
"""

import functools
import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from lm_jax.data.hugging_face_tokenizer import HuggingFace
from lm_jax.errors import UserError
from lm_jax.generate.chat_template import THOUGHTS, Message, Template, shown
from lm_jax.generate.render_template import Job, render

PRIVATE = range(0xF0000, 0x10FFFE)  # characters of Unicode that nobody gives a meaning


@functools.lru_cache(maxsize=4)
def names_of(tokenizer: HuggingFace) -> tuple[re.Pattern, re.Pattern]:
    """Patterns of the names of special tokens, and of all added tokens but white space; the longest name first."""
    special = [name for name in tokenizer.special if len(name) > 1]
    added = [name for name in tokenizer.added if len(name) > 1 and name.strip()]
    one = lambda names: re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")
    return one(special), one(added)


class Part(NamedTuple):
    """A part of a message that is looked for in what a template writes, without the white space around it."""

    message: int
    words: str
    must: bool  # it may not be missing; thoughts may, as templates leave out earlier ones
    spells: bool  # the name of a special token, which stays text


class Span(NamedTuple):
    """Where a part is in a text, as it was said or as JSON spells it."""

    part: Part
    start: int
    stop: int


class Filled(NamedTuple):
    """A conversation as a template writes it."""

    text: str
    spans: list[Span]
    generation: list[tuple[int, int]]  # what {% generation %} marks; empty where the template has no such block


class MarkedMessages:
    """Two private characters of their own around each part of what was said, to be found again in what a template writes."""

    def __init__(self, messages: Sequence[Message], source: str, names: re.Pattern, prompt: bool):
        used = {*json.dumps(messages, ensure_ascii=False), *source}
        self.free = (chr(k) for k in PRIVATE if chr(k) not in used)
        self.names, self.newest = names, -1 if prompt else len(messages) - 1  # whose thoughts are not earlier ones
        self.parts: dict[str, Part] = {}  # by the character before each
        self.lasts: dict[str, str] = {}  # the character after each: the one before it
        self.around = self._sign() + self._sign()
        self.messages = [self._value(k, message, "", message["role"]) for k, message in enumerate(messages)]

    def _sign(self) -> str:
        if sign := next(self.free, ""):
            return sign
        raise UserError(f"a conversation of more than {len(PRIVATE) // 2:,} parts is too long for a chat template")

    def _value(self, k: int, value: Any, name: str, role: str) -> Any:
        if isinstance(value, dict):
            return {key: self._value(k, each, f"{name}.{key}", role) for key, each in value.items()}
        if isinstance(value, list):
            return [self._value(k, each, name, role) for each in value]
        if not isinstance(value, str) or name == ".role":
            return value
        if name not in (".content", ".content.text"):
            thinks = name[1:] in THOUGHTS
            return self._text(k, value, must=thinks and k == self.newest, whole=thinks)
        # <think> and </think> of an assistant are its template's; what stands before the second are its thoughts.
        *parts, last = re.split("(</?think>)", value) if role == "assistant" else [value]
        marked = [
            self._text(k, a, must=b != "</think>" or k == self.newest) + b
            for a, b in zip(parts[::2], parts[1::2], strict=True)
        ]
        return "".join(marked) + self._text(k, last, must=True)

    def _text(self, k: int, text: str, must: bool, whole: bool = True) -> str:
        """Marks the names of special tokens, and the words between them where they are to be found (`whole`)."""
        found, start = "", 0
        for name in self.names.finditer(text):
            between = text[start : name.start()]
            found += self._mark(Part(k, between.strip(), must, False), between) if whole else between
            found += self._mark(Part(k, name[0], must, True), name[0])
            start = name.end()
        rest = text[start:]
        return found + (self._mark(Part(k, rest.strip(), must, False), rest) if whole else rest)

    def _mark(self, part: Part, text: str) -> str:
        if not part.words:
            return text
        first, last = self._sign(), self._sign()
        self.parts[first], self.lasts[last] = part, first
        before, after = text.split(part.words, 1)
        return before + first + part.words + last + after

    def read(self, marked: str) -> Filled:
        """A text without its marks, and what stands whole between them."""
        text, opened, spans, generation = "", {}, [], []
        for chunk in re.split(f"([{chr(PRIVATE[0])}-{chr(PRIVATE[-1])}])", marked):
            if chunk in self.parts or chunk == self.around[0]:
                opened[chunk] = len(text)
            elif chunk == self.around[1]:
                generation.append((opened.pop(self.around[0], len(text)), len(text)))
            elif chunk in self.lasts:
                first = self.lasts[chunk]
                span = Span(self.parts[first], opened.pop(first, len(text)), len(text))
                if text[span.start :] in (span.part.words, json.dumps(span.part.words, ensure_ascii=False)[1:-1]):
                    spans.append(span)
            else:
                text += chunk
        return Filled(text, spans, generation)


def fill(template: Template, messages: Sequence[Message], prompt: bool, tokenizer: HuggingFace, now=None) -> Filled:
    """What a template makes of a conversation, with the position of all that was said.

    Raises UserError that names the message whose words are lost.
    """
    marks, template = (
        MarkedMessages(messages, template.source, names_of(tokenizer)[0], prompt),
        shown(template, tokenizer),
    )
    text, marked = render(template, [Job(messages, prompt), Job(marks.messages, prompt, marks.around)], now)
    filled = marks.read(marked)
    found = {id(span.part) for span in filled.spans}
    lost = next((part for part in marks.parts.values() if part.must and id(part) not in found), None)
    if lost:
        raise UserError(
            f"the chat template leaves out or rewrites a part of message {lost.message + 1} "
            f"({messages[lost.message]['role']}): {lost.words[:60]!r}"
        )
    if filled.text != text:
        one = lambda k: [*messages[:k], marks.messages[k], *messages[k + 1 :]]
        texts = render(template, [Job(one(k), prompt) for k in range(len(messages))], now)
        which = next((f"message {k + 1}" for k, each in enumerate(texts) if marks.read(each).text != text), "an answer")
        raise UserError(
            f"the chat template counts or takes apart the words of {which}: they cannot be told from its own"
        )
    return filled
