"""A folder given as text is read as text or refused: nothing in it is taken for prose that is none, nothing is lost unsaid."""

import gzip
import os
import shlex
import socket

import pytest
from helpers import tiny

from lm_jax.data import source_kinds, sources
from lm_jax.data.corpus import open_corpus
from lm_jax.data.lines import KINDS
from lm_jax.errors import UserError
from lm_jax.prepare import run

TEXT = b"one line of text\nand another\n"
RECORD = b'{"text": "a record"}\n'
PACKED = gzip.compress(RECORD)
PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
PARQUET = b"PAR1\x15\x04\x15"
# Of a folder with a.txt: what else is in it, what is said of that, and the flags with which it is prepared
NOT_PROSE = {
    "x.jsonl": (RECORD, "x.jsonl is a table of records", ""),
    "x.ndjson": (b'{"body": "b", "id": "1"}\n', "x.ndjson is a table of records", "--text_key body"),
    "x.json": (b'[{"title": "t", "content": "long"}]', "x.json is a table of records", "--text_key content"),
    "x.csv": (b"id,review\n1,good film\n", "x.csv is a table of records", "--text_key review"),
    "X.CSV": (b"id,text\n1,good film\n", "X.CSV is a table of records", ""),
    "x.tsv": (b"text\tlabel\na\tb\n", "x.tsv is a table of records", ""),
    "x.parquet": (PARQUET, "x.parquet is a table of records", ""),
    "x.jsonl.gz": (PACKED, "x.jsonl.gz is packed", ""),
    "x.txt.gz": (gzip.compress(TEXT), "x.txt.gz is packed", ""),
    "x.csv.gz": (gzip.compress(b"id,long review\n1,good film\n"), "x.csv.gz is packed", "--text_key 'long review'"),
    "x.jsonl.zst": (b"\x28\xb5\x2f\xfd", "x.jsonl.zst is packed", ""),
    "x.html": (b"<p>a", "x.html is a web page", ""),
    "x.warc": (b"WARC/1.0", "x.warc is an archive of web pages", ""),
    "photo": (PNG, "photo is no text", "--on_bad_record skip"),
    "x.txt": (b"a\0b", "x.txt is no text", "--on_bad_record skip"),
    "late.txt": (b"a" * 100_000 + b"\0", "late.txt is no text", "--on_bad_record skip"),
    "deep/er/x.bin": (bytes(range(256)), "x.bin is no text", "--on_bad_record skip"),
    "train.jsonl": (RECORD, "records to finetune on instead: name their task", ""),
    "two words.jsonl": (RECORD, "two words.jsonl is a table of records", ""),
}


def write(folder, **contents) -> str:
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return str(folder)


def refused(place, *settings) -> str:
    with pytest.raises(UserError) as error:
        list(sources.documents(str(place), *settings))
    assert len(str(error.value).split("\n")) <= 5
    return str(error.value)


@pytest.mark.parametrize("name", NOT_PROSE)
def test_what_is_no_prose_is_refused_with_the_command_that_prepares_it(tmp_path, name):
    content, words, flags = NOT_PROSE[name]
    place = tmp_path / "my text"
    message = refused(write(place, **{"a.txt": TEXT, name: content}))
    assert words in message
    command = next(line for line in message.split("\n") if line.startswith("python"))
    expected = f"python tools/prepare_data.py --output 'corpora/my text' {flags} {shlex.quote(str(place))}"
    assert command == expected.replace("  ", " ") and "take --config.data.sources=" in message
    assert message == refused(write(place, **{"z/again.txt": TEXT}))


def test_the_command_makes_the_corpus_as_it_is_pasted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "mixed", **{"a.txt": TEXT, "b.jsonl": RECORD, "c.csv": b"text\nof a table\n", "d.png": PNG})
    message = refused("mixed", "bytes")
    assert "b.jsonl is a table of records, and 2 more of 4 files are none" in message
    words = shlex.split(next(line for line in message.split("\n") if line.startswith("python")))
    assert words[:4] == ["python", "tools/prepare_data.py", "--output", "corpora/mixed"]
    given = dict(zip(words[2:-1:2], words[3:-1:2], strict=True))
    assert given == {"--output": "corpora/mixed", "--tokenizer": "bytes", "--on_bad_record": "skip"}
    settings = {name[2:]: value for name, value in given.items()}
    none = {"validation_fraction": 0.0, "test_fraction": 0.0}
    told = run.run(run.Settings(sources=(words[-1],), workers=1, **none, **settings), lambda line: None)
    assert told["in"]["documents"] == 4 and told["out"]["documents"] == 3
    assert open_corpus(tiny(data__sources="corpora/mixed").data).splits["train"].num_documents == 3


