"""The steps of a run on disk: saved, restored, removed. Orbax writes arrays, our manifest says that a step is whole.

    <workdir>/checkpoints/<step>/{parameters,optimizer,data}  <workdir>/checkpoints/<step>/MANIFEST.json

A step's manifest (`manifest.py`) is written last, durably, and names the run of config.json (`run_folder.py`); then the
mark "unfinished" goes.
A step that was never finished is removed at the next start; a damaged one is set aside as `<step>.broken`, and said.
Rows that were left out after a step was saved are in its manifest (`skipped`), in place of those in its data state.
"""

import concurrent.futures
import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from lm_jax import fault_points
from lm_jax.batch_ramp import DataState
from lm_jax.config import Config
from lm_jax.distributed import agree, first_answer, is_main_process, share
from lm_jax.errors import UserError
from lm_jax.files import check_room, sealed, write_whole
from lm_jax.manifest import (
    ITEMS,
    MANIFEST,
    PATIENCE,
    invalid_reason,
    read_manifest,
    wait_for,
    write_manifest,
    write_part,
)
from lm_jax.optimizer import all_finite
from lm_jax.regular_files import is_url, read_object
from lm_jax.remote import set_aside
from lm_jax.stop import NEVER, StopSignal
from lm_jax.train_state import TrainSetup, TrainState, abstract

STEP = re.compile("0|[1-9][0-9]*")  # the name of a step's folder; what is called otherwise is not ours
UNFINISHED = ".unfinished"  # `<step>.unfinished` stands beside a step while it is written, and while it is removed
FACTS = ("run", "pipeline", "tokenizer", "data")  # kept with every step; config.json has the shards too


def items(state: TrainState, data: DataState) -> dict[str, Any]:
    """The state as Orbax items: nested dicts of arrays, and JSON."""
    return {
        "parameters": ocp.args.StandardSave(state.parameters),
        "optimizer": ocp.args.StandardSave(by_path(state.optimizer_state)),
        "data": ocp.args.JsonSave(data._asdict()),
    }


def by_path(tree) -> dict[str, Any]:
    """Any pytree as {path: leaf}, so that what is on disk does not depend on a library's classes."""
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator=".")
    return {name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def steps_folder(workdir: epath.Path) -> epath.Path:
    """Where the steps of a run lie; an absolute path, as Orbax needs it."""
    return (workdir if is_url(workdir) else epath.Path(os.path.abspath(workdir))) / "checkpoints"


class NotFinite(Exception):
    """A state with inf or NaN in it, which is not saved."""


class Saver:
    """Saves steps in the background.

    `poll` raises what went wrong there, `wait` returns once the manifest is on disk. `stop` learns which step is saved.
    """

    def __init__(self, workdir: epath.Path, config: Config, facts: dict[str, Any], stop: StopSignal | None = None):
        self.stop = stop or StopSignal()
        self.folder, self.config, self.facts = steps_folder(workdir), config, facts
        self.folder.mkdir(parents=True, exist_ok=True)
        # In a bucket an array is objects of its own: OCDBT would join them, by generations that not every store has.
        arrays = lambda: ocp.StandardCheckpointHandler(use_ocdbt=not is_url(workdir))
        handlers = {"parameters": arrays(), "optimizer": arrays(), "data": ocp.JsonCheckpointHandler()}
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(**handlers))
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._commit: concurrent.futures.Future | None = None
        self._is_finite = jax.jit(all_finite)
        self.saved_at = time.monotonic()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        """After an error in the loop: the step that is being saved is finished first, or fails as well."""
        if error is not None and self._commit is not None:
            concurrent.futures.wait([self._commit], PATIENCE)

    def save(self, state: TrainState, data: DataState, also: dict[str, Any] | None = None, retain: bool = True) -> None:
        """Starts to save a step; returns once the state is copied, so that its arrays may be donated.

        `also` goes into the manifest, beside the facts of the run. Without `retain` no older step is removed.
        Raises NotFinite.
        """
        self.wait()
        if agree(is_main_process() and (self.folder / str(data.step) / MANIFEST).exists(), "is saved"):
            return
        if not self._is_finite(state):
            raise NotFinite(f"the state after step {data.step:,} is not finite (inf or NaN), and is not saved")
        num_bytes = sum(x.nbytes for x in jax.tree.leaves(state))
        if problem := first_answer(
            lambda: self._make_way(data.step, num_bytes) if is_main_process() else "", "room for a step"
        ):
            raise UserError(problem)
        if jax.default_backend() == "cpu":  # a CPU array on the host is a view, which the next step would write over
            state = jax.block_until_ready(jax.tree.map(jnp.copy, state))
        self.saved_at = time.monotonic()
        self._orbax.save(self.folder / str(data.step), args=ocp.args.Composite(**items(state, data)), force=True)
        self._commit = self._thread.submit(self._finish, data.step, also or {}, retain)

    def _make_way(self, step: int, num_bytes: int) -> str:
        """Marks the step unfinished. Returns what is in its way, "" = nothing. Raises OSError without room."""
        path = self.folder / str(step)
        if path.exists() and not mark_path(self.folder, step).exists() and not is_step_without_manifest(path):
            return f"{path} is in the way of a checkpoint and was not written by a run: move it away"
        check_room(self.folder, num_bytes)
        mark_unfinished(self.folder, step)
        fault_points.reach("save.begin")
        return ""

    def _finish(self, step: int, also: dict[str, Any], retain: bool) -> None:
        self._orbax.wait_until_finished()
        fault_points.reach("save.arrays")
        folder = self.folder / str(step)
        if share()[1] > 1:
            write_part(folder)
        fault_points.reach("save.part")
        if is_main_process():
            fault_points.reach("save.manifest")
            write_manifest(folder, {"step": step} | {name: self.facts[name] for name in FACTS} | also)
            fault_points.reach("save.mark")
            mark_path(self.folder, step).unlink()
            fault_points.reach("save.commit")
            if retain:
                self._retain()
        wait_for(folder / MANIFEST)  # so that all processes know the same steps
        self.stop.saved = step

    def _retain(self) -> None:
        """Keeps the newest `keep_last` steps and every multiple of `keep_every`, once the new manifest is durable."""
        settings = self.config.checkpoint
        steps = complete_steps(self.folder)
        for step in steps[: -settings.keep_last]:
            if not settings.keep_every or step % settings.keep_every:
                remove_step(self.folder, step)

    def poll(self) -> None:
        if self._commit is not None and self._commit.done():
            self._commit.result()

    def wait(self) -> None:
        if self._commit is not None:
            self._commit.result()
            self._commit = None

    def close(self) -> None:
        self.wait()
        self._thread.shutdown()
        self._orbax.close()


