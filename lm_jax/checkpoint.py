"""Checkpoints: Orbax writes, our manifest verifies; what is torn is removed, what is broken is set aside and said.

    <workdir>/config.json  tokenizer.{model,json,bytes}  checkpoints/<step>/{parameters,optimizer,data}  .../MANIFEST.json

The manifest is written last and durably: a step without one never was. Order of restore: (1) the workdir has a valid step:
resume; (2) `train.init_from`: parameters only; (3) fresh.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.nnx.traversals import flatten_mapping, unflatten_mapping

from lm_jax import __version__, files
from lm_jax.config import Config, UserError, difference, flatten, leaves, nearest, resolve, unflatten
from lm_jax.data.objectives import specials
from lm_jax.data.shards import check_url, file_hash, is_url
from lm_jax.data.sources import files_below
from lm_jax.data.tokenizer import Tokenizer, load, named
from lm_jax.distributed import leads
from lm_jax.model.adapters import merged
from lm_jax.model.graph import Graph, build
from lm_jax.places import set_aside, write_whole
from lm_jax.train_state import Program, TrainState, abstract, make_program
from lm_jax.trained import joined

FORMAT = 1
MANIFEST = "MANIFEST.json"
PATIENCE = 600  # seconds that one process waits for a file of another
FACTS = ("pipeline", "tokenizer", "data")  # of the mixture, kept with every step; config.json has its shards too


class DataState(NamedTuple):
    """Where the training stream is: after `step` updates the next row is `cursor`; `skipped` row ranges were dropped."""

    step: int
    cursor: int
    skipped: tuple[tuple[int, int], ...] = ()


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


class Saver:
    """Saves in the background. `poll` raises what went wrong there; `wait` ends with the manifest on disk."""

    def __init__(self, workdir: epath.Path, config: Config, facts: dict[str, Any]):
        self.folder, self.config, self.facts = steps_folder(workdir), config, facts
        self.folder.mkdir(parents=True, exist_ok=True)
        # In a bucket every array is objects of its own: Orbax's OCDBT would join them, by generations that not every store has.
        arrays = lambda: ocp.StandardCheckpointHandler(use_ocdbt=not is_url(workdir))
        handlers = {"parameters": arrays(), "optimizer": arrays(), "data": ocp.JsonCheckpointHandler()}
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(**handlers))
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._commit: concurrent.futures.Future | None = None
        self.saved_at = time.monotonic()

    def save(self, state: TrainState, data: DataState) -> None:
        """Returns once the state is copied; the state's arrays may then be donated."""
        self.wait()
        if (self.folder / str(data.step) / MANIFEST).exists():
            return
        if jax.default_backend() == "cpu":  # a CPU array on the host is a view, which the next step would write over
            state = jax.block_until_ready(jax.tree.map(jnp.copy, state))
        self.saved_at = time.monotonic()
        self._orbax.save(self.folder / str(data.step), args=ocp.args.Composite(**items(state, data)), force=True)
        self._commit = self._thread.submit(self._finish, data.step)

    def _finish(self, step: int) -> None:
        self._orbax.wait_until_finished()
        folder = self.folder / str(step)
        if jax.process_count() > 1:
            write_part(folder)
        if leads():
            write_manifest(folder, {"step": step} | {name: self.facts[name] for name in FACTS})
            self._retain()
        wait_for(folder / MANIFEST)  # so that all processes know the same steps

    def _retain(self) -> None:
        """Keeps the newest `keep_last` and every multiple of `keep_every`; runs after the new manifest is durable."""
        settings = self.config.checkpoint
        steps = complete_steps(self.folder)
        for step in steps[: -settings.keep_last]:
            if not settings.keep_every or step % settings.keep_every:
                (self.folder / str(step) / MANIFEST).unlink()  # from here on torn: a kill in between is cleaned up
                (self.folder / str(step)).rmtree()

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


