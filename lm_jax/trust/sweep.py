"""Many runs of one experiment over values of its settings: a grid, or what Optuna proposes; each in a folder of its own.

A sweep is resumable because its runs are: the same command finds them by their folders, and each goes on or says its result.
"""

import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from etils import epath

from lm_jax import metrics_file
from lm_jax.errors import UserError, needs
from lm_jax.trust.comparison import aligned

JOURNAL = "optuna.log"  # what Optuna knows, one line a thing
RANGE = re.compile(r"(?P<low>[-+.\deE]+)\.\.(?P<high>[-+.\deE]+?)(?P<log>:log)?")
Values = dict[str, str]  # {key: value as it is typed}


class Trial(NamedTuple):
    """One run of a sweep."""

    values: Values
    workdir: epath.Path
    code: int  # its exit code
    measure: float | None  # None where it has none, or it is not finite


def parse(over: list[str]) -> dict[str, str]:
    """["optimizer.learning_rate=1e-3,3e-3"] -> {key: text of its values}. Raises UserError."""
    found: dict[str, str] = {}
    for text in over:
        key, is_given, values = text.removeprefix("--").removeprefix("config.").partition("=")
        if not is_given or not values or key.count(".") != 1:
            raise UserError(f"--over {text!r}: expected KEY=VALUES, such as optimizer.learning_rate=1e-3,3e-3")
        if key in found:
            raise UserError(f"--over {key} is given twice; give all of its values in one: {key}={found[key]},{values}")
        found[key] = values
    if not found:
        raise UserError(
            "nothing to sweep over: give --over KEY=VALUES, such as --over optimizer.learning_rate=1e-3,3e-3"
        )
    return found


def grid(over: dict[str, str]) -> Iterator[Values]:
    """Every combination of comma-separated values, the last key fastest; commas inside brackets or quotes are a value's own."""
    for key, text in over.items():
        if RANGE.fullmatch(text):
            raise UserError(f"--over {key}={text} is a range: give values, or --trials N for Optuna to choose from it")
    for chosen in itertools.product(*(_split(text) for text in over.values())):
        yield dict(zip(over, chosen, strict=True))


def _split(text: str) -> list[str]:
    parts, depth, quote = [""], 0, ""
    for c in text:
        if quote:
            quote = "" if c == quote else quote
        elif c in "\"'":
            quote = c
        depth += (c in "([{") - (c in ")]}") if not quote else 0
        if c == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += c
    return [part.strip() for part in parts]


def folder_name(values: Values) -> str:
    """Of a run, from its values: readable, and another one for other values."""
    text = ",".join(f"{key.partition('.')[2]}={value}" for key, value in values.items())
    return re.sub(r"[^\w.,=+-]", "_", text)[:150] or "run"


