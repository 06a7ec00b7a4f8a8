"""Histograms of what a step changes are those of the parameters before and after it, layer by layer."""

import types

import jax
import numpy as np
import pytest
from helpers import ROOT, tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lm_jax import load_model, main, update_histograms
from lm_jax.sharding import AXES

SMOKE = [
    "--config", str(ROOT / "experiments" / "quickstart.py:smoke"), "--config.train.num_steps=4", "--config.checkpoint.every=1",
    "--config.checkpoint.keep_last=9", "--config.log.trackers=('histograms',)", "--config.evaluate.prompt=",
    "--config.optimizer.name=sgd", "--config.data.tokenizer=bytes", "--config.evaluate.every=2",
]  # fmt: skip


def parameters_after(run, step: int) -> dict:
    found = load_model.locate(f"{run}@{step}")
    with jax.set_mesh(jax.make_mesh((1,) * len(AXES), AXES, devices=jax.devices()[:1])):
        return load_model.load_parameters(found)[1]


@pytest.mark.parametrize("mesh", [dict(data=1), pytest.param(dict(data=2, fsdp=4), marks=pytest.mark.proof)])
def test_a_histogram_is_of_what_one_step_changed(mesh, tmp_path, eight):
    """After steps 2 and 4, which evaluations follow."""
    axes = [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
    assert main.main([*SMOKE, *axes, "--workdir", str(tmp_path / "run")]) == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), {"histograms": 0})
    events.Reload()
    tags = events.Tags()["histograms"]
    assert {"updates/embedding/table", "updates/block_0/mlp/up/kernel/0", "updates/block_0/mlp/up/kernel/1"} <= {*tags}
    before, after = (parameters_after(tmp_path / "run", step) for step in (3, 4))
    for tag in tags:
        first, found = events.Histograms(tag)
        *path, last = tag.removeprefix("updates/").split("/")
        pick = (lambda x, layer=int(last): np.asarray(x)[layer]) if last.isdigit() else np.asarray
        keys = path if last.isdigit() else [*path, last]
        then, now = before, after
        for key in keys:
            then, now = then[key], now[key]
        changed = (pick(now) - pick(then)).ravel()
        value = found.histogram_value
        assert (first.step, found.step, value.num) == (2, 4, changed.size) and sum(value.bucket) == changed.size
        np.testing.assert_allclose([value.min, value.max], [changed.min(), changed.max()], rtol=1e-6)
        np.testing.assert_allclose(value.sum_squares, (changed.astype(np.float64) ** 2).sum(), rtol=1e-4)
        below = np.searchsorted(np.sort(changed), np.array(value.bucket_limit, np.float32), side="right")
        np.testing.assert_array_equal(np.diff(below, prepend=0), value.bucket)


def test_the_step_after_one_that_was_gone_back_from_is_not_compared_with_it():
    run = types.SimpleNamespace(before=(7, {}), is_due=lambda length, step: False, data=types.SimpleNamespace(step=3))
    run.plan = types.SimpleNamespace(program=types.SimpleNamespace(split=lambda parameters: (parameters, {})))
    run.state, run.config, run.num_steps = types.SimpleNamespace(parameters={}), tiny(), 9
    update_histograms.look(run, None)  # no writer is asked
    assert run.before is None
