"""Reading files that a user names: only regular ones are opened, since a FIFO waits for ever and a device has no end.

Everything that reads what somebody else wrote opens it here; `files.py` has the files that we write. What cannot be
opened is an OSError whose `strerror` says why.
"""

import errno
import importlib.util
import json
import os
import stat
from collections.abc import Iterator
from typing import IO, Any

from etils import epath

from lm_jax.errors import UserError, needs

LARGEST = 2**28  # bytes of what is read at once: JSON, tokenizers, templates, prompts
# Of what is no file; no refusal of the machine.
NO_FILE = (errno.ENXIO, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENOENT)
NUMBERS = {
    FileNotFoundError: errno.ENOENT,
    IsADirectoryError: errno.EISDIR,
    NotADirectoryError: errno.ENOTDIR,
    PermissionError: errno.EACCES,
}
KINDS = (
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISDIR, "a folder"),
)


def is_url(path) -> bool:
    """Whether a path is a URL: gs://, s3:// and the like."""
    return "://" in str(path)


def check_url(name: str, path) -> None:
    """Raises UserError where the package that reads a URL is not installed; `name` says who asks, such as a flag."""
    scheme = str(path).partition("://")[0] if is_url(path) else ""
    package, extra = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}.get(scheme, ("", ""))
    if package and importlib.util.find_spec(package) is None:
        raise needs(f"{name} {path}", package, extra)


def check(path) -> None:
    """Raises OSError for what is on this machine and no regular file."""
    if is_url(path):
        return
    try:
        mode = os.stat(path).st_mode
    except ValueError as error:  # a NUL in the name
        raise OSError(errno.ENXIO, str(error), str(path)) from None
    for is_one, kind in KINDS:
        if is_one(mode):
            raise OSError(errno.EISDIR if kind == "a folder" else errno.ENXIO, f"it is {kind}, not a file", str(path))


def opened(path) -> IO[bytes]:
    """The bytes of a file at any place. Raises OSError, with a number also where a bucket's package gives it none."""
    check(path)
    try:
        return epath.Path(path).open("rb")
    except OSError as error:
        number = next((number for kind, number in NUMBERS.items() if isinstance(error, kind)), None)
        if error.errno is not None or number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from None


def read_bytes(path, largest: int = LARGEST) -> bytes:
    """A whole file of at most `largest` bytes. Raises OSError."""
    with opened(path) as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise OSError(errno.ENXIO, f"it has more than {largest >> 20:,} MiB", str(path))
    return content


def parse_json(raw: bytes) -> Any:
    """The value of JSON text. Raises ValueError for what is none, also where it is nested too deep."""
    try:
        return json.loads(raw)
    except RecursionError:
        raise ValueError("nested too deep") from None


def read_json(path) -> Any:
    """The JSON value in a file. Raises OSError, and ValueError for what is none."""
    return parse_json(read_bytes(path))


def read_object(path) -> dict[str, Any]:
    """The JSON object in a file, {} where it is missing or holds none. Raises OSError where the system refuses it."""
    try:
        content = read_json(path)
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def walk(folder: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """`os.walk` in the order of names that goes through links, into each folder once: a circle of links has an end."""
    seen = set()
    for where, folders, names in os.walk(folder, followlinks=True, onerror=_raise):
        identity = os.stat(where)
        folders.sort()
        if (identity.st_dev, identity.st_ino) in seen:
            folders.clear()
            continue
        seen.add((identity.st_dev, identity.st_ino))
        yield where, folders, sorted(names)


def below(path: str) -> Iterator[str]:
    """The files below a folder, or the place itself where it is none. Raises OSError."""
    if not os.path.isdir(path):
        yield path
        return
    for where, _, names in walk(path):
        yield from (os.path.join(where, name) for name in names)


def check_plain(*paths: str) -> None:
    """Raises UserError where a file, or one of a folder, is a pipe or a device: it would be read, or waited for, for ever."""
    for path in filter(os.path.lexists, paths):
        try:
            for file in below(path):
                check(file)
        except OSError as error:
            if error.errno not in NO_FILE:
                raise  # a refusal of the machine
            raise UserError(f"{error.filename}: {error.strerror}; remove it, or name another place") from None


def files_below(folder: epath.Path) -> Iterator[epath.Path]:
    """The files below a folder at any path or URL, in no order."""
    for path in folder.iterdir():
        if path.is_dir():
            yield from files_below(path)
        else:
            yield path


def _raise(error: OSError) -> None:
    raise error


def shown(name: str) -> str:
    """A name for one line of a terminal: control characters and bytes that are no text as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(name))
