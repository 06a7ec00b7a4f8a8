"""Checkpoints: Orbax writes, our manifest verifies; what is torn is removed, what is broken is set aside and said.

    <workdir>/config.json  tokenizer.{model,json,bytes}  checkpoints/<step>/{parameters,optimizer,data}  .../MANIFEST.json

A step's manifest (`manifest.py`) is written last and durably; config.json has the hashes of the files beside it. Both are
sealed, and name the same run. Where rows were left out after a step was saved, its manifest has them (`skipped`) in the place of
its data state. Order of restore: (1) the workdir has a valid step: resume; (2) `train.init_from`: parameters only; (3) fresh.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.nnx.traversals import flatten_mapping, unflatten_mapping

from lm_jax import fault_points, regular_files
from lm_jax.batch_ramp import DataState
from lm_jax.config import Config, UserError, difference, flatten, is_read, leaves, nearest, resolve_found, unflatten
from lm_jax.data import special_ids
from lm_jax.data.objectives import specials
from lm_jax.data.shards import check_plain, check_url, is_url
from lm_jax.data.tokenizer import Tokenizer
from lm_jax.data.tokenizer_files import BESIDE, load, named, read_json
from lm_jax.distributed import agree, first_answer, leads, share
from lm_jax.files import MODEL_FILES, file_hash, invalid_reason, seal, sealed, unsealed, write_whole
from lm_jax.manifest import (
    FORMAT,
    ITEMS,
    MANIFEST,
    PATIENCE,
    fault,
    read_manifest,
    wait_for,
    write_manifest,
    write_part,
)  # fmt: skip
from lm_jax.model.build import Graph, build
from lm_jax.model.lora import merged
from lm_jax.optimizer import all_finite
from lm_jax.remote import check_room, set_aside
from lm_jax.stop import NEVER, Stop
from lm_jax.train_state import Program, TrainState, abstract, make_program
from lm_jax.trainable import joined

STEP = re.compile("0|[1-9][0-9]*")  # the name of a step's folder; what is called otherwise is not ours
UNFINISHED = ".unfinished"  # `<step>.unfinished` stands beside a step while it is written, and while it is removed
RUN_FILES = (*MODEL_FILES, BESIDE, "reference.npz")  # what config.json has the hashes of
FACTS = ("run", "pipeline", "tokenizer", "data")  # kept with every step; config.json has the shards too
# What decides results from outside of a config: {name: whether a run must keep it}.
OUTSIDE = {
    "jax_enable_x64": True,
    "jax_default_prng_impl": True,
    "jax_threefry_partitionable": True,
    "jax_default_matmul_precision": True,
    "XLA_FLAGS": False,
    "jax": False,
    "jaxlib": False,
}


def items(state: TrainState, data: DataState) -> dict[str, Any]:
    """The state as Orbax items: nested dicts of arrays, and JSON."""
    return {
        "parameters": ocp.args.StandardSave(state.parameters),
        "optimizer": ocp.args.StandardSave(_named(state.optimizer_state)),
        "data": ocp.args.JsonSave(data._asdict()),
    }


def _named(tree) -> dict[str, Any]:
    """Any pytree as {path: leaf}, so that what is on disk does not depend on a library's classes."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): x
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def steps_folder(workdir: epath.Path) -> epath.Path:
    """Where the steps of a run lie; absolute, as Orbax wants it."""
    return (workdir if is_url(workdir) else epath.Path(os.path.abspath(workdir))) / "checkpoints"


class NotFinite(Exception):
    """A state that is not saved: numbers in it are inf or NaN."""


