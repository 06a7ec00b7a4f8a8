"""Real processes that find each other without a variable of JAX's, and train; and devices that only their owner may ask."""

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import jax
import pytest
from helpers import LIMIT, ROOT, free_port, tiny
from metadata_server import of_worker
from on_tpu_vm import pretend

from lm_jax import distributed, run_plan, start, train
from lm_jax.config import flatten
from lm_jax.plan import counts

TRAIN = ["--config=experiments/quickstart.py:smoke", "--config.evaluate.prompt=", "--config.evaluate.every=0"]


@contextlib.contextmanager
def metadata(attributes: dict[str, str]) -> Iterator[str]:
    """The address of a metadata server in a process of its own."""
    line = [sys.executable, str(ROOT / "tests" / "metadata_server.py"), json.dumps(attributes)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield f"127.0.0.1:{server.stdout.readline().strip()}"
        server.kill()


def started(tmp_path, workers: list[dict[str, str]], *more: str, limit: str = str(LIMIT)) -> list[tuple[int, str]]:
    """(exit code, output) of a command on every worker of a pod, each with its own metadata server, cache and home."""
    pretended = pretend(tmp_path / "chips")
    shared = pretended | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1", "LM_JAX_JOIN_SECONDS": limit}
    unset = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "TPU_SKIP_MDS_QUERY")
    inherited = {name: value for name, value in os.environ.items() if name not in unset}
    port = str(free_port())
    line = [sys.executable, "-u", str(ROOT / "tests" / "on_tpu_vm.py"), "lm_jax.main", *TRAIN, *more]
    with contextlib.ExitStack() as stack:
        processes = []
        for k, worker in enumerate(workers):
            own = {
                "GCE_METADATA_IP": stack.enter_context(metadata(worker)),
                "JAX_COORDINATOR_PORT": port,  # tests of other processes may run beside this one
                "HOME": str(tmp_path / f"home-{k}"),
            }
            processes.append(
                subprocess.Popen(
                    line, env=inherited | shared | own, cwd=ROOT, text=True,
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                )
            )  # fmt: skip
        outputs = [process.communicate(timeout=LIMIT)[0] for process in processes]
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


HERE = "127.0.0.1"
PODS = {
    "slice of two": ([of_worker(k, [HERE] * 2) for k in range(2)], "2 processes on 1 host, 2 devices (Cloud TPU)"),
    "slice of four": ([of_worker(k, [HERE] * 4) for k in range(4)], "4 processes on 1 host, 4 devices (Cloud TPU)"),
    "two slices of two": (
        [of_worker(k % 2, [HERE] * 2, 2, k // 2, HERE) for k in range(4)],
        "4 processes on 1 host, 2 slices, 4 devices (Cloud TPU)",
    ),
    "two slices of one": (
        [of_worker(0, [HERE], 2, k, HERE) for k in range(2)],
        "2 processes on 1 host, 2 slices, 2 devices (Cloud TPU)",
    ),
}


def test_two_workers_of_a_slice_find_each_other(tmp_path):
    workers, words = PODS["slice of two"]
    found = started(tmp_path, workers, "--dry_run")
    assert [code for code, _ in found] == [0, 0], found
    assert words in found[0][1] and words not in found[1][1]  # the first speaks for all


@pytest.mark.proof
@pytest.mark.parametrize("pod", PODS)
def test_a_pod_trains_without_a_variable_of_jax(pod, tmp_path):
    workers, words = PODS[pod]
    found = started(tmp_path, workers, f"--workdir={tmp_path / 'run'}")
    assert [code for code, _ in found] == [0] * len(workers), found
    assert words in found[0][1] and "step      2 of 2" in found[0][1]
    assert (tmp_path / "run" / "checkpoints" / "2" / "MANIFEST.json").exists()


@pytest.mark.proof
@pytest.mark.parametrize("missing", range(3))
def test_the_worker_that_never_comes_is_named_on_all_others(missing, tmp_path):
    hosts = [HERE, "127.0.0.2", "127.0.0.3"]
    workers = [of_worker(k, hosts) for k in range(3) if k != missing]
    found = started(tmp_path, workers, "--dry_run", limit="20")
    assert [code for code, _ in found] == [70, 70], found
    for _, output in found:
        assert f"process {missing} ({hosts[missing]})" in output and "never came within 20 s" in output
        assert "Traceback" not in output


class Owned:
    """A device as a pod has it: whoever is not its owner may ask its kind and its numbers, and an error for the rest."""

    platform, device_kind, slice_index = "tpu", "TPU v5 lite", 0

    def __init__(self, process_index: int, memory: int):
        self.process_index, self.memory, self.id = process_index, memory, process_index

    def __getattr__(self, name: str):
        if self.process_index != jax.process_index():
            raise RuntimeError(f"{name} is not supported: this device belongs to another process")
        return {"memory_stats": lambda: {"bytes_limit": self.memory}}[name]


POSITIONS = {"first of two": 0, "second of two": 1, "last of four": 3}


@pytest.mark.parametrize("position", POSITIONS)
def test_planning_asks_only_devices_of_this_process(position, monkeypatch, tmp_path, capsys):
    """From `train.run` to the header, where every device belongs to somebody."""
    number = POSITIONS[position]
    owned = [Owned(process, 2**30 * (process + 1)) for process in range(4 if number > 1 else 2)]
    monkeypatch.setattr(jax, "process_index", lambda *_: number)
    monkeypatch.setattr(start, "devices", lambda: owned)
    monkeypatch.setattr(distributed, "is_main_process", lambda: True)
    monkeypatch.setattr(start, "is_main_process", lambda: True)
    monkeypatch.setattr(run_plan, "make_mesh", lambda mesh, here: pretended_mesh(here))
    asked = []
    monkeypatch.setattr(counts, "device_memory", watched(counts.device_memory, asked))
    config = tiny(train__microbatch_rows="auto", evaluate__prompt="", model__attention="chunked")
    assert train.run(config, "experiments/quickstart.py:smoke", str(tmp_path / "run"), {}, dry_run=True) == 0
    assert {device.process_index for device in asked} == {number}
    assert f"of {number + 1} GiB a device" in capsys.readouterr().out and flatten(config)


# One process by what they are: they time it, or compare it, on one device.
ALONE = {"benchmark/gpu.py", "benchmark/generate.py", "benchmark/save.py", "trust/killed_runs.py"}


def test_nobody_takes_the_first_of_all_devices():
    """Which is another process's on every host but the first."""
    first = re.compile(r"(?<!local_)devices\(\)\[|\bhere\[0\]\.(?!platform|device_kind)")
    paths = [*(ROOT / "lm_jax").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]
    named = {f"{path.parent.name}/{path.name}": path for path in paths}
    assert not [name for name, path in named.items() if name not in ALONE and first.search(path.read_text())]


def pretended_mesh(here: list[Owned]) -> SimpleNamespace:
    """What is asked of a mesh before anything is placed on it."""
    flat = SimpleNamespace(flat=here)
    return SimpleNamespace(devices=flat, size=len(here))


def watched(measure, asked: list):
    def measuring(device):
        asked.append(device)
        return measure(device)

    return measuring
