"""Preparing: every document is in the corpus or in the report, and the shards are the same however they were made."""

import contextlib
import gzip
import io
import json
import os
import pathlib
import random
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import LIMIT, ROOT, free_port, tiny

from lm_jax.data import lines, sources
from lm_jax.data.corpus import open_corpus
from lm_jax.errors import UserError
from lm_jax.prepare import clean, executors, overlap, readers
from lm_jax.prepare import run as prepare

WORDS = """the of to and with that have be a in for over under before after letter proof table engine garden bridge number
method picture record wrote read mended measured compared answered counted sorted drew slowly early often never once green
small heavy quiet river station window paper morning winter friend teacher sailor doctor question story reason answer""".split()


def story(seed: int, sentences: int = 12) -> str:
    """Text that filters for English take for prose, different for each seed."""
    pick = random.Random(seed)
    lines = [[" ".join(pick.choices(WORDS, k=14)).capitalize() + "." for _ in range(2)] for _ in range(sentences // 2)]
    return "\n".join(map(" ".join, lines))


def write(path: pathlib.Path, texts, key="text") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({key: text}, ensure_ascii=False) + "\n" for text in texts))


def settings(place: pathlib.Path, *names: str, **changes) -> prepare.Settings:
    given = {"tokenizer": "bytes", "workers": 1, "validation_fraction": 0.1, "test_fraction": 0.1} | changes
    return prepare.Settings(sources=tuple(str(place / name) for name in names), output=str(place / "out"), **given)


def run(*arguments, **changes):
    return prepare.run(settings(*arguments, **changes), lambda line: None)


def texts_of(folder) -> list[str]:
    """All documents of a corpus, in order."""
    corpus = open_corpus(tiny(data__sources=((str(folder), 1.0),)).data)
    found = []
    for name in sources.SPLITS:
        split = corpus.splits[name]
        for start, end in zip(split.offsets[:-1], split.offsets[1:], strict=True):
            assert split.tokens[start : start + 1][0] == corpus.tokenizer.document_id
            found.append(corpus.tokenizer.decode(split.tokens[start + 1 : end]))
    return found


def files_of(folder) -> dict[str, bytes]:
    made = {"report.json", "report.html"}  # which say how long it took
    return {path.name: path.read_bytes() for path in pathlib.Path(folder).iterdir() if path.name not in made}


@pytest.fixture
def raw(tmp_path):
    texts = [story(seed) for seed in range(120)] + ["价格是￥１２８．００；真的吗？", "a\ttab  and two spaces\n"]
    write(tmp_path / "raw" / "one.jsonl", texts[:60])
    write(tmp_path / "raw" / "deep" / "two.jsonl", [*texts[60:], texts[3], texts[70], "", " \n"])
    (tmp_path / "raw" / "three.txt").write_bytes("\ufeffonce\r\nmore\n".encode())
    return tmp_path, [*texts, "once\nmore\n"]


def test_every_document_is_in_the_corpus_or_in_the_report(raw):
    place, texts = raw
    told = run(place, "raw")
    assert sorted(texts_of(place / "out")) == sorted(texts)
    assert told["in"]["documents"] == len(texts) + 4
    dropped = {reason: entry for stage in told["stages"] for reason, entry in stage["dropped"].items()}
    assert {reason: entry["documents"] for reason, entry in dropped.items()} == {"empty": 2, "the same text": 2}
    assert dropped["empty"]["examples"][0][0].endswith("two.jsonl:65")
    assert told["out"]["bytes"] == sum(len(text.encode()) for text in texts)
    assert told["out"]["tokens"] == told["out"]["bytes"] + len(texts)
    assert sum(number for _, number in told["lengths"]) == len(texts)
    page = (place / "out" / "report.html").read_text()
    assert "<svg" in page and "two.jsonl:65" in page
    assert not (place / "out.work").exists()


