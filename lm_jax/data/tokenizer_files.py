"""The setting of a tokenizer, and the folders that keep one: a run, a corpus, a Hugging Face model.

Beside the tokenizer's one file a folder may say which id ends a text and how many rows its model's table has (`stated_in`).
"""

import contextlib
import re
from typing import Any

from etils import epath

from lm_jax import regular_files
from lm_jax.data.hugging_face_tokenizer import HuggingFace
from lm_jax.data.tokenizer import Bytes, SentencePiece, Stated, Tokenizer
from lm_jax.errors import UserError
from lm_jax.files import BESIDE
from lm_jax.regular_files import read_object

TRAINED = {"sentencepiece": "bpe", "unigram": "unigram"}  # kind of a setting: what SentencePiece calls it
SETTINGS = (
    '"bytes", "sentencepiece:PIECES" (BPE), "unigram:PIECES", a tokenizer.model or tokenizer.json, or a folder with one'
)
KINDS: dict[str, Any] = {kind.file_name: kind for kind in (HuggingFace, SentencePiece, Bytes)}  # the richest first


def load(setting: str) -> Tokenizer:
    """The tokenizer of a setting that needs no training: "bytes", a file, or a folder that keeps one. Raises UserError."""
    if setting == "bytes":
        return Bytes()
    path = epath.Path(setting)
    if not path.exists():
        raise UserError(f"config.data.tokenizer = {setting!r}: no such file; sentencepiece:2048 trains one")
    if path.is_dir():
        kept = [path / name for name in KINDS if (path / name).exists()]
        if not kept:
            raise UserError(f"config.data.tokenizer = {setting!r}: the folder has none of {', '.join(KINDS)}")
        path = kept[0]
    kind = {".json": HuggingFace, ".bytes": Bytes}.get(path.suffix, SentencePiece)
    try:
        if not (model := regular_files.read_bytes(path)):
            raise UserError("the file is empty")
        return kind(model, stated_in(path.parent))
    except UserError as error:
        raise UserError(f"config.data.tokenizer = {setting!r}: {error}") from None


def stated_in(folder: epath.Path) -> Stated:
    """What a folder says of its tokenizer: a run or a corpus in `special_ids.json`, Hugging Face in its three files."""
    if kept := read_object(folder / BESIDE):
        return Stated(kept.get("document"), kept.get("num_pieces", 0))
    described, told = read_object(folder / "config.json"), read_object(folder / "tokenizer_config.json")
    ids = [read_object(folder / name).get("eos_token_id") for name in ("generation_config.json", "config.json")]
    ends = [token_in(told.get("eos_token")), *map(first_of, ids)]
    rows = described.get("vocab_size")
    num_rows = rows if isinstance(rows, int) and rows > 0 else 0
    return Stated(next((end for end in ends if end is not None), None), num_rows)


def token_in(value: Any) -> str | None:
    """The name of a token as tokenizer_config.json writes it: a string, or an object with its `content`."""
    found = value.get("content") if isinstance(value, dict) else value
    return found if isinstance(found, str) else None


def first_of(value: Any) -> int | None:
    """An id, or the first of a list of ids; None where there is none."""
    found = value[0] if isinstance(value, list) and value else value
    return found if isinstance(found, int) else None


def files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """What a run or a corpus keeps of a tokenizer, by name."""
    return {tokenizer.file_name: tokenizer.model} | ({BESIDE: tokenizer.beside} if tokenizer.beside else {})


def vocab_size(setting: str) -> int:
    """2048 of "sentencepiece:2048", 0 where nothing is trained. Raises UserError for what is no setting."""
    kind, _, pieces = setting.partition(":")
    if kind not in TRAINED or epath.Path(setting).exists():
        known = setting == "bytes" or setting.endswith((".model", ".json", ".bytes")) or epath.Path(setting).is_dir()
        if not known:
            raise UserError(f"config.data.tokenizer = {setting!r}: expected {SETTINGS}")
        return 0
    if not pieces.isdigit() or not 300 <= int(pieces) <= 1_000_000:
        raise UserError(f'config.data.tokenizer = {setting!r}: expected 300 to 1000000 pieces, such as "{kind}:2048"')
    return int(pieces)


@contextlib.contextmanager
def named(flag: str):
    """Mistakes about a tokenizer that a command's own flag names, not a config."""
    try:
        yield
    except UserError as error:
        raise UserError(re.sub("config.data.tokenizer( =)?", flag, str(error))) from None
