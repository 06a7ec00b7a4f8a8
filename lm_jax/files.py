"""Files that we write: whole or not at all, one writer at a time by a lock, verified by hashes when they are read.

`regular_files.py` opens what others wrote; here is, once each: the draft that is renamed when it is finished, the lock
between processes, the hash of a file, and the seal of a JSON object. A sealed object says what a run, a step or a
corpus consists of: it has the hash of all the rest of it under "sha256". What an earlier version wrote has another
"format" and no seal; one flipped bit does not turn one into the other.
"""

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from typing import IO, Any

from etils import epath

from lm_jax import regular_files

SEAL = "sha256"
Hash = dict[str, int | str]  # {"bytes": size, "sha256" or "md5": of the content}
SELF_CHECKED = "base"  # not under the seal: a path that may move, beside the hash of what must be found there
# What may stand beside the config.json of a model, and is part of it: its tokenizer, its template, where its texts end.
# A run also has what its tokenizer's file does not say of its ids, and the margins of a reference model.
BESIDE, REFERENCE = "special_ids.json", "reference.npz"
MODEL_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer.bytes", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
RUN_FILES = (*MODEL_FILES, BESIDE, REFERENCE)  # what the config.json of a run has the hashes of


def cache_folder() -> str:
    """Where what can be made again is kept: $LM_JAX_CACHE, else ~/.cache/lm_jax. Raises FileNotFoundError without a home."""
    if given := os.environ.get("LM_JAX_CACHE"):
        return given
    home = os.path.expanduser("~")
    if not os.path.isdir(home):
        wrong = "this user has no home: say LM_JAX_CACHE=FOLDER, where the cache may be"
        raise FileNotFoundError(errno.ENOENT, wrong, home)
    return os.path.join(home, ".cache", "lm_jax")


def file_hash(path, kind: str = "sha256") -> Hash:
    """{"bytes": size, "sha256": hash} of a file at any path; `kind` "md5": what a bucket says of an object."""
    digest, size = hashlib.new(kind, usedforsecurity=False), 0
    with regular_files.opened(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
            size += len(block)
    return {"bytes": size, kind: digest.hexdigest()}


def invalid_reason(path, expected: Hash) -> str:
    """What is wrong with a file of which size and hash are known, "" where it is as it was written."""
    try:
        found = file_hash(path, "md5" if "md5" in expected else "sha256")
    except OSError as error:
        if error.errno not in regular_files.NO_FILE:  # the disk, or a permission: no damage
            raise
        return "is missing"
    return "" if found == expected else "is not as it was written"


def flush(file: IO) -> None:
    """Returns once what was written to an open file is on the disk, not in the system's memory alone."""
    file.flush()
    os.fsync(file.fileno())


def flush_folder(folder) -> None:
    """Returns once the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def draft_name(path, alone: bool) -> str:
    """The name until it is finished. Where it is not `alone` that a process writes it, each has a name of its own."""
    return f"{path}.draft" if alone else f"{path}.{secrets.token_hex(4)}.draft"


@contextlib.contextmanager
def draft(path, mode: str = "wb", alone: bool = True, durable: bool = True) -> Iterator[IO]:
    """An open file that takes the place of `path` (or URL) once all is written; after an error nothing is left.

    `alone`: no other process writes it meanwhile; else the last one stays. `durable`: it is on the disk at the end.
    """
    if regular_files.is_url(path):  # an object appears whole
        assert "b" in mode, mode
        content = io.BytesIO()
        yield content
        epath.Path(path).write_bytes(content.getvalue())
        return
    name = draft_name(path, alone)
    try:
        with open(name, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            if durable:
                flush(file)
        os.replace(name, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(name)


@contextlib.contextmanager
def draft_folder(folder: str, alone: bool = True) -> Iterator[str]:
    """The name of a folder to make; at the end it becomes `folder` (missing or empty), after an error it is removed."""
    name = draft_name(folder, alone)
    shutil.rmtree(name, ignore_errors=True)
    try:
        yield name
        os.rename(name, folder)
    finally:
        shutil.rmtree(name, ignore_errors=True)


def write_whole(path, content: bytes, alone: bool = True) -> None:
    """A file at any place that is there whole and durably, or not at all; `alone` as in `draft`."""
    with draft(path, alone=alone) as file:
        file.write(content)


@contextlib.contextmanager
def locked(path, busy: Callable[[], None] = lambda: None, shared: bool = False) -> Iterator[None]:
    """Holds the lock of a local file, made where it is missing; a process that dies lets go of it.

    Where another one holds it `busy` is called, which may raise, and then it is waited for. `shared`: with others.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    with open(path, "a") as file:
        is_free = False
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            is_free = True
        if not is_free:
            busy()
            fcntl.flock(file, kind)
        yield


def check_room(folder: epath.Path, num_bytes: float) -> None:
    """Raises OSError where a disk has no room for so many bytes more, before it is filled in vain."""
    if regular_files.is_url(folder):
        return
    there = next(path for path in (folder, *epath.Path(os.path.abspath(folder)).parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < num_bytes:
        needed = f"a checkpoint needs {num_bytes / 1e6:,.1f} MB, and {free / 1e6:,.1f} are free"
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {needed}", str(folder))


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
        content = regular_files.parse_json(raw)
    except ValueError:
        raise ValueError("cannot be read as JSON") from None
    if not isinstance(content, dict):
        raise ValueError("holds no JSON object")
    number = content.get("format")
    if SEAL in content or type(number) is not int or not 0 < number < first:
        if content.pop(SEAL, "") != seal(apart(content)):
            raise ValueError("is not as it was written")
    return content