def test_splits_are_those_of_the_content(raw):
    place, _ = raw
    run(place, "raw")
    corpus = open_corpus(tiny(data__sources=((str(place / "out"), 1.0),)).data)
    for name, split in corpus.splits.items():
        for start, end in zip(split.offsets[:-1], split.offsets[1:], strict=True):
            assert sources.split_of(corpus.tokenizer.decode(split.tokens[start + 1 : end]), 0.1, 0.1)[0] == name
    assert all(split.num_documents for split in corpus.splits.values())


def test_the_shards_do_not_depend_on_tasks_or_on_how_text_lies_in_files(raw, monkeypatch):
    place, texts = raw
    run(place, "raw", tokenizer="unigram:420")
    first = files_of(place / "out")
    monkeypatch.setattr(prepare, "TASK_BYTES", 3000)
    monkeypatch.setattr(prepare, "BUCKET_BYTES", 3000)
    plan = prepare.make_plan(settings(place, "raw"))
    assert len(plan.tasks) == 3 and plan.buckets > 10
    prepare.run(prepare.dataclasses.replace(settings(place, "raw", tokenizer="unigram:420"), output=str(place / "b")))
    assert files_of(place / "b") == first
    write(place / "raw" / "one.jsonl", [])
    write(place / "raw" / "deep" / "two.jsonl", [*texts[3:7], *reversed(texts)])
    prepare.run(prepare.dataclasses.replace(settings(place, "raw", tokenizer="unigram:420"), output=str(place / "c")))
    different = {name for name, content in files_of(place / "c").items() if first[name] != content}
    assert different == {"manifest.json"}  # which counts what was left out


class Killed(BaseException):
    pass


@pytest.mark.parametrize("when", range(0, 40, 3))
def test_killed_anywhere_it_goes_on_to_the_same_shards(raw, monkeypatch, when):
    place, _ = raw
    monkeypatch.setattr(prepare, "TASK_BYTES", 6000)
    monkeypatch.setattr(prepare, "BUCKET_BYTES", 6000)
    run(place, "raw")
    first = files_of(place / "out")
    again = prepare.dataclasses.replace(settings(place, "raw"), output=str(place / "again"))
    replace, count = os.replace, iter(range(1000))

    def dies(*arguments):
        if next(count) == when:
            raise Killed
        replace(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dies)
        with pytest.raises(Killed):
            prepare.run(again, lambda line: None)
    said = []
    prepare.run(again, said.append)
    assert files_of(place / "again") == first
    assert when == 0 or "going on with" in said[0]


def test_a_prepared_corpus_is_not_prepared_again_nor_written_over(raw):
    place, _ = raw
    run(place, "raw")
    said = []
    prepare.run(settings(place, "raw"), said.append)
    assert said == [f"{place}/out is prepared already"]
    with pytest.raises(UserError, match="holds a corpus of other text or settings"):
        run(place, "raw", normalise="none")


