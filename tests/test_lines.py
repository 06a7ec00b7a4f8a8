"""A line of a table is read as its maker wrote it, and what is none is named with its number: JSON, CSV, TSV."""

import io

import pytest

from lm_jax.data import lines
from lm_jax.errors import UserError
from lm_jax.prepare import readers
from lm_jax.tasks import tables

HALVES = (r'{"a": "\ud83d"}', r'{"a": {"b": ["c", {"d": "\udc00 e"}]}}', r'{"a": [{"role": "\ud83d", "content": "x"}]}')
ODD = "\u2028\u2029\v\f\x85\x1c\x1d\x1e"  # which str.splitlines takes for the end of a line
# (kind, content, cells of each row by its line)
READ = {
    "tsv has no quotes": ("tsv", '"a\tx\n"b\ty\n', {2: ['"a', "x"], 3: ['"b', "y"]}),
    "tsv keeps quotes": ("tsv", '"a ""b"""\tx', {2: ['"a ""b"""', "x"]}),
    "tsv ends lines at newlines": ("tsv", f"a{ODD}\tx{ODD}\r\nc\ty", {2: [f"a{ODD}", f"x{ODD}"], 3: ["c", "y"]}),
    "csv ends lines at newlines": ("csv", f"a{ODD}b,x\n", {2: [f"a{ODD}b", "x"]}),
    "a newline in quotes": ("csv", '"a\nb\r\nc",x\nd,y\n', {2: ["a\nb\r\nc", "x"], 5: ["d", "y"]}),
    "doubled quotes": ("csv", '"a ""b"", ""c""","x"\n"""","y"', {2: ['a "b", "c"', "x"], 3: ['"', "y"]}),
    "a quote inside is a quote": ("csv", '5" disk,x\n', {2: ['5" disk', "x"]}),
    "empty cells": ("csv", '"",x\n,\n', {2: ["", "x"], 3: ["", ""]}),
    "crlf": ("csv", 'a,x\r\n\r\n"b","y"\r\n', {2: ["a", "x"], 4: ["b", "y"]}),
    "a carriage return inside": ("csv", "a\rb,x\n", {2: ["a\rb", "x"]}),
    "a long cell": ("csv", f'"{"a," * 500_000}",x\n', {2: ["a," * 500_000, "x"]}),
    "a long cell of a tsv": ("tsv", f"{'a' * 1_000_000}\tx\n", {2: ["a" * 1_000_000, "x"]}),
    "spaces stay": ("csv", " a , x \n", {2: [" a ", " x "]}),
    "json ends lines at newlines": ("jsonl", f'{{"text": "a{ODD[:2]}\x85", "label": "x"}}', {1: [f"a{ODD[:2]}\x85", "x"]}),
    "a whole pair": ("jsonl", r'{"text": "\ud83d\ude00", "label": "\\ud83d"}', {1: ["\U0001f600", r"\ud83d"]}),
    "a list in a .json": ("json", '[{"text": "a", "label": "x"},\n{"text": "b", "label": "y"}]', {1: ["a", "x"], 2: ["b", "y"]}),
    "lines in a .json": ("json", '{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}', {1: ["a", "x"], 2: ["b", "y"]}),
    "an object in a .json": ("json", '\n{\n"text": "a",\n"label": "x"}', {1: ["a", "x"]}),
}  # fmt: skip
# (kind, content with its header, line, what is said)
WRONG = [
    ("csv", 'text,label\n"a" b,x\n', 2, "(' b,x'; a quote in a quoted cell is written twice: \"\")"),
    ("csv", 'text,label\na,x\n"b,y\nc,z\n', 3, "the quote that opens here never closes"),
    ("csv", 'text,label\na,x\nb,"y', 3, "the quote that opens here never closes"),
    ("csv", "text,label\nb\n", 2, "1 cells, the header names 2: text, label"),
    ("csv", "text,label\na,b,c\n", 2, "3 cells, the header names 2: text, label"),
    ("csv", "text,label,text\na,b,c\n", 1, "a column stands twice in the header ('text'"),
    ("tsv", "a\tlabel\ta\nx\ty\tz\n", 1, "a column stands twice in the header ('a'"),
    ("csv", ",text,\na,b,c\n", 1, "a column stands twice in the header (''"),
    ("csv", "text;label\na;b\n", 1, "a .csv has commas between its cells, here are semicolons"),
    ("csv", "text\tlabel\na\tb\n", 1, "here are tabs; a table with tabs is named .tsv"),
    ("tsv", "text,label\na,b\n", 1, "a .tsv has tabs between its cells, here are commas"),
    ("tsv", 'text\tlabel\n"a\nb"\tx\n', 2, "a .tsv has no quotes: cells with a tab or a line end need .csv or .jsonl"),
    ("csv", "text,label\ra,b\r", 1, "its lines end in \\r alone"),
    ("csv", b'text,label\na,x\n"b\n\xff",y\n', 4, "not UTF-8"),
    ("tsv", b"text\tlabel\n\xe9\tx\n", 2, "not UTF-8"),
    ("csv", "text,label\na,b\n".encode("utf-16"), 1, "not UTF-8 (but UTF-16, which iconv"),
    ("jsonl", '{"text": "a"}'.encode("utf-16"), 1, "not UTF-8 (but UTF-16, which iconv"),
    ("jsonl", '{"text": "a", "label": "x", "text": "b"}', 1, "a name stands twice in one object ('text')"),
    ("jsonl", '{"a": {"b": 1, "b": 2}}', 1, "a name stands twice in one object ('b')"),
    ("jsonl", "\n[1, 2]\n", 2, "no JSON object (a list of 2;"),
    ("jsonl", '"text"', 1, "no JSON object ('text';"),
    ("jsonl", "[" * 100_000, 1, "no JSON object (nested too deep;"),
    ("jsonl", '{"a": ' + "9" * 5_000 + "}", 1, "no JSON object (Exceeds the limit"),
    ("jsonl", '{"a": "b"', 1, "no JSON object (Expecting ',' delimiter, column 10;"),
    ("jsonl", b'{"a": "\xff"}', 1, "not UTF-8 (byte 8)"),
    ("json", '[{"a": 1},\n3]', 2, "no JSON object (the number 3)"),
    ("json", '[{"a": 1},\n', 1, "no JSON object (Expecting value, line 2, column 1)"),
]


