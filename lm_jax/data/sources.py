"""Where text comes from: a place -> documents. Nothing is downloaded."""

import hashlib
import os
import warnings
from collections.abc import Iterator

from etils import epath

from lm_jax.config import UserError

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
SPLITS = ("train", "validation", "test")


def documents(place: str) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of every document of a place, in the order of their names. Raises UserError."""
    if place == "python":
        yield from _interpreter()
        return
    folder = epath.Path(place)
    if not folder.exists():
        raise UserError(f'config.data.sources: {place!r}: no such folder; "python" is the corpus that is always here')
    if not folder.is_dir():
        raise UserError(f"config.data.sources: {place!r} is a file: give the folder of text files it stands in")
    for path in sorted(files_below(folder), key=str):
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(
                f"config.data.sources: {path} cannot be read: {error.strerror}; remove it, or mend it"
            ) from None
        yield str(path), content


def files_below(folder: epath.Path) -> Iterator[epath.Path]:
    for path in folder.iterdir():
        if path.is_dir():
            yield from files_below(path)
        else:
            yield path


def _interpreter() -> Iterator[tuple[str, bytes]]:
    """The running interpreter's standard library, without its tests, and its manual's topics: 13 MB."""
    root = os.path.dirname(os.__file__)
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - SKIPPED_FOLDERS)
        names += [os.path.join(folder, file) for file in files if file.endswith(".py")]
    for name in sorted(names):
        with open(name, "rb") as file:
            yield os.path.relpath(name, root), file.read()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a literal in the interpreter's own manual is not our concern
        from pydoc_data.topics import topics
    for name in sorted(topics):
        yield f"manual/{name}", topics[name].encode()


def decode(name: str, data: bytes) -> str | None:
    """The text of a document without its byte-order mark, or None where it is not UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


def split_of(text: str, validation_fraction: float, test_fraction: float) -> tuple[str, str]:
    """(split, content hash): equal documents never stand in two splits, and no order or seed enters."""
    digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
    share = int(digest[:13], 16) / 16**13
    if share < test_fraction:
        return "test", digest
    return ("validation" if share < test_fraction + validation_fraction else "train"), digest
