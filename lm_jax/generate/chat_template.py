"""Conversations as a model's own chat template writes them; what people say never becomes a control token, and is never lost.

A template is filled in twice, in a process with limits (`jinja_process.py`): with what was said, which gives the text, and with
private characters of Unicode around every part of it, which tell whose words are whose.
"""

import atexit
import datetime
import functools
import importlib.util
import itertools
import json
import pathlib
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from lm_jax import regular_files
from lm_jax.data.tokenizer import HuggingFace, Tokenizer
from lm_jax.errors import UserError, needs

Message = dict[str, Any]  # {"role": "user", "content": "..."}
FILE, MORE, NAMES_FILE = "chat_template.jinja", "additional_chat_templates", "tokenizer_config.json"
PRIVATE = range(0xF0000, 0x10FFFE)  # characters of Unicode that nobody gives a meaning
THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # fields of a message, the first is what templates read
TAUGHT = datetime.datetime(2025, 1, 1)  # what `strftime_now` shows in training: a run that resumes finds the same rows


class Template(NamedTuple):
    """A chat template of Jinja, and the variables that it is shown beside the messages, such as `bos_token`."""

    source: str
    variables: dict[str, Any] = {}


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def find_template(folder: epath.Path) -> Template | None:
    """The chat template of a run or of a Hugging Face folder, None where it has none. Raises UserError.

    Files win over tokenizer_config.json, and of several templates the one named "default" is taken.
    """
    described = read_object(folder / NAMES_FILE)
    named = {"default": read_text(folder / FILE)} if (folder / FILE).exists() else {}
    if (folder / MORE).is_dir():
        files = sorted((folder / MORE).glob("*.jinja"))
        named |= {path.name.removesuffix(".jinja"): read_text(path) for path in files}
    found = named or described.get("chat_template") or {}
    if isinstance(found, str):
        found = {"default": found}
    if isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found if isinstance(entry, dict) and len(entry) == 2}
    if not found:
        return None
    if not isinstance(found, dict) or not isinstance(found.get("default"), str):
        raise UserError(f"{folder} has the chat templates {', '.join(found)}: none is named default")
    return Template(found["default"], special_names(folder, described))


def special_names(folder: epath.Path, described: dict[str, Any]) -> dict[str, str]:
    """{"bos_token": "<s>", ...} of tokenizer_config.json, and of the older special_tokens_map.json where that counts."""
    if "added_tokens_decoder" not in described:
        described = described | read_object(folder / "special_tokens_map.json")
    more = described.get("extra_special_tokens")
    named = {name: value for name, value in described.items() if name.endswith("_token")}
    named |= more if isinstance(more, dict) else {}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in named.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def files_of(template: Template) -> dict[str, bytes]:
    """What a folder keeps of a template, by file name: `find_template` reads it again."""
    named = json.dumps(template.variables, indent=1, ensure_ascii=False)
    return {FILE: template.source.encode(), NAMES_FILE: named.encode()}


def read_text(path: epath.Path) -> str:
    try:
        return regular_files.read_bytes(path).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror if isinstance(error, OSError) else 'no UTF-8'}"
        ) from None


def read_object(path: epath.Path) -> dict[str, Any]:
    """A file's JSON object, {} where there is no file. Raises UserError."""
    if not path.exists():
        return {}
    text = read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON: {str(error)[:100]}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object")
    return content


def read_template(folder: epath.Path, variables: str = "") -> Template:
    """The chat template of a folder, with further variables in JSON. Raises UserError where it has none."""
    template = find_template(folder)
    if template is None:
        raise UserError(f"--model {folder} has no chat template ({FILE} or {NAMES_FILE}): leave --chat out")
    try:
        given = json.loads(variables or "{}")
    except ValueError:
        given = None
    if not isinstance(given, dict):
        raise UserError(f"--chat_variables {variables}: no JSON object such as '{{\"enable_thinking\": false}}'")
    return template._replace(variables=template.variables | given)


class Sandbox:
    """The process that fills in templates: started for the first text, and again after a template that it ended with."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen | None = None

    def start(self) -> subprocess.Popen:
        if not importlib.util.find_spec("jinja2"):
            raise needs("a chat template", "jinja2", "hf")
        line = [sys.executable, "-P", str(pathlib.Path(__file__).parent / "jinja_process.py")]
        pipe, none = subprocess.PIPE, subprocess.DEVNULL
        return subprocess.Popen(line, stdin=pipe, stdout=pipe, stderr=none, start_new_session=True)

    def ask(self, request: dict[str, Any]) -> list[str]:
        """The texts of a request's jobs. Raises UserError."""
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                self.process = self.start()
            assert self.process.stdin and self.process.stdout
            try:
                self.process.stdin.write(json.dumps(request).encode() + b"\n")
                self.process.stdin.flush()
                reply = self.process.stdout.readline()
            except BrokenPipeError:
                reply = b""
            if not reply:
                ended = self.process.wait()
                self.close()
                why = "it computes for too long" if ended == -signal.SIGXCPU else f"its process ended ({ended})"
                raise UserError(f"the chat template cannot be filled in: {why}")
        found = json.loads(reply)
        if "refusal" in found:
            raise UserError(f"the chat template refuses this conversation: {found['refusal']}")
        if "fault" in found:
            raise UserError(f"the chat template cannot be filled in: {found['fault']}")
        return found["texts"]

    def close(self) -> None:
        if self.process:
            self.process.kill()
            self.process.communicate()