def files_of(folder: epath.Path) -> dict[str, dict[str, int | str]]:
    """{relative path: size and sha256} of every file of a step but its manifest."""
    paths = sorted(path for path in files_below(folder) if not path.name.startswith("MANIFEST."))
    return {os.path.relpath(path, folder): file_hash(path) for path in paths}


def writer_of(path: str) -> int:
    """The process that wrote a file of a step: Orbax keeps the arrays' parts of process k in `ocdbt.process_k`."""
    found = re.search(r"ocdbt\.process_(\d+)", path)
    return int(found[1]) if found else 0


def part_of(folder: epath.Path, process: int) -> epath.Path:
    return folder / f"MANIFEST.p{process}.json"


def write_part(folder: epath.Path) -> None:
    """`MANIFEST.p<k>.json`: hashes of what this process wrote, so that no process reads what the others did."""
    mine = {
        name: file_hash(folder / name)
        for name in (os.path.relpath(path, folder) for path in files_below(folder))
        if writer_of(name) == jax.process_index() and not os.path.basename(name).startswith("MANIFEST.")
    }
    write_whole(part_of(folder, jax.process_index()), json.dumps(mine).encode())


def wait_for(path: epath.Path) -> None:
    """Until another process has written it. The processes of a run share its workdir."""
    start = time.monotonic()
    while not path.exists():
        if time.monotonic() - start > PATIENCE:
            raise TimeoutError(f"{path} was not written in {PATIENCE} s: is the workdir shared by all processes?")
        time.sleep(0.05)


def written_files(folder: epath.Path) -> dict[str, dict[str, int | str]]:
    """`files_of`, joined from what the processes say that they wrote where there are several."""
    if jax.process_count() == 1:
        return files_of(folder)
    parts = [part_of(folder, process) for process in range(jax.process_count())]
    for part in parts:
        wait_for(part)
    return {name: file for part in parts for name, file in json.loads(part.read_text()).items()}


def write_manifest(folder: epath.Path, facts: dict[str, Any]) -> None:
    versions = {module.__name__: module.__version__ for module in (jax, ocp)} | {"lm_jax": __version__}
    manifest = {"format": FORMAT, **facts, "versions": versions, "files": written_files(folder)}
    write_whole(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
    for path in (folder, folder.parent) if not is_url(folder) else ():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def complete_steps(folder: epath.Path) -> list[int]:
    """Steps that have a manifest, in order."""
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return sorted(int(name) for name in names if re.fullmatch("[0-9]+", name) and (folder / name / MANIFEST).exists())


def fault(folder: epath.Path) -> str:
    """What is wrong with a step, "" where every file is as it was written."""
    try:
        manifest = files.read_json(folder / MANIFEST)
        expected = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} cannot be read"
    if manifest.get("format") != FORMAT:
        return f"{MANIFEST} has format {manifest.get('format')!r}, this version reads {FORMAT}"
    found = files_of(folder)
    for name in sorted({*expected, *found}):
        if name not in found:
            return f"{name} is missing"
        if found[name] != expected.get(name):
            return f"{name} is not as it was written"
    return ""


def clean(workdir: epath.Path, say: Callable[[str], None]) -> None:
    """Removes what a kill left half-written: steps without a manifest, and Orbax's temporary folders."""
    folder = steps_folder(workdir)
    for path in folder.iterdir() if folder.exists() else ():
        torn = path.name.isdigit() and not (path / MANIFEST).exists()
        if torn or "orbax-checkpoint-tmp" in path.name:
            say(f"removed {path.name}: a checkpoint that was never finished")
            path.rmtree()


