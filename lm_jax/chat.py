"""Conversations as an imported model's own template writes them, in a sandbox; what people say never becomes a control token.

A template is filled in twice: with what was said, and with marks in its place, so that one knows which words are whose.
"""

import functools
import itertools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from lm_jax import regular_files
from lm_jax.config import UserError, needs
from lm_jax.data.tokenizer import HuggingFace, Tokenizer

Message = dict[str, str]  # {"role": "user", "content": "..."}
MARK = "\ue000{}\ue001"  # stands for a message's text while the template is filled in; private characters of Unicode
MARKED = re.compile(MARK.format(r"(\d+)"))
FILE = "chat_template.jinja"


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def find_template(folder: epath.Path) -> str:
    """The chat template of a run or of a Hugging Face folder, "" where it has none."""
    if (folder / FILE).exists():
        return regular_files.read_bytes(folder / FILE).decode()
    try:
        found = regular_files.read_json(folder / "tokenizer_config.json")["chat_template"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    if isinstance(found, list):  # several by name
        found = next((entry["template"] for entry in found if entry["name"] == "default"), "")
    return str(found)


def read_template(folder: epath.Path) -> str:
    """The chat template of a folder. Raises UserError where it has none."""
    if template := find_template(folder):
        return template
    raise UserError(f"--model {folder} has no chat template ({FILE} or tokenizer_config.json): leave --chat out")


def render(template: str, messages: Sequence[Message], prompt: bool = True, **names: Any) -> str:
    """The template filled in by a sandboxed Jinja, with `prompt` up to where the assistant speaks. Raises UserError."""
    try:
        import jinja2
    except ImportError:
        raise needs("a chat template", "jinja2", "hf") from None
    try:
        return compiled(template).render(messages=messages, add_generation_prompt=prompt, **names)
    except jinja2.exceptions.TemplateError as error:
        raise UserError(f"the chat template cannot be filled in: {error}") from None


@functools.lru_cache(maxsize=8)
def compiled(template: str):
    import jinja2.sandbox

    def refuse(words: str):
        raise UserError(f"the chat template refuses this conversation: {words}")

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    return environment.from_string(template)


class Filled(NamedTuple):
    """A conversation as a template writes it, with a mark for each message, and what stands in the place of the marks."""

    text: str
    said: list[str]
    as_it_is: bool  # each message as it was said, or without the white space around it


def fill(template: str, messages: Sequence[Message], tokenizer: HuggingFace, prompt: bool) -> Filled:
    names = {index: name for name, index in tokenizer.special.items()}
    first = "".join(names.get(index, "") for index in tokenizer.around()[0])
    end = tokenizer.known_document
    tokens = {"bos_token": first, "eos_token": "" if end is None else names.get(end, "")}
    marked = [message | {"content": MARK.format(i)} for i, message in enumerate(messages)]
    text, said = render(template, marked, prompt, **tokens), [message["content"] for message in messages]
    parts = MARKED.split(text)
    either = lambda words: f"({re.escape(words)}|{re.escape(words.strip())})"
    pattern = "".join(either(said[int(part)]) if k % 2 else re.escape(part) for k, part in enumerate(parts))
    match = re.fullmatch(pattern, render(template, messages, prompt, **tokens))
    for index, words in zip(parts[1::2], match.groups() if match else (), strict=bool(match)):
        said[int(index)] = words
    return Filled(text, said, bool(match))


def ids_of(text: str, said: list[str], tokenizer: HuggingFace) -> np.ndarray:
    """int32 ids of a template's text with marks: encoded as one text, control tokens where the template writes them.

    What somebody said is encoded apart where it spells such a token, and stays text.
    """
    spelled = ["\ue000", *(name for name in tokenizer.special if len(name) > 1)]
    apart = [any(name in words for name in spelled) for words in said]
    filled = MARKED.sub(lambda mark: mark[0] if apart[int(mark[1])] else said[int(mark[1])], text)
    parts = MARKED.split(filled)
    encode = lambda k, part: tokenizer.encode(said[int(part)]) if k % 2 else tokenizer.encode_control(part)
    return np.concatenate([encode(k, part) for k, part in enumerate(parts)])


def encode(template: str, messages: list[Message], tokenizer: Tokenizer) -> np.ndarray:
    """int32 ids of a conversation, up to where the assistant speaks."""
    known = with_controls(tokenizer)
    filled = fill(template, messages, known, prompt=True)
    return ids_of(filled.text, filled.said, known)


def with_controls(tokenizer: Tokenizer) -> HuggingFace:
    if not isinstance(tokenizer, HuggingFace):
        raise UserError("a chat template needs the tokenizer.json that it was made for")
    return tokenizer


class Turns(NamedTuple):
    """A whole conversation: int32 ids [N], and bool [N] what the assistant has to write: its words and the end of each turn."""

    ids: np.ndarray
    is_answer: np.ndarray


def encode_turns(template: str, messages: list[Message], tokenizer: Tokenizer) -> Turns:
    """A conversation with the assistant's turns told apart. Before each turn stand the ids that `encode` gives a model there.

    Raises UserError where that cannot be: earlier turns become others in the course of the conversation, or nothing says
    where the assistant begins or ends.
    """
    known = with_controls(tokenizer)
    text, said, as_it_is = fill(template, messages, known, prompt=False)
    if not as_it_is:
        raise UserError(
            "the chat template leaves out or rewrites a part of what was said: its words cannot be told apart"
        )
    borders = []
    for k, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = (fill(template, messages[: k + n], known, prompt=not n).text for n in (0, 1))
        if not (after.startswith(before) and text.startswith(after)):
            raise UserError(
                f"the chat template writes the turns before message {k + 1} in another way once it has been said"
            )
        borders += [len(before), len(before) + end_of_answer(after[len(before) :], MARK.format(k), known)]
    ids, befores = ids_of(text, said, known), [ids_of(text[:border], said, known) for border in borders]
    parts = np.split(ids, [len(part) for part in befores])
    if not all(np.array_equal(ids[: len(part)], part) for part in befores):  # a piece reaches over a border
        parts = [ids_of(text[a:b], said, known) for a, b in itertools.pairwise([0, *borders, len(text)])]
    is_answer = [np.full(len(part), number % 2 == 1) for number, part in enumerate(parts)]
    return Turns(np.concatenate(parts), np.concatenate(is_answer))


def end_of_answer(turn: str, mark: str, tokenizer: HuggingFace) -> int:
    """Where what the assistant has to write ends in its turn: after the first control token that follows its words."""
    lead, _, rest = turn.partition(mark)
    control = re.search("|".join(map(re.escape, tokenizer.special)), rest)
    if lead.strip():
        raise UserError(
            "the chat template has no marker of where the assistant begins (it ignores add_generation_prompt)"
        )
    if not control:
        raise UserError(
            "the chat template has no marker of where the assistant ends: no control token follows its words"
        )
    return len(lead) + len(mark) + control.end()


def end_of_turn(template: str, tokenizer: Tokenizer) -> int:
    """The id of the control token that ends the assistant's turn. Raises UserError."""
    ids, is_answer = encode_turns(template, [user("a"), {"role": "assistant", "content": "b"}], tokenizer)
    return int(ids[is_answer][-1])
