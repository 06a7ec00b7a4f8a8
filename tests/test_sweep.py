"""Sweeps: which runs a grid has, that a sweep that was stopped goes on, and what Optuna is told."""

import math

import pytest
from etils import epath
from helpers import ROOT

from lm_jax import main, metrics
from lm_jax.errors import UserError
from lm_jax.trust.sweep import JOURNAL, Sweep, folder_name, grid, parse, proposed

OVER = {"optimizer.learning_rate": "1e-3,1e-2", "data.batch_ramp": "((0, 2), (4, 8)),()"}


def fake_run(calls: list[list[str]]):
    """A run whose loss is that of a parabola in the logarithm of its rate; one of rate 1 is refused."""

    def run(words: list[str]) -> int:
        calls.append(words)
        given = dict(word.removeprefix("--config.").split("=", 1) for word in words if "=" in word)
        rate = float(given.get("optimizer.learning_rate", "1e-3"))
        if rate == 1:
            return 2
        folder = epath.Path(words[words.index("--workdir") + 1])
        folder.mkdir(parents=True, exist_ok=True)
        writer = metrics.Writer(folder, 0, print, ())
        writer.scalars(1, {"final/loss": 2 + (math.log10(rate) + 2.5) ** 2})
        writer.close()
        return 0

    return run


def sweep_of(folder, calls) -> Sweep:
    return Sweep(epath.Path(folder), ["--config", "x.py"], "final/loss", False, fake_run(calls))


def test_a_grid_has_every_combination_once():
    found = list(grid(OVER))
    rates = [values["optimizer.learning_rate"] for values in found]
    assert rates == ["1e-3", "1e-3", "1e-2", "1e-2"]
    assert [values["data.batch_ramp"] for values in found[:2]] == ["((0, 2), (4, 8))", "()"]
    assert len({folder_name(values) for values in found}) == 4


@pytest.mark.parametrize(
    ("over", "problem"),
    [
        ([], "nothing to sweep over"),
        (["learning_rate=1"], "expected KEY=VALUES"),
        (["optimizer.learning_rate"], "expected KEY=VALUES"),
        (
            ["optimizer.warmup=1", "--config.optimizer.warmup=2"],
            "is given twice; give all of its values in one: optimizer.warmup=1,2",
        ),
        (["optimizer.warmup=1..9"], "is a range: give values, or --trials N"),
    ],
)
def test_what_is_no_grid_is_refused(over, problem):
    with pytest.raises(UserError, match=problem):
        list(grid(parse(over)))


def test_the_table_has_the_best_first_and_says_what_failed(tmp_path):
    sweep = sweep_of(tmp_path, [])
    for values in grid({"optimizer.learning_rate": "1e-4,3e-3,1"}):
        sweep.trial(values)
    lines = [line.split() for line in sweep.table().splitlines()]
    assert [line[-2] for line in lines[1:]] == ["3e-3", "1e-4", "1"]
    assert lines[1][0] == "2.0005" and sweep.table().splitlines()[3].split()[:3] == ["exit", "code", "2"]
    sweep.draw(str(tmp_path / "sweep.png"))
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_two_sets_of_values_never_share_a_folder(tmp_path):
    sweep = sweep_of(tmp_path, [])
    sweep.trial({"evaluate.prompt": "a b"})
    with pytest.raises(UserError, match="would share the folder"):
        sweep.trial({"evaluate.prompt": "a/b"})


def test_a_grid_of_real_runs_is_run_once_and_its_results_found_again(tmp_path, capsys):
    line = ["--config", str(ROOT / "experiments" / "quickstart.py:smoke"), "--config.mesh.data=1"]
    measures = []
    for _ in range(2):
        sweep = Sweep(epath.Path(tmp_path), line, "final/loss", False, main.main)
        measures.append([sweep.trial(values).measure for values in grid({"optimizer.learning_rate": "1e-3,2e-3"})])
    assert measures[0] == measures[1] and len({*measures[0]}) == 2
    assert capsys.readouterr().out.count("this run is finished") == 2


@pytest.mark.proof
def test_what_optuna_proposes_comes_near_the_best_and_goes_on_after_a_kill(tmp_path):
    """Killed while the fourth trial runs: it is the first of the next time, with the same values."""
    over, calls = {"optimizer.learning_rate": "1e-5..1e-1:log"}, []
    sweep = sweep_of(tmp_path, calls)
    ideas = proposed(over, sweep, 12)
    for _ in range(3):
        sweep.trial(next(ideas))
    cut = next(ideas)
    del ideas
    again = sweep_of(tmp_path, calls)
    found = []
    for values in proposed(over, again, 12):
        found.append(values)
        again.trial(values)
    assert found[3] == cut and found[:3] == [trial.values for trial in sweep.trials] and len(found) == 12
    assert len({values["optimizer.learning_rate"] for values in found}) == 12, "none is proposed twice"
    assert again.best_first()[0].measure < 2.3 and (tmp_path / JOURNAL).exists()