def test_what_is_not_a_corpus_is_not_written_over(raw):
    place, _ = raw
    (place / "out").mkdir()
    (place / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is not empty, and no corpus of ours"):
        run(place, "raw")
    assert (place / "out" / "thesis.tex").read_text() == "years of work"
    (place / "out" / "thesis.tex").unlink()
    assert run(place, "raw")["out"]["documents"]


def test_changed_text_starts_over(raw, monkeypatch):
    place, _ = raw
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "finish", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            run(place, "raw")
    write(place / "raw" / "one.jsonl", ["changed"])
    said = []
    prepare.run(settings(place, "raw"), said.append)
    assert "starting over" in said[0] and "changed" in texts_of(place / "out")


BAD = [
    ("x.jsonl", b'{"text": "good"}\n{"text": "\xff"}\n', "x.jsonl:2", "not UTF-8"),
    ("x.jsonl", b'{"text": "good"}\n{"text": "ha', "x.jsonl:2", "no JSON object"),
    ("x.jsonl", b'{"text": "good"}\n\n[1, 2]\n', "x.jsonl:3", "no JSON object (a list of 2;"),
    (
        "x.jsonl",
        b'{"text": "good"}\n{"body": "b"}\n',
        "x.jsonl:2",
        "no string under 'text' (it has body; --text_key body takes a string)",
    ),
    ("x.jsonl", b'{"text": "good"}\n{"text": 3}\n', "x.jsonl:2", "no string under 'text' (there stands the number 3)"),
    ("x.jsonl", b'{"text": "good"}\n{"text": "\\u0000"}\n', "x.jsonl:2", "NUL"),
    ("x.jsonl", b'{"text": "good"}\n{"text": "\\ud800"}\n', "x.jsonl:2", "surrogate"),
    ("x.jsonl", b'{"text": "good"}\n' + b"[" * 100_000 + b"\n", "x.jsonl:2", "no JSON object"),
    ("x.jsonl", b'{"text": "good"}\n{"n": ' + b"9" * 10_000 + b"}\n", "x.jsonl:2", "no JSON object"),
    ("x.jsonl", b'{"text": "good"}\n{"text": "' + b"x" * 2_000_000 + b'"}\n', "x.jsonl:2", "a line of more than 1 MB"),
    (
        "x.jsonl.gz",
        gzip.compress(b'{"text": "good"}\n' + random.Random(0).randbytes(999).hex().encode())[:-200],
        "x.jsonl.gz:1",
        "damaged or ends early",
    ),
    ("x.jsonl.gz", b'{"text": "good"}\n', "x.jsonl.gz", "damaged or ends early"),
    ("x.txt", b"one\ntwo\n\xff\xfe\n", "x.txt:3", "not UTF-8"),
    ("x.txt", "utf-16".encode("utf-16"), "x.txt:1", "not UTF-8"),
    ("x.txt", b"a\0b", "x.txt", "NUL"),
]


@pytest.mark.parametrize(("name", "content", "place", "reason"), BAD, ids=[f"{n}-{r[:12]}" for n, _, _, r in BAD])
def test_a_bad_record_stops_by_its_place_or_is_counted(tmp_path, monkeypatch, name, content, place, reason):
    monkeypatch.setattr(lines, "LONGEST", 1_000_000)
    (tmp_path / name).write_bytes(content)
    write(tmp_path / "good.jsonl", [story(seed) for seed in range(30)])
    with pytest.raises(UserError) as error:
        run(tmp_path, name, "good.jsonl")
    assert str(tmp_path / place) in str(error.value) and reason in str(error.value)
    assert "--on_bad_record skip" in str(error.value)
    told = run(tmp_path, name, "good.jsonl", on_bad_record="skip")
    assert sum(entry["documents"] for entry in told["stages"][0]["dropped"].values()) == 1
    good = place.endswith(".gz:1") or (name == "x.jsonl" and b"good" in content)
    assert told["out"]["documents"] == told["in"]["documents"] - 1 == 30 + good


def test_a_byte_order_mark_and_a_long_line_are_no_mistakes(tmp_path):
    long = "x" * 10_000_000
    (tmp_path / "x.jsonl").write_bytes("\ufeff".encode() + json.dumps({"text": story(1)}).encode() + b"\r\n")
    write(tmp_path / "y.jsonl", [long])
    told = run(tmp_path, "x.jsonl", "y.jsonl", validation_fraction=0.0, test_fraction=0.0)
    assert told["in"]["pieces"] == 10 and told["out"]["bytes"] == len(story(1)) + readers.CHUNK
    assert told["stages"][1]["dropped"]["the same text"]["documents"] == 9


@pytest.mark.parametrize(
    ("names", "words"),
    [(["nothing"], "no such file"), (["empty.jsonl"], "no training document"), (["e"], "no such file")],
)
def test_nothing_to_prepare_is_said(tmp_path, names, words):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "e").mkdir()
    with pytest.raises(UserError, match=words):
        run(tmp_path, *names)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"filters": ("goffer",)}, "choose from gopher, c4, fineweb"),
        ({"duplicates": "fuzzy"}, "choose from exact, minhash"),
        ({"executor": "dask"}, "choose from local, ray, slurm"),
        ({"test_fraction": 0.95}, "less than a tenth"),
        ({"remove_contaminated": True}, "needs --decontaminate"),
        ({"tokenizer": "gpt2"}, "expected"),
    ],
)
def test_a_wrong_setting_is_refused_by_its_flag(raw, changes, words):
    with pytest.raises(UserError, match=words):
        run(raw[0], "raw", **changes)
    assert not (raw[0] / "out.work").exists()


