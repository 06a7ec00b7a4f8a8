"""Eight fake CPU devices, one compile cache and one corpus for all test processes."""

import fcntl
import gc
import importlib
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator

os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # of `-m device`: cuda, or tpu
os.environ.setdefault("LM_JAX_CACHE", str(pathlib.Path(__file__).parent.parent / ".pytest_cache" / "lm_jax"))

import jax  # noqa: E402
import pytest  # noqa: E402
from helpers import ROOT, STARTS, tiny  # noqa: E402
from one_process import PRESET  # noqa: E402

from lm_jax import distributed, main  # noqa: E402
from lm_jax.data import shards  # noqa: E402
from lm_jax.data.corpus import open_corpus  # noqa: E402

distributed.configure()
gc.set_threshold(
    50_000, 10, 10
)  # tracing makes many objects and few cycles: 19.2 s for a step's first call become 18.0
sys.path.append(str(ROOT / "tools"))


# The same bits where it was looked at, compiled in less than two thirds of the time.
FAST = f"--xla_backend_optimization_level=1{PRESET}"


def pytest_configure(config):
    """The default run compiles fast, here and in the processes that it starts; proofs run what XLA makes of a program with all
    its passes. So does the default run with XLA_FLAGS set, even to nothing."""
    if "not proof" in config.option.markexpr:
        os.environ.setdefault("XLA_FLAGS", FAST)
    config.option.loadscopereorder = False  # else files begin by their number of tests


# The files that take longest begin first, so that none of them is alone at the end; seconds of processor in docs/notebook.md.
LONGEST = (
    "tour",
    "train",
    "sharding",
    "generate",
    "model",
    "convert",
    "families",
    "damage",
    "spikes",
    "export_runs",
    "adapters",
    "signals",
    "chaos",
)


def pytest_collection_modifyitems(items):
    order = {f"test_{name}": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(scope="session")
def corpus() -> shards.Corpus:
    return open_corpus(tiny().data)


@pytest.fixture(scope="session")
def eight() -> list[jax.Device]:
    devices = jax.devices()
    assert len(devices) == 8
    return devices


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> pathlib.Path:
    """A run of `quickstart:smoke` on one device that is done: two steps, a checkpoint. Nobody changes it: the first of pytest's
    workers that asks makes it, in its own process, the other waits for it."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "finished"
    folder.mkdir(exist_ok=True)
    line = ["--config", str(ROOT / "experiments" / "quickstart.py:smoke"), "--config.mesh.data=1"]
    with open(folder / "asked", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            shutil.rmtree(folder / "run", ignore_errors=True)
            assert main.main([*line, "--workdir", str(folder / "run")]) == 0
            (folder / "done").touch()
    return folder / "run"


@pytest.fixture
def starts(tmp_path, monkeypatch) -> pathlib.Path:
    """A folder to work in, where lie the models that shipped experiments start from, as far as a config reads them."""
    for name, content in STARTS.items():
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A bucket of an emulator on this machine."""
    emulator = importlib.import_module("bucket_emulator")
    if not emulator.is_here():
        pytest.skip("gcp-storage-emulator is not installed")
    with emulator.bucket("lmtest") as url:
        yield url


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """In CI nothing is left out: a test that skips itself there, for want of a library, has failed."""
    report = (yield).get_result()
    if report.skipped and os.environ.get("CI") == "true":
        report.outcome, report.longrepr = "failed", f"left out in CI: {report.longrepr}"