class Saver:
    """Saves in the background. `poll` raises what went wrong there; `wait` ends with the manifest on disk. `stop` is told
    what is saved."""

    def __init__(self, workdir: epath.Path, config: Config, facts: dict[str, Any], stop: Stop | None = None):
        self.stop = stop or Stop()
        self.folder, self.config, self.facts = steps_folder(workdir), config, facts
        self.folder.mkdir(parents=True, exist_ok=True)
        # In a bucket every array is objects of its own: Orbax's OCDBT would join them, by generations that not every store has.
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
        """Where something else went wrong, what is being saved is saved first, or fails as well."""
        if error is not None and self._commit is not None:
            concurrent.futures.wait([self._commit], PATIENCE)

    def save(self, state: TrainState, data: DataState, also: dict[str, Any] | None = None, retain: bool = True) -> None:
        """Returns once the state is copied; the state's arrays may then be donated.

        The manifest has `also` beside the facts of the run. Without `retain` no older step is removed. Raises NotFinite.
        """
        self.wait()
        if agree(leads() and (self.folder / str(data.step) / MANIFEST).exists(), "is saved"):
            return
        if not self._is_finite(state):
            raise NotFinite(f"the state after step {data.step:,} is not finite (inf or NaN), and is not saved")
        num_bytes = sum(x.nbytes for x in jax.tree.leaves(state))
        if problem := first_answer(lambda: self._make_way(data.step, num_bytes) if leads() else "", "room for a step"):
            raise UserError(problem)
        if jax.default_backend() == "cpu":  # a CPU array on the host is a view, which the next step would write over
            state = jax.block_until_ready(jax.tree.map(jnp.copy, state))
        self.saved_at = time.monotonic()
        self._orbax.save(self.folder / str(data.step), args=ocp.args.Composite(**items(state, data)), force=True)
        self._commit = self._thread.submit(self._finish, data.step, also or {}, retain)

    def _make_way(self, step: int, num_bytes: int) -> str:
        """Makes sure that a step can be written. Returns what is in the way of it; raises OSError where there is no room."""
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
        if leads():
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
        """Keeps the newest `keep_last` and every multiple of `keep_every`; runs after the new manifest is durable."""
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
    """From here on, until the mark is taken away, what lies under the step's name does not count: a kill leaves it so."""
    write_whole(
        mark_path(folder, step), b"this step is being written, or removed; what there is of it does not count\n"
    )


def remove_step(folder: epath.Path, step: int) -> None:
    mark_unfinished(folder, step)
    fault_points.reach("retain")
    (folder / str(step)).rmtree()
    mark_path(folder, step).unlink()


def complete_steps(folder: epath.Path) -> list[int]:
    """Steps that have a manifest, in order."""
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    steps = {int(name) for name in names if STEP.fullmatch(name) and f"{name}{UNFINISHED}" not in names}
    return sorted(step for step in steps if (folder / str(step) / MANIFEST).exists())


def go_back(workdir: epath.Path, data: DataState) -> None:
    """Makes the step of `data`, which is whole, the newest, and its rows without `data.skipped`.

    Later steps go first, the newest of them first: a kill in between leaves a run that comes here again. Then the manifest says
    what is left out, in the place of the data state that was saved, and is replaced in one piece.
    """
    folder = steps_folder(workdir)
    for step in reversed(complete_steps(folder)):
        if step > data.step:
            remove_step(folder, step)
    manifest = read_manifest(folder / str(data.step))
    write_whole(folder / str(data.step) / MANIFEST, sealed(manifest | {"skipped": data.skipped}))


def clean(workdir: epath.Path, say: Callable[[str], None]) -> None:
    """Removes what a kill left half-written, and sets aside a step that has lost its manifest; what is not ours stays."""
    folder = steps_folder(workdir)
    names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    for name in names:
        step, _, rest = name.partition(".")
        if not STEP.fullmatch(step):
            continue
        if rest.startswith("orbax-checkpoint-tmp"):
            (folder / name).rmtree()
            say(f"removed {name}: a checkpoint that was never finished")
        elif f".{rest}" == UNFINISHED:
            if step in names:
                (folder / step).rmtree()
                say(f"removed {step}: a checkpoint that was never finished")
            (folder / name).unlink()
        elif not rest and f"{name}{UNFINISHED}" not in names and is_step_without_manifest(folder / name):
            to = set_step_aside(folder, int(step))
            say(f"checkpoint {step} is broken: {MANIFEST} is missing; set aside as {to.name}")


def is_step_without_manifest(path: epath.Path) -> bool:
    """Whether a folder with a step's name holds what we write there, or nothing at all: another one is the user's."""
    if not path.is_dir() or (path / MANIFEST).exists():
        return False
    names = {inside.name for inside in path.iterdir()}
    return not names or bool(names & {"parameters", "optimizer", "data", "_CHECKPOINT_METADATA"})