@pytest.mark.parametrize(
    "changes", [{"filters": ("c4",)}, {"scrub": True}, {"duplicates": "minhash"}, {"executor": "ray"}], ids=str
)
def test_without_the_extra_its_flags_are_refused_with_the_mend(raw, monkeypatch, changes):
    for module in [name for name in sys.modules if name.startswith("datatrove.")] + ["datatrove"]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[prep\]'"):
        run(raw[0], "raw", **changes)
    assert run(raw[0], "raw", workers=0)["out"]["documents"]


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


@pytest.mark.parametrize("seed", range(50))
def test_no_mutant_loses_a_document_in_silence(tmp_path, seed):
    fuzz(tmp_path, seed)


@pytest.mark.proof
@pytest.mark.parametrize("seed", range(1000, 2000))
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


needs_datatrove = pytest.mark.skipif(not executors.has_datatrove(), reason="pip install -e '.[prep]'")
PERSONAL = [
    "jane.doe+news@mail.example.net", "ROOT@sub.domain.co.uk", "203.0.113.77", "10.1.2.3", "8.8.8.8",
    "2001:db8:85a3::8a2e:370:7334", "fe80::1ff:fe23:4567:890a", "+1 415-555-2671", "(020) 7946 0958", "415-555-2671",
    "+442079460958",
]  # fmt: skip


@needs_datatrove
def test_planted_personal_data_does_not_survive(tmp_path):
    texts = [f"{story(n, 2)} Write to {secret}, or call. It is {secret}." for n, secret in enumerate(PERSONAL)]
    innocent = "Version 3.11.7 of 2026-11-24, at 12:30:45, cost 1,234.50; see a::b, std::vector and 127 others."
    write(tmp_path / "x.jsonl", [*texts, innocent])
    run(tmp_path, "x.jsonl", scrub=True)
    found = texts_of(tmp_path / "out")
    assert len(found) == len(texts) + 1 and innocent in found
    assert not [secret for secret in PERSONAL if any(secret in text for text in found)]
    assert any(clean.EMAIL in text for text in found) and any(clean.ADDRESS in text for text in found)


@needs_datatrove
def test_of_near_duplicates_one_stays(tmp_path):
    texts = [story(seed, 30) for seed in range(25)]
    nearly = [text + " The end." for text in texts[:5]]
    write(tmp_path / "x.jsonl", [*texts, *nearly])
    told = run(tmp_path, "x.jsonl", duplicates="minhash")
    found = texts_of(tmp_path / "out")
    assert told["out"]["documents"] == len(found) == 25
    assert told["near_duplicates"]["clusters"] == 5 and told["near_duplicates"]["documents"] == 10
    assert told["stages"][2]["dropped"]["near-duplicate"]["documents"] == 5
    for text, other in zip(texts, nearly, strict=False):
        assert (text in found) + (other in found) == 1
    assert all(text in found for text in texts[5:])


