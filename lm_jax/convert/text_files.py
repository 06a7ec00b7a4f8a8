"""The files of a folder that say what its text is: tokenizer, first token, all ends, chat template; for any reader.

    tokenizer.json           pieces, and what stands around a text (`post_processor`)
    tokenizer_config.json    class and names of special tokens
    generation_config.json   ids of the first token and of all ends
    chat_template.jinja

What a model came with goes along; in it is corrected only what this model does otherwise.
"""

import json
from typing import Any, NamedTuple

from lm_jax.convert import tokenizer_json
from lm_jax.data.hugging_face_tokenizer import HuggingFace
from lm_jax.data.special_ids import SpecialIds
from lm_jax.data.tokenizer import Bytes, Tokenizer
from lm_jax.errors import UserError
from lm_jax.model_config import NUM_SENTINELS

CLASS = "PreTrainedTokenizerFast"  # reads tokenizer.json as it is, in every version of transformers
CONFIG, GENERATION, TEMPLATE = "tokenizer_config.json", "generation_config.json", "chat_template.jinja"
# Pages of Python's manual on which a tokenizer.json made here has to agree.
REAL_TEXTS = ("for", "specialnames", "strings")


class Text(NamedTuple):
    """What a model on its way out knows of text."""

    tokenizer: Tokenizer
    ids: SpecialIds
    added: tuple[tuple[int, str], ...] = ()  # (id, name) of pieces beyond the tokenizer's, of the model's objective
    template: str = ""
    kept: dict[str, bytes] = {}  # files that it came with


def added_pieces(objective: str, tokenizer: Tokenizer) -> tuple[tuple[int, str], ...]:
    """(id, name) of what an objective needs beyond the tokenizer: a mask, or the sentinels of hidden spans."""
    num = tokenizer.vocab_size
    if objective.startswith("masked") and "[MASK]" not in tokenizer.special:
        return ((num, "[MASK]"),)
    if objective == "span_corruption" and f"<extra_id_{NUM_SENTINELS - 1}>" not in tokenizer.special:
        return tuple((num + k, f"<extra_id_{k}>") for k in range(NUM_SENTINELS))
    return ()


def id_fields(ids: SpecialIds, reads: bool) -> dict[str, Any]:
    """The fields of config.json for special ids; `reads` where an encoder reads the prompt."""
    found: dict[str, Any] = {"bos_token_id": ids.first[0]} if ids.first else {}
    found |= {"eos_token_id": ids.ends[0] if len(ids.ends) == 1 else list(ids.ends)} if ids.ends else {}
    return found | ({"decoder_start_token_id": ids.start} if reads and ids.start >= 0 else {})


def made(text: Text, fields: dict[str, Any], context: int) -> tuple[dict[str, bytes], str]:
    """({name: content} of the files, what is left out and why: "" = nothing).

    `fields` are the ids that config.json has, `context` is the longest text in tokens.
    """
    tokenizer, why = text.tokenizer, ""
    files = dict(text.kept) | {tokenizer.file_name: tokenizer.model}
    try:
        files[HuggingFace.file_name] = with_ids(as_json(tokenizer), text.ids, text.added)
    except UserError as error:
        if isinstance(tokenizer, Bytes):
            raise  # nobody but lm_jax knows its own file
        files.pop(HuggingFace.file_name, None)
        why = f"no {HuggingFace.file_name} beside {tokenizer.file_name}: {error}"
    files[CONFIG] = written(tokenizer_config(read(text.kept, CONFIG), text.ids, names_of(text), context))
    if text.ids.ends:
        ends = {"eos_token_id": list(text.ids.ends)}
        files[GENERATION] = written({"pad_token_id": text.ids.ends[0]} | read(text.kept, GENERATION) | fields | ends)
    if text.template:
        files[TEMPLATE] = text.template.encode()
    return files, why


def as_json(tokenizer: Tokenizer) -> bytes:
    """The tokenizer's tokenizer.json: its own, or one that was checked to give the same ids. Raises UserError."""
    if isinstance(tokenizer, HuggingFace):
        return tokenizer.model
    import pydoc_data.topics

    return tokenizer_json.checked(tokenizer, [pydoc_data.topics.topics[name] for name in REAL_TEXTS])


def with_ids(model: bytes, ids: SpecialIds, added: tuple[tuple[int, str], ...] = ()) -> bytes:
    """A tokenizer.json that puts these ids around a text and names the added pieces; the same bytes where it does already."""
    if HuggingFace(model).around() == (list(ids.first), list(ids.last)) and not added:
        return model
    content = json.loads(model)
    content["added_tokens"] += [tokenizer_json.special_token(i, name) for i, name in added]
    names = {i: name for name, i in tokenizer_json.vocab_of(content).items()}
    beside = lambda several, part: [{"SpecialToken": {"id": names[i], "type_id": part}} for i in several]
    words = lambda name, part: {"Sequence": {"id": name, "type_id": part}}
    single = [*beside(ids.first, 0), words("A", 0), *beside(ids.last, 0)]
    content["post_processor"] = {
        **{"type": "TemplateProcessing", "single": single, "pair": [*single, words("B", 1), *beside(ids.last, 1)]},
        "special_tokens": {
            names[i]: {"id": names[i], "ids": [i], "tokens": [names[i]]} for i in (*ids.first, *ids.last)
        },
    }
    return json.dumps(content, ensure_ascii=False).encode()


def names_of(text: Text) -> dict[str, str]:
    """{"bos_token": its name, ...} of the special tokens that have a name."""
    names = tokenizer_json.piece_names(text.tokenizer) | dict(text.added)
    found = {"bos_token": names.get(text.ids.first[0]) if text.ids.first else None}
    found |= {"eos_token": names.get(text.ids.ends[0]) if text.ids.ends else None}
    found |= {"mask_token": "[MASK]" if "[MASK]" in dict(text.added).values() else None}
    return {kind: name for kind, name in found.items() if name is not None}


def tokenizer_config(kept: dict[str, Any], ids: SpecialIds, names: dict[str, str], context: int) -> dict[str, Any]:
    """The content of tokenizer_config.json; names that a model came with stay, as its chat template uses them."""
    new = {"tokenizer_class": CLASS, "model_max_length": context, "clean_up_tokenization_spaces": False}
    found = new | names | kept | {"add_bos_token": bool(ids.first), "add_eos_token": bool(ids.last)}
    return found if found.get("pad_token") or "eos_token" not in found else found | {"pad_token": found["eos_token"]}


def read(files: dict[str, bytes], name: str) -> dict[str, Any]:
    """A JSON object of these files, {} where there is none. Raises UserError."""
    try:
        content = json.loads(files.get(name, b"{}"))
        assert isinstance(content, dict)
    except (ValueError, RecursionError, AssertionError):
        raise UserError(f"{name} beside the model cannot be read as JSON; take it away or copy it again") from None
    return content


def written(content: dict[str, Any]) -> bytes:
    """An object as a JSON file."""
    return json.dumps(content, indent=1, ensure_ascii=False).encode()
