"""Conversations as people publish them -> messages.

A record is one of

    {"messages": [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Blue."}]}
    {"conversations": [{"from": "human", "value": "Name a colour."}, {"from": "gpt", "value": "Blue."}]}    ShareGPT
    {"prompt": [{"role": "user", ...}], "completion": [{"role": "assistant", ...}]}                          TRL
    {"instruction": "Name a colour.", "input": "", "output": "Blue."}                                        Alpaca

A ShareGPT or Alpaca record may have a "system" too. Of a pair, "chosen" and "rejected" may be lists of messages: an answer each,
or the whole conversation each, as TRL writes them. Sources: https://huggingface.co/docs/trl/dataset_formats, and for Alpaca
https://github.com/hiyouga/LLaMA-Factory/tree/main/data (an instruction and its input are one message, joined by a line end).
"""

from collections.abc import Callable
from typing import Any

from lm_jax.data.lines import described
from lm_jax.errors import UserError
from lm_jax.generate.chat_template import THOUGHTS, Message
from lm_jax.tasks.tables import Row, like
from lm_jax.tasks.task import checked_text, no_text

ROLES = ("system", "user", "assistant")
OTHER_ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's
UNREAD = ("tool_calls", "function_call", "tool_call_id")
MESSAGE = '{"role": "user", "content": "..."}'


def _share_gpt(row: Row) -> Any:
    spoken, system = row.content["conversations"], row.content.get("system")
    return [_system(row), *spoken] if system and isinstance(spoken, list) else spoken


def _halves(row: Row) -> Any:
    for column in ("prompt", "completion"):
        if isinstance(row.content[column], str):
            raise UserError(
                f"{row.where}: {column} is a text, not a list of messages:\n"
                "--config.train.task=text_to_text --config.data.columns=\"('prompt', 'completion')\" learns to go on with a text"
            )
    prompt, completion = (_list(row, column) for column in ("prompt", "completion"))
    return prompt + completion


def _alpaca(row: Row) -> Any:
    if row.content.get("history"):
        raise UserError(f"{row.where} has a history, which is not read: write its turns as messages")
    more = row.content.get("input")
    asked = [checked_text(row, "instruction"), *([checked_text(row, "input")] if more else [])]
    turns = ({"role": "user", "content": "\n".join(asked)}, {"role": "assistant", "content": row.content["output"]})
    return [*([_system(row)] if row.content.get("system") else []), *turns]


def _system(row: Row) -> Message:
    return {"role": "system", "content": row.content["system"]}


LAYOUTS: dict[tuple[str, ...], Callable[[Row], Any]] = {
    ("messages",): lambda row: row.content["messages"],
    ("conversations",): _share_gpt,
    ("prompt", "completion"): _halves,
    ("instruction", "output"): _alpaca,
}


def messages_of(row: Row) -> list[Message]:
    """The checked messages of a record in one of the LAYOUTS, the first whose columns it has. Raises UserError."""
    columns = next(columns for columns in LAYOUTS if set(columns) <= row.content.keys())
    return checked_messages(Row({columns[0]: LAYOUTS[columns](row)}, row.where), columns[0])


def pair_of(row: Row) -> tuple[str | list[Message], str, str]:
    """(prompt, chosen, rejected) of a pair: texts, or lists of messages, of which each answer is one. Raises UserError."""
    both = ("chosen", "rejected")
    if not any(isinstance(row.content[column], list) for column in both):
        if "prompt" not in row.content:
            raise UserError(f"{row.where} has no prompt: only two whole conversations may leave it out")
        is_chat = isinstance(row.content["prompt"], list)
        prompt = checked_messages(row, "prompt", answered=False) if is_chat else checked_text(row, "prompt")
        return prompt, checked_text(row, "chosen"), checked_text(row, "rejected")
    first, second = ([_message(row, k, one) for k, one in enumerate(_list(row, column), 1)] for column in both)
    before = _before(row, first, second)
    if first[: len(before)] == second[: len(before)] == before:
        first, second = first[len(before) :], second[len(before) :]
    for column, rest in zip(both, (first, second), strict=True):
        if [message["role"] for message in rest] != ["assistant"]:
            said = ", ".join(message["role"] for message in rest) or "nothing"
            raise UserError(
                f"{row.where}: after the prompt, {column} is {said}: one message of the assistant is expected"
            )
    prompt = checked_messages(Row({"prompt": before}, row.where), "prompt", answered=False)
    answers = Row({"chosen": first[0]["content"], "rejected": second[0]["content"]}, row.where)
    return prompt, checked_text(answers, "chosen"), checked_text(answers, "rejected")