def mark_path(folder: epath.Path, step: int) -> epath.Path:
    return folder / f"{step}{UNFINISHED}"


def mark_unfinished(folder: epath.Path, step: int) -> None:
    """Until the mark is removed, what lies under the step's name does not count, whenever the process is killed."""
    words = b"this step is being written, or removed; what there is of it does not count\n"
    write_whole(mark_path(folder, step), words)


def remove_step(folder: epath.Path, step: int) -> None:
    mark_unfinished(folder, step)
    fault_points.reach("retain")
    (folder / str(step)).rmtree()
    mark_path(folder, step).unlink()


def complete_steps(folder: epath.Path) -> list[int]:
    """Steps that have a manifest, in order."""
    return sorted(int(path.name) for path in steps_inside(paths_inside(folder)) if (path / MANIFEST).exists())


def paths_inside(folder: epath.Path) -> list[epath.Path]:
    return list(folder.iterdir()) if folder.exists() else []


def steps_inside(paths: list[epath.Path]) -> list[epath.Path]:
    """Those that are named like a step and not marked unfinished."""
    names = {path.name for path in paths}
    return [path for path in paths if STEP.fullmatch(path.name) and f"{path.name}{UNFINISHED}" not in names]


def go_back(workdir: epath.Path, data: DataState) -> None:
    """Makes the step of `data`, a valid one, the newest; from there on the rows `data.skipped` are left out.

    Later steps are removed first, the newest first: a run that is killed in between comes here again. Then the manifest
    is replaced, in one piece, by one with the skipped rows.
    """
    folder = steps_folder(workdir)
    for step in reversed(complete_steps(folder)):
        if step > data.step:
            remove_step(folder, step)
    manifest = read_manifest(folder / str(data.step))
    write_whole(folder / str(data.step) / MANIFEST, sealed(manifest | {"skipped": data.skipped}))


def clean(workdir: epath.Path, log: Callable[[str], None]) -> None:
    """Removes what a killed run left half-written, sets a step without manifest aside; other files stay."""
    folder = steps_folder(workdir)
    names = sorted(path.name for path in paths_inside(folder))
    for name in names:
        step, _, rest = name.partition(".")
        if not STEP.fullmatch(step):
            continue
        if rest.startswith("orbax-checkpoint-tmp"):
            (folder / name).rmtree()
            log(f"removed {name}: a checkpoint that was never finished")
        elif f".{rest}" == UNFINISHED:
            if step in names:
                (folder / step).rmtree()
                log(f"removed {step}: a checkpoint that was never finished")
            (folder / name).unlink()
        elif not rest and f"{name}{UNFINISHED}" not in names and is_step_without_manifest(folder / name):
            to = set_step_aside(folder, int(step))
            log(f"checkpoint {step} is broken: {MANIFEST} is missing; set aside as {to.name}")


