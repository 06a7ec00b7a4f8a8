"""A workdir and shards in a bucket: the same run, killed and gone on with, to the bit; one run a workdir.

The bucket is an emulator on localhost (`pip install gcp-storage-emulator`, extra `gcs`); without it the proof is skipped.
"""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from etils import epath
from helpers import ROOT, lines_of, made_up, write_shards

from lm_jax import remote
from lm_jax.data import shards
from lm_jax.data.corpus import publish


def test_the_mirror_of_a_local_run_is_its_workdir(tmp_path):
    mirror = remote.LocalMirror(epath.Path(tmp_path))
    mirror.fetch()
    mirror.send()
    assert mirror.folder == epath.Path(tmp_path) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("process", [0, 1, 3])
def test_of_several_processes_the_leading_one_sends(tmp_path, monkeypatch, process):
    """A mirror apart from its workdir, as that of a URL is."""
    monkeypatch.setattr(remote.jax, "process_index", lambda: process)
    mirror = remote.LocalMirror(epath.Path(tmp_path / "there"))
    mirror.folder = epath.Path(tmp_path / "mirror")
    for folder in (mirror.workdir, mirror.folder):
        folder.mkdir()
    (mirror.folder / "metrics.jsonl").write_text("a line")
    mirror.send()
    assert [path.name for path in mirror.workdir.iterdir()] == ["metrics.jsonl"] * (process == 0)


@pytest.mark.parametrize(
    ("holder", "over"),
    [
        ({"host": "elsewhere", "pid": 1, "until": 1000}, False),
        ({"host": "elsewhere", "pid": 1, "until": -1}, True),
        ({"host": remote.socket.gethostname(), "pid": 2**22 + 1, "until": 1000}, True),
        ({"host": remote.socket.gethostname(), "pid": os.getpid(), "until": 1000}, False),
        ("no object", True),
    ],
)
def test_a_lock_is_over_with_its_lease_or_its_process(holder, over):
    if isinstance(holder, dict):
        holder = holder | {"until": time.time() + holder["until"]}  # from now, not from when tests were collected
    assert remote._expired(json.dumps(holder).encode()) == over


STEPS = 12
TRAIN = [
    "--config=experiments/quickstart.py:smoke", f"--config.train.num_steps={STEPS}", "--config.checkpoint.every=3",
    "--config.evaluate.every=6", "--config.evaluate.prompt=",
]  # fmt: skip


def train(workdir, source, kill_after: int = 0) -> tuple[int, str]:
    """(exit code, output) of the command; SIGKILL once the output has the step `kill_after`."""
    line = [
        sys.executable,
        "-u",
        "-m",
        "lm_jax.main",
        *TRAIN,
        f"--workdir={workdir}",
        f"--config.data.sources={source}",
    ]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        line, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    said = []
    for text in process.stdout:
        said.append(text)
        if kill_after and text.startswith("step") and int(text.split()[1]) >= kill_after:
            process.send_signal(signal.SIGKILL)
            break
    process.stdout.close()
    return process.wait(), "".join(said)


@pytest.mark.proof
def test_a_run_in_a_bucket_is_killed_and_goes_on_to_the_bit(bucket, corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("LM_JAX_CACHE", str(tmp_path / "cache"))  # nothing was copied before
    documents = {"train": made_up(300), "validation": made_up(20, 5)}
    write_shards(tmp_path / "text", corpus, documents, 1000)
    publish(str(tmp_path / "text"), f"{bucket}/text")
    code, said = train(tmp_path / "local", tmp_path / "text")
    assert code == 0, said
    run, source = f"{bucket}/runs/x", f"{bucket}/text"
    code, said = train(run, source, kill_after=8)
    assert code == -signal.SIGKILL and "copying gs://" in said, said
    code, said = train(run, source)
    assert code == 0 and "resumed at step" in said, said
    assert lines_of(run) == lines_of(tmp_path / "local")
    for step in ("9", "12"):
        manifest = lambda place, step=step: json.loads(
            (epath.Path(f"{place}/checkpoints/{step}/MANIFEST.json")).read_text()
        )
        here, there = manifest(tmp_path / "local"), manifest(run)
        assert here["data"] == there["data"]
    assert any((epath.Path(run) / "tensorboard").iterdir()) and "resumed" in (epath.Path(run) / "log.txt").read_text()
    result = subprocess.run(
        [sys.executable, "-m", "lm_jax.evaluate", "--model", run], capture_output=True, text=True, cwd=ROOT
    )
    last = [line for line in lines_of(run) if "final/loss" in line][-1]
    found = json.loads(result.stdout.strip().split("\n")[-1])
    np.testing.assert_allclose(found["eval/loss"], last["final/loss"], rtol=1e-6)


@pytest.mark.proof
def test_one_run_a_bucket(bucket, monkeypatch):
    monkeypatch.setattr(remote, "LEASE", 2.0)
    workdir = epath.Path(f"{bucket}/runs/locked")
    said = []
    with remote.leased(workdir, said.append):
        with pytest.raises(shards.UserError, match="another run is at work"), remote.leased(workdir, said.append):
            pass
    with remote.leased(workdir, said.append):
        assert "locked by a run that may be dead" in said[0]
    (workdir / "lock" / "7").write_text(json.dumps({"host": "elsewhere", "pid": 1, "until": time.time() - 1}))
    with remote.leased(workdir, said.append):
        assert [path.name for path in (workdir / "lock").iterdir()] == ["8"]
    assert not list((workdir / "lock").glob("*"))
