"""Rows are a pure function of their index, every token is a target once an epoch, and no byte of text is lost."""

import multiprocessing
import os
import pathlib

import jax
import numpy as np
import pytest
from helpers import LIMIT, tiny

from lm_jax.config import Mesh
from lm_jax.data import loader, packing, shards, sources, tokenizer_files
from lm_jax.data.corpus import open_corpus
from lm_jax.errors import UserError
from lm_jax.mesh import make_mesh


@pytest.fixture
def stream(corpus):
    return loader.Stream(corpus.splits["train"], 64, seed=0)


def tiny_split(sizes) -> shards.Split:
    """Documents whose tokens say which they are: document d = d * 1000 + (0, 1, ...)."""
    tokens = np.concatenate([d * 1000 + np.arange(size) for d, size in enumerate(sizes)]).astype(np.uint16)
    return shards.Split(tokens, np.cumsum([0, *sizes]), num_bytes=len(tokens))


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_every_document_is_decoded_to_the_bytes_it_was_read_from(corpus):
    texts = {}
    for _, raw in sources.documents("python"):
        text = sources.decode(raw)
        if text:
            texts[sources.split_of(text, 0.02, 0.02)] = text
    seen = 0
    for split_name, split in corpus.splits.items():
        for start, end in zip(split.offsets[:-1], split.offsets[1:], strict=True):
            document = np.asarray(split.tokens[start:end])
            assert document[0] == corpus.tokenizer.document_id
            text = corpus.tokenizer.decode(document[1:])
            assert sources.split_of(text, 0.02, 0.02)[0] == split_name
            assert texts[sources.split_of(text, 0.02, 0.02)] == text
            seen += 1
    assert seen == len(texts) > 500


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\n\n",
        "\t\tx",
        "a  b   c",
        "▁▁ a▁b",
        "<|endoftext|>",
        "naïve 中文 🙂\u200b",
        "\r\n",
        "\x00\x01",
        "<0x41>",
        " \n \n",
    ],
)
def test_any_text_survives_the_tokenizer(corpus, text):
    assert corpus.tokenizer.decode(corpus.tokenizer.encode(text)) == text
    assert corpus.tokenizer.document_id not in corpus.tokenizer.encode(text)


def test_bytes_per_piece_add_up(corpus):
    text = "def f(x):\n    return 'né▁e' * x\n" * 3
    assert corpus.tokenizer.bytes_per_piece[corpus.tokenizer.encode(text)].sum() == len(text.encode())


def test_code_takes_few_tokens():
    corpus = open_corpus(tiny(data__tokenizer="sentencepiece:2048").data)
    count = corpus.manifest["counts"]["train"]
    assert count["bytes"] / count["tokens"] > 2.7


@pytest.mark.parametrize("sizes", [[5], [1, 1, 1], [7, 3, 20, 1, 9], [64, 64], [200, 1]])
def test_every_token_is_a_target_once_an_epoch(sizes):
    split = tiny_split(sizes)
    stream, length = loader.Stream(split, 8, seed=3), 8
    epochs = 8  # a whole number of rows
    num_rows = epochs * len(split.tokens) // length
    targets = np.concatenate([stream.row(i)["targets"] for i in range(num_rows)])
    tokens = np.concatenate([stream.row(i)["tokens"] for i in range(num_rows)])
    np.testing.assert_array_equal(tokens[1:], targets[:-1])
    found, counts = np.unique(tokens, return_counts=True)
    np.testing.assert_array_equal(found, np.sort(split.tokens))
    assert (counts == epochs).all()
    per_epoch = tokens.reshape(epochs, -1)
    for epoch in per_epoch:
        np.testing.assert_array_equal(np.sort(epoch), np.sort(split.tokens))
    if len(sizes) > 2:
        assert len({tuple(epoch) for epoch in per_epoch}) > 1, "every epoch has the same order"


def test_a_row_depends_on_nothing_but_its_index(stream, corpus):
    rows = {i: stream.row(i) for i in (70_000, 0, 7, 100_000, 6)}
    again = loader.Stream(corpus.splits["train"], 64, seed=0)
    assert all(equal(again.row(i), row) for i, row in sorted(rows.items()))
    assert not equal(loader.Stream(corpus.splits["train"], 64, seed=1).row(7), rows[7])


@pytest.mark.parametrize(
    ("devices", "mesh", "num_workers"),
    [(1, Mesh(), 0), (8, Mesh(), 0), (8, Mesh(2, 2, 2), 0), (4, Mesh(1, 1, 4), 0), (8, Mesh(2, 2, 2), 2)],
)
def test_batches_are_the_rows_whatever_the_mesh_and_workers(stream, devices, mesh, num_workers):
    built = make_mesh(mesh, jax.devices()[:devices])
    found = list(loader.batches(stream, built, first=24, num=3, size=8, num_workers=num_workers))
    assert len(found) == 3
    for j, batch in enumerate(found):
        assert batch["tokens"].sharding.mesh == built and batch["tokens"].shape == (8, 64)
        for i in range(8):
            assert equal({name: np.asarray(x)[i] for name, x in batch.items()}, stream.row(24 + 8 * j + i))


