"""Files -> records: JSONL, text, Parquet, web pages and archives of them, packed or not, on disk or behind a URL.

Every record of a file is given back, as a document or as what is wrong with it and where: nothing is lost in silence. That is
why these are not datatrove's readers, which log a broken line and go on.
"""

import codecs
import contextlib
import dataclasses
import gzip
import hashlib
import io
import os
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import fsspec

from lm_jax import regular_files
from lm_jax.data import lines, sources
from lm_jax.data.source_kinds import kind_of
from lm_jax.errors import UserError, needs

CHUNK = 1_000_000  # characters of the longest document; a longer one is cut, so that no stage holds more at once
HF_FILES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz")  # what is read of a data set's repository


@dataclasses.dataclass
class Document:
    """A text and where it came from; the attributes are those that datatrove's blocks read."""

    text: str
    id: str  # "file", "file:line" or "file#chunk"
    media: list = dataclasses.field(default_factory=list)
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)


class Bad(NamedTuple):
    """A record that is no text: where it is and what is wrong with it."""

    id: str
    reason: str


class File(NamedTuple):
    """An input file."""

    path: str  # or URL
    size: int  # bytes
    key: str  # changes with the content


class DamagedError(ValueError):
    """A compressed file that ends early or is not what its name says."""


DAMAGE = (DamagedError, EOFError, gzip.BadGzipFile, zlib.error)


def find(inputs: tuple[str, ...], log: Callable[[str], None] = lambda line: None) -> list[File]:
    """The files of inputs (files, folders, globs, URLs of fsspec, "hf:OWNER/NAME"), in order. Raises UserError."""
    found: dict[str, File] = {}
    hidden: list[str] = []
    for source in inputs:
        if source == "python":
            found[source] = File(
                source, 13_000_000, hashlib.sha256(repr(list(sources.documents("python"))).encode()).hexdigest()
            )
            continue
        url = f"hf://datasets/{source[3:]}" if source.startswith("hf:") and "//" not in source else source
        try:
            system, inside = fsspec.core.url_to_fs(url)
            paths = _below(system, inside, hidden)
            if url != source:
                paths = [path for path in paths if path.endswith(HF_FILES)]
            for path in paths:
                name = path if "file" in system.protocol else system.unstrip_protocol(path)
                found[name] = File(name, system.size(path), system.ukey(path))
        except (ImportError, ValueError) as error:  # a protocol whose package is not here, or that nobody knows
            raise UserError(f"{source}: {error}") from None
        except OSError as error:
            raise UserError(f"{error.filename or source} cannot be read: {error.strerror or error}") from None
        if not paths:
            raise UserError(
                f"{source}: no such file, folder or pattern" + f"; it has {len(hidden)} hidden ones" * bool(hidden)
            )
    if hidden:
        first = regular_files.shown(hidden[0])
        log(f"left out: {len(hidden):,} files and folders whose names begin with a dot, the first {first}")
    return [found[name] for name in sorted(found)]


def _below(system, path: str, hidden: list[str]) -> list[str]:
    """Files that a path, a folder or a pattern names. Raises OSError for a local path that is no regular file."""
    exists = os.path.lexists if "file" in system.protocol else system.exists
    matching = system.glob(path) if re.search(r"[*?\[]", path) and not exists(path) else [path]
    if "file" not in system.protocol:
        return [file for match in matching if exists(match) for file in sorted(system.find(match))]
    found = [file for match in matching if exists(match) for file in sources.names_below(match, hidden)]
    for file in found:
        regular_files.check(file)
    return found


class Zstandard(io.RawIOBase):
    """The content of a .zst file; raises DamagedError where it ends early (the package's own reader just stops)."""

    def __init__(self, file):
        try:
            import zstandard
        except ImportError:
            raise needs("a .zst file", "zstandard", "prep") from None
        self._file, self._package = file, zstandard
        self._frame, self._ready, self._fed = zstandard.ZstdDecompressor().decompressobj(), b"", False

    def readable(self) -> bool:
        """Always True."""
        return True

    def readinto(self, buffer) -> int:
        """Fills the buffer with decompressed bytes, 0 at the end. Raises DamagedError."""
        while not self._ready:
            rest = self._frame.unused_data if self._frame.eof else b""
            block = rest or self._file.read(1 << 12)  # of which a bomb makes 128 MiB, not more
            if not block:
                if self._fed and not self._frame.eof:
                    raise DamagedError("the file ends inside a frame")
                return 0
            if self._frame.eof:
                self._frame = self._package.ZstdDecompressor().decompressobj()
            self._fed = True
            try:
                self._ready = self._frame.decompress(block)
            except self._package.ZstdError as error:
                raise DamagedError(str(error)) from None
        num = min(len(buffer), len(self._ready))
        buffer[:num], self._ready = self._ready[:num], self._ready[num:]
        return num