def set_step_aside(folder: epath.Path, step: int) -> epath.Path:
    """The folder of a step under the name of a broken one. Returns its new path."""
    number = len(list(folder.glob(f"{step}.broken*")))
    to = folder / (f"{step}.broken" + f"-{number}" * bool(number))
    set_aside(folder / str(step), to)
    return to


def newest_first(folder: epath.Path) -> Iterator[int]:
    """The steps that have a manifest, as the leading process finds them, on every process: all ask for the next one together."""
    step = sys.maxsize
    while True:
        earlier = [found for found in complete_steps(folder) if found < step] if leads() else []
        if (step := agree(max(earlier, default=NEVER), "a step")) == NEVER:
            return
        yield step


def newest_valid(
    workdir: epath.Path, say: Callable[[str], None], quarantine: bool, run: str = "", items: Collection[str] = ITEMS
) -> int | None:
    """The newest step of a run of which the `items` are as written, None where there never was one; all processes ask together.

    Raises UserError if all are broken.
    """
    folder = steps_folder(workdir)
    for step in newest_first(folder):
        problem = fault(folder / str(step), run, items)
        if not problem:
            return step
        say(f"checkpoint {step} is broken: {problem}" + ("; set aside, trying the one before" if quarantine else ""))
        if quarantine and leads():
            fault_points.reach("quarantine")
            set_step_aside(folder, step)
    if has_steps(workdir):
        raise UserError(
            f"no checkpoint in {folder} is whole; remove the folder to start over, or restore it from a copy"
        )
    return None


def restore(workdir: epath.Path, step: int, program: Program) -> tuple[TrainState, DataState]:
    """The state of a verified step, on the mesh that is set."""
    target = abstract(program)
    named = _named(target.optimizer_state)
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
    """That of a verified step: as it was saved, but for the rows that were left out since; nothing was read where the parameters
    are from elsewhere."""
    folder = steps_folder(workdir) / str(step)
    if not (folder / "data").exists():
        return DataState(step, 0)
    saved = json.loads((folder / "data" / "metadata").read_text())
    skipped = read_json(folder / MANIFEST).get("skipped", saved["skipped"])
    return DataState(saved["step"], saved["cursor"], tuple((first, last) for first, last in skipped))


def expected_data_state(workdir: epath.Path) -> DataState:
    """That of the newest step, which is not verified yet; the start of the run where none can be read."""
    try:
        return read_data_state(workdir, complete_steps(steps_folder(workdir))[-1])
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return DataState(0, 0)


def saved_beside(workdir: epath.Path, step: int) -> dict[str, Any]:
    """What the manifest of a step says, {} where there is none."""
    return read_json(steps_folder(workdir) / str(step) / MANIFEST)


def write_config(workdir: epath.Path, config: Config, origins: dict[str, dict], facts: dict[str, Any]) -> None:
    """`config.json`: the resolved values, where each that is no default came from, and what else decides the results.

    It is written after the files beside it, whose hashes it has.
    """
    files = {name: file_hash(workdir / name) for name in RUN_FILES if (workdir / name).exists()}
    content = {"format": FORMAT, "config": flatten(config), "origins": origins, **facts, "outside": outside()}
    write_whole(workdir / "config.json", sealed(content | {"files": files}))


def run_identity(saved: dict[str, Any], config: Config, facts: dict[str, Any]) -> str:
    """What config.json and the steps of a run have in common; made of what a run must keep when it starts, kept then."""
    kept = {path: value for path, value in flatten(config).items() if leaves()[path].metadata["fixed"]}
    return saved.get("run") or seal([kept, facts])[:16]


def outside() -> dict[str, Any]:
    """The settings of `OUTSIDE` as they are in this process."""
    versions = {"jax": jax.__version__, "jaxlib": jaxlib.version.__version__}
    flags = os.environ.get("XLA_FLAGS", "").split()
    given = {"XLA_FLAGS": " ".join(sorted(flag for flag in flags if "host_platform_device_count" not in flag))}
    return {name: (versions | given).get(name, getattr(jax.config, name, None)) for name in OUTSIDE}


def write_run_file(workdir: epath.Path, name: str, content: bytes, say: Callable[[str], None]) -> None:
    """A file beside config.json, whole or not at all; written anew, and said, where it is not as it was."""
    assert name in RUN_FILES, name
    path = workdir / name
    if path.exists() and path.read_bytes() != content:
        say(f"{name} was not as it was written: it is written again")
    if not path.exists() or path.read_bytes() != content:
        write_whole(path, content)


