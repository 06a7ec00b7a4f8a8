"""A run whose length is a time: it ends with it, its schedule at the end; killed in the middle it has the rest of the time."""

import types

import jax
import numpy as np
import pytest
from etils import epath
from helpers import ROOT, Crash, lines_of, tiny

from lm_jax import main, step_folders, step_log, time_budget, train_step
from lm_jax.batch_ramp import TICKS, Clocks, clocks, make_ramp, with_steps
from lm_jax.schedule import schedule
from lm_jax.time_budget import TimeBudget


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes only when it is told to."""
    fake = types.SimpleNamespace(now=1000.0)
    monkeypatch.setattr(time_budget, "time", types.SimpleNamespace(monotonic=lambda: fake.now))
    return fake


def rates(name: str, *ticks: int, step: int = 10**6, warmup: int = 10) -> list[float]:
    config = with_steps(
        tiny(train__num_steps="5 min", optimizer__schedule=name, optimizer__warmup=warmup), make_ramp(tiny()), 1
    )
    assert config.train.num_steps == "5 min" and config.optimizer.decay_over == 0
    rate = jax.jit(lambda tick: schedule(config.optimizer, Clocks(ticks=tick))(step))
    return [float(rate(tick)) / config.optimizer.learning_rate for tick in ticks]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cosine", [1, 0.55, 0, 0.1]),
        ("linear", [1, 0.55, 0.28, 0.1]),
        ("warmup_stable_decay", [1, 1, 1, 0.1]),
        ("constant", [1, 1, 1, 1]),
    ],
)
def test_the_rate_follows_the_share_of_the_time(name, expected):
    ticks = [0, TICKS // 2, int(0.8 * TICKS), TICKS]
    found = rates(name, *ticks)
    np.testing.assert_allclose([found[0], found[1], found[3]], [expected[0], expected[1], expected[3]], rtol=1e-6)
    np.testing.assert_allclose(
        found[2], 0.1 + 0.9 * (1 + np.cos(0.8 * np.pi)) / 2 if name == "cosine" else expected[2], rtol=1e-5
    )
    rising = rates(name, *ticks, step=4)  # is counted in updates: half of ten are done
    np.testing.assert_allclose(rising, np.minimum(0.5, found), rtol=1e-6)


def test_a_decay_of_its_own_length_is_counted_in_steps():
    config = tiny(train__num_steps="5 min", optimizer__decay_over=7)
    assert (
        clocks(config, make_ramp(config)).ticks is None
        and with_steps(config, make_ramp(config), 1).optimizer.decay_over == 7
    )
    assert clocks(tiny(train__num_steps="5 min"), make_ramp(config)).ticks == 0
    assert clocks(tiny(), make_ramp(config)).ticks is None


@pytest.mark.parametrize("budget", [60.0, 58.0, 62.0, 30.0, 6.0, 2.0])
@pytest.mark.parametrize("spent", [0.0, 0.5])
def test_steps_end_within_half_a_step_of_the_time(clock, budget, spent):
    """Steps of 6 s, the first of a process of 7: the last one is at the end of the schedule, and none follows."""
    timer, ticks, planned = TimeBudget(budget, spent * budget), [0], None
    while (planned := timer.before_step(rows=3)) and not (len(ticks) > 1 and planned.ticks < ticks[-1]):
        clock.now += 6.0 + (len(ticks) == 1)
        timer.dispatched_step(3, ())
        ticks.append(planned.ticks)
        if planned.is_last:
            break
    if len(ticks) == 2:  # one step is more than all of the time, or nearly
        assert budget * (1 - spent) < 7 + 3.5
    else:
        assert planned and planned.is_last and ticks[-1] == TICKS and abs(timer.left()) <= 3.5


def test_an_evaluation_that_would_not_end_in_time_is_left_out(clock):
    timer = TimeBudget(60.0, 0.0)
    with timer.looking():
        clock.now += 20
    assert timer.has_time_to_look()
    clock.now += 19
    assert timer.has_time_to_look()
    clock.now += 2
    assert not timer.has_time_to_look()


RUN = [
    "--config", str(ROOT / "experiments" / "quickstart.py:smoke"), "--config.checkpoint.every=3", "--config.evaluate.every=4",
    "--config.evaluate.prompt=", "--config.data.tokenizer=bytes", "--config.mesh.data=1", "--config.model.num_layers=1",
    "--config.optimizer.name=sgd", "--config.data.validation_fraction=0.002",
]  # fmt: skip


@pytest.mark.parametrize(
    "rows", [8, pytest.param(4, marks=pytest.mark.proof)]
)  # of a microbatch: one program, or three
def test_a_killed_run_has_the_rest_of_its_time(clock, tmp_path, monkeypatch, rows, capsys):
    """Each step takes 6 s, so that there are ten; killed after the fourth, of which three are saved, seven follow."""
    step, done, killed_at = train_step.CompiledStep.__call__, step_log.StepLog.done, [0]
    slow_one = [0]

    def slow(self, state, *arguments):
        clock.now += 10.0 if int(state.step) + 1 == slow_one[0] else 6.0
        return step(self, state, *arguments)

    def killing(self, step, *arguments):
        done(self, step, *arguments)
        if step == killed_at[0]:
            raise Crash

    monkeypatch.setattr(train_step.CompiledStep, "__call__", slow)
    monkeypatch.setattr(step_log.StepLog, "done", killing)
    line = lambda minutes, place: [
        *RUN, f"--config.train.microbatch_rows={rows}", f"--config.train.num_steps={minutes} min", "--workdir", str(place),
    ]  # fmt: skip
    assert main.main(line(1, tmp_path / "whole")) == 0
    slow_one[0] = 9  # after it too little is left for another, which nobody knew before: it has its line all the same
    assert main.main([*line(1, tmp_path / "late"), "--config.log.every=5"]) == 0
    assert [found["step"] for found in lines_of(tmp_path / "late") if "train/loss" in found] == [1, 5, 9]
    killed_at[0], slow_one[0] = 4, 0
    with pytest.raises(Crash):
        main.main(line(1, tmp_path / "killed"))
    assert step_folders.read_data_state(epath.Path(tmp_path / "killed"), 3).seconds == 18.0
    killed_at[0] = 0
    assert main.main(line(1, tmp_path / "killed")) == 0
    for place in ("whole", "killed"):
        found = [found for found in lines_of(tmp_path / place) if "train/loss" in found]
        assert [(line["step"], line["train/seconds"]) for line in found] == [(n, 6.0 * n) for n in range(1, 11)]
        np.testing.assert_allclose(found[9]["train/learning_rate"], 0.1 * 1.5e-3, rtol=1e-6)
        assert found[4]["train/learning_rate"] > 5 * found[9]["train/learning_rate"]
    capsys.readouterr()
    assert main.main(line(1, tmp_path / "killed")) == 0
    assert "train on with a larger --config.train.num_steps" in capsys.readouterr().out
    assert main.main(line(1.5, tmp_path / "killed")) == 0
    found = [found for found in lines_of(tmp_path / "killed") if "train/loss" in found]
    assert [found["step"] for found in found] == list(range(1, 16)) and found[-1]["train/seconds"] == 90.0