def test_prose_of_any_name_is_read_and_the_rest_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("LM_JAX_CACHE", str(tmp_path / "cache"))
    place = write(
        tmp_path / "text",
        **{
            "a.txt": TEXT,
            "b.md": b"# b",
            "README": b"no ending",
            "c.py": b"print({})",
            "empty": b"",
            ".git/x.bin": PNG,
        },
        **{
            ".DS_Store": PNG,
            "latin.txt": "Grüße".encode("latin-1"),
            "d/e/deep.rst": b"deep",
            "ends.txt": "a\x1cb\x85\u2028".encode(),
        },
    )
    os.symlink(tmp_path / "text", tmp_path / "text" / "d" / "circle")
    os.symlink("../circle", tmp_path / "text" / "d" / "e" / "again")
    os.symlink("a.txt", tmp_path / "text" / "linked.txt")
    hidden: list[str] = []
    names = [os.path.relpath(name, place) for name, _ in sources.documents(place, "", hidden)]
    expected = ["README", "a.txt", "b.md", "c.py", "d/e/deep.rst", "empty", "ends.txt", "latin.txt", "linked.txt"]
    assert names == expected and sorted(os.path.relpath(name, place) for name in hidden) == [".DS_Store", ".git"]
    said: list[str] = []
    given = dict(data__tokenizer="bytes", data__validation_fraction=0.0, data__test_fraction=0.0)
    corpus = open_corpus(tiny(data__sources=place, **given).data, said.append)
    assert "6 documents" in said[0] and "1 empty, 1 duplicates, 1 not UTF-8, 2 hidden" in said[0]
    assert {"hidden, left out: " + os.path.join(place, ".git"), f"not UTF-8, left out: {place}/latin.txt"} <= set(said)
    assert corpus.manifest["left_out"]["hidden"] == hidden


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.txt", TEXT, "is a file: give the folder it stands in, or prepare it"),
        ("x.jsonl", RECORD, "x.jsonl is a table of records. Prepare it"),
        ("x.png", PNG, "holds no text"),
        ("utf16.txt", "a".encode("utf-16"), "iconv -f UTF-16 -t UTF-8"),
    ],
)
def test_a_single_file_is_no_source(tmp_path, name, content, words):
    write(tmp_path, **{name: content})
    message = refused(tmp_path / name)
    assert words in message and ("tools/prepare_data.py" in message) == (name in ("x.txt", "x.jsonl"))


def test_what_is_no_file_is_named(tmp_path):
    write(tmp_path, **{"a.txt": TEXT})
    os.mkfifo(tmp_path / "fifo")
    assert "fifo cannot be read: it is a FIFO, not a file" in refused(tmp_path)
    os.remove(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        assert "it is a socket, not a file" in refused(tmp_path)
    os.remove(tmp_path / "socket")
    os.symlink("nowhere", tmp_path / "broken")
    assert "broken cannot be read: No such file" in refused(tmp_path)
    os.remove(tmp_path / "broken")
    os.symlink("loop", tmp_path / "loop")
    assert "loop cannot be read: Too many levels" in refused(tmp_path)
    assert "it is a device, not a file" in refused("/dev/zero")
    write(tmp_path / "new\nline", **{"\x1b[31m.csv": b"a"})
    os.remove(tmp_path / "loop")
    assert "\x1b" not in refused(tmp_path)


def test_hidden_files_are_left_out_of_what_is_prepared_and_said(tmp_path):
    place = write(tmp_path / "raw", **{"a.txt": TEXT, ".DS_Store": PNG, ".cache/b.txt": TEXT})
    said: list[str] = []
    settings = run.Settings(sources=(place,), output=str(tmp_path / "out"), tokenizer="bytes", workers=1)
    settings = run.dataclasses.replace(settings, validation_fraction=0.0, test_fraction=0.0)
    assert run.run(settings, said.append)["in"]["documents"] == 1
    assert said[0].startswith("left out: 2 files and folders whose names begin with a dot, the first ")


def test_every_kind_of_table_has_rows():
    assert {kind for kind in source_kinds.KINDS.values() if kind in KINDS} == {*KINDS}
