"""Conversations as an imported model's own template writes them, in a sandbox; what people say never becomes a control token."""

import json
import re
from typing import Any

import numpy as np
from etils import epath

from lm_jax.config import UserError
from lm_jax.data.tokenizer import HuggingFace, Tokenizer

Message = dict[str, str]  # {"role": "user", "content": "..."}
MARK = "\ue000{}\ue001"  # stands for a message's text while the template is filled in; private characters of Unicode


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def read_template(folder: epath.Path) -> str:
    """The chat template of a Hugging Face folder. Raises UserError where it has none."""
    if (folder / "chat_template.jinja").exists():
        return (folder / "chat_template.jinja").read_text()
    try:
        found = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"--model {folder} has no chat template (chat_template.jinja or tokenizer_config.json): leave --chat out"
        ) from None
    if isinstance(found, list):  # several by name
        found = next((entry["template"] for entry in found if entry["name"] == "default"), "")
    return str(found)


def render(template: str, messages: list[Message], **names: Any) -> str:
    """The template filled in by a sandboxed Jinja, up to where the assistant speaks. Raises UserError with its words."""
    try:
        import jinja2.sandbox
    except ImportError:
        raise UserError("a chat template needs the package jinja2: pip install 'lm_jax[hf]'") from None

    def refuse(words: str):
        raise UserError(f"the chat template refuses this conversation: {words}")

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    try:
        return environment.from_string(template).render(messages=messages, add_generation_prompt=True, **names)
    except jinja2.exceptions.TemplateError as error:
        raise UserError(f"the chat template cannot be filled in: {error}") from None


def encode(template: str, messages: list[Message], tokenizer: Tokenizer) -> np.ndarray:
    """int32 ids of a conversation: control tokens where the template writes them, the messages' text as text."""
    if not isinstance(tokenizer, HuggingFace):
        raise UserError("a chat template needs the tokenizer.json that it was made for")
    marked = [message | {"content": MARK.format(i)} for i, message in enumerate(messages)]
    names = {index: name for name, index in tokenizer.special.items()}
    first = "".join(names.get(index, "") for index in tokenizer.around()[0])
    whole = render(template, marked, bos_token=first, eos_token=names.get(tokenizer.document_id, ""))
    ids: list[np.ndarray] = []
    for number, part in enumerate(re.split(MARK.format(r"(\d+)"), whole)):
        ids.append(tokenizer.encode(messages[int(part)]["content"]) if number % 2 else tokenizer.encode_control(part))
    return np.concatenate(ids)
