"""What stands under a name is whole: the old content or the new, whoever wrote it and wherever that was cut short."""

import errno
import functools
import json
import os
import threading
import types

import numpy as np
import pytest
from etils import epath
from helpers import made_up, write_shards

from lm_jax import compile_cache, files, metrics, regular_files
from lm_jax.data import best_fit, corpus_verification, shards
from lm_jax.prepare import run
from lm_jax.prepare.report import Tally


def known_hashes(folder, corpus) -> None:
    """What `corpus_verification.verify` keeps of the files that it has read."""
    if not (folder / "text").exists():
        write_shards(folder / "text", corpus, {"train": made_up(20), "validation": made_up(5, 5)}, 1000)
    corpus_verification.verify(str(folder / "text"), shards.read_manifest(str(folder / "text"), "mend"), "mend")


# Everything that puts a file in the place of another: {name: what writes it into a folder}.
WRITERS = {
    "any file": lambda folder, corpus: files.write_whole(folder / "x", b"content"),
    "one of several writers": lambda folder, corpus: files.write_whole(folder / "x", b"content", alone=False),
    "metrics": lambda folder, corpus: metrics.Writer(folder, 0).close(),
    "a program": lambda folder, corpus: compile_cache.CompileCache(str(folder)).put("a", b"program"),
    "a packing plan": lambda folder, corpus: best_fit.plan_rows(np.arange(1, 30), 32, keep=True),
    "known hashes": known_hashes,
    "a plan of preparation": lambda folder, corpus: run.write_json(str(folder / "plan.json"), {"a": 1}),
    "a report": lambda folder, corpus: Tally().save(str(folder / "report.json")),
    "a corpus": lambda folder, corpus: write_shards(folder / "made", corpus, {"train": made_up(9)}, 1000),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_could_not_be_put_in_place_leaves_nothing_behind(name, tmp_path, corpus, monkeypatch, capsys):
    monkeypatch.setenv("LM_JAX_CACHE", str(tmp_path / "cache"))
    if name == "known hashes":
        known_hashes(tmp_path, corpus)
    tried = []

    def refuse(draft, path):
        tried.append(path)
        assert os.path.getsize(draft) or name == "metrics"  # what it was is whole, and beside it
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(files.os, "replace", refuse)
    try:
        WRITERS[name](tmp_path, corpus)
    except OSError as error:
        assert error.errno == errno.ENOSPC
    else:
        assert "programs are not kept" in capsys.readouterr().err
    assert tried and not [path for path in tmp_path.rglob("*") if "draft" in path.name]


def test_a_file_that_several_write_at_once_is_one_of_theirs(tmp_path):
    contents = [bytes([k]) * 100_000 for k in range(8)]
    path = tmp_path / "x"

    def again(content: bytes) -> None:
        for _ in range(20):
            files.write_whole(path, content, alone=False)
            assert path.read_bytes() in contents

    threads = [threading.Thread(target=again, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in contents and [found.name for found in tmp_path.iterdir()] == ["x"]


class Broken(Exception):
    pass


@pytest.mark.parametrize("alone", [True, False])
def test_a_draft_that_is_not_finished_changes_nothing(tmp_path, alone):
    files.write_whole(tmp_path / "x", b"before")
    with pytest.raises(Broken), files.draft(tmp_path / "x", "w", alone) as file:
        file.write("half")
        raise Broken
    with pytest.raises(Broken), files.draft_folder(str(tmp_path / "made"), alone) as draft:
        os.mkdir(draft)
        raise Broken
    assert [path.name for path in tmp_path.iterdir()] == ["x"] and (tmp_path / "x").read_bytes() == b"before"
    with files.draft_folder(str(tmp_path / "made"), alone) as draft:
        os.mkdir(draft)
        assert not (tmp_path / "made").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "x"]


def test_a_lock_is_held_by_one_or_shared_by_those_that_share_it(tmp_path):
    def busy():
        raise Broken

    with files.locked(tmp_path / "lock"):
        for shared in (True, False):
            with pytest.raises(Broken), files.locked(tmp_path / "lock", busy, shared):
                pass
    with files.locked(tmp_path / "lock", busy, shared=True), files.locked(tmp_path / "lock", busy, shared=True):
        with pytest.raises(Broken), files.locked(tmp_path / "lock", busy):
            pass
    waited = []
    with files.locked(tmp_path / "lock"):
        thread = threading.Thread(target=lambda: waits(tmp_path / "lock", waited))
        thread.start()
        while waited != ["busy"]:
            assert thread.is_alive()
    thread.join()
    assert waited == ["busy", "held"]


def waits(path, said: list[str]) -> None:
    with files.locked(path, lambda: said.append("busy")):
        said.append("held")


def test_a_written_file_is_read_again(tmp_path):
    files.write_whole(tmp_path / "x", b"one")
    files.write_whole(str(tmp_path / "x"), json.dumps({"a": 1}).encode())
    assert json.loads((tmp_path / "x").read_bytes()) == {"a": 1}


@pytest.mark.parametrize(
    ("kind", "number", "is_damage"),
    [
        (FileNotFoundError, errno.ENOENT, True),
        (IsADirectoryError, errno.EISDIR, True),
        (NotADirectoryError, errno.ENOTDIR, True),
        (PermissionError, errno.EACCES, False),
        (OSError, None, False),
    ],
)
def test_what_a_bucket_refuses_without_a_number_has_one(kind, number, is_damage, monkeypatch):
    """gcsfs says FileNotFoundError("b/bucket/o/name"), without a number: a missing object was taken for the machine's refusal."""

    def refuse(path, mode):
        raise kind("b/bucket/o/name")

    monkeypatch.setattr(epath, "Path", lambda path: types.SimpleNamespace(open=functools.partial(refuse, path)))
    with pytest.raises(kind) as raised:
        regular_files.opened("gs://bucket/name")
    assert raised.value.errno == number and (number is None or raised.value.filename == "gs://bucket/name")
    if is_damage:
        assert files.invalid_reason("gs://bucket/name", {"bytes": 1, "md5": ""}) == "is missing"
    else:
        with pytest.raises(kind):
            files.invalid_reason("gs://bucket/name", {"bytes": 1, "md5": ""})