def _before(row: Row, first: list[Message], second: list[Message]) -> list[Message]:
    """The messages that both answers answer: the prompt's, or those with which both conversations begin."""
    prompt = row.content.get("prompt")
    if isinstance(prompt, list):
        return [_message(row, k, one) for k, one in enumerate(prompt, 1)]
    most = min(len(first), len(second)) - 1
    shared = next((k for k in range(most) if first[k] != second[k]), max(most, 0))
    if prompt is None and not shared:
        raise UserError(f"{row.where}: chosen and rejected begin with different messages, and there is no prompt")
    if prompt is None or not shared:
        return first[:shared] or [{"role": "user", "content": prompt}]
    if prompt not in [message["content"] for message in first[:shared]]:
        raise UserError(f"{row.where}: chosen and rejected begin with other words than the prompt {described(prompt)}")
    return first[:shared]


def _list(row: Row, column: str) -> list:
    """A column's messages. Raises UserError where they are no list."""
    messages = row.content[column]
    if not isinstance(messages, list) or not messages:
        cell = "; a cell of a table cannot be one: give JSON lines" if isinstance(messages, str) else ""
        raise UserError(f"{row.where}: {column} is no list of messages {MESSAGE} but {described(messages)}{cell}")
    return messages


def _message(row: Row, number: int, message: Any) -> Message:
    """A message by its field names today: role and content, a text. Raises UserError."""
    where = f"{row.where}: message {number}"
    if isinstance(message, dict) and {"from", "value"} <= message.keys() and not {"role", "content"} & message.keys():
        message = {"role": message["from"], "content": message["value"]} | {
            name: value for name, value in message.items() if name not in ("from", "value")
        }
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise UserError(f"{where} is no {MESSAGE} but {described(message)}")
    role, content = message["role"], message["content"]
    role = OTHER_ROLES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        close = like(str(role).strip(), ROLES)
        near = f"; did you mean {close[0]}?" if close else ""
        raise UserError(f"{where}: role {role!r:.60} is none of {', '.join(ROLES)}{near}")
    if isinstance(content, list) and content:
        content = "".join(_part(where, part) for part in content)
    if not isinstance(content, str) or not content.strip():
        said = "is empty" if isinstance(content, str) else f"has no text: its content is {no_text(content)}"
        raise UserError(f"{where} ({role}) {said}")
    if unread := next((name for name in UNREAD if message.get(name)), ""):
        raise UserError(f"{where} has {unread}: conversations with tools are not read")
    if message.get("weight", 1) != 1:
        raise UserError(f"{where} has weight {message['weight']!r}: every answer is learnt alike, leave it out")
    thoughts = {name: message[name] for name in THOUGHTS if isinstance(message.get(name), str)}
    return {"role": role, "content": content} | thoughts


def _part(where: str, part: Any) -> str:
    """The text of a part of a message's content. Raises UserError where it is something else."""
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, dict) else None
    said = f"a part of type {kind!r:.60}" if kind not in (None, "text") else described(part)
    raise UserError(f'{where}: its content holds {said}: only parts {{"type": "text", "text": "..."}} are read')


def checked_messages(row: Row, column: str, answered: bool = True) -> list[Message]:
    """The checked messages of a column: an optional system message, then a user's and an assistant's.

    At least one is an assistant's; where not `answered`, the last is a user's. Raises UserError.
    """
    messages = [_message(row, number, message) for number, message in enumerate(_list(row, column), 1)]
    roles = [message["role"] for message in messages]
    for number, role in enumerate(roles, 1):
        if role == "system" and number > 1:
            raise UserError(f"{row.where}: message {number}: a system speaks first or not at all")
        if role == "assistant" and "user" not in roles[: number - 1]:
            raise UserError(f"{row.where}: message {number}: an assistant speaks before anybody has said anything")
    if answered and "assistant" not in roles:
        raise UserError(f"{row.where}: no message is an assistant's: there is nothing to learn")
    if not answered and roles[-1] != "user":
        raise UserError(f"{row.where}: the last message of {column} is {roles[-1]}'s, not a user's")
    return messages
