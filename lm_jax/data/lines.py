r"""Lines of records as their makers wrote them: JSON, CSV and TSV -> rows, and what is wrong with a line.

A line ends at "\n" or "\r\n" and at no other character. CSV has quotes (RFC 4180: a quoted cell may hold commas, line ends and
doubled quotes), TSV has none (a cell holds no tab and no line end). A cell may have any length up to LONGEST. Nothing is
lost: what is no row is a `Wrong`.
"""

import codecs
import itertools
import json
import re
import shlex
from collections.abc import Iterable, Iterator
from typing import IO, Any, NamedTuple

LONGEST = 64_000_000  # bytes of a row
QUOTED = re.compile(r'(?:[^"]|"")*+')  # up to the quote that closes
HALF = re.compile("[\ud800-\udfff]")  # of a surrogate pair: no character, and nothing can be done with it
UTF_16 = "not UTF-8 (but UTF-16, which iconv -f UTF-16 -t UTF-8 IT > ANOTHER turns into it)"
UTF_16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
EXAMPLE = '{"text": ..., "label": ...}'
TOO_LONG = "a line of more than {} MB (give so long a text as a text file)"
KINDS = ("jsonl", "json", "csv", "tsv")
SEPARATORS = {"csv": ",", "tsv": "\t"}


class Row(NamedTuple):
    """A record: the values of its columns by their names."""

    number: int  # of its first line, from 1
    content: dict[str, Any]


class Wrong(NamedTuple):
    """A line that is no record, and why."""

    number: int
    reason: str  # before " (" the same for all of its kind


def rows(file: IO[bytes], kind: str) -> Iterator[Row | Wrong]:
    """Every row of a file of one of KINDS, in order; lines without anything are none."""
    if kind == "json":
        yield from _document(file)
    elif kind == "jsonl":
        for line in _lines(file):
            if isinstance(line, Wrong) or line[1].strip():
                yield line if isinstance(line, Wrong) else json_row(*line)
    else:
        read = csv if kind == "csv" else tsv
        yield from _named(read(_texts(_lines(file))), SEPARATORS[kind])


def _document(file: IO[bytes]) -> Iterator[Row | Wrong]:
    """The rows of a .json: JSON lines, or one list of objects, or one object; a row's number is then its position in the list."""
    head = file.readline(LONGEST + 1).removeprefix(codecs.BOM_UTF8)
    while head.isspace():
        head = file.readline(LONGEST + 1)
    head = head.lstrip()
    if not head.startswith((b"[", b"{")) or isinstance(json_row(1, head), Row):
        for number, line in enumerate(
            itertools.chain([head] * bool(head), iter(lambda: file.readline(LONGEST + 1), b"")), 1
        ):
            if line.strip():
                yield json_row(number, line)
        return
    content = head + file.read(LONGEST + 1 - min(len(head), LONGEST))
    if len(content) > LONGEST:
        yield Wrong(0, f"JSON of more than {LONGEST // 10**6} MB in one piece (write a record a line, as .jsonl)")
        return
    found, problem = parsed(content)
    for number, record in enumerate(found if isinstance(found, list) else [found], 1):
        row = Row(number, record) if isinstance(record, dict) else None
        yield row or Wrong(number, f"no JSON object ({problem or described(record)})")


