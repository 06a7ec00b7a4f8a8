"""Files that are there whole or not at all, and say whether they are as they were written: hashes, and JSON under a seal.

A sealed object is the last word on what a run, a step or a corpus consists of: it has the hash of all the rest of it under
"sha256". What an earlier version wrote has another "format" and no seal; one flipped bit does not turn one into the other.
"""

import contextlib
import hashlib
import json
import os
import secrets
from typing import IO, Any

from etils import epath

from lm_jax import regular_files

SEAL = "sha256"
Hash = dict[str, int | str]  # {"bytes": size, "sha256" or "md5": of the content}
SELF_CHECKED = "base"  # not under the seal: a path that may move, beside the hash of what must be found there
# What may stand beside the config.json of a model, and is part of it: its tokenizer, its template, where its texts end.
MODEL_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer.bytes", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


def file_hash(path, kind: str = "sha256") -> Hash:
    """{"bytes": size, "sha256": hash} of a file at any path; `kind` "md5" where that is what a store says of an object."""
    digest, size = hashlib.new(kind, usedforsecurity=False), 0
    with regular_files.opened(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
            size += len(block)
    return {"bytes": size, kind: digest.hexdigest()}


def invalid_reason(path, expected: Hash) -> str:
    """What is wrong with a file of which size and hash are known, "" where it is as it was written."""
    if not epath.Path(path).is_file():
        return "is missing"
    return "" if file_hash(path) == expected else "is not as it was written"


def flush(file: IO) -> None:
    """What was written to an open file is on the disk, not in the system's memory alone."""
    file.flush()
    os.fsync(file.fileno())


def write_whole(path, content: bytes, alone: bool = True) -> None:
    """A file at any place that is there whole and durably, or not at all.

    Where it is not `alone` that a process writes the file, each writes a draft of its own: the last one stays.
    """
    if regular_files.is_url(path):
        epath.Path(path).write_bytes(content)
        return
    draft = f"{path}.draft" if alone else f"{path}.{secrets.token_hex(4)}.draft"
    try:
        with open(draft, "wb") as file:
            file.write(content)
            flush(file)
        os.replace(draft, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(draft)


def seal(content: Any) -> str:
    """sha256 of what a JSON value says, however it is laid out."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sealed(content: dict[str, Any]) -> bytes:
    """The object as the bytes of a file, with its seal."""
    return json.dumps(content | {SEAL: seal(apart(content))}, indent=1).encode()


def apart(content: dict[str, Any]) -> dict[str, Any]:
    """What of an object is under its seal."""
    return {name: value for name, value in content.items() if name not in (SEAL, SELF_CHECKED)}


def unsealed(raw: bytes, first: int) -> dict[str, Any]:
    """The object of a file without its seal, which files have from format `first` on.

    Raises ValueError that says of the file that it cannot be read, or is not as it was written.
    """
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError):
        raise ValueError("cannot be read as JSON") from None
    if not isinstance(content, dict):
        raise ValueError("holds no JSON object")
    number = content.get("format")
    if SEAL in content or type(number) is not int or not 0 < number < first:
        if content.pop(SEAL, "") != seal(apart(content)):
            raise ValueError("is not as it was written")
    return content