@contextlib.contextmanager
def opened(path: str, progress: Callable[[int], None] = lambda num_bytes: None):
    """The bytes of a file, .gz and .zst decompressed (not of WARC, whose reader wants to).

    `progress` is called with the number of bytes that were read of the file.
    """
    with fsspec.open(path, "rb") if regular_files.is_url(path) else regular_files.opened(path) as raw:
        if kind_of(path) == "parquet":  # read by its own index
            yield raw
            return
        inner = _Heard(raw, progress)
        if path.lower().endswith(".gz") and kind_of(path) != "warc":
            # With a buffer around it, whole lines before a torn end would be lost.
            yield gzip.GzipFile(fileobj=io.BufferedReader(inner))
        elif path.lower().endswith(".zst"):
            yield io.BufferedReader(Zstandard(inner), 1 << 17)
        else:
            yield io.BufferedReader(inner, 1 << 17)


class _Heard(io.RawIOBase):
    def __init__(self, file, progress: Callable[[int], None]):
        self._file, self._progress, self._num = file, progress, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        block = self._file.read(len(buffer))
        buffer[: len(block)] = block
        self._num += len(block)
        self._progress(self._num)
        return len(block)


class Where:
    """The line that a reader is at; 0 where a file has no lines."""

    def __init__(self, path: str):
        self.path, self.name, self.line = path, regular_files.shown(path), 0

    def __str__(self) -> str:
        return f"{self.name}:{self.line}" if self.line else self.name


