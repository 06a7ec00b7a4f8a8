"""Eight fake CPU devices, one compile cache and one corpus for all test processes."""

import importlib
import os
import pathlib
import sys
from collections.abc import Iterator

os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # of `-m device`: cuda, or tpu
os.environ.setdefault("LM_JAX_CACHE", str(pathlib.Path(__file__).parent.parent / ".pytest_cache" / "lm_jax"))

import jax  # noqa: E402
import pytest  # noqa: E402
from helpers import ROOT, tiny  # noqa: E402

from lm_jax import distributed, main  # noqa: E402
from lm_jax.data import shards  # noqa: E402
from lm_jax.data.corpus import open_corpus  # noqa: E402

distributed.configure()
sys.path.append(str(ROOT / "tools"))


FAST = "--xla_backend_optimization_level=1"  # the same bits where it was looked at, compiled in two thirds of the time


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
    "families",
    "model",
    "convert",
    "export",
    "damage",
    "spikes",
    "generate",
    "adapters",
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
    """A run of `quickstart:smoke` on one device that is done: two steps, a checkpoint. Made in this process: what many tests
    need does not wait for the start of another."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    line = ["--config", str(ROOT / "experiments" / "quickstart.py:smoke"), "--config.mesh.data=1"]
    assert main.main([*line, "--workdir", str(workdir)]) == 0
    return workdir


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