def has_steps(workdir: epath.Path) -> bool:
    """Whether there is something that another config would lose: a checkpoint, whole or broken."""
    folder = steps_folder(workdir)
    if complete_steps(folder):
        return True
    paths = list(folder.iterdir()) if folder.exists() else []
    names = {path.name for path in paths}
    lost = (path for path in paths if STEP.fullmatch(path.name) and f"{path.name}{UNFINISHED}" not in names)
    return any(".broken" in name for name in names) or any(map(is_step_without_manifest, lost))


def read_config(workdir: epath.Path) -> dict[str, Any]:
    """The content of `config.json`; a key that the run was started without has its default.

    Raises UserError where it is not as it was written.
    """
    path = workdir / "config.json"
    try:
        content = unsealed(regular_files.read_bytes(path), FORMAT)
        content["config"] = flatten(Config()) | content["config"]
    except (FileNotFoundError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is no config of a run; use another --workdir") from None
    except ValueError as error:
        raise UserError(
            f"{path} is no config of a run: it {error}\nput it back from a copy, or use another --workdir"
        ) from None
    return content


def check_run_files(workdir: epath.Path, content: dict[str, Any]) -> None:
    """Raises UserError where a file beside config.json is not as config.json says."""
    files = content.get("files", {})
    for name, expected in files.items():
        if problem := invalid_reason(workdir / name, expected):
            raise UserError(f"{workdir / name} {problem}; put it back from a copy")
    if found := [name for name in RUN_FILES if files and name not in files and (workdir / name).exists()]:
        raise UserError(f"{workdir / found[0]} is not of this run, which was written without it; take it away")


def check_resume(workdir: epath.Path, saved: dict[str, Any], config: Config, facts: dict[str, Any]) -> list[str]:
    """Lines on what changed since the run was started. Raises UserError for what a run must keep."""
    here = flatten(config)
    changed = difference(saved["config"], here)
    changed = {path: both for path, both in changed.items() if path not in leaves() or is_read(here, path)}
    fixed = {
        path: values for path, values in changed.items() if path not in leaves() or leaves()[path].metadata["fixed"]
    }
    if fixed:
        shown = [line for path, (old, new) in fixed.items() for line in describe(path, old, new)]
        raise UserError(
            f"{workdir} holds a run with another config:\n{few(shown)}\nuse another --workdir, or its config"
        )
    if different := other_data(saved, facts):
        raise UserError(
            f"{workdir} holds a run on other data, or of other settings:\n{few(different)}\n"
            "use another --workdir, or what the run had"
        )
    now = {f"config.{path}": values for path, values in changed.items()}
    before, here = saved.get("outside", {}), outside()
    now |= {name: (old, here.get(name)) for name, old in before.items() if old != here.get(name)}
    return [f"changed on resume: {name}: {old!r} -> {new!r}" for name, (old, new) in now.items()]


def few(lines: list[str]) -> str:
    """The first three of them, and how many more there are."""
    return "\n".join(lines[:3]) + f" (+{len(lines) - 3} more)" * (len(lines) > 3)


def describe(path: str, old: Any, new: Any) -> list[str]:
    """How a config value differs; for the mixture which source, and which weight."""
    if path != "data.sources" or not old:
        return [f"config.{path}: {old!r} there, {new!r} here"]
    there, here = ({place: weight for place, weight in sources} for sources in (old, new))
    weights = {place: (there.get(place, "none"), here.get(place, "none")) for place in {**there, **here}}
    lines = [
        f"config.{path}: weight of {place!r}: {a} there, {b} here"
        for place, (a, b) in weights.items()
        if json.dumps(a) != json.dumps(b)
    ]
    return lines or [f"config.{path}: the order of the sources"]


def other_data(saved: dict[str, Any], facts: dict[str, Any]) -> list[str]:
    """What a run was started on that is not what is here now: tokenizer, version, or shards by name."""
    there, here = saved.get("outside", {}), outside()
    lines = [
        f"{name} {there[name]!r} there, {here[name]!r} here"
        for name, kept in OUTSIDE.items()
        if kept and there.get(name, here[name]) != here[name]
    ]
    lines += [
        f"{name} {saved.get(name)!r} there, {facts[name]!r} here"
        for name in ("pipeline", "tokenizer")
        if saved.get(name) != facts[name]
    ]
    for place, here in facts["shards"].items():
        there = saved.get("shards", {}).get(place, {})
        lines += [
            f"{place}: {name} {there.get(name, 'none')} there, {here.get(name, 'none')} here"
            for name in sorted({*there, *here})
            if there.get(name) != here.get(name)
        ]
    return lines


class Located(NamedTuple):
    """A MODEL, as every command reads it: what only the place of its training needed is as it is by default (`resolve_found`)."""

    workdir: epath.Path
    step: int
    config: Config
    tokenizer: Tokenizer
    described: Any = None  # of a Hugging Face folder, what its config.json says
    base: "Located | None" = None  # what has the other parameters, where these are only the ones that were trained

    @property
    def num_pieces(self) -> int:
        """Of the model: those of its tokenizer, and what its objective adds."""
        added = lambda: specials(self.tokenizer, self.config.data.objective).num_pieces
        return self.described.num_pieces if self.described else added()

    @property
    def special_ids(self) -> special_ids.SpecialIds:
        """What begins and ends a text."""
        return special_ids.read(self.workdir, self.tokenizer)


def locate(model: str, say: Callable[[str], None] = print) -> Located:
    """MODEL: a run (`runs/x`) or a step of it (`runs/x@12000`), what is read of it verified; or a Hugging Face folder.

    Where there are several processes, all of them ask. Raises UserError.
    """
    check_url("--model", model)
    place, _, wanted = (model, "", "") if (epath.Path(model) / "config.json").exists() else model.rpartition("@")
    place, wanted = (place, wanted) if place else (wanted or model, "")
    workdir = epath.Path(place)
    check_plain(str(workdir))
    if not (workdir / "config.json").exists():
        siblings = [str(path) for path in workdir.parent.glob("*") if (path / "config.json").exists()]
        raise UserError(f"--model {model}: {place} is not a run (it has no config.json){nearest(place, siblings)}")
    if "model_type" in read_json(workdir / "config.json"):
        return locate_hugging_face(workdir)
    content = read_config(workdir)
    check_run_files(workdir, content)
    if not has_steps(workdir):
        raise UserError(f"--model {model}: the run has no checkpoint yet")
    config = resolve_found(unflatten(content["config"]))
    base = locate_base(workdir, content["base"], say) if "base" in content else None
    found = Located(workdir, NEVER, config, load(str(workdir)), None, base)
    return found._replace(step=locate_step(found, model, wanted, content.get("run", ""), say))


def locate_step(found: Located, model: str, wanted: str, run: str, say: Callable[[str], None]) -> int:
    """The step that is `wanted` of a run ("": the newest), what is read of it verified. Raises UserError."""
    folder = steps_folder(found.workdir)
    steps, items = complete_steps(folder), items_read(found)
    if not wanted:
        step = newest_valid(found.workdir, say, quarantine=False, run=run, items=items)
        assert step is not None
        return step
    if not STEP.fullmatch(wanted) or int(wanted) not in steps:
        raise UserError(f"--model {model}: no step {wanted!r}; the run has {', '.join(map(str, steps))}")
    if problem := fault(folder / wanted, run, items):
        others = ", ".join(str(step) for step in steps if step != int(wanted)) or "none"
        raise UserError(f"--model {model}: {problem}; whole are {others}")
    return int(wanted)


def items_read(located: Located) -> frozenset[str]:
    """What of a step is read for the parameters that are the model: their average is in the optimizer's state, where a run keeps
    one of its own; the parameters themselves, then, only for what was not trained."""
    if not located.config.optimizer.ema or located.base:
        return frozenset({"parameters"})
    program = make_program(located.config, located.num_pieces)
    has_frozen = len(program.trained) < len(program.graph.declarations)
    return frozenset({"optimizer", *["parameters"] * has_frozen})


def locate_base(workdir: epath.Path, said: dict[str, str], say: Callable[[str], None]) -> Located:
    """The model over which a folder's parameters were trained, as its config.json names it. Raises UserError."""
    where = f"put it back, or write its new place into {workdir / 'config.json'} (base, place)"
    try:
        found = locate(said["place"], say)
    except RecursionError:
        raise UserError(f"{workdir}: its base is itself, or leads back to it\n{where}") from None
    except UserError as error:
        raise UserError(f"{workdir} needs its base: {str(error).removeprefix('--model ')}\n{where}") from None
    if fingerprint(found) != said["hash"]:
        raise UserError(f"{workdir} was trained over another model than {said['place']} is now\n{where}")
    return found


def context_of(located: Located) -> int:
    """The longest text, in tokens, that a model was made for: a run that started from another model keeps that one's."""
    kept = {} if located.described else read_config(located.workdir)
    return max(kept.get("context", 0), located.config.data.sequence_length)


def fingerprint(located: Located) -> str:
    """sha256 over what is known of the files that hold a model's arrays, wherever they lie."""
    if located.described:
        from lm_jax.convert import safetensors

        names = safetensors.weight_files(str(located.workdir))
        files = {name: file_hash(located.workdir / name) for name in names}
    else:
        files = read_json(steps_folder(located.workdir) / str(located.step) / MANIFEST)["files"]
    below = fingerprint(located.base) if located.base else ""
    return hashlib.sha256(json.dumps([files, below], sort_keys=True).encode()).hexdigest()


def locate_hugging_face(folder: epath.Path) -> Located:
    """A folder with config.json, safetensors and a tokenizer. The one place where the core looks up `convert`."""
    from lm_jax.convert import hugging_face

    described = hugging_face.read_description(str(folder))
    with named(f"--model {folder}: its tokenizer"):
        tokenizer = load(str(folder))
    return Located(folder, 0, described.config, tokenizer, described)


def graph_of(located: Located) -> Graph:
    """The model of a run, its adapters merged."""
    model = dataclasses.replace(located.config.model, lora_rank=0)
    return build(model, located.num_pieces, located.config.data.sequence_length)


def load_parameters(located: Located) -> tuple[Graph, dict]:
    """The model of a run and its parameters on the mesh that is set, adapters merged: their average where the run keeps one."""
    program, parameters = load_as_trained(located)
    model = located.config.model
    if not model.lora_rank:
        return program.graph, parameters
    plain = build(dataclasses.replace(model, lora_rank=0), located.num_pieces, located.config.data.sequence_length)
    merge = jax.jit(lambda parameters: merged(parameters, program.graph.declarations, model))
    return plain, merge(parameters)


def load_as_trained(located: Located) -> tuple[Program, dict]:
    """What trains a MODEL, and the parameters that are the model, adapters apart."""
    program = make_program(located.config, located.num_pieces)
    target = abstract(program)
    if located.described:
        from lm_jax.convert import hugging_face

        return program, hugging_face.read_on_mesh(str(located.workdir), located.described, target.parameters)
    trained, frozen = program.split(target.parameters)
    # Only the average of the optimizer's state is read: {"3.average.embedding.table": ..., ...}.
    named = {name: x for name, x in _named(target.optimizer_state).items() if ".average." in name}
    items, args = items_read(located), dict[str, Any]()
    if "parameters" in items:
        args["parameters"] = ocp.args.StandardRestore(trained if located.base else target.parameters)
    if "optimizer" in items:
        restore_args = ocp.checkpoint_utils.construct_restore_args(named)
        args["optimizer"] = ocp.args.PyTreeRestore(named, restore_args, partial_restore=True)
    with contextlib.closing(ocp.Checkpointer(ocp.CompositeCheckpointHandler())) as orbax:
        found = orbax.restore(steps_folder(located.workdir) / str(located.step), args=ocp.args.Composite(**args))
    parameters = found.parameters if "parameters" in items else {}
    if "optimizer" in items:
        average = [found.optimizer[name] for name in named]
        parameters = joined(parameters, jax.tree.unflatten(jax.tree.structure(trained), average))
    return program, joined(under(located.base, frozen), parameters) if located.base else parameters


def under(base: Located, frozen: dict) -> dict:
    """The parameters of the base that are wanted, like `frozen`: its first places, and not its heads."""
    found = flatten_mapping(load_parameters(base)[1])
    wanted = flatten_mapping(frozen)
    return unflatten_mapping({path: jax.device_put(found[path][: len(x)], x.sharding) for path, x in wanted.items()})
