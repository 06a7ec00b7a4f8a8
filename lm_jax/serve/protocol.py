"""OpenAI's words: the body of a request -> what it asks for, and what was written -> the bodies of answers.

A field that is not known, or whose value asks for something that is not there, is refused: nothing is left out in silence.
"""

import dataclasses
import json
import time
import uuid
from typing import Any

from lm_jax.errors import nearest, shown
from lm_jax.generate.sampling import Sampling
from lm_jax.generate.slots import ALTERNATIVES

MOST_CHOICES, MOST_PROMPTS, MOST_STOPS = 128, 256, 16
NUMBERS = {  # of a field: is it whole, the smallest, the largest
    **dict.fromkeys(("max_tokens", "max_completion_tokens"), (True, 0, 2**31)),
    **{"temperature": (False, 0, 2), "top_p": (False, 0, 1), "n": (True, 1, MOST_CHOICES)},
    **{"seed": (True, -(2**63), 2**64), "top_k": (True, 0, 2**31), "min_p": (False, 0, 1)},
    "top_logprobs": (True, 0, ALTERNATIVES),
}
SWITCHES = ("stream", "echo", "ignore_eos")
# What may be said where it changes nothing.
NEUTRAL: dict[str, tuple] = {
    **{"frequency_penalty": (0,), "presence_penalty": (0,), "repetition_penalty": (1,), "logit_bias": ({},)},
    **{"best_of": (1,), "suffix": ("",), "tools": ([],), "tool_choice": ("none", "auto"), "store": (False,)},
    **{"service_tier": ("auto", "default"), "modalities": (["text"],), "parallel_tool_calls": (True, False)},
}
BOTH = {"model", "stop", "stream_options", "response_format", "user", "logprobs", *NUMBERS, *SWITCHES[::2], *NEUTRAL}
FIELDS = {True: BOTH | {"messages"}, False: BOTH - {"top_logprobs", "max_completion_tokens"} | {"prompt", "echo"}}


class Refusal(Exception):  # noqa: N818
    """An answer in OpenAI's form of an error."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None):
        super().__init__(message)
        kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request that can be answered, before anything is tokenised."""

    chat: bool
    prompts: list[Any]  # each a text, the ids of all tokens, or the messages of a conversation
    limit: int  # new tokens; -1: as many as there is room for
    num: int  # answers for each prompt
    sampling: Sampling
    seed: int | None
    stops: tuple[str, ...]
    alternatives: int  # beside each token; -1: no log-probabilities
    schema: dict | None
    switches: dict[str, bool]  # of SWITCHES, and "usage": at the end of a stream


def parse(body: bytes, chat: bool, model: str) -> Asked:
    """What the body of a request asks for. Raises Refusal."""
    given = {name: value for name, value in read_object(body).items() if value is not None}
    only(given, FIELDS[chat])
    for name, value in given.items():
        if name in NEUTRAL and not any(value == same and type(value) in (type(same), float) for same in NEUTRAL[name]):
            raise Refusal(f"{name} = {shown(value)} is not supported: leave it out", name)
    if given.get("model", model) != model:
        told = f"the model {shown(given['model'])} does not exist; there is {model}"
        raise Refusal(told, "model", 404, "model_not_found")
    numbers = {name: _number(given[name], name, *NUMBERS[name]) for name in NUMBERS if name in given}
    switches = {name: of_kind(given.get(name, False), bool, name) for name in SWITCHES}
    options = of_kind(given.get("stream_options", {}), dict, "stream_options")
    if unknown := set(options) - {"include_usage"} or (options and not switches["stream"]):
        raise Refusal(f"stream_options: {unknown if unknown is not True else 'without stream'}", "stream_options")
    switches["usage"] = of_kind(options.get("include_usage", False), bool, "stream_options.include_usage")
    limits = [numbers[name] for name in ("max_completion_tokens", "max_tokens") if name in numbers]
    sampling = Sampling(numbers.get("temperature", 1.0), numbers.get("top_k", 0), numbers.get("top_p", 1.0))
    return Asked(
        chat,
        [messages(given)] if chat else prompts(given.get("prompt")),
        limits[0] if limits else -1 if chat else 16,
        numbers.get("n", 1),
        sampling._replace(min_p=numbers.get("min_p", 0.0)),
        numbers.get("seed"),
        _stops(given.get("stop", [])),
        _alternatives(given, chat, numbers.get("top_logprobs")),
        _schema(of_kind(given.get("response_format", {"type": "text"}), dict, "response_format")),
        switches,
    )


