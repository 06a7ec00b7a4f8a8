"""What begins and ends a text for a MODEL, as its own folder says it; `read` is the one function that looks it up.

A folder of Hugging Face: the ends are `generation_config.json`'s, else `config.json`'s; what stands before a text is what its
tokenizer puts there. A run: `special_ids.json`, which is written with it, else the mark between its documents.
"""

import json
from collections.abc import Iterable
from typing import Any, NamedTuple

from etils import epath

from lm_jax.data.hugging_face_tokenizer import HuggingFace
from lm_jax.data.tokenizer import SentencePiece, Tokenizer
from lm_jax.data.tokenizer_files import stated_in, token_in
from lm_jax.files import BESIDE
from lm_jax.regular_files import read_object

GENERATION = "generation_config.json"


class SpecialIds(NamedTuple):
    """Ids around texts. `ends` is a set in its writer's order: any of them ends a text, the first stands for all."""

    first: tuple[int, ...]  # before a text
    last: tuple[int, ...]  # after a text that an encoder reads whole
    start: int  # what is written starts with it where no prompt stands before: beside an encoder; -1 = nobody says it
    ends: tuple[int, ...]  # may be none: a text is then as long as it may be

    def also(self, *ends: int) -> "SpecialIds":
        """With further ends, such as that of a chat template's turn."""
        return self._replace(ends=tuple(dict.fromkeys((*self.ends, *ends))))


def of_documents(tokenizer: Tokenizer) -> SpecialIds:
    """Of models that are trained here: one mark stands before every document, and so after every one."""
    document = tokenizer.document_id
    return SpecialIds((document,), (), document, (document,))


def read(folder: epath.Path, tokenizer: Tokenizer) -> SpecialIds:
    """Of the MODEL in a folder: a run, or a folder of Hugging Face."""
    kept = read_object(folder / BESIDE)
    if SpecialIds._fields[0] in kept:
        first, last, start, ends = (kept[name] for name in SpecialIds._fields)
        return SpecialIds(tuple(first), tuple(last), start, tuple(ends))
    described = read_object(folder / "config.json")
    if "model_type" not in described:
        return of_documents(tokenizer)
    generation = read_object(folder / GENERATION)
    said = lambda name: ids_in(generation.get(name), tokenizer) or ids_in(described.get(name), tokenizer)
    first, last = around(folder, tokenizer)
    ends = said("eos_token_id") or end_of_tokenizer(folder, tokenizer)
    starts = *said("decoder_start_token_id"), *said("bos_token_id"), *first, *ends, -1
    return SpecialIds(first, last, starts[0], ends)


def files(tokenizer: Tokenizer, ids: SpecialIds) -> dict[str, bytes]:
    """What a run keeps of a tokenizer and of what begins and ends its texts, by name."""
    beside = ids._asdict() | json.loads(tokenizer.beside or b"{}")
    return {tokenizer.file_name: tokenizer.model, BESIDE: json.dumps(beside).encode()}


def ids_in(value: Any, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids in an int, in a list of ints or in nothing; those that the model has not are left out."""
    given: Iterable[Any] = value if isinstance(value, list) else [value]
    known = lambda x: isinstance(x, int) and not isinstance(x, bool) and 0 <= x < tokenizer.vocab_size
    return tuple(dict.fromkeys(x for x in given if known(x)))


def end_of_tokenizer(folder: epath.Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """What the tokenizer's own files say where no config does; may be nothing."""
    stated = tokenizer.id_of(stated_in(folder).document)
    found = stated if stated is not None else tokenizer.known_document
    return () if found is None else (found,)


def around(folder: epath.Path, tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids that a tokenizer puts before a text and after it, as `transformers` has it.

    By the post-processor of a tokenizer.json; beside a SentencePiece model by `add_bos_token` and `add_eos_token` of
    tokenizer_config.json; else none.
    """
    if isinstance(tokenizer, HuggingFace):
        before, after = tokenizer.around()
        return tuple(before), tuple(after)
    if not isinstance(tokenizer, SentencePiece):
        return (), ()
    said = read_object(folder / "tokenizer_config.json")

    def put(name: str, own: int) -> tuple[int, ...]:
        if said.get(f"add_{name}_token") is not True:
            return ()
        stated = tokenizer.id_of(token_in(said.get(f"{name}_token")))
        found = own if stated is None else stated
        return (found,) if found >= 0 else ()

    return put("bos", tokenizer.bos_id), put("eos", tokenizer.eos_id)