def is_step_without_manifest(path: epath.Path) -> bool:
    """Whether a folder that is named like a step has no manifest, and is empty or holds items of a step."""
    if not path.is_dir() or (path / MANIFEST).exists():
        return False
    names = {inside.name for inside in path.iterdir()}
    return not names or bool(names & {"parameters", "optimizer", "data", "_CHECKPOINT_METADATA"})


def set_step_aside(folder: epath.Path, step: int) -> epath.Path:
    """Renames the folder of a step to `<step>.broken`, or `<step>.broken-1` ... Returns its new path."""
    number = len(list(folder.glob(f"{step}.broken*")))
    to = folder / (f"{step}.broken" + f"-{number}" * bool(number))
    set_aside(folder / str(step), to)
    return to


def newest_first(folder: epath.Path) -> Iterator[int]:
    """Steps that have a manifest, as the leading process finds them; all processes ask for the next one together."""
    step = sys.maxsize
    while True:
        earlier = [found for found in complete_steps(folder) if found < step] if is_main_process() else []
        if (step := agree(max(earlier, default=NEVER), "a step")) == NEVER:
            return
        yield step


def newest_valid(
    workdir: epath.Path, log: Callable[[str], None], quarantine: bool, run: str = "", items: Collection[str] = ITEMS
) -> int | None:
    """The newest step whose `items` are as they were written, None where the run has no step; `run` is its identity.

    With `quarantine` broken steps are set aside. All processes call it together. Raises UserError if all are broken.
    """
    folder = steps_folder(workdir)
    for step in newest_first(folder):
        problem = invalid_reason(folder / str(step), run, items)
        if not problem:
            return step
        log(f"checkpoint {step} is broken: {problem}" + ("; set aside, trying the one before" if quarantine else ""))
        if quarantine and is_main_process():
            fault_points.reach("quarantine")
            set_step_aside(folder, step)
    if has_steps(workdir):
        mend = "remove the folder to start over, or restore it from a copy"
        raise UserError(f"no checkpoint in {folder} is whole; {mend}")
    return None


def restore(workdir: epath.Path, step: int, program: TrainSetup) -> tuple[TrainState, DataState]:
    """(state on the mesh that is set, data state) of a verified step."""
    target = abstract(program)
    named = by_path(target.optimizer_state)
    with contextlib.closing(ocp.Checkpointer(ocp.CompositeCheckpointHandler())) as orbax:
        found = orbax.restore(
            steps_folder(workdir) / str(step),
            args=ocp.args.Composite(
                parameters=ocp.args.StandardRestore(target.parameters),
                optimizer=ocp.args.StandardRestore(named),
            ),
        )
    _, structure = jax.tree.flatten(target.optimizer_state)
    optimizer_state = jax.tree.unflatten(structure, [found.optimizer[name] for name in named])
    data = read_data_state(workdir, step)
    step_array = jax.device_put(np.int32(data.step), target.step.sharding)
    return TrainState(step_array, found.parameters, optimizer_state), data


def read_data_state(workdir: epath.Path, step: int) -> DataState:
    """The data state of a verified step, with the rows that were left out since; of converted parameters, row 0."""
    folder = steps_folder(workdir) / str(step)
    if not (folder / "data").exists():
        return DataState(step, 0)
    saved = json.loads((folder / "data" / "metadata").read_text())
    skipped = read_object(folder / MANIFEST).get("skipped", saved["skipped"])
    return DataState(saved["step"], saved["cursor"], tuple((first, last) for first, last in skipped))


def expected_data_state(workdir: epath.Path) -> DataState:
    """The data state of the newest step, which is not verified yet; of the start of a run where none can be read."""
    try:
        return read_data_state(workdir, complete_steps(steps_folder(workdir))[-1])
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return DataState(0, 0)


def saved_beside(workdir: epath.Path, step: int) -> dict[str, Any]:
    """The manifest of a step, not verified; {} where there is none."""
    return read_object(steps_folder(workdir) / str(step) / MANIFEST)


def has_steps(workdir: epath.Path) -> bool:
    """Whether a run has a checkpoint, whole or broken, that another config must not overwrite."""
    folder = steps_folder(workdir)
    if complete_steps(folder):
        return True
    paths = paths_inside(folder)
    return any(".broken" in path.name for path in paths) or any(map(is_step_without_manifest, steps_inside(paths)))
