"""What is read: damaged lines, giant documents, packed files, tables, pages, archives; nothing is lost in silence."""

import gzip
import io
import json
import os
import pathlib
import random

import pytest
from raw_text import run, settings, story, texts_of, write

from lm_jax.errors import UserError
from lm_jax.prepare import clean, overlap, readers
from lm_jax.prepare import run as prepare

MUTATIONS = [
    lambda data, pick: data[: pick.randrange(len(data) + 1)],
    lambda data, pick: _at(data, pick, lambda i: data[:i] + bytes([pick.randrange(256)]) + data[i + 1 :]),
    lambda data, pick: _at(data, pick, lambda i: data[:i] + pick.randbytes(9) + data[i:]),
    lambda data, pick: _at(data, pick, lambda i: data[:i] + data[i + pick.randrange(200) :]),
    lambda data, pick: _at(data, pick, lambda i: data[:i] + b"\n" * pick.randrange(3) + data[i:]),
    lambda data, pick: _at(data, pick, lambda i: data[:i] + b"\0" + data[i:]),
    lambda data, pick: data[pick.randrange(len(data)) :] + data,
]


def _at(data: bytes, pick: random.Random, make) -> bytes:
    return make(pick.randrange(len(data)))


def readable(line: bytes) -> str | None:
    """An independent reading of a line: its text, or None where it has none."""
    try:
        found = json.loads(line.decode("utf-8-sig"))
        found["text"].encode()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, IndexError):
        return None
    return None if "\0" in found["text"] else found["text"]


def fuzz(place: pathlib.Path, seed: int) -> None:
    pick = random.Random(seed)
    lines = [json.dumps({"text": story(number, 4)}).encode() for number in range(6)]
    data = b"\n".join(lines) + b"\n"
    for _ in range(pick.randrange(1, 4)):
        data = pick.choice(MUTATIONS)(data, pick) or b"x"
    (place / "x.jsonl").write_bytes(data)
    (place / "x.txt").write_bytes(pick.choice(MUTATIONS)(story(seed).encode(), pick))
    packed = pick.choice(MUTATIONS)(gzip.compress(b"\n".join(lines)), pick)
    (place / "y.jsonl.gz").write_bytes(packed)
    write(place / "good.jsonl", ["this one stays"])
    told = run(
        place,
        "x.jsonl",
        "x.txt",
        "y.jsonl.gz",
        "good.jsonl",
        on_bad_record="skip",
        validation_fraction=0.0,
        test_fraction=0.0,
    )
    found = texts_of(place / "out")
    wanted = [readable(line) for line in data.split(b"\n") if line.strip()]
    alive = {clean.normalise(text) for text in wanted if text is not None and text.strip()}
    assert alive | {"this one stays"} <= set(found), "a readable line was lost"
    reading = told["stages"][0]["dropped"]
    lost = sum(entry["documents"] for entry in reading.values())
    assert told["in"]["documents"] >= len(wanted) + 2 and lost >= sum(text is None for text in wanted)


@pytest.mark.parametrize("seed", range(20))
def test_no_mutant_loses_a_document_in_silence(tmp_path, seed):
    fuzz(tmp_path, seed)


@pytest.mark.proof
@pytest.mark.parametrize("seed", [*range(20, 50), *range(1000, 2000)])
def test_no_mutant_of_a_thousand_loses_a_document_in_silence(tmp_path, seed):
    fuzz(tmp_path, seed)


@pytest.mark.parametrize("size", [1, 999, 1000, 1001, 2500, 10_000])
def test_a_giant_document_is_taken_apart_and_no_character_is_lost(tmp_path, monkeypatch, size):
    monkeypatch.setattr(readers, "CHUNK", 1000)
    text = (story(size) * 20)[:size]
    (tmp_path / "x.txt").write_text(text)
    write(tmp_path / "x.jsonl", [text])
    for name in ("x.txt", "x.jsonl"):
        found = list(readers.records(str(tmp_path / name)))
        assert "".join(document.text for document in found) == text
        assert max(len(document.text) for document in found) <= 1000
        assert all(document.text.endswith("\n") for document in found[:-1] if "\n" in document.text[500:])