SANDBOX = Sandbox()
atexit.register(SANDBOX.close)


class Job(NamedTuple):
    """A text that a template is to write; `around` are two characters that it puts about what {% generation %} marks."""

    messages: Sequence[Message]
    add_generation_prompt: bool
    around: str = ""


def render(template: Template, jobs: Sequence[Job], now: datetime.datetime | None = None) -> list[str]:
    """What a template writes for each job, as `apply_chat_template` of `transformers` does. Raises UserError."""
    asked = [job._replace(messages=[seen(message) for message in job.messages])._asdict() for job in jobs]
    when = (now or datetime.datetime.now()).isoformat()
    return SANDBOX.ask({"source": template.source, "variables": template.variables, "now": when, "jobs": asked})


def seen(message: Message) -> Message:
    """A message as a template sees it: without what is none, thoughts under each name that templates know."""
    message = {name: value for name, value in message.items() if value is not None}
    thought = next((message[name] for name in THOUGHTS if name in message), None)
    return message if thought is None else {"thinking": thought} | message | {THOUGHTS[0]: thought}


class Part(NamedTuple):
    """A part of a message that is looked for in what a template writes, without the white space around it."""

    message: int
    words: str
    must: bool  # it may not be missing; thoughts may, as templates leave out earlier ones
    spells: bool  # the name of a special token, which stays text


class Span(NamedTuple):
    """Where a part stands in a text, as it was said or as JSON spells it."""

    part: Part
    start: int
    stop: int


class Filled(NamedTuple):
    """A conversation as a template writes it."""

    text: str
    spans: list[Span]
    generation: list[tuple[int, int]]  # what {% generation %} marks; empty where the template has no such block


