"""Where text comes from: a source (a path, a URL, or "python") -> documents. Nothing is downloaded."""

import hashlib
import os
import warnings
from collections.abc import Iterator

from etils import epath

from lm_jax import regular_files
from lm_jax.data.source_kinds import BINARY, is_binary, reason_unread, to_prepare, unreadable
from lm_jax.errors import UserError

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
LARGEST = 2**30  # bytes of a document of a folder of text
SPLITS = ("train", "validation", "test")


def documents(source: str, tokenizer: str = "", hidden: list[str] | None = None) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of every document of a source, in the order of their names.

    A source with anything that is no text is refused, with the command that prepares it (and by `tokenizer`, where one is
    set). Names that begin with a dot are left out, and put into `hidden`. Raises UserError.
    """
    if source == "python":
        yield from _interpreter()
        return
    names = _names(source, [] if hidden is None else hidden)
    others = [(name, reason) for name in names if (reason := reason_unread(name))]
    if others or not epath.Path(source).is_dir():
        raise to_prepare(source, others, len(names), tokenizer)
    for name in names:
        try:
            content = regular_files.read_bytes(name, LARGEST)
        except OSError as error:
            raise unreadable(name, error) from None
        if is_binary(content):
            raise to_prepare(source, [(name, BINARY)], len(names), tokenizer)
        yield name, content


def _names(source: str, hidden: list[str]) -> list[str]:
    """The files of a source, which may be one, in order. Raises UserError."""
    path = epath.Path(source)
    if not path.exists() and not os.path.lexists(source):
        quote = 'names in a list are quoted: (("/a", 0.7), ("/b", 0.3))' if source[:1] + source[-1:] == "()" else ""
        raise UserError(
            f"config.data.sources: {source!r}: no such folder; {quote or 'python is the corpus that is always here'}"
        )
    if regular_files.is_url(source):
        return sorted(map(str, regular_files.files_below(path))) if path.is_dir() else [source]
    try:
        return names_below(source, hidden)
    except OSError as error:
        raise unreadable(str(error.filename), error) from None


def names_below(path: str, hidden: list[str]) -> list[str]:
    """The files of a folder on this machine, in order; of a file itself. Raises OSError.

    Names that begin with a dot, and what Python compiled, go into `hidden`.
    """
    if not os.path.isdir(path):
        return [path]
    found = []
    is_hidden = lambda name: name.startswith(".") or name == "__pycache__"
    for folder, folders, names in regular_files.walk(path):
        hidden += [os.path.join(folder, name) for name in (*folders, *names) if is_hidden(name)]
        folders[:] = [name for name in folders if not is_hidden(name)]
        found += [os.path.join(folder, name) for name in names if not is_hidden(name)]
    return sorted(found)


def _interpreter() -> Iterator[tuple[str, bytes]]:
    """The running interpreter's standard library, without its tests, and its manual's topics: 13 MB."""
    root = os.path.dirname(os.__file__)
    names = []
    for folder, folders, present in os.walk(root):
        folders[:] = sorted(set(folders) - SKIPPED_FOLDERS)
        names += [os.path.join(folder, file) for file in present if file.endswith(".py")]
    for name in sorted(names):
        with open(name, "rb") as file:
            yield os.path.relpath(name, root), file.read()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a literal in the interpreter's own manual is not our concern
        from pydoc_data.topics import topics
    for name in sorted(topics):
        yield f"manual/{name}", topics[name].encode()


def decode(content: bytes) -> str | None:
    """The text of a document without its byte-order mark, or None where it is not UTF-8."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


def share_of(text: str | bytes) -> tuple[float, str]:
    """(a number in [0, 1) from the hash of a text, the hash)."""
    digest = hashlib.sha256(text.encode("utf-8") if isinstance(text, str) else text).hexdigest()
    return int(digest[:13], 16) / 16**13, digest


def split_of(text: str, validation_fraction: float, test_fraction: float) -> tuple[str, str]:
    """(split, content hash): equal documents never stand in two splits, and no order or seed enters."""
    share, digest = share_of(text)
    if share < test_fraction:
        return "test", digest
    return ("validation" if share < test_fraction + validation_fraction else "train"), digest
