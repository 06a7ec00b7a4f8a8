"""The best evaluation of a run and its step, and how many evaluations came after it: read from the lines of `metrics.jsonl`.

Nothing else says which step is the best: a run that was killed, or went back before a spike, has the lines that it has.
"""

import math
from collections.abc import Collection
from typing import Any

from etils import epath

from lm_jax import metrics_file
from lm_jax.config import Config
from lm_jax.data import mixture
from lm_jax.errors import UserError, nearest
from lm_jax.stop import NEVER

# Lower is better of these, higher of all other numbers of an evaluation.
LOWER = ("loss", "perplexity", "bits_per_byte", "rmse", "brier_score")
Lines = list[dict[str, Any]]


def measure(config: Config) -> str:
    """The number by which evaluations are compared."""
    return config.checkpoint.keep_best or "eval/loss"


def evaluations(lines: Lines, name: str) -> list[tuple[int, float]]:
    """(step, how bad) of each evaluation that has this number, in order; infinity where it was not finite."""
    sign = 1 if name.endswith(LOWER) else -1
    found = {line["step"]: math.inf if line[name] is None else sign * line[name] for line in lines if name in line}
    return sorted(found.items())


def best_step(lines: Lines, name: str, steps: Collection[int]) -> int:
    """The step of the best evaluation among `steps`, the first of equal ones; NEVER where none of them has a finite one."""
    found = [(bad, step) for step, bad in evaluations(lines, name) if step in steps and bad < math.inf]
    return min(found)[1] if found else NEVER


def since_best(lines: Lines, name: str) -> int:
    """How many evaluations came after the best one."""
    bad = [bad for _, bad in evaluations(lines, name)]
    return len(bad) - 1 - bad.index(min(bad)) if bad else 0


def is_out_of_patience(folder: epath.Path, config: Config, step: int) -> bool:
    """Whether up to `step` `evaluate.patience` evaluations came after the best one; `folder` has the metrics."""
    if not config.evaluate.patience:
        return False
    lines = [line for line in metrics_file.read(folder) if line["step"] <= step]
    return since_best(lines, measure(config)) >= config.evaluate.patience


def steps_to_keep(folder: epath.Path, config: Config, steps: Collection[int]) -> set[int]:
    """Of the saved `steps` the best one, where one is kept."""
    if not config.checkpoint.keep_best:
        return set()
    return {best_step(metrics_file.read(folder), measure(config), steps)} - {NEVER}


def check(config: Config, mixed: mixture.Mixture, of_tasks: Collection[str] = ()) -> None:
    """Raises UserError where what asks for evaluations would never see one, or not that number; `of_tasks`: lm-eval's numbers."""
    asked = {"checkpoint.keep_best": config.checkpoint.keep_best, "evaluate.patience": config.evaluate.patience}
    asked["evaluate.tasks"] = config.evaluate.tasks
    if not any(asked.values()):
        return
    try:
        mixed.held(config.data, "validation")
    except UserError as error:
        raise UserError(f"config.{next(key for key, value in asked.items() if value)}: {error}") from None
    measures = mixed.task.measures if mixed.task else ()
    own = ("loss", *measures) if measures else ("loss", "perplexity", "bits_per_byte")
    names = [f"eval/{name}" for name in own]
    if len(mixed.corpora) > 1:
        names += ["eval/weighted_loss", *(f"eval/{source}/{name}" for source in mixed.corpora for name in own)]
    names += of_tasks if config.evaluate.tasks_every else ()
    if (name := measure(config)) not in names:
        listed = ", ".join(names[:8])
        raise UserError(
            f"config.checkpoint.keep_best = {name!r}: no evaluation has it{nearest(name, names)} (of {listed})"
        )
