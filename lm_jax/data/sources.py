"""Where text comes from: a place -> documents. Nothing is downloaded."""

import gzip
import hashlib
import os
import re
import shlex
import warnings
import zlib
from collections.abc import Iterator
from typing import Any

from etils import epath

from lm_jax import regular_files
from lm_jax.data import lines
from lm_jax.errors import UserError

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
KINDS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet",
    ".html": "html", ".htm": "html", ".warc": "warc", ".wet": "warc",
}  # fmt: skip
LARGEST = 2**30  # bytes of a document of a folder of text
HEAD = 2**16  # bytes by which text is told from what is none
BINARY, UTF_16 = "no text", "UTF-16, not UTF-8"
CONTROLS = re.compile(rb"[\0-\x06\x0e-\x1a\x1c-\x1f]")  # that no text has
SPLITS = ("train", "validation", "test")


def documents(place: str, tokenizer: str = "", hidden: list[str] | None = None) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of every document of a place, in the order of their names.

    A place with anything that is no text is refused, with the command that prepares it (and by `tokenizer`, where one is
    set). Names that begin with a dot are left out, and put into `hidden`. Raises UserError.
    """
    if place == "python":
        yield from _interpreter()
        return
    names = _names(place, [] if hidden is None else hidden)
    others = [(name, what) for name in names if (what := what_else(name))]
    if others or not epath.Path(place).is_dir():
        raise to_prepare(place, others, len(names), tokenizer)
    for name in names:
        try:
            content = regular_files.read_bytes(name, LARGEST)
        except OSError as error:
            raise unreadable(name, error) from None
        if is_binary(content):
            raise to_prepare(place, [(name, BINARY)], len(names), tokenizer)
        yield name, content


def _names(place: str, hidden: list[str]) -> list[str]:
    """The files of a place, which may be one, in order. Raises UserError."""
    path = epath.Path(place)
    if not path.exists() and not os.path.lexists(place):
        raise UserError(f'config.data.sources: {place!r}: no such folder; "python" is the corpus that is always here')
    if regular_files.is_url(place):
        return sorted(str(file) for file in files_below(path)) if path.is_dir() else [place]
    try:
        return names_below(place, hidden)
    except OSError as error:
        raise unreadable(str(error.filename), error) from None


def names_below(place: str, hidden: list[str]) -> list[str]:
    """The files of a folder on this machine, in order, or the one that the place is; names that begin with a dot, and
    what Python compiled, go into `hidden`. Raises OSError."""
    if not os.path.isdir(place):
        return [place]
    found = []
    for where, folders, names in regular_files.walk(place):
        is_hidden = lambda name: name.startswith(".") or name == "__pycache__"
        hidden += [os.path.join(where, name) for name in (*folders, *names) if is_hidden(name)]
        folders[:] = [name for name in folders if not is_hidden(name)]
        found += [os.path.join(where, name) for name in names if not is_hidden(name)]
    return sorted(found)


def unreadable(name: str, error: OSError) -> UserError:
    return UserError(
        f"config.data.sources: {regular_files.shown(name)} cannot be read: {error.strerror}; remove it, or mend it"
    )


def what_else(name: str) -> str:
    """What a file is that is not to be read as the text it seems to be, "" where it is text. Raises UserError."""
    kind, packed = kind_of(name), re.search(r"\.(gz|zst)$", name.lower())
    try:
        with regular_files.opened(name) as file:
            head = file.read(HEAD)
    except OSError as error:
        raise unreadable(name, error) from None
    if packed:
        return "packed"
    if kind != "text":
        return {"html": "a web page", "warc": "an archive of web pages"}.get(kind, "a table of records")
    return UTF_16 if head.startswith(lines.UTF_16_MARKS) else BINARY if is_binary(head) else ""


def is_binary(content: bytes) -> bool:
    """Whether bytes are no text: a NUL in what is UTF-8, control characters in what is not."""
    try:
        content[:HEAD].decode()
        return b"\0" in content
    except UnicodeDecodeError:
        return bool(CONTROLS.search(content))


def to_prepare(place: str, others: list[tuple[str, str]], num_files: int, tokenizer: str) -> UserError:
    """The mistake of a place that is no folder of text, with the command that makes it text, or a corpus of it."""
    where, whats = f"config.data.sources: {regular_files.shown(repr(place))}", [what for _, what in others]
    first = f"{regular_files.shown(others[0][0])} is {whats[0]}" if others else ""
    if whats[:1] == [UTF_16]:
        name = shlex.quote(others[0][0])
        return UserError(
            f"{where}: {first}; this makes it that:\niconv -f UTF-16 -t UTF-8 {name} > new && mv new {name}"
        )
    if whats.count(BINARY) == num_files:
        return UserError(
            f"{where} holds no text: {first}; a folder of UTF-8 text is expected, or what is packed unpacked"
        )
    output = os.path.join("corpora", os.path.basename(os.path.abspath(place)).split(".")[0] or "mine")
    words = ["python", "tools/prepare_data.py", "--output", output]
    words += ["--tokenizer", tokenizer] if tokenizer else []
    key = next((key for name, _ in others if (key := text_key(name))), "text")
    words += ["--text_key", key] if key != "text" else []
    words += ["--on_bad_record", "skip"] if {BINARY, UTF_16} & {*whats} else []
    more = f", and {len(others) - 1:,} more of {num_files:,} files are none" if len(others) > 1 else ""
    wrong = (
        f"is not read as text: {first}{more}. Prepare it"
        if others
        else "is a file: give the folder it stands in, or prepare it"
    )
    found = [f"{where} {wrong}, and take --config.data.sources={output}"]
    found.append(shlex.join([*words, f"./{place}" if place.startswith("-") else place]))
    if any(os.path.basename(name).startswith("train.") for name, _ in others):
        found.append("records to finetune on instead: name their task, such as --config.train.task=classification")
    return UserError("\n".join(found))


def text_key(name: str) -> str:
    """Under which name the first row of a table has its text, "" where that is not known."""
    kind = kind_of(name)
    try:
        with regular_files.opened(name) as raw:
            file: Any = gzip.GzipFile(fileobj=raw) if name.lower().endswith(".gz") else raw
            row = next(lines.rows(file, kind), None) if kind in lines.KINDS else None
    except (OSError, EOFError, zlib.error):
        return ""
    if not isinstance(row, lines.Row):
        return ""
    return "text" if isinstance(row.content.get("text"), str) else lines.longest(row.content)


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


def kind_of(path: str) -> str:
    """How a file is read: jsonl, json, csv, tsv, parquet, html, warc, python or text, by its name without .gz and .zst."""
    suffix = os.path.splitext(re.sub(r"\.(gz|zst)$", "", path.lower()))[1]
    return "python" if path == "python" else KINDS.get(suffix, "text")


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