def newest_valid(workdir: epath.Path, say: Callable[[str], None], quarantine: bool) -> int | None:
    """The newest step whose files are as written, None where there never was one. Raises UserError if all are broken."""
    folder = steps_folder(workdir)
    steps = complete_steps(folder)
    for step in reversed(steps):
        problem = fault(folder / str(step))
        if not problem:
            return step
        say(f"checkpoint {step} is broken: {problem}" + ("; set aside, trying the one before" if quarantine else ""))
        if quarantine:
            number = len(list(folder.glob(f"{step}.broken*")))
            set_aside(folder / str(step), folder / (f"{step}.broken" + f"-{number}" * bool(number)))
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
                data=ocp.args.JsonRestore(),
            ),
        )
    _, structure = jax.tree.flatten(target.optimizer_state)
    optimizer_state = jax.tree.unflatten(structure, [found.optimizer[name] for name in named])
    data = DataState(found.data["step"], found.data["cursor"], tuple(map(tuple, found.data["skipped"])))
    step_array = jax.device_put(np.int32(data.step), target.step.sharding)
    return TrainState(step_array, found.parameters, optimizer_state), data


def write_config(workdir: epath.Path, config: Config, origins: dict[str, dict], facts: dict[str, Any]) -> None:
    """`config.json`: the resolved values, and for each that is no default where it came from."""
    content = {"format": FORMAT, "config": flatten(config), "origins": origins, **facts}
    write_whole(workdir / "config.json", json.dumps(content, indent=1).encode())


def write_tokenizer(workdir: epath.Path, tokenizer: Tokenizer) -> None:
    """The tokenizer's file under its own name, whole or not at all."""
    path = workdir / tokenizer.file_name
    if not path.exists() or path.read_bytes() != tokenizer.model:
        write_whole(path, tokenizer.model)


def has_steps(workdir: epath.Path) -> bool:
    """Whether there is something that another config would lose: a finished checkpoint, whole or broken."""
    folder = steps_folder(workdir)
    return bool(complete_steps(folder)) or (folder.exists() and any(folder.glob("*.broken*")))


