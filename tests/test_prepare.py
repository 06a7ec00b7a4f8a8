"""Preparing: every document is in the corpus or in the report, and the shards are the same however they were made."""

import gzip
import json
import os
import random
import sys

import numpy as np
import pytest
from helpers import tiny
from raw_text import files_of, raw_text, run, settings, story, texts_of, write

from lm_jax.data import lines, sources
from lm_jax.data.corpus import open_corpus
from lm_jax.errors import UserError
from lm_jax.prepare import readers
from lm_jax.prepare import run as prepare


@pytest.fixture
def raw(tmp_path):
    return raw_text(tmp_path)


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


def test_a_histogram_counts_every_document():
    lengths = prepare.Counter({1: 3, 4: 2})
    assert prepare.report.histogram(lengths) == [(1, 3), (2, 0), (4, 0), (8, 2)]
    assert np.sum([n for _, n in prepare.report.histogram(lengths)]) == 5