class Marks:
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
        *pieces, last = re.split("(</?think>)", value) if role == "assistant" else [value]
        marked = [
            self._text(k, a, must=b != "</think>" or k == self.newest) + b
            for a, b in zip(pieces[::2], pieces[1::2], strict=True)
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
        for piece in re.split(f"([{chr(PRIVATE[0])}-{chr(PRIVATE[-1])}])", marked):
            if piece in self.parts or piece == self.around[0]:
                opened[piece] = len(text)
            elif piece == self.around[1]:
                generation.append((opened.pop(self.around[0], len(text)), len(text)))
            elif piece in self.lasts:
                first = self.lasts[piece]
                span = Span(self.parts[first], opened.pop(first, len(text)), len(text))
                if text[span.start :] in (span.part.words, json.dumps(span.part.words, ensure_ascii=False)[1:-1]):
                    spans.append(span)
            else:
                text += piece
        return Filled(text, spans, generation)


def fill(template: Template, messages: Sequence[Message], prompt: bool, tokenizer: HuggingFace, now=None) -> Filled:
    """What a template makes of a conversation, with all that was said found in it again.

    Raises UserError that names the message whose words are not.
    """
    marks, template = Marks(messages, template.source, names_of(tokenizer)[0], prompt), shown(template, tokenizer)
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


class Tokens(NamedTuple):
    """int32 ids [N], and [N, 2] where in a text each stands."""

    ids: np.ndarray
    places: np.ndarray


def tokens_of(filled: Filled, start: int, stop: int, tokenizer: HuggingFace) -> Tokens:
    """A stretch of a conversation as one text, in which names of special tokens mean these where the template wrote them.

    Those that somebody spelled are encoded apart and stay text.
    """
    spelled = sorted((span.start, span.stop) for span in filled.spans if span.part.spells)
    edges = itertools.chain(*(pair for pair in spelled if start <= pair[0] and pair[1] <= stop))
    found = [Tokens(np.zeros(0, np.int32), np.zeros((0, 2), int))]
    for k, (a, b) in enumerate(itertools.pairwise([start, *edges, stop])):
        if a < b:
            found.append(piece_of(filled.text, a, b, tokenizer, apart=k % 2 == 1, begins=a == k == 0))
    return Tokens(*map(np.concatenate, zip(*found, strict=True)))


def piece_of(text: str, a: int, b: int, tokenizer: HuggingFace, apart: bool, begins: bool) -> Tokens:
    """text[a:b]. Where a text does not begin it is encoded behind a line break: some tokenizers put a space before a text."""

    def encode(words: str) -> Tokens:
        if not apart:
            return Tokens(*tokenizer.place_control(words))
        ids = tokenizer.encode(words)
        return Tokens(ids, np.tile([0, len(words)], (len(ids), 1)))

    found, shift = encode(text[a:b]), a
    if not begins:
        lead, longer = encode("\n").ids, encode("\n" + text[a:b])
        if np.array_equal(longer.ids[: len(lead)], lead):
            found, shift = Tokens(longer.ids[len(lead) :], longer.places[len(lead) :]), a - 1
    return Tokens(found.ids, found.places + shift)


def encode(template: Template, messages: Sequence[Message], tokenizer: Tokenizer, now=None) -> np.ndarray:
    """int32 ids of a conversation, up to where the assistant speaks. Raises UserError."""
    known = with_controls(tokenizer)
    filled = fill(template, messages, True, known, now)
    return tokens_of(filled, 0, len(filled.text), known).ids


def with_controls(tokenizer: Tokenizer) -> HuggingFace:
    if not isinstance(tokenizer, HuggingFace):
        raise UserError("a chat template needs the tokenizer.json that it was made for")
    return tokenizer


def shown(template: Template, tokenizer: Tokenizer) -> Template:
    """A template with the names of special tokens; of a folder that tells none, what begins and ends the tokenizer's texts."""
    if not isinstance(tokenizer, HuggingFace) or any(name.endswith("_token") for name in template.variables):
        return template
    names = {index: name for name, index in tokenizer.special.items()}
    first = "".join(names.get(index, "") for index in tokenizer.around()[0])
    end = tokenizer.known_document
    own = {"bos_token": first, "eos_token": "" if end is None else names.get(end, "")}
    return template._replace(variables={name: text for name, text in own.items() if text} | template.variables)


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
    """Every token that reaches into what {% generation %} marks is learnt."""
    ids, places = tokens_of(filled, 0, len(filled.text), tokenizer)
    is_answer = np.zeros(len(ids), bool)
    for start, stop in filled.generation:
        is_answer |= (places[:, 0] < stop) & (places[:, 1] > start)
    if not is_answer.any():
        raise UserError(
            "the chat template marks nothing of this conversation with {% generation %}: nothing can be learnt"
        )
    return Turns(ids, is_answer)


def parted_turns(filled: Filled, borders: list[int], unlearnt: tuple[int, ...], tokenizer: HuggingFace) -> Turns:
    """What stands between every other two borders is learnt; where a token reaches over one, it is parted there."""
    end = len(filled.text)
    ids = tokens_of(filled, 0, end, tokenizer).ids
    befores = [tokens_of(filled, 0, border, tokenizer).ids for border in borders]
    parts = np.split(ids, [len(part) for part in befores])
    if not all(np.array_equal(ids[: len(part)], part) for part in befores):
        parts = [tokens_of(filled, a, b, tokenizer).ids for a, b in itertools.pairwise([0, *borders, end])]
    is_answer = [np.full(len(part), number % 2 == 1) for number, part in enumerate(parts)]
    return Turns(np.concatenate(parts), np.concatenate(is_answer), unlearnt)


def answer_in(filled: Filled, k: int, before: str, after: str, tokenizer: HuggingFace) -> list[int]:
    """Where in a text begins and ends what the assistant writes as message k, its end with the first control token behind
    its words; [] where the text is another than `after`, which was written when that message was the last.

    `before` is what the model was given. Raises UserError.
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


@functools.lru_cache(maxsize=4)
def names_of(tokenizer: HuggingFace) -> tuple[re.Pattern, re.Pattern]:
    """Names of special tokens, and of all that were added to the vocabulary and are no white space; the longest first."""
    special = [name for name in tokenizer.special if len(name) > 1]
    added = [name for name in tokenizer.added if len(name) > 1 and name.strip()]
    one = lambda names: re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")
    return one(special), one(added)


def end_of_control(text: str, start: int, stop: int, tokenizer: HuggingFace) -> tuple[str, int] | None:
    """The first special token of text[start:stop] and where it ends; without one, the first token that was added."""
    found = (names.search(text, start, stop) for names in names_of(tokenizer))
    return next(((control[0], control.end()) for control in found if control), None)


def ends_of_turn(template: Template, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The control token that a template writes behind what an assistant said; none where it writes only text there."""
    known = with_controls(tokenizer)
    said = [user("a"), {"role": "assistant", "content": "b"}]
    try:
        filled = fill(template, said, False, known)
    except UserError:  # it takes no such conversation: what it says of others is seen where they are written
        return ()
    stop = max(span.stop for span in filled.spans)
    end = end_of_control(filled.text, stop, len(filled.text), known)
    return (known.added[end[0]],) if end else ()
