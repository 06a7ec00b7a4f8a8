"""Where the time goes: parts that add up, one compiled step in a run's life, no transfer that nobody asked for, a trace."""

import time

import jax
import jax.monitoring
import numpy as np
import pytest
from helpers import tiny

from lm_jax import main, metrics_file, train
from lm_jax.data import loader
from lm_jax.goodput import Goodput, traced

SMALL = dict(
    train__num_steps=4, evaluate__every=2, evaluate__prompt="", checkpoint__every=2, optimizer__warmup=1, mesh__data=1,
    model__num_layers=1, optimizer__name="sgd",
)  # fmt: skip


def run(workdir, **changes) -> int:
    return train.run(tiny(**SMALL | changes), "experiments/quickstart.py:smoke", str(workdir), {})


def test_parts_add_up_to_the_time_since_the_start():
    goodput = Goodput()
    with goodput("data"):
        time.sleep(0.02)
    with goodput("evaluation"):
        time.sleep(0.01)
    assert list(goodput.waiting(iter([1, 2]), "data wait")) == [1, 2]
    before, parts, after = time.monotonic(), goodput.parts(), time.monotonic()
    assert list(parts) == ["start-up", "evaluation", "data wait", "step"]
    assert parts["start-up"] >= 0.02 and parts["evaluation"] >= 0.01 and parts["step"] >= 0
    assert before - goodput.start - 0.01 <= sum(parts.values()) <= after - goodput.start + 0.01
    shares = [float(line.split("%")[0].split()[-1]) for line in goodput.table().split("\n")[1:]]
    assert abs(sum(shares) - 100) < 1


def test_one_compile_of_the_step_across_evaluation_checkpoint_and_resume(tmp_path):
    compiled = []

    def listen(event, seconds, **about):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(about.get("fun_name", ""))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        assert run(tmp_path / "run") == 0
        step = [name for name in compiled if "train_step" in name]
        assert len(step) == 1, compiled
        before = len(compiled)
        assert run(tmp_path / "run", train__num_steps=8) == 0
        again = [name for name in compiled[before:] if "train_step" in name]
        assert len(again) == 1, "a resumed process compiles it once, whatever it restores"
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert [line["step"] for line in metrics_file.read(tmp_path / "run") if "train/loss" in line] == list(range(1, 9))


def test_a_transfer_that_nobody_asked_for_stops_the_loop(tmp_path, monkeypatch):
    """The mutant feeds the step from the host's memory."""
    whole = loader.batches
    to_host = lambda *arguments: ({name: np.asarray(x) for name, x in batch.items()} for batch in whole(*arguments))
    monkeypatch.setattr(train.loader, "batches", to_host)
    with pytest.raises(Exception, match="Disallowed (host-to-device|device-to-host) transfer"):
        run(tmp_path / "run")


def test_traced_steps_are_all_steps(tmp_path):
    said = []
    assert list(traced(range(2, 9), lambda: 4, tmp_path / "profile", said.append)) == list(range(2, 9))
    assert len(said) == 1 and "steps 4 to 6" in said[0]
    assert list(traced(range(3), lambda: 0, tmp_path / "none", said.append)) == [0, 1, 2]
    assert not (tmp_path / "none").exists()


@pytest.mark.proof
def test_a_run_writes_its_trace_and_says_where_the_time_went(tmp_path, capsys):
    workdir = tmp_path / "run"
    more = ["--config.train.num_steps=4", "--config.model.num_layers=1", "--config.log.profile=2"]
    more += ["--config.mesh.data=1", "--config.optimizer.name=sgd"]
    assert main.main(["--config", "experiments/quickstart.py:smoke", *more, "--workdir", str(workdir)]) == 0
    said = capsys.readouterr().out
    assert list((workdir / "profile").rglob("*.xplane.pb")), "what XProf reads"
    for part in ("goodput", "start-up", "compile", "data wait", "evaluation", "checkpoint", "samples", "step"):
        assert part in said