@needs_datatrove
def test_filters_leave_prose_and_name_the_rule_that_drops(tmp_path):
    good = [story(seed, 30) for seed in range(10)]
    bad = [
        "buy now " * 200,
        "lorem ipsum dolor sit amet, and so on and on.\n" * 9,
        "- a\n- b\n" * 50,
        "x",
        "{" + good[0],
    ]
    write(tmp_path / "x.jsonl", [*good, *bad])
    told = run(tmp_path, "x.jsonl", filters=("gopher", "c4", "fineweb"))
    dropped = {reason for reason in told["stages"][0]["dropped"]}
    assert told["out"]["documents"] == 10 and told["in"]["documents"] == 15
    assert any(reason.startswith("gopher: ") for reason in dropped) and "c4: curly_bracket" in dropped
    assert sorted(texts_of(tmp_path / "out")) == sorted(good)


@needs_datatrove
@pytest.mark.parametrize(
    "text", ["", " ", "。", "\u200b", "!!!", "a", "- ", "\n\n\n", "…" * 40, "中文" * 99, "\x1b[0m"]
)
def test_no_text_upsets_a_block(text):
    dropped = []
    writer = type(
        "Writer",
        (),
        {"__enter__": lambda s: s, "__exit__": lambda s, *_: None, "write": lambda s, d, r: dropped.append(d)},
    )
    blocks = clean.filters(clean.FILTERS, lambda rule: writer()) + clean.scrubbers()
    data = iter([readers.Document(text + "x", "name")])
    for block in blocks:
        data = block(data, 0, 1)
    assert len(list(data)) + len(dropped) == 1


EVERYTHING = {"filters": ("gopher", "c4", "fineweb"), "scrub": True, "duplicates": "minhash"}


@needs_datatrove
@pytest.mark.proof
@pytest.mark.parametrize("executor", ["ray", "local"])
def test_every_executor_makes_the_same_shards(raw, monkeypatch, executor):
    """A real Ray on this machine. Its processes import lm_jax anew, so it is the plan that carries the sizes of tasks."""
    if executor == "ray":
        pytest.importorskip("ray")
    place, _ = raw
    monkeypatch.setattr(prepare, "TASK_BYTES", 30_000)
    monkeypatch.setattr(prepare, "BUCKET_BYTES", 30_000)
    run(place, "raw", **EVERYTHING)
    other = settings(place, "raw", executor=executor, **EVERYTHING | {"workers": 2})
    told = prepare.run(prepare.dataclasses.replace(other, output=str(place / executor)), lambda line: None)
    assert files_of(place / executor) == files_of(place / "out") and told["out"]["documents"] > 50


@needs_datatrove
@pytest.mark.proof
@pytest.mark.parametrize("executor", ["ray", "local"])
def test_a_mistake_comes_back_from_every_executor(raw, executor):
    place, _ = raw
    (place / "raw" / "one.jsonl").write_text('{"text": "good"}\n{"text": "half')
    with pytest.raises(UserError, match="one.jsonl:2: not JSON"):
        run(place, "raw", executor=executor, workers=2, scrub=True)