def read_object(body: bytes) -> dict[str, Any]:
    """The JSON object of a body. Raises Refusal."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    try:
        found = json.loads(body.decode(), parse_constant=refuse)
        json.dumps(found, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise Refusal(f"the body is no JSON: {str(error)[:200]!a}") from None
    return of_kind(found, dict, "the body")


def only(given: dict[str, Any], known: set[str]) -> None:
    """Raises Refusal for a field that is not known."""
    for name in given:
        if name not in known:
            raise Refusal(f"{shown(name)} is not supported{nearest(name[:100], known)}", name[:100])


def of_kind(value: Any, kind: type, name: str) -> Any:
    """The value. Raises Refusal where it is of another kind."""
    if type(value) is not kind:
        known = {bool: "true or false", dict: "an object", str: "a string", list: "a list"}
        raise Refusal(f"{name} is {shown(value)}: {known[kind]} is expected", name)
    return value


def _number(value: Any, name: str, whole: bool, low: int, high: int) -> Any:
    fits = type(value) is int or (type(value) is float and (not whole or value.is_integer()))
    if not fits or not low <= value <= high:
        kind = "a whole number" if whole else "a number"
        raise Refusal(f"{name} is {shown(value)}: {kind} from {low} to {high} is expected", name)
    return int(value) if whole else float(value)


def prompts(given: Any) -> list[Any]:
    """Texts and lists of ids; one of either, or a list of them."""
    is_ids = lambda x: isinstance(x, list) and bool(x) and all(type(i) is int and 0 <= i < 2**31 for i in x)
    found = [given] if isinstance(given, str) or is_ids(given) else given
    if not isinstance(found, list) or not 0 < len(found) <= MOST_PROMPTS:
        raise Refusal(f"prompt: a text, a list of token ids, or up to {MOST_PROMPTS} of these are expected", "prompt")
    for prompt in found:
        if not isinstance(prompt, str) and not is_ids(prompt):
            raise Refusal(f"prompt holds {shown(prompt)}: a text or a list of token ids is expected", "prompt")
    return found


def messages(given: dict[str, Any]) -> list[dict[str, str]]:
    """The messages of a conversation, each with a role and one text."""
    found = []
    for number, message in enumerate(of_kind(given.get("messages", []), list, "messages")):
        where = f"messages[{number}]"
        message = {name: value for name, value in of_kind(message, dict, where).items() if value is not None}
        if unknown := set(message) - {"role", "content", "name"}:
            raise Refusal(f"{where}: {shown(min(unknown))} is not supported", where)
        content = message.get("content", "")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else of_kind(content, list, where)
        for part in parts:
            if set(of_kind(part, dict, where)) != {"type", "text"} or part["type"] != "text":
                raise Refusal(f"{where}: parts of a content are {{'type': 'text', 'text': ...}}", where)
        texts = [of_kind(part["text"], str, where) for part in parts]
        named = {name: of_kind(message[name], str, where) for name in ("role", "name") if name in message}
        if "role" not in named:
            raise Refusal(f"{where} has no role", where)
        found.append(named | {"content": "".join(texts)})
    if not found:
        raise Refusal("messages: at least one is expected", "messages")
    return found


def _stops(given: Any) -> tuple[str, ...]:
    stops = [given] if isinstance(given, str) else of_kind(given, list, "stop")
    if len(stops) > MOST_STOPS or not all(isinstance(x, str) and 0 < len(x) <= 1000 for x in stops):
        raise Refusal(f"stop: up to {MOST_STOPS} strings are expected, none of them empty", "stop")
    return tuple(stops)


def _alternatives(given: dict[str, Any], chat: bool, top: int | None) -> int:
    """How many tokens beside each written one; -1 without log-probabilities."""
    if not chat:
        return _number(given["logprobs"], "logprobs", True, 0, ALTERNATIVES) if "logprobs" in given else -1
    if not of_kind(given.get("logprobs", False), bool, "logprobs"):
        if top:
            raise Refusal("top_logprobs is read only where logprobs is true", "top_logprobs")
        return -1
    return top or 0


def _schema(asked: dict[str, Any]) -> dict | None:
    kind = asked.get("type")
    if kind == "text" or kind == "json_object":
        return None if kind == "text" else {"type": "object"}
    named = asked.get("json_schema")
    if kind != "json_schema" or not isinstance(named, dict) or not isinstance(named.get("schema"), dict):
        raise Refusal(
            "response_format: text, json_object, or json_schema with its schema is expected", "response_format"
        )
    return named["schema"]


class Answer:
    """The bodies of one answer: whole, or in chunks of a stream."""

    def __init__(self, asked: Asked, model: str):
        kind, prefix = ("chat.completion", "chatcmpl") if asked.chat else ("text_completion", "cmpl")
        self.asked, self.prompt_tokens, self.tokens = asked, 0, 0
        chunk = ".chunk" if asked.chat and asked.switches["stream"] else ""
        named = {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind + chunk, "created": int(time.time())}
        self.head = named | {"model": model}

    def whole(self, choices: list[dict]) -> dict:
        """The body of an answer in one."""
        return self.head | {"choices": choices, "usage": self.usage()}

    def chunk(self, choices: list[dict], usage: dict | None = None) -> str:
        """An event of a stream."""
        more = {"usage": usage} if self.asked.switches["usage"] else {}
        return event(self.head | {"choices": choices} | more)

    def usage(self) -> dict:
        """The tokens of prompts and answers."""
        total = self.prompt_tokens + self.tokens
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.tokens, "total_tokens": total}

    def choice(self, index: int, text: str, logprobs: Any, finish: str, first: bool = False) -> dict:
        """A choice, or what a chunk adds to one; `first` chunks of a conversation say who speaks."""
        tail = {"logprobs": logprobs, "finish_reason": finish or None}
        if not self.asked.chat:
            return {"index": index, "text": text} | tail
        role = {"role": "assistant"} if first or not self.asked.switches["stream"] else {}
        said = role | ({"content": text} if text or role else {})
        return {"index": index, "delta" if self.asked.switches["stream"] else "message": said} | tail


def event(body: dict) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