def test_overlap_with_an_evaluation_set_is_found_and_can_be_left_out(tmp_path):
    question = "Which of the ten engineers answered the letter that came with a table and a garden yesterday?"
    texts = [story(seed) for seed in range(20)]
    write(tmp_path / "x.jsonl", [*texts, f"Xylophones. {question.upper()} Zebras, too.", question[:30]])
    write(tmp_path / "eval.jsonl", [question, "short one", story(999)], key="question")
    told = run(tmp_path, "x.jsonl", decontaminate=(str(tmp_path / "eval.jsonl"),))
    counted = {"items": 3, "too_short": 1, "found": 1, "documents": 1}
    assert told["contamination"] == {str(tmp_path / "eval.jsonl"): counted}
    assert told["out"]["documents"] == 22
    cleaned = prepare.dataclasses.replace(
        settings(tmp_path, "x.jsonl", decontaminate=(str(tmp_path / "eval.jsonl"),), remove_contaminated=True),
        output=str(tmp_path / "cleaned"),
    )
    told = prepare.run(cleaned, lambda line: None)
    assert told["out"]["documents"] == 21 and not any("Zebras" in text for text in texts_of(cleaned.output))
    index, _ = overlap.evaluation_index((str(tmp_path / "eval.jsonl"),), "text")
    assert not any(set(clean.ngrams(text)) & index.keys() for text in texts_of(cleaned.output))


def test_places_are_files_folders_patterns_and_urls(tmp_path):
    import fsspec

    write(tmp_path / "a" / "x.jsonl", ["one"])
    write(tmp_path / "a" / "b" / "y.jsonl", ["two"])
    with fsspec.open("memory://bucket/z.jsonl", "wb") as file:
        file.write(b'{"text": "three"}\n')
    names = lambda *places: [os.path.basename(file.path) for file in readers.find(places)]
    assert names(str(tmp_path / "a")) == ["y.jsonl", "x.jsonl"]
    assert names(str(tmp_path / "a" / "*.jsonl")) == ["x.jsonl"]
    assert names(str(tmp_path / "a" / "**" / "*.jsonl"), str(tmp_path)) == ["y.jsonl", "x.jsonl"]
    assert names("memory://bucket/*.jsonl") == ["z.jsonl"]
    assert [r.text for r in readers.records(readers.find(("memory://bucket",))[0].path)] == ["three"]
    with pytest.raises(UserError, match="gopher://x"):
        readers.find(("gopher://x",))


def test_packed_files_and_tables_and_pages(tmp_path):
    zstandard, parquet = pytest.importorskip("zstandard"), pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("trafilatura")
    import pyarrow

    line = json.dumps({"text": story(1)}).encode() + b"\n"
    frames = zstandard.compress(line) + zstandard.compress(line * 3)
    (tmp_path / "x.jsonl.zst").write_bytes(frames)
    assert [r.text for r in readers.records(str(tmp_path / "x.jsonl.zst"))] == [story(1)] * 4
    for end in (len(frames) - 5, 10):
        (tmp_path / "x.jsonl.zst").write_bytes(frames[:end])
        *whole, torn = readers.records(str(tmp_path / "x.jsonl.zst"))
        assert isinstance(torn, readers.Bad) and [r.text for r in whole] == [story(1)] * (end > 10)
    parquet.write_table(pyarrow.table({"text": ["one", None, "three"], "n": [1, 2, 3]}), tmp_path / "x.parquet")
    found = list(readers.records(str(tmp_path / "x.parquet")))
    assert [r.id.rpartition(":")[2] for r in found] == ["1", "2", "3"] and found[
        1
    ].reason == "no string under 'text' (there stands null)"
    (tmp_path / "x.parquet").write_bytes((tmp_path / "x.parquet").read_bytes()[:100])
    assert "damaged" in list(readers.records(str(tmp_path / "x.parquet")))[0].reason
    paragraphs = "".join(f"<p>{story(n)}</p>" for n in range(3))
    page = f"<html><body><nav>Home About</nav><article>{paragraphs}</article><script>var x</script></body></html>"
    (tmp_path / "x.html").write_text(page)
    (text,) = [r.text for r in readers.records(str(tmp_path / "x.html"))]
    assert "var x" not in text and "the" in text and story(1).splitlines()[0] in text


def test_pages_of_an_archive(tmp_path):
    pytest.importorskip("trafilatura")
    warcwriter = pytest.importorskip("warcio.warcwriter")
    from warcio.statusandheaders import StatusAndHeaders

    path = tmp_path / "x.warc.gz"
    with open(path, "wb") as file:
        writer = warcwriter.WARCWriter(file, gzip=True)
        for number, kind in ((1, "text/html; charset=utf-8"), (2, "image/png")):
            body = f"<html><body><article><p>{story(number)}</p></article></body></html>".encode()
            headers = StatusAndHeaders("200 OK", [("Content-Type", kind)], protocol="HTTP/1.1")
            url = f"https://example.com/{number}"
            writer.write_record(writer.create_warc_record(url, "response", io.BytesIO(body), http_headers=headers))
    (found,) = readers.records(str(path))
    assert found.id.endswith("https://example.com/1") and story(1).splitlines()[0] in found.text
    path.write_bytes(path.read_bytes()[:-40])
    assert len(list(readers.records(str(path)))) >= 1
