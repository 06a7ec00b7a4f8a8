"""Chat templates, as a folder keeps them: where they are found, and the names of special tokens that go along.

render_template.py fills one in, chat_words.py finds in the text what was said, chat_tokens.py makes ids of it.
"""

import json
from typing import Any, NamedTuple

from etils import epath

from lm_jax import regular_files
from lm_jax.data.hugging_face_tokenizer import HuggingFace
from lm_jax.data.tokenizer import Tokenizer
from lm_jax.errors import UserError

Message = dict[str, Any]  # {"role": "user", "content": "..."}
FILE, MORE, NAMES_FILE = "chat_template.jinja", "additional_chat_templates", "tokenizer_config.json"
THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # fields of a message, the first is what templates read


class Template(NamedTuple):
    """A chat template in Jinja, and the variables that it gets beside the messages, such as `bos_token`."""

    source: str
    variables: dict[str, Any] = {}


def user(text: str) -> Message:
    """A message of the user."""
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
    """The files that keep a template, {name: content}; `find_template` reads them again."""
    named = json.dumps(template.variables, indent=1, ensure_ascii=False)
    return {FILE: template.source.encode(), NAMES_FILE: named.encode()}


def read_text(path: epath.Path) -> str:
    """A file as text. Raises UserError where it cannot be read or is no UTF-8."""
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


def shown(template: Template, tokenizer: Tokenizer) -> Template:
    """The template with the names of special tokens; where it has none, those that begin and end the tokenizer's texts."""
    if not isinstance(tokenizer, HuggingFace) or any(name.endswith("_token") for name in template.variables):
        return template
    names = {index: name for name, index in tokenizer.special.items()}
    first = "".join(names.get(index, "") for index in tokenizer.around()[0])
    end = tokenizer.known_document
    own = {"bos_token": first, "eos_token": "" if end is None else names.get(end, "")}
    return template._replace(variables={name: text for name, text in own.items() if text} | template.variables)