class Sweep:
    """Runs of a sweep in `folder`; `run` takes the words after `python -m lm_jax.main` and returns the exit code."""

    def __init__(
        self, folder: epath.Path, given: list[str], measure: str, maximise: bool, run: Callable[[list[str]], int]
    ):
        self.folder, self.given, self.measure, self.maximise, self.run = folder, given, measure, maximise, run
        self.trials: list[Trial] = []

    def trial(self, values: Values) -> Trial:
        """Runs once, or goes on with what was begun. Raises UserError where two sets of values would share a folder."""
        workdir = self.folder / folder_name(values)
        if any(trial.workdir == workdir and trial.values != values for trial in self.trials):
            raise UserError(f"two runs would share the folder {workdir}: sweep over fewer keys, or shorter values")
        code = self.run([*self.given, "--workdir", str(workdir), *(f"--config.{key}={v}" for key, v in values.items())])
        found = metrics_file.series(metrics_file.read(workdir), self.measure) if workdir.exists() else []
        self.trials.append(Trial(values, workdir, code, found[-1][1] if found and not code else None))
        return self.trials[-1]

    def best_first(self) -> list[Trial]:
        """The trials by their measure, those without one last."""
        sign = -1 if self.maximise else 1
        return sorted(self.trials, key=lambda trial: math.inf if trial.measure is None else sign * trial.measure)

    def table(self) -> str:
        """A line a trial, the best first."""
        keys = [key for key in self.trials[0].values] if self.trials else []
        rows = [[self.measure, *keys, "run"]]
        for trial in self.best_first():
            told = f"exit code {trial.code}" if trial.code else "-" if trial.measure is None else f"{trial.measure:.5g}"
            rows.append([told, *(trial.values[key] for key in keys), str(trial.workdir)])
        return aligned(rows)

    def draw(self, picture: str) -> None:
        """A panel a key: the measure of every trial over its value."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        shown = [trial for trial in self.trials if trial.measure is not None]
        keys = list(self.trials[0].values)
        figure, panels = pyplot.subplots(
            1, len(keys), figsize=(4.5 * len(keys), 3.6), layout="constrained", squeeze=False
        )
        for panel, key in zip(panels[0], keys, strict=True):
            numbers = [_number(trial.values[key]) for trial in shown]
            if None in numbers:
                panel.plot([trial.values[key] for trial in shown], [trial.measure for trial in shown], "o")
            else:
                panel.plot(numbers, [trial.measure for trial in shown], "o")
                positive = [number for number in numbers if number and number > 0]
                if len(positive) == len(numbers) and positive and max(positive) >= 8 * min(positive):
                    panel.set_xscale("log")
            panel.set(xlabel=key, ylabel=self.measure)
            panel.spines[["top", "right"]].set_visible(False)
        figure.savefig(picture, dpi=110)
        pyplot.close(figure)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def proposed(over: dict[str, str], sweep: Sweep, trials: int) -> Iterator[Values]:
    """What Optuna proposes, until there are `trials`; each is told the measure of the trial that was run with it.

    What it knows stands in the sweep's folder: a trial that a kill cut short is the first of the next time. Raises UserError.
    """
    try:
        import optuna
    except ImportError:
        raise needs("--trials", "optuna", "optuna") from None
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    os.makedirs(sweep.folder, exist_ok=True)
    storage = JournalStorage(JournalFileBackend(str(sweep.folder / JOURNAL)))
    names = json.dumps([over, sweep.measure, sweep.given])
    study = optuna.create_study(
        study_name=names,
        storage=storage,
        load_if_exists=True,
        direction="maximize" if sweep.maximise else "minimize",
    )
    study.sampler = optuna.samplers.TPESampler(seed=len(study.trials), n_startup_trials=5)  # another one each time
    state = optuna.trial.TrialState
    for done in study.get_trials(states=(state.COMPLETE, state.FAIL)):
        yield done.user_attrs["values"]
    unfinished = [trial.number for trial in study.get_trials(states=(state.RUNNING,))]
    for _ in range(len(study.trials) - len(unfinished), trials):
        if unfinished:
            trial = optuna.trial.Trial(study, study.trials[unfinished.pop(0)]._trial_id)
        else:
            trial = study.ask(_distributions(over, optuna.distributions))
        values = {key: str(value) for key, value in trial.params.items()}
        trial.set_user_attr("values", values)
        yield values
        measure = sweep.trials[-1].measure
        study.tell(trial, measure, state=state.FAIL if measure is None else state.COMPLETE)


def _distributions(over: dict[str, str], kinds: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, text in over.items():
        match = RANGE.fullmatch(text)
        if not match:
            found[key] = kinds.CategoricalDistribution(_split(text))
            continue
        low, high, log = match["low"], match["high"], bool(match["log"])
        try:
            whole = all(re.fullmatch(r"[-+]?\d+", end) for end in (low, high))
            kind = kinds.IntDistribution if whole else kinds.FloatDistribution
            found[key] = kind(*(int(end) if whole else float(end) for end in (low, high)), log=log)
        except ValueError as error:
            raise UserError(f"--over {key}={text}: {error}; a range is LOW..HIGH or LOW..HIGH:log") from None
    return found
