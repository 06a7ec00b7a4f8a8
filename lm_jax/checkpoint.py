"""The state of a run saved and restored: Orbax writes the arrays, our manifest says that a step is whole.

    <workdir>/checkpoints/<step>/{parameters,optimizer,data}  <workdir>/checkpoints/<step>/MANIFEST.json

The manifest (`manifest.py`) is written last, and names the run of config.json (`run_folder.py`); then the mark "unfinished"
is removed. `step_folders.py` finds the steps, removes old ones and sets broken ones aside.
"""

import concurrent.futures
import contextlib
import time
from collections.abc import Collection
from types import TracebackType
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
from lm_jax.files import check_room
from lm_jax.loss_scale import all_finite
from lm_jax.manifest import MANIFEST, PATIENCE, wait_for, write_manifest, write_part
from lm_jax.regular_files import is_url
from lm_jax.step_folders import (
    is_step_without_manifest,
    mark_path,
    mark_unfinished,
    read_data_state,
    remove_old_steps,
    steps_folder,
)
from lm_jax.stop import StopSignal
from lm_jax.train_state import TrainSetup, TrainState, abstract

FACTS = ("run", "pipeline", "tokenizer", "data")  # kept with every step; config.json has the shards too


def items(state: TrainState, data: DataState) -> dict[str, Any]:
    """The state as Orbax items: nested dicts of arrays, and JSON."""
    return {
        "parameters": ocp.args.StandardSave(state.parameters),
        "optimizer": ocp.args.StandardSave(by_path(state.optimizer_state)),
        "data": ocp.args.JsonSave({name: x for name, x in data._asdict().items() if x or name != "seconds"}),
    }


def by_path(tree: object) -> dict[str, Any]:
    """Any pytree as {path: leaf}, so that files on disk do not depend on the classes of a library."""
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator=".")
    return {name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


class NotFinite(Exception):  # noqa: N818  (it is no error of the program)
    """A state with inf or NaN in it, which is not saved."""


class Saver:
    """Saves steps in the background; `stop.saved` is the newest step whose manifest is on disk."""

    def __init__(self, workdir: epath.Path, config: Config, facts: dict[str, Any], stop: StopSignal | None = None):
        self.stop = stop or StopSignal()
        self.folder, self.config, self.facts = steps_folder(workdir), config, facts
        self.folder.mkdir(parents=True, exist_ok=True)
        # In a bucket each array has objects of its own: OCDBT would join them, by generations that not every store has.
        arrays = lambda: ocp.StandardCheckpointHandler(use_ocdbt=not is_url(workdir))
        handlers = {"parameters": arrays(), "optimizer": arrays(), "data": ocp.JsonCheckpointHandler()}
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(**handlers))
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._commit: concurrent.futures.Future | None = None
        self._is_finite = jax.jit(all_finite)
        self.saved_at = time.monotonic()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """After an error in the loop, waits until the step that is being saved is finished, or has failed as well."""
        if error is not None and self._commit is not None:
            concurrent.futures.wait([self._commit], PATIENCE)

    def save(
        self, state: TrainState, data: DataState, also: dict[str, Any] | None = None, keep: Collection[int] | None = ()
    ) -> None:
        """Starts to save a step; returns once the state is copied, so that its arrays may be donated.

        `also` goes into the manifest, beside the facts of the run. Steps in `keep` are not removed; None: no older step is.
        Raises NotFinite.
        """
        self.wait()
        if agree(is_main_process() and (self.folder / str(data.step) / MANIFEST).exists(), "is saved"):
            return
        if not self._is_finite(state):
            raise NotFinite(f"the state after step {data.step:,} is not finite (inf or NaN), and is not saved")
        num_bytes = sum(x.nbytes for x in jax.tree.leaves(state))
        make_way = lambda: self._make_way(data.step, num_bytes) if is_main_process() else ""
        if problem := first_answer(make_way, "room for a step"):
            raise UserError(problem)
        if jax.default_backend() == "cpu":  # a CPU array on the host is a view, which the next step would write over
            state = jax.block_until_ready(jax.tree.map(jnp.copy, state))
        self.saved_at = time.monotonic()
        self._orbax.save(self.folder / str(data.step), args=ocp.args.Composite(**items(state, data)), force=True)
        self._commit = self._thread.submit(self._finish, data.step, also or {}, keep)

    def _make_way(self, step: int, num_bytes: int) -> str:
        """Marks the step unfinished. Returns what is in its way, "" = nothing. Raises OSError without room."""
        path = self.folder / str(step)
        if path.exists() and not mark_path(self.folder, step).exists() and not is_step_without_manifest(path):
            return f"{path} is in the way of a checkpoint and was not written by a run: move it away"
        check_room(self.folder, num_bytes)
        mark_unfinished(self.folder, step)
        fault_points.reach("save.begin")
        return ""

    def _finish(self, step: int, also: dict[str, Any], keep: Collection[int] | None) -> None:
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
            if keep is not None:
                remove_old_steps(self.folder, self.config.checkpoint, keep)
        wait_for(folder / MANIFEST)  # so that all processes know the same steps
        self.stop.saved = step

    def poll(self) -> None:
        """Raises what went wrong in the background so far."""
        if self._commit is not None and self._commit.done():
            self._commit.result()

    def wait(self) -> None:
        """Returns once the manifest of the last step is on disk; raises what went wrong."""
        if self._commit is not None:
            self._commit.result()
            self._commit = None

    def close(self) -> None:
        """Waits, and ends the threads."""
        self.wait()
        self._thread.shutdown()
        self._orbax.close()


def restore(workdir: epath.Path, step: int, program: TrainSetup) -> tuple[TrainState, DataState]:
    """(state on the mesh that is set, data state) of a verified step."""
    target = abstract(program)
    named = by_path(target.optimizer_state)
    with contextlib.closing(ocp.Checkpointer(ocp.CompositeCheckpointHandler())) as orbax:
        found = orbax.restore(
            steps_folder(workdir) / str(step),
            args=ocp.args.Composite(
                parameters=ocp.args.StandardRestore(target.parameters), optimizer=ocp.args.StandardRestore(named)
            ),
        )
    _, structure = jax.tree.flatten(target.optimizer_state)
    optimizer_state = jax.tree.unflatten(structure, [found.optimizer[name] for name in named])
    data = read_data_state(workdir, step)
    step_array = jax.device_put(np.int32(data.step), target.step.sharding)
    return TrainState(step_array, found.parameters, optimizer_state), data
