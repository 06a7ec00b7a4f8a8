"""A MODEL on its way out: what it is in another's words, its arrays, and what it knows of text; as a folder or a GGUF file."""

import json
import os
from collections.abc import Callable
from typing import NamedTuple

from etils import epath

from lm_jax import load_model, run_folder
from lm_jax.convert import description, gguf, heads, hugging_face, tensor_map, text_files
from lm_jax.convert.proof import Exported
from lm_jax.convert.text_files import Text
from lm_jax.data.hugging_face_tokenizer import HuggingFace
from lm_jax.data.objectives import specials
from lm_jax.data.special_ids import SpecialIds
from lm_jax.data.tokenizer import Tokenizer
from lm_jax.errors import UserError
from lm_jax.generate import chat_template, chat_tokens
from lm_jax.meanwhile import elapsed

RECORD = "lm_jax.json"  # in a folder that was a run: which step of which
Prove = Callable[[str, dict, Exported], None]  # sees the folder's small files, the arrays, and the model as it is here


class Leaving(NamedTuple):
    """A model on its way out: its description, parameters and text files."""

    described: description.Description
    parameters: dict
    text: Text
    no_chat: str = ""  # why conversations cannot be compared here, though there is a template
    told: str = ""  # what is to be known of its answers


def of_model(found: load_model.ModelRef) -> Leaving:
    """Describes a run or a Hugging Face folder. Raises UserError where no family can express this model."""
    text, no_chat = text_of(found)
    described = described_with(found, text, load_model.context_of(found))
    kept = {} if found.described else run_folder.read_config(found.workdir)
    _, parameters = load_model.load_parameters(found)
    parameters, told = heads.expressible(parameters, described.config.model, kept.get("values", ()))
    content = heads.without_unused(description.FAMILIES[described.family], described.content, parameters)
    return Leaving(described._replace(content=content), parameters, text, no_chat, told)


def described_with(found: load_model.ModelRef, text: Text, context: int) -> description.Description:
    """What a model and its text are in another's words; `context` as in `description_of`. Raises UserError."""
    if "block" in found.parts.replaced:
        raise UserError(f"{found.workdir} has the block of {found.parts.path}, which no family of transformers has")
    fields = text_files.id_fields(text.ids, found.config.model.kind == "encoder_decoder")
    return description.description_of(found.config, found.vocab_size, fields, context)


def check(found: load_model.ModelRef, ids: SpecialIds) -> None:
    """Raises UserError where a model that is still to be trained could not leave; `ids` are those of its texts."""
    text = Text(found.tokenizer, ids, text_files.added_pieces(found.config.data.objective, found.tokenizer))
    described_with(found, text, 0)
    text_files.made(text, {}, found.config.data.sequence_length)


def of_gguf(path: str) -> Leaving:
    """Reads a GGUF file of the Llama family. Raises UserError."""
    contents = gguf.read(path)
    tokenizer = HuggingFace(contents.files[HuggingFace.file_name])
    template = contents.files.get(text_files.TEMPLATE, b"").decode()
    ids, no_chat = with_turns(contents.ids, chat_template.Template(template) if template else None, tokenizer)
    described = description.describe(contents.config | text_files.id_fields(ids, False), path, "bytes")
    parameters = tensor_map.parameters(described, contents.tensors, path)
    return Leaving(described, parameters, Text(tokenizer, ids, template=template), no_chat)


def text_of(found: load_model.ModelRef) -> tuple[Text, str]:
    """What a MODEL knows of text, and why its conversations cannot be compared ("" = they can)."""
    tokenizer, data, no_chat = found.tokenizer, found.config.data, ""
    ids, template = found.special_ids, chat_template.find_template(found.workdir)
    if found.config.model.kind == "encoder" or found.config.model.head:
        own, is_encoder = specials(tokenizer, data.objective), found.config.model.kind == "encoder"
        ids = ids._replace(first=(own.classifier,) * is_encoder, last=(own.document,), ends=())
        template = None
    else:
        ids, no_chat = with_turns(ids, template, tokenizer)
    added = () if found.described else text_files.added_pieces(data.objective, tokenizer)
    kept = hugging_face.carried_files(str(found.workdir))
    if not found.described:
        kept[RECORD] = json.dumps({"model": load_model.fingerprint(found), "step": found.step}).encode()
    return Text(tokenizer, ids, added, template.source if template else "", kept), no_chat


def with_turns(
    ids: SpecialIds, template: chat_template.Template | None, tokenizer: Tokenizer
) -> tuple[SpecialIds, str]:
    """(ids with the end of an assistant's turn among their ends, why there is none although there is a template)."""
    if not template:
        return ids, ""
    try:
        ends = chat_tokens.ends_of_turn(template, tokenizer)
    except UserError as error:
        return ids, str(error)
    return ids.also(*ends), "" if ends else "the chat template writes no control token behind an answer, or takes none"


def write_folder(folder: str, leaving: Leaving, prove: Prove, log: Callable[[str], None]) -> None:
    """Writes a new Hugging Face folder, proven before its arrays are written. Raises UserError."""
    described, parameters, text, no_chat, told = leaving
    fields = text_files.id_fields(text.ids, described.config.model.kind == "encoder_decoder")
    files, left_out = text_files.made(text, fields, described.config.data.sequence_length)
    if left_out:
        log(left_out)
    if told:
        log(told)
    if no_chat:
        log(f"conversations are not compared: {no_chat}")

    def as_read(small: str, tensors: dict) -> None:
        """The folder's own text is compared, not the run's."""
        again = load_model.locate_hugging_face(epath.Path(small))
        ids = again.special_ids
        if text.ids.ends and (ids.first, set(ids.ends)) != (text.ids.first, set(text.ids.ends)):
            raise UserError(f"not written: texts begin and end with {text.ids} here, and read again with {ids}")
        graph, template = (
            description.graph_of(described),
            None if no_chat else chat_template.find_template(epath.Path(small)),
        )
        prove(small, tensors, Exported(described, graph, parameters, again.tokenizer, ids, template))

    with elapsed(f"writing {folder}"):
        hugging_face.write(folder, described, parameters, files, as_read)


def write_gguf(path: str, leaving: Leaving) -> None:
    """Writes a GGUF file of the Llama family; an existing file is not replaced. Raises UserError."""
    if os.path.exists(path):
        raise UserError(f"{path} is there; name another file")
    described, parameters, text, *_ = leaving
    tensors = tensor_map.their_tensors(described, parameters)
    hugging_face.check_room(os.path.dirname(os.path.abspath(path)), path, sum(x.nbytes for x in tensors.values()))
    gguf.write(path, described.content, tensors, text)