def read_config(workdir: epath.Path) -> dict[str, Any]:
    """The content of `config.json`; a key that the run was started without has its default. Raises UserError."""
    try:
        content = files.read_json(workdir / "config.json")
        content["config"] = flatten(Config()) | content["config"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{workdir / 'config.json'} is no config of a run; use another --workdir") from None
    return content


def check_resume(workdir: epath.Path, saved: dict[str, Any], config: Config, facts: dict[str, Any]) -> list[str]:
    """Lines on what changed since the run was started. Raises UserError for what a run must keep."""
    changed = difference(saved["config"], flatten(config))
    fixed = {
        path: values for path, values in changed.items() if path not in leaves() or leaves()[path].metadata["fixed"]
    }
    if fixed:
        shown = [line for path, (old, new) in fixed.items() for line in describe(path, old, new)]
        raise UserError(
            f"{workdir} holds a run with another config:\n{few(shown)}\nuse another --workdir, or its config"
        )
    if different := other_data(saved, facts):
        raise UserError(f"{workdir} holds a run on other data:\n{few(different)}\nuse another --workdir, or its data")
    return [f"changed on resume: config.{path}: {old!r} -> {new!r}" for path, (old, new) in changed.items()]


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
    lines = [
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


def locate(model: str, say: Callable[[str], None] = print) -> Located:
    """MODEL: a run (`runs/x`) or a step of it (`runs/x@12000`), verified; or a Hugging Face folder. Raises UserError."""
    check_url("--model", model)
    place, _, wanted = (model, "", "") if (epath.Path(model) / "config.json").exists() else model.rpartition("@")
    place, wanted = (place, wanted) if place else (wanted or model, "")
    workdir = epath.Path(place)
    if not (workdir / "config.json").exists():
        siblings = [str(path) for path in workdir.parent.glob("*") if (path / "config.json").exists()]
        raise UserError(f"--model {model}: {place} is not a run (it has no config.json){nearest(place, siblings)}")
    if not (content := read_json(workdir / "config.json")):
        raise UserError(
            f"--model {model}: {workdir / 'config.json'} cannot be read as a JSON object; restore it from a copy"
        )
    if "model_type" in content:
        return locate_hugging_face(workdir)
    steps = complete_steps(workdir / "checkpoints")
    if not steps:
        raise UserError(f"--model {model}: the run has no checkpoint yet")
    if not wanted:
        step = newest_valid(workdir, say, quarantine=False)
        assert step is not None
    elif re.fullmatch("[0-9]{1,18}", wanted) and int(wanted) in steps:
        step = int(wanted)
        if problem := fault(workdir / "checkpoints" / str(step)):
            raise UserError(
                f"--model {model}: {problem}; whole are {', '.join(str(s) for s in steps if s != step) or 'none'}"
            )
    else:
        raise UserError(f"--model {model}: no step {wanted!r}; the run has {', '.join(map(str, steps))}")
    content = read_config(workdir)
    config = resolve(unflatten(content["config"]))
    base = locate_base(workdir, content["base"], say) if "base" in content else None
    return Located(workdir, step, config, load(str(workdir)), None, base)


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


def fingerprint(located: Located) -> str:
    """sha256 over what is known of the files that hold a model's arrays, wherever they lie."""
    if located.described:
        files = {path.name: file_hash(path) for path in located.workdir.glob("*.safetensors")}
    else:
        files = read_json(steps_folder(located.workdir) / str(located.step) / MANIFEST)["files"]
    below = fingerprint(located.base) if located.base else ""
    return hashlib.sha256(json.dumps([files, below], sort_keys=True).encode()).hexdigest()


def read_json(path: epath.Path) -> dict[str, Any]:
    """An object in a file, {} where there is none that can be read."""
    try:
        content = files.read_json(path)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def locate_hugging_face(folder: epath.Path) -> Located:
    """A folder with config.json, safetensors and a tokenizer. The one place where the core looks up `convert`."""
    from lm_jax.convert import hugging_face

    described = hugging_face.read_description(str(folder))
    with named(f"--model {folder}: its tokenizer"):
        tokenizer = load(str(folder))
    if tokenizer.num_pieces > described.num_pieces:
        raise UserError(
            f"--model {folder}: its tokenizer has {tokenizer.num_pieces} pieces, its config.json says {described.num_pieces}"
        )
    return Located(folder, 0, described.config, tokenizer, described)


def graph_of(located: Located) -> Graph:
    """The model of a run, its adapters merged. The attention backend was right where it was trained; here the best of this
    platform is."""
    model = dataclasses.replace(located.config.model, attention="auto", lora_rank=0)
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

        found = hugging_face.read_parameters(str(located.workdir), located.described)
        return program, jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), found, target.parameters)
    trained, frozen = program.split(target.parameters)
    # Only the average of the optimizer's state is read: {"3.average.embedding.table": ..., ...}.
    named = {name: x for name, x in _named(target.optimizer_state).items() if ".average." in name and not located.base}
    args: dict[str, Any] = {}
    if frozen or not named:
        args["parameters"] = ocp.args.StandardRestore(trained if located.base else target.parameters)
    if named:
        restore_args = ocp.checkpoint_utils.construct_restore_args(named)
        args["optimizer"] = ocp.args.PyTreeRestore(named, restore_args, partial_restore=True)
    with contextlib.closing(ocp.Checkpointer(ocp.CompositeCheckpointHandler())) as orbax:
        found = orbax.restore(steps_folder(located.workdir) / str(located.step), args=ocp.args.Composite(**args))
    parameters = found.parameters if "parameters" in args else {}
    if named:
        average = [found.optimizer[name] for name in named]
        parameters = joined(parameters, jax.tree.unflatten(jax.tree.structure(trained), average))
    return program, joined(under(located.base, frozen), parameters) if located.base else parameters


def under(base: Located, frozen: dict) -> dict:
    """The parameters of the base that are wanted, like `frozen`: its first places, and not its heads."""
    found = flatten_mapping(load_parameters(base)[1])
    wanted = flatten_mapping(frozen)
    return unflatten_mapping({path: jax.device_put(found[path][: len(x)], x.sharding) for path, x in wanted.items()})