@pytest.mark.parametrize("indices", [[0], [5, 6, 7, 8], [3, 4, 9, 10, 11, 2], list(range(40, 80))])
def test_rows_taken_together_are_the_rows_made_one_by_one(indices):
    stream = loader.Stream(tiny_split([7, 3, 20, 1, 9, 1, 1, 30]), 8, seed=3)
    together = stream.rows(indices)
    for k, i in enumerate(indices):
        alone = packing.make_row(list(stream.chunks(8 * i, 8 * i + 9)), 8, i)
        assert equal({name: value[k] for name, value in together.items()}, alone)
        assert {name: value.dtype for name, value in together.items()} == {n: v.dtype for n, v in alone.items()}


def test_segments_and_positions_restart_at_documents(stream, corpus):
    for i in range(0, 2000, 97):
        row = stream.row(i)
        starts = np.flatnonzero(row["tokens"] == corpus.tokenizer.document_id)
        np.testing.assert_array_equal(np.flatnonzero(np.diff(row["segment_ids"])) + 1, starts[starts > 0])
        assert all(row["positions"][start] == 0 for start in starts)
        assert row["loss_mask"].all() and row["segment_ids"].min() == 1


@pytest.mark.parametrize("sizes", [[5], [8], [9], [3, 4, 1, 30], [16, 1]])
def test_held_rows_cover_every_token_once(sizes):
    split = tiny_split(sizes)
    held = loader.HeldOutRows(split, 8, document_id=9999)
    rows = [held.row(i) for i in range(held.num_rows)]
    kept = lambda name: np.concatenate([row[name][row["loss_mask"] > 0] for row in rows])
    np.testing.assert_array_equal(kept("tokens"), split.tokens)
    np.testing.assert_array_equal(kept("targets"), [*split.tokens[1:], 9999])
    assert all((row["segment_ids"][row["loss_mask"] == 0] == 0).all() for row in rows)


def test_equal_documents_never_stand_in_two_splits():
    shares = {split: 0 for split in sources.SPLITS}
    for i in range(4000):
        split, digest = sources.split_of(f"document {i}", 0.1, 0.2)
        assert (split, digest) == sources.split_of(f"document {i}", 0.1, 0.2)
        shares[split] += 1
    assert abs(shares["validation"] / 4000 - 0.1) < 0.02 and abs(shares["test"] / 4000 - 0.2) < 0.03
    assert sources.split_of("document 1", 0.0, 0.0)[0] == "train"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of real text with faults in it, and an empty cache."""
    monkeypatch.setenv("LM_JAX_CACHE", str(tmp_path / "cache"))
    place = tmp_path / "text"
    place.mkdir()
    library = pathlib.Path(os.__file__).parent
    for name in ("argparse.py", "ast.py", "bisect.py", "calendar.py", "copy.py", "csv.py"):
        (place / name).write_bytes((library / name).read_bytes())
    (place / "again.py").write_bytes((library / "copy.py").read_bytes())
    (place / "empty.py").write_text("")
    (place / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    (place / ".hidden").write_text("not text")
    (place / "windows.txt").write_bytes("\ufeffhello\r\nworld".encode())
    return place


def test_bad_input_is_left_out_and_said(folder):
    said = []
    data = tiny(
        data__sources=str(folder),
        data__tokenizer="sentencepiece:400",
        data__validation_fraction=0.0,
        data__test_fraction=0.0,
    ).data
    corpus = open_corpus(data, said.append)
    names = {"not_utf8": [str(folder / "latin.txt")], "hidden": [str(folder / ".hidden")]}
    assert corpus.manifest["left_out"] == {"empty": 1, "duplicates": 1} | names
    assert corpus.splits["train"].num_documents == 7
    assert "left out: 1 empty, 1 duplicates, 1 not UTF-8, 1 hidden" in said[0]
    assert "latin.txt" in said[1] and ".hidden" in said[2]
    texts = corpus.tokenizer.decode(corpus.splits["train"].tokens)
    assert "hello\r\nworld" in texts and "\ufeff" not in texts


def test_a_corpus_is_built_once_and_checked_when_read(folder):
    data = tiny(data__sources=str(folder), data__tokenizer="sentencepiece:400").data
    first = open_corpus(data)
    said = []
    assert open_corpus(data, said.append).manifest["files"] == first.manifest["files"] and not said
    tokens = pathlib.Path(first.folder) / "train-00000.tokens.npy"
    raw = bytearray(tokens.read_bytes())
    raw[-1] ^= 1
    tokens.write_bytes(raw)
    with pytest.raises(UserError, match=r"train-00000.tokens.npy is changed since it was built; remove"):
        open_corpus(data)
    (folder / "copy.py").write_text("something else")
    assert open_corpus(data).manifest["files"] != first.manifest["files"]


def build_and_say(data, queue):
    said = []
    queue.put((str(open_corpus(data, said.append).manifest["files"]), said))


def test_one_process_builds_and_the_others_wait(folder):
    data = tiny(data__sources=str(folder), data__tokenizer="sentencepiece:400").data
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=build_and_say, args=(data, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=LIMIT) for _ in processes]
    for process in processes:
        process.join()
    assert len({files for files, _ in results}) == 1
    assert sum(any("training a tokenizer" in line for line in said) for _, said in results) == 1


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("sentencepiece:20", "300 to"),
        ("sentencepiece:many", "300 to"),
        ("bpe:2048", "sentencepiece:PIECES"),
        ("nowhere/t.model", "no such file"),
        (__file__.replace(".py", ".model"), "no such file"),
    ],
)
def test_a_bad_tokenizer_is_refused(setting, words):
    with pytest.raises(UserError, match=words):
        open_corpus(tiny(data__tokenizer=setting).data)


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path):
    (tmp_path / "x.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        tokenizer_files.load(str(tmp_path / "x.model"))
