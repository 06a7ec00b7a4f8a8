"""What the first parameters say of every pair of answers: computed once before the first step, and kept beside the run.

Preference tuning needs the reference's log-probabilities alone, no second model: they stand in the rows (`reference`). A run that
resumes reads them, so that it goes on to the bit.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from lm_jax.config import Config
from lm_jax.data.mixture import Mixture
from lm_jax.data.sources import SPLITS
from lm_jax.distributed import agree, is_main_process
from lm_jax.errors import UserError
from lm_jax.files import REFERENCE, write_whole
from lm_jax.tasks.records import HeldOutExamples, TaskData
from lm_jax.tasks.results import Result


class Totals(Protocol):
    """What is read here of the totals that `evaluate` returns."""

    @property
    def results(self) -> tuple[Result, ...]:
        """One result for each record."""
        ...


Evaluator = Callable[[dict, HeldOutExamples], Totals]  # (parameters, rows) -> what a model makes of the records in them


def attach_reference(
    mixed: Mixture, config: Config, workdir: epath.Path, parameters: dict, evaluator: Evaluator, resumes: bool
) -> str:
    """Puts the reference's margin of every pair into its rows; returns what was done, for the log.

    `mixed` holds the records of a task, `parameters` are the first ones. Raises UserError where a run resumes without
    the margins that it began with.
    """
    assert isinstance(mixed, TaskData)
    of_data, kept = digest_of_data(mixed, config), read(workdir)
    if resumes:
        fill(mixed, expected(kept, of_data, workdir))
        return "the reference's margins are those that the run began with"
    of_parameters = digest(parameters)
    is_kept = kept is not None and (str(kept["data"]), str(kept["parameters"])) == (of_data, of_parameters)
    if agree(is_kept, "reference"):
        found = expected(kept, of_data, workdir)
    else:
        fill(mixed, {split: np.zeros(len(mixed.records[split].where), np.float32) for split in SPLITS})
        found = {split: margins(mixed, config, split, parameters, evaluator) for split in SPLITS}
        if is_main_process():
            file = io.BytesIO()
            np.savez(file, allow_pickle=False, data=of_data, parameters=of_parameters, **found)
            write_whole(workdir / REFERENCE, file.getvalue())
    fill(mixed, found)
    return (
        f"the reference's margins of {sum(len(found[split]) for split in SPLITS):,} pairs are in {workdir / REFERENCE}"
    )


def resume(mixed: Mixture, config: Config, workdir: epath.Path) -> None:
    """Puts the margins that a run began with into its rows. Raises UserError where they are missing."""
    assert isinstance(mixed, TaskData)
    fill(mixed, expected(read(workdir), digest_of_data(mixed, config), workdir))


def expected(kept: dict[str, np.ndarray] | None, of_data: str, workdir: epath.Path) -> dict[str, np.ndarray]:
    """The kept margins, by split. Raises UserError where they are missing, broken, or of other records."""
    if kept and str(kept["data"]) == of_data:
        return kept
    what = "is of other records, or of another sequence_length or dpo_beta" if kept else "is missing or broken"
    raise UserError(
        f"{workdir / REFERENCE} {what}: it holds what the first parameters say of every pair, and they are gone\n"
        "put it back, or begin in another --workdir"
    )


def margins(mixed: TaskData, config: Config, split: str, parameters: dict, evaluator: Evaluator) -> np.ndarray:
    """float32 [N]: beta * (log pi(chosen) - log pi(rejected)) of each pair of a split."""
    records = mixed.records[split]
    if not records.where:
        return np.zeros(0, np.float32)
    (rows,) = mixed.held(config.data, split).values()
    found = {result.record: result.prediction for result in evaluator(parameters, rows).results}
    return np.array([found[where] for where in records.where], np.float32)


def fill(mixed: TaskData, kept: dict[str, np.ndarray]) -> None:
    """Writes the margins into the column `reference`, at the first token of each record's segment."""
    for split in SPLITS:
        if len(kept[split]):
            records = mixed.records[split]
            records.columns["reference"][records.split.offsets[:-1]] = kept[split]


def read(workdir: epath.Path) -> dict[str, np.ndarray] | None:
    """The arrays of the kept file, None where there is no whole one."""
    if not (workdir / REFERENCE).exists():
        return None
    try:
        with np.load(io.BytesIO((workdir / REFERENCE).read_bytes()), allow_pickle=False) as file:
            return {name: file[name] for name in ("data", "parameters", *SPLITS)}
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def digest_of_data(mixed: Mixture, config: Config) -> str:
    """A hash of what decides the pairs and their margins, but for the parameters."""
    data = mixed.facts["data"], mixed.facts["tokenizer"], config.data.sequence_length, config.train.dpo_beta
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()[:16]


def digest(parameters: dict) -> str:
    """A hash of the sums of the parameters and of their squares, leaf by leaf."""
    sums = jax.jit(lambda tree: jnp.stack([jnp.stack([x.sum(), jnp.square(x).sum()]) for x in jax.tree.leaves(tree)]))
    return hashlib.sha256(np.asarray(sums(parameters), np.float32).tobytes()).hexdigest()[:16]