def _lines(file: IO[bytes]) -> Iterator[tuple[int, bytes] | Wrong]:
    r"""(number, bytes without "\n") of each line; the first without a byte-order mark."""
    number = 0
    while line := file.readline(LONGEST + 1):
        number += 1
        if number == 1:
            if line.startswith(UTF_16_MARKS):
                yield Wrong(1, UTF_16)
                return
            line = line.removeprefix(codecs.BOM_UTF8)
        if len(line) > LONGEST:
            yield Wrong(number, TOO_LONG.format(LONGEST // 10**6))
            while line and not line.endswith(b"\n"):  # where that is wanted, the next lines are read
                line = file.readline(1 << 20)
            continue
        yield number, line.removesuffix(b"\n")


def _texts(lines: Iterator[tuple[int, bytes] | Wrong]) -> Iterator[tuple[int, str] | Wrong]:
    """Lines of a table. Bytes that are no UTF-8 become halves of pairs, which `_named` finds: a quote may be open here."""
    for line in lines:
        yield line if isinstance(line, Wrong) else (line[0], line[1].decode(errors="surrogateescape"))


def json_row(number: int, line: bytes) -> Row | Wrong:
    """The object of a line."""
    if len(line) > LONGEST:
        return Wrong(number, TOO_LONG.format(LONGEST // 10**6))
    content, problem = parsed(line)
    if isinstance(content, dict):
        return Row(number, content)
    if problem.startswith(("not UTF-8", "a name")):
        return Wrong(number, problem)
    return Wrong(number, f"no JSON object ({problem or described(content)}; a record is {EXAMPLE}, one a line)")


def parsed(content: bytes) -> tuple[Any, str]:
    """What JSON says, and what is wrong with it. A name that stands twice in an object is an error, as in a header."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise _RepeatedNameError(repeated(name for name, _ in pairs))
        return found

    try:
        return json.loads(content.decode(), object_pairs_hook=once), ""
    except UnicodeDecodeError as error:
        return None, f"not UTF-8 (byte {error.start + 1})"
    except RecursionError:
        return None, "nested too deep"
    except _RepeatedNameError as error:
        return None, f"a name stands twice in one object ({error.args[0]!r})"
    except json.JSONDecodeError as error:
        return None, f"{error.msg}, " + f"line {error.lineno}, " * (error.lineno > 1) + f"column {error.colno}"
    except ValueError as error:  # a number of too many digits
        return None, str(error).split(";")[0]


def repeated(names: Iterable[str]) -> str | None:
    """The first name that stands twice."""
    earlier: set[str] = set()
    return next((name for name in names if name in earlier or earlier.add(name)), None)  # type: ignore[func-returns-value]


class _RepeatedNameError(Exception):
    """A name that stands twice."""


def strings(content: Any, names: bool = False) -> Iterator[str]:
    """All strings inside, in order; the names of objects too where these are wanted."""
    waiting = [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            yield from value if names else ()
            waiting += reversed(value.values())
        elif isinstance(value, list):
            waiting += reversed(value)


def no_text(content: Any) -> str:
    """What stands in one of the strings inside and is no text, "" where all are."""
    for text in strings(content, names=True):
        if "\0" in text:
            return "holds a NUL character (a binary file?)"
        if HALF.search(text):
            return f"holds half a surrogate pair, which is no character ({text[:40]!r})"
    return ""


class Cells(NamedTuple):
    """The cells of one row of a table, before they have names."""

    number: int  # of the first line
    values: list[str]
    hint: str = ""  # what may be the cause where these are too many or too few


def tsv(lines: Iterator[tuple[int, str] | Wrong]) -> Iterator[Cells | Wrong]:
    """The cells of each line of a TSV; an empty line has none."""
    for line in lines:
        if isinstance(line, Wrong):
            yield line
        elif text := line[1].removesuffix("\r"):
            hint = "; a .tsv has no quotes: cells with a tab or a line end need .csv or .jsonl" if '"' in text else ""
            yield Cells(line[0], text.split("\t"), hint)


def csv(lines: Iterator[tuple[int, str] | Wrong]) -> Iterator[Cells | Wrong]:
    """The cells of each row of a CSV, which may go over several lines."""
    waiting = _Csv()
    for line in lines:
        if isinstance(line, Wrong):
            yield from waiting.torn()
            yield line
        elif found := waiting.take(*line):
            yield found
    yield from waiting.torn()


class _Csv:
    """The cells of the row that is being read, which goes on in the next line while a quote is open."""

    def __init__(self) -> None:
        self.first, self.size = 0, 0
        self.values: list[str] = []
        self.quoted: list[str] | None = None  # parts of the cell whose quote is open, which it is since line `opened`
        self.opened = 0

    def take(self, number: int, line: str) -> Cells | Wrong | None:
        """The row that ends with this line, or what is wrong with it; None where none does."""
        if self.quoted is None:
            self.first, self.values, self.size = number, [], 0
            if not line.removesuffix("\r"):
                return None
        at, self.size = 0, self.size + len(line) + 1
        while True:
            if self.quoted is None:
                if line.startswith('"', at):
                    self.quoted, self.opened, at = [], number, at + 1
                    continue
                end = line.find(",", at)
                self.values.append(line[at:end] if end >= 0 else line[at:].removesuffix("\r"))
            else:
                close = QUOTED.match(line, at).end()  # type: ignore[union-attr]
                self.quoted.append(line[at:close])
                if close == len(line):
                    return self._goes_on(number)
                self.values.append("".join(self.quoted).replace('""', '"'))
                self.quoted, end = None, close + 1
                if line[end:] in ("", "\r"):
                    end = -1
                elif line[end] != ",":
                    after = f'{line[end : end + 20]!r}; a quote in a quoted cell is written twice: ""'
                    return Wrong(number, f"no comma after a closing quote ({after})")
            if end < 0:
                return Cells(self.first, self.values)
            at = end + 1

    def _goes_on(self, number: int) -> Wrong | None:
        assert self.quoted is not None
        self.quoted.append("\n")
        if self.size <= LONGEST:
            return None
        self.quoted = None
        return Wrong(self.opened, f"the quote that opens here does not close (for {number - self.opened:,} lines)")

    def torn(self) -> Iterator[Wrong]:
        """The quote that is still open where the lines end, or where one of them is none."""
        if self.quoted is not None:
            self.quoted = None
            yield Wrong(self.opened, "the quote that opens here never closes")


def _named(found: Iterator[Cells | Wrong], separator: str) -> Iterator[Row | Wrong]:
    """Cells under the names of the first row, the header."""
    names: list[str] = []
    for cells in found:
        if not isinstance(cells, Wrong) and (half := HALF.search(text := ",".join(cells.values))):
            cells = Wrong(cells.number + text.count("\n", 0, half.start()), "not UTF-8")
        if isinstance(cells, Wrong):
            yield cells
            if not names:  # without a header nothing that follows has a name
                return
        elif not names:
            names = cells.values
            if wrong := wrong_header(names, separator):
                yield Wrong(cells.number, wrong)
                return
        elif len(cells.values) != len(names):
            num = len(cells.values)
            counts = f"{num} cells, the header names {len(names)}: {listed(names)}"
            yield Wrong(cells.number, f"other cells than its header ({counts}{cells.hint})")
        else:
            yield Row(cells.number, dict(zip(names, cells.values, strict=True)))


def wrong_header(names: list[str], separator: str = "") -> str:
    """What is wrong with the names of a table's columns, "" where nothing is."""
    twice = repeated(names)
    if twice is not None:
        return f"a column stands twice in the header ({twice!r}: give each a name of its own)"
    if any(re.search("\r(?!\n)", name) for name in names):
        return r"its lines end in \r alone (tr '\r' '\n' < it > another makes them lines)"
    others = [other for other in (";", "\t", ",", "|") if len(names) == 1 and other != separator and other in names[0]]
    if separator and others:
        words = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
        kind = next(kind for kind, known in SEPARATORS.items() if known == separator)
        other = max(others, key=names[0].count)
        rename = "; a table with tabs is named .tsv" if other == "\t" else ""
        return (
            f"a .{kind} has {words[separator]} between its cells, here are {words[other]}{rename} ({names[0][:60]!r})"
        )
    return ""


def listed(names) -> str:
    """The first few names of columns."""
    names = list(names)
    return ", ".join(name[:40] for name in names[:8]) + ", ..." * (len(names) > 8)


def text_of(content: dict[str, Any], key: str, flag: str) -> str | Wrong:
    """The string under a key of a row, or what is there instead and which value of `flag` would find one."""
    value = content.get(key)
    if isinstance(value, str):
        return value
    take = f"; {flag} {shlex.quote(other)} takes a string" if (other := longest(content)) else ""
    there = f"there stands {described(value)}" if key in content else f"it has {listed(content) or 'nothing'}"
    return Wrong(0, f"no string under {key!r} ({there}{take})")


def longest(content: dict[str, Any]) -> str:
    """The name of the longest string of a row, "" where it has none."""
    sizes = {name: len(value) for name, value in content.items() if isinstance(value, str) and value.strip()}
    return max(sizes, key=lambda name: sizes[name], default="")


def described(value: Any) -> str:
    """What a value is, in words for a message that names what was expected instead."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"{str(value).lower()} (no string)"
    if isinstance(value, (int, float)):
        return f"the number {value!r:.40}"
    if isinstance(value, str):
        return repr(value[:40]) + "..." * (len(value) > 40) if value.strip() else "empty"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return f"an object with {listed(value) or 'nothing'}"
    return f"a {type(value).__name__}"