@pytest.mark.proof
def test_a_corpus_is_prepared_from_a_bucket_to_a_bucket(raw):
    """An emulator of a bucket on this machine, as in test_places."""
    emulator = os.path.join(os.path.dirname(sys.executable), "gcp-storage-emulator")
    if not os.path.exists(emulator):
        pytest.skip("needs gcp-storage-emulator and gcsfs")
    place, _ = raw
    url = f"http://127.0.0.1:{free_port()}"
    line = [
        emulator,
        "start",
        "--host=127.0.0.1",
        f"--port={url.rpartition(':')[2]}",
        "--in-memory",
        "--default-bucket=b",
    ]
    seen = {
        "STORAGE_EMULATOR_HOST": url,
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        "LM_JAX_CACHE": str(place / "cache"),
    }
    script = (
        "import pathlib, sys; from etils import epath; from lm_jax.prepare import run as prepare\n"
        "from_, to = sys.argv[1:]\n"
        "for path in pathlib.Path(from_).glob('**/*.jsonl'):\n"
        "    epath.Path(f'gs://b/raw/{path.name}').write_text(path.read_text())\n"
        "given = dict(sources=('gs://b/raw/*.jsonl',), output='gs://b/out', tokenizer='bytes', workers=1)\n"
        "told = [prepare.run(prepare.Settings(**given), print) for _ in range(2)]\n"
        "for path in epath.Path('gs://b/out').iterdir(): (epath.Path(to) / path.name).write_bytes(path.read_bytes())\n"
    )
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        time.sleep(3)
        (place / "copy").mkdir()
        line = [sys.executable, "-c", script, str(place / "raw"), str(place / "copy")]
        result = subprocess.run(line, env=os.environ | seen | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert "gs://b/out is prepared already" in result.stdout
    finally:
        process.terminate()
        process.wait()
    (place / "raw" / "three.txt").unlink()
    run(place, "raw", validation_fraction=0.02, test_fraction=0.02)
    found, wanted = files_of(place / "copy"), files_of(place / "out")
    assert {name for name in wanted if found[name] != wanted[name]} == {"manifest.json"}  # which names the source


@needs_datatrove
@pytest.mark.proof
def test_killed_as_a_real_command_it_goes_on_and_leaves_no_orphan(raw):
    place, _ = raw
    write(place / "raw" / "more.jsonl", [story(seed, 30) for seed in range(1000, 3000)])
    run(place, "raw", scrub=True, duplicates="minhash", validation_fraction=0.02, test_fraction=0.02)
    arguments = ["--tokenizer=bytes", "--scrub", "--duplicates=minhash", "--workers=2"]
    line = [sys.executable, "tools/prepare_data.py", "--output", str(place / "b"), str(place / "raw"), *arguments]
    pick = random.Random(0)
    for _ in range(5):
        process = subprocess.Popen(
            line, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(pick.uniform(3, 12))
        process.kill()
        process.wait()
    subprocess.run(line, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, timeout=LIMIT)
    assert files_of(place / "b") == files_of(place / "out")
    time.sleep(2)
    names = [path.read_bytes() for path in pathlib.Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not [name for name in names if str(place / "b").encode() in name]


SBATCH = """#!/bin/sh
# A queue of one machine: runs the tasks of an array one after another, as Slurm would start them.
for last; do :; done
case $(grep -c launch_pickled $last) in 0) echo Submitted batch job 2; exit;; esac
n=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' $last)
export SLURM_NODELIST=here SLURM_JOB_ID=1
for i in $(seq 0 $n); do SLURM_ARRAY_TASK_ID=$i bash $last > $last.log 2>&1 || cp $last.log "$LOGS"; done
echo Submitted batch job 1
"""


@needs_datatrove
@pytest.mark.proof
def test_slurm_jobs_make_the_same_shards(raw, tmp_path, monkeypatch):
    """Slurm itself is not here: `sbatch`, `srun` and `scontrol` are stand-ins, what they run is real."""
    place, _ = raw
    (tmp_path / "bin").mkdir()
    for name, script in (
        ("sbatch", SBATCH),
        ("srun", '#!/bin/sh\nwhile [ "$1" != launch_pickled_pipeline ]; do shift; done\nexec "$@"\n'),
        ("scontrol", "#!/bin/sh\necho here\n"),
    ):
        (tmp_path / "bin" / name).write_text(script)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("LOGS", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(pathlib.Path(__file__).parent.parent))
    run(place, "raw", scrub=True)
    other = settings(place, "raw", scrub=True, executor="slurm", slurm_partition="any")
    prepare.run(prepare.dataclasses.replace(other, output=str(place / "slurm")), lambda line: None)
    assert files_of(place / "slurm") == files_of(place / "out")


def test_a_histogram_counts_every_document():
    lengths = prepare.Counter({1: 3, 4: 2})
    assert prepare.report.histogram(lengths) == [(1, 3), (2, 0), (4, 0), (8, 2)]
    assert np.sum([n for _, n in prepare.report.histogram(lengths)]) == 5