def read(kind: str, content) -> list:
    return list(lines.rows(io.BytesIO(content if isinstance(content, bytes) else content.encode()), kind))


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["", "BOM"])
@pytest.mark.parametrize("name", READ)
def test_a_row_is_what_its_maker_wrote(name, mark):
    kind, content, expected = READ[name]
    header = {"csv": "text,label\n", "tsv": "text\tlabel\n"}.get(kind, "")
    found = read(kind, mark + header + content)
    assert {row.number: list(row.content.values()) for row in found} == expected
    assert all(list(row.content) == ["text", "label"] for row in found)


@pytest.mark.parametrize(("kind", "content", "number", "reason"), WRONG, ids=[f"{w[0]} {w[3][:40]}" for w in WRONG])
def test_what_is_no_row_is_named_with_its_line(kind, content, number, reason):
    wrong = [row for row in read(kind, content) if isinstance(row, lines.Wrong)]
    assert wrong[0].number == number and reason in wrong[0].reason


def test_after_a_wrong_row_the_next_are_read():
    found = read("csv", 'text,label\n"a" b,x\nc,y\nd\ne,"z\nz"\n')
    assert [row.number for row in found] == [2, 3, 4, 5] and found[-1].content == {"text": "e", "label": "z\nz"}


@pytest.mark.parametrize("line", [*HALVES, r'{"\ud83d": 1}', r'{"a": "\u0000"}'])
def test_what_is_no_character_is_an_error_with_its_line(tmp_path, line):
    path = tmp_path / "train.jsonl"
    path.write_text('{"a": "b"}\n\n' + line + "\n")
    with pytest.raises(UserError, match=r"train.jsonl line 3: holds (half a surrogate pair|a NUL)"):
        list(tables.rows(tables.epath.Path(path), ()))


def test_a_row_has_an_end(monkeypatch):
    monkeypatch.setattr(lines, "LONGEST", 1000)
    found = read("csv", 'text\n"a\n' + "b\n" * 600 + "c\n")
    assert isinstance(found[0], lines.Wrong) and found[0].number == 2 and "does not close (for" in found[0].reason
    found = read("jsonl", '{"a": "' + "b" * 2000 + '"}\n{"a": "c"}\n')
    assert [type(row) for row in found] == [lines.Wrong, lines.Row] and found[1].number == 2


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
@pytest.mark.parametrize(("kind", "mark"), [("csv", ","), ("tsv", "\t")])
def test_tables_are_prepared_by_their_text_column(tmp_path, kind, mark, packing):
    content = mark.join(["id", "body"]) + "\n" + "".join(f"{k}{mark}text {k}\n" for k in range(3)) + f"3{mark}\n4\n"
    path = tmp_path / f"x.{kind}{packing}"
    if packing == ".zst":
        packed = pytest.importorskip("zstandard").compress(content.encode())
    else:
        packed = readers.gzip.compress(content.encode()) if packing else content.encode()
    path.write_bytes(packed)
    *texts, empty, bad = readers.records(str(path), "body")
    assert [text.text for text in texts] == ["text 0", "text 1", "text 2"] and empty.text == ""
    assert bad.id == f"{path}:6" and "1 cells, the header names 2: id, body" in bad.reason
    wrong = next(readers.records(str(path)))
    assert wrong.reason == "no string under 'text' (it has id, body; --text_key body takes a string)"
