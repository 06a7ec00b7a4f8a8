"""Shards: many read as one, written in bounded memory, and never read where they are not as they were written."""

import itertools
import json
import os
import pathlib
import pickle
import shutil
import types

import numpy as np
import pytest
from helpers import made_up, write_shards

from lm_jax import files
from lm_jax.data import corpus, corpus_verification, shard_writer, shards, tokenizer_files
from lm_jax.data.corpus import is_prepared
from lm_jax.errors import UserError


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LM_JAX_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("shard_tokens", [1, 50, 100, 10**6])
def test_many_shards_read_as_one(corpus, cache, tmp_path, shard_tokens):
    documents = made_up(40)
    found = shards.read(str(write_shards(tmp_path / "many", corpus, documents, shard_tokens)), "")
    split, whole = found.splits["train"], [i for ids in documents for i in (corpus.tokenizer.document_id, *ids)]
    assert found.manifest["counts"]["train"]["shards"] == (1 if shard_tokens == 10**6 else len(split.tokens.parts))
    np.testing.assert_array_equal(np.asarray(split.tokens), whole)
    for d, ids in enumerate(documents):
        found_ids = split.tokens[int(split.offsets[d]) : int(split.offsets[d + 1])]
        np.testing.assert_array_equal(found_ids, [corpus.tokenizer.document_id, *ids])
    for start in range(0, len(whole), 7):
        for size in (0, 1, 13, 300):
            np.testing.assert_array_equal(split.tokens[start : start + size], whole[start : start + size])
    sizes = [len(np.load(path)) for path in sorted((tmp_path / "many").glob("*.tokens.npy"))]
    assert all(size <= max(shard_tokens, 61) for size in sizes) and sum(sizes) == len(whole)


def test_a_document_may_come_in_parts(corpus, cache, tmp_path):
    writer = shard_writer.ShardWriter(str(tmp_path / "parts"), corpus.tokenizer, 10)
    writer.add("train", np.arange(2, 9), 7)
    writer.extend("train", np.arange(9, 40), 31)
    writer.add("train", np.arange(2, 5), 3)
    writer.close()
    split = shards.read(str(tmp_path / "parts"), "").splits["train"]
    assert split.num_documents == 2 and split.num_bytes == 41
    np.testing.assert_array_equal(split.tokens[1:39], np.arange(2, 40))


def test_a_worker_maps_the_files_anew(corpus, cache, tmp_path):
    split = shards.read(str(write_shards(tmp_path / "many", corpus, made_up(3000), 5000)), "").splits["train"]
    packed = pickle.dumps(split)
    assert len(packed) < 1000
    np.testing.assert_array_equal(np.asarray(pickle.loads(packed).tokens), np.asarray(split.tokens))


def test_an_unfinished_writer_leaves_no_corpus_and_the_next_one_starts_clean(corpus, cache, tmp_path):
    writer = shard_writer.ShardWriter(str(tmp_path / "x"), corpus.tokenizer, 50)
    for ids in made_up(40):
        writer.add("train", np.array(ids, np.int32), 1)
    assert not is_prepared(str(tmp_path / "x")) and len(list((tmp_path / "x").glob("*.npy"))) > 10
    write_shards(tmp_path / "x", corpus, made_up(2))
    assert len(list((tmp_path / "x").glob("*.npy"))) == 2 and is_prepared(str(tmp_path / "x"))


def changed(path: pathlib.Path, how: str) -> None:
    raw = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(raw[:-2])
    elif how == "longer":
        path.write_bytes(raw + b"\0\0")
    else:
        path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))


@pytest.mark.parametrize("how", ["missing", "truncated", "longer", "flipped"])
@pytest.mark.parametrize("name", ["train-00001.tokens.npy", "train-00000.offsets.npy", "tokenizer.model"])
def test_a_shard_that_is_not_as_written_is_refused_by_name(corpus, cache, tmp_path, name, how):
    folder = write_shards(tmp_path / "x", corpus, made_up(40), 500)
    shards.read(str(folder), "")  # now it is known by size and time
    changed(folder / name, how)
    with pytest.raises(UserError, match=f"{name} is (missing|changed since it was built).*; prepare it again"):
        shards.read(str(folder), "prepare it again")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"format": 2}', "cannot be read"),
        ("FORMAT", "has format 9"),
        ("FILES", "its files are not those of its counts"),
    ],
)
def test_a_broken_manifest_is_refused(corpus, cache, tmp_path, content, words):
    folder = write_shards(tmp_path / "x", corpus, made_up(4))
    manifest = json.loads((folder / "manifest.json").read_text())
    if content == "FORMAT":
        manifest["format"] = 9
    elif content == "FILES":
        del manifest["files"]["train-00000.tokens.npy"]
    del manifest["sha256"]
    (folder / "manifest.json").write_bytes(files.sealed(manifest) if content.isupper() else content.encode())
    with pytest.raises(UserError, match=words):
        shards.read(str(folder), "")


def test_large_files_are_known_by_size_and_time_and_one_is_hashed_in_turn(corpus, cache, tmp_path, monkeypatch):
    folder, hashed = write_shards(tmp_path / "x", corpus, made_up(4)), []
    real = corpus_verification.file_hash
    monkeypatch.setattr(
        corpus_verification, "file_hash", lambda path: hashed.append(os.path.basename(path)) or real(path)
    )
    names = sorted(json.loads((folder / "manifest.json").read_text())["files"])
    for _ in range(2):  # what is small, at every start
        shards.read(str(folder), "")
    assert sorted(hashed) == sorted(2 * names)
    monkeypatch.setattr(corpus_verification, "ALWAYS_HASHED", 0)
    monkeypatch.setattr(corpus_verification, "HASHED_IN_TURN", 1)
    hashed.clear()
    for _ in range(3):
        shards.read(str(folder), "")
    assert sorted(hashed) == names
    hashed.clear()
    os.utime(folder / names[2])
    shards.read(str(folder), "")
    assert sorted(hashed) == sorted({names[0], names[2]})
    hashed.clear()
    shutil.rmtree(tmp_path / "cache")
    shards.read(str(folder), "")
    assert sorted(hashed) == names


def test_tokenising_says_how_long_it_will_take(tmp_path, monkeypatch):
    """Five groups of documents, three seconds each: told after every one."""
    seconds = itertools.count(0, 3)
    monkeypatch.setattr(corpus, "time", types.SimpleNamespace(monotonic=lambda: next(seconds)))
    trained, told = tokenizer_files.load("bytes"), []
    texts = {"train": ["word"] * 4 * corpus.TOGETHER, "validation": ["word"] * corpus.TOGETHER}
    corpus.write_splits(str(tmp_path), texts, trained, 4 * 5 * corpus.TOGETHER, told.append).close()
    assert told == [f"tokenising: {20 * n}%, {15 - 3 * n} s left" for n in (1, 2, 3, 4, 5)]
