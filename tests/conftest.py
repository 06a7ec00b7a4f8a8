"""Eight fake CPU devices, one compile cache and one corpus for all test processes."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # of `-m device`: cuda, or tpu
os.environ.setdefault("LM_JAX_CACHE", str(ROOT / ".pytest_cache" / "lm_jax"))

import jax  # noqa: E402
import pytest  # noqa: E402

from lm_jax import distributed  # noqa: E402
from lm_jax.config import Config, default_config, flatten, unflatten  # noqa: E402
from lm_jax.config_check import resolve  # noqa: E402
from lm_jax.data import shards  # noqa: E402
from lm_jax.data.corpus import open_corpus  # noqa: E402
from lm_jax.experiment import shrink, without_unread  # noqa: E402

distributed.configure()


def tiny(**changes) -> Config:
    """Two layers, 64 wide, rows of 64 tokens of the embedded corpus; changes as section__name=value."""
    config = shrink(default_config())
    for path, value in changes.items():
        section, name = path.split("__")
        config[section][name] = value
    given = [path.replace("__", ".") for path in changes]
    return resolve(unflatten(without_unread(flatten(config), given)))


# Changes of `tiny` that make the families: what every specification is held against.
LLAMA = dict(
    model__positions="rotary", model__norm="rmsnorm", model__activation="silu", model__gated=True, model__bias=False,
    model__num_kv_heads=2, model__tie_embedding=False,
)  # fmt: skip
FAMILIES = {
    "gpt2": {},
    "llama": LLAMA,
    "gpt3_banded": dict(model__window=(0, 8), model__num_layers=4),
    "sinusoidal_relu": dict(model__positions="sinusoidal", model__activation="relu"),
    "post_norm": dict(model__norm_place="post"),
    "llama3": dict(LLAMA, model__rotary_scaling=(8.0, 1.0, 4.0, 32.0)),
    "mistral": dict(LLAMA, model__window=(16,)),
    "qwen2": dict(LLAMA, model__qkv_bias=True),
    "qwen3": dict(LLAMA, model__qk_norm=True),
    "gemma3": dict(
        LLAMA,
        model__qk_norm=True,
        model__norm_place="both",
        model__window=(16, 0),
        model__rotary_local_base=100.0,
        model__num_layers=4,
        model__scale_embedding=True,
        model__tie_embedding=True,
    ),
    "mixtral": dict(LLAMA, model__num_experts=4),
    "gemma2": dict(
        LLAMA,
        model__norm_place="both",
        model__window=(16, 0),
        model__num_layers=4,
        model__logit_softcap=(2.0, 4.0),
        model__multipliers=(1.0, 1.0, 0.2, 1.0),
        model__scale_embedding=True,
        model__tie_embedding=True,
    ),
    "olmo2": dict(LLAMA, model__norm_place="branch", model__qk_norm=True, model__qk_norm_whole=True),
    "granite_yarn": dict(
        LLAMA,
        model__window=(0, 0),
        model__num_layers=4,
        model__rotary_share=(0.5, 0.0),
        model__rotary_scaling=(4.0, 1.0, 32.0, 32.0),
        model__rotary_scaling_kind="yarn",
        model__multipliers=(3.0, 0.4, 0.1, 2.0),
    ),
    "no_positions": dict(model__positions="none", model__norm="rmsnorm"),
    "lstm": dict(model__kind="lstm", model__init_scale=0.2),
}


@pytest.fixture(scope="session")
def corpus() -> shards.Corpus:
    return open_corpus(tiny().data)


@pytest.fixture(scope="session")
def eight() -> list[jax.Device]:
    devices = jax.devices()
    assert len(devices) == 8
    return devices


def command(module: str, *arguments: str, devices: int = 1, **keywords) -> subprocess.CompletedProcess:
    """`python -m lm_jax.<module> ...` as a real process."""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", f"lm_jax.{module}", *arguments]
    return subprocess.run(line, capture_output=True, text=True, env=environment, timeout=600, **keywords)


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> pathlib.Path:
    """A run of `quickstart:smoke` that is done: two steps, a checkpoint."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    result = command("main", "--config", "experiments/quickstart.py:smoke", "--workdir", str(workdir))
    assert result.returncode == 0, result.stderr
    return workdir


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """In CI nothing is left out: a test that skips itself there, for want of a library, has failed."""
    report = (yield).get_result()
    if report.skipped and os.environ.get("CI") == "true":
        report.outcome, report.longrepr = "failed", f"left out in CI: {report.longrepr}"