def records(
    path: str, text_key: str = "text", progress: Callable[[int], None] = lambda n: None
) -> Iterator[Document | Bad]:
    """Every record of a file, in order, none lost: a document of at most CHUNK characters, or what is wrong with it."""
    if path == "python":
        for name, content in sources.documents("python"):
            yield from _whole(f"python/{name}", content)
        return
    where = Where(path)
    own = {"parquet": _parquet, "html": _html, "warc": _warc, "text": _text}
    read = own.get(kind_of(path), _rows)
    try:
        with opened(path, progress) as file:
            for record in read(where, file, text_key):
                yield from _checked(record)
    except DAMAGE as error:
        yield Bad(str(where), f"the file is damaged or ends early ({error})")
    except (OSError, ImportError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def _checked(record: Document | Bad) -> Iterator[Document | Bad]:
    """The record in chunks, or what is wrong with its text."""
    if isinstance(record, Document) and (reason := lines.no_text(record.text)):
        record = Bad(record.id, reason)
    if isinstance(record, Bad) or len(record.text) <= CHUNK:
        yield record
        return
    number, rest = 0, record.text
    while rest:
        part = rest[: cut(rest)]
        yield Document(part, f"{record.id}#{number}", metadata={"chunk": number})
        number, rest = number + 1, rest[len(part) :]


def cut(text: str) -> int:
    """Where a text is cut to at most CHUNK characters: after a line, else after a space, else anywhere."""
    if len(text) <= CHUNK:
        return len(text)
    return text.rfind("\n", CHUNK // 2, CHUNK) + 1 or text.rfind(" ", CHUNK // 2, CHUNK) + 1 or CHUNK


def _whole(name: str, content: bytes) -> Iterator[Document | Bad]:
    text = sources.decode(content)
    yield from _checked(Bad(name, "not UTF-8") if text is None else Document(text, name))


def _text(where: Where, file, _: str) -> Iterator[Document | Bad]:
    """A text file is one document; a long one is read chunk by chunk."""
    decoder, waiting, line, number = codecs.getincrementaldecoder("utf-8-sig")(), "", 1, 0
    while True:
        block = file.read(CHUNK)
        try:
            waiting += decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            where.line = line + waiting.count("\n") + error.object[: error.start].count(b"\n")
            is_16 = not line - 1 and error.object.startswith(lines.UTF_16_MARKS)
            yield Bad(str(where), lines.UTF_16 if is_16 else "not UTF-8")
            return
        while len(waiting) > CHUNK:
            part = waiting[: cut(waiting)]
            yield Document(part, f"{where.name}#{number}", metadata={"chunk": number})
            line, number, waiting = line + part.count("\n"), number + 1, waiting[len(part) :]
        if not block:
            break
    name, facts = (f"{where.name}#{number}", {"chunk": number}) if number else (where.name, {})
    yield Document(waiting, name, metadata=facts)


def _rows(where: Where, file, text_key: str) -> Iterator[Document | Bad]:
    """JSON, CSV or TSV."""
    for row in lines.rows(file, kind_of(where.path)):
        where.line = row.number
        found = lines.text_of(row.content, text_key, "--text_key") if isinstance(row, lines.Row) else row
        yield Document(found, str(where)) if isinstance(found, str) else Bad(str(where), found.reason)


def _needs(package: str, what: str):
    try:
        return __import__(package, fromlist=["_"])
    except ImportError:
        raise needs(what, package.split(".")[0], "prep") from None


def _parquet(where: Where, file, text_key: str) -> Iterator[Document | Bad]:
    """Rows count as lines; one group of rows is in memory at a time."""
    parquet = _needs("pyarrow.parquet", "a Parquet file")
    from pyarrow import ArrowException

    try:
        table = parquet.ParquetFile(file)
        names = table.schema_arrow.names
        if wrong := lines.wrong_header(names):
            yield Bad(where.name, wrong)
            return
        if text_key not in names:
            yield Bad(where.name, f"no column {text_key!r} (--text_key; it has: {lines.listed(names)})")
            return
        for batch in table.iter_batches(256, columns=[text_key]):
            for value in batch.column(0).to_pylist():
                where.line += 1
                found = lines.text_of({text_key: value}, text_key, "--text_key")
                yield Document(found, str(where)) if isinstance(found, str) else Bad(str(where), found.reason)
    except (ArrowException, OSError, ValueError) as error:  # of a damaged file, and of text that is no UTF-8
        raise DamagedError(str(error).split("\n")[0][:100]) from None


def _html(where: Where, file, _: str) -> Iterator[Document | Bad]:
    content = file.read(lines.LONGEST + 1)
    if len(content) > lines.LONGEST:
        yield Bad(where.name, f"a page of more than {lines.LONGEST // 10**6} MB")
    else:
        yield Document(page_text(content), where.name)


def page_text(content: bytes) -> str:
    """The main text of a web page, "" where there is none.

    Called here and not through datatrove's block, which gives up after a second (of whichever machine) and forgets
    lines that it saw on the pages before: then a page's text would depend on more than the page.
    """
    trafilatura = _needs("trafilatura", "a web page")
    return trafilatura.extract(content, include_comments=False, favor_precision=True, deduplicate=False) or ""


def _warc(where: Where, file, _: str) -> Iterator[Document | Bad]:
    """Pages (responses of HTML) and WET texts (conversions); requests, images and the like are no documents."""
    archiveiterator = _needs("warcio.archiveiterator", "a WARC file")
    from warcio.exceptions import ArchiveLoadFailed

    try:
        for record in archiveiterator.ArchiveIterator(file):
            where.line += 1
            name = f"{where}:{record.rec_headers.get_header('WARC-Target-URI') or ''}"
            kind = (record.http_headers and record.http_headers.get_header("Content-Type")) or ""
            is_page = record.rec_type == "response" and "html" in kind
            if record.rec_type != "conversion" and not is_page:
                continue
            content = record.content_stream().read(lines.LONGEST + 1)
            if len(content) > lines.LONGEST:
                yield Bad(name, f"a page of more than {lines.LONGEST // 10**6} MB")
            elif is_page:
                yield Document(page_text(content), name)
            else:
                yield from _whole(name, content)
    except ArchiveLoadFailed as error:
        raise DamagedError(str(error).split("\n")[0][:100]) from None
