"""MODEL -> its config, tokenizer and parameters: a run, a step of a run, or a Hugging Face folder.

`locate` finds and verifies it, `load_parameters` reads its parameters onto the mesh that is set. Every command that
takes `--model`, and `config.train.init_from`, goes through here.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import itertools
import json
import re
import shlex
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from etils import epath
from flax.nnx.traversals import flatten_mapping, unflatten_mapping

from lm_jax import best, metrics_file
from lm_jax.checkpoint import by_path
from lm_jax.config import Config, unflatten
from lm_jax.config_check import resolve_found
from lm_jax.data import special_ids
from lm_jax.data.objectives import specials
from lm_jax.data.tokenizer import Tokenizer
from lm_jax.data.tokenizer_files import load, named
from lm_jax.errors import UserError, nearest
from lm_jax.files import file_hash
from lm_jax.manifest import MANIFEST, invalid_reason
from lm_jax.model.build import ModelDef, build
from lm_jax.model.lora import merged
from lm_jax.parts import ORDINARY, Parts, of_run, of_source
from lm_jax.regular_files import check_plain, check_url, read_object
from lm_jax.run_folder import CONFIG, check_run_files, read_config
from lm_jax.step_folders import STEP, complete_steps, has_steps, newest_valid, steps_folder
from lm_jax.stop import NEVER
from lm_jax.train_state import TrainSetup, abstract, make_program
from lm_jax.trainable import merge_params

MODEL = "a run (runs/x), a step of it (runs/x@12000, runs/x@best), or a Hugging Face folder"


def convert_modules() -> tuple[ModuleType, ModuleType]:
    """(hugging_face, safetensors) of the wing `convert`, looked up here alone, when a MODEL needs them."""
    from lm_jax.convert import hugging_face, safetensors

    return hugging_face, safetensors


def add_flags(parser: argparse.ArgumentParser, model: str = MODEL) -> None:
    """--model and --parts, as every command has them that reads a MODEL."""
    parser.add_argument("--model", required=True, help=model)
    parser.add_argument(
        "--parts", default="", help="the file of the parts that the run was trained with; it is executed"
    )


def of_flags(flags: argparse.Namespace, log: Callable[[str], None]) -> "ModelRef":
    """The MODEL that these flags name. Raises UserError, also where it has no use for --parts."""
    return locate_with(flags.model, flags.parts, log)


def locate_with(model: str, parts: str, log: Callable[[str], None]) -> "ModelRef":
    """`locate`, which raises UserError also where the MODEL has no use for the file `parts`."""
    found = locate(model, log, parts)
    if parts and not found.parts.replaced:
        raise UserError(f"--parts {parts}: {model} was trained with the ordinary parts; leave it out")
    return found


class ModelRef(NamedTuple):
    """A MODEL that was found. Its config has defaults for what concerns only the machine of its training."""

    workdir: epath.Path
    step: int
    config: Config
    tokenizer: Tokenizer
    described: Any = None  # of a Hugging Face folder: what its config.json says (`hugging_face.Description`)
    base: "ModelRef | None" = None  # of a folder with the trained parameters alone: the MODEL that has the frozen ones
    parts: Parts = ORDINARY  # that a run was trained with

    @property
    def vocab_size(self) -> int:
        """The vocabulary of the model: that of its tokenizer, and the ids that its objective adds."""
        if self.described:
            return self.described.vocab_size
        return specials(self.tokenizer, self.config.data.objective).vocab_size

    @property
    def special_ids(self) -> special_ids.SpecialIds:
        """The tokens that begin and end a text."""
        return special_ids.read(self.workdir, self.tokenizer)


def locate(model: str, log: Callable[[str], None] = print, parts: str | Parts = "") -> ModelRef:
    """Finds and verifies MODEL: a run (`runs/x`), a step of it (`runs/x@12000`, `runs/x@best`) or a Hugging Face folder.

    What lies inside of these is taken for them: `runs/x/checkpoints/12000`, `folder/model.safetensors`. `parts`: the file of the
    parts that a run was trained with, or those of the run that starts from it. With several processes
    all of them call it together. Raises UserError.
    """
    workdir, wanted = folder_of(model)
    if is_hugging_face(workdir):
        return locate_hugging_face(workdir)
    content = read_config(workdir)
    check_run_files(workdir, content)
    if not has_steps(workdir):
        raise UserError(f"--model {model}: the run has no checkpoint yet")
    config = resolve_found(unflatten(content["config"]))
    recorded = content.get("parts", {})
    where = str(workdir)
    own = of_run(recorded, parts, where) if isinstance(parts, str) else of_source(recorded, parts, where)
    base = locate_base(workdir, content["base"], log, own) if "base" in content else None
    found = ModelRef(workdir, NEVER, config, load(str(workdir)), None, base, own)
    return found._replace(step=locate_step(found, model, wanted, content.get("run", ""), log))


def folder_of(model: str) -> tuple[epath.Path, str]:
    """(the folder that MODEL names, its step or ""). Raises UserError where no config.json is there."""
    check_url("--model", model)
    model = whole(model)
    path, _, wanted = (model, "", "") if (epath.Path(model) / CONFIG).exists() else model.rpartition("@")
    path, wanted = (path, wanted) if path else (wanted or model, "")
    workdir = epath.Path(path)
    check_plain(str(workdir))
    if not (workdir / CONFIG).exists():
        siblings = [str(path) for path in workdir.parent.glob("*") if (path / CONFIG).exists()]
        fetch = f"\nnothing is fetched: hf download {path} --local-dir {workdir.name}" if is_hub_name(path) else ""
        raise UserError(f"--model {model}: {path} is not a run (it has no config.json){nearest(path, siblings)}{fetch}")
    return workdir, wanted


def is_hub_name(path: str) -> bool:
    """Whether a name of no folder is as those of Hugging Face's hub: `owner/name`, where no `owner` is here."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", path)) and not epath.Path(path).parent.exists()


def is_hugging_face(folder: epath.Path) -> bool:
    """Whether a config.json is one of Hugging Face's: it says what it is by `model_type`."""
    return "model_type" in read_object(folder / CONFIG)


def read_settings(folder: epath.Path) -> Config:
    """The config of a MODEL by its config.json alone, whose arrays nobody has looked at. Raises UserError."""
    if is_hugging_face(folder):
        return convert_modules()[0].read_description(str(folder)).config
    return resolve_found(unflatten(read_config(folder)["config"]))


def whole(model: str) -> str:
    """The MODEL that a file or folder inside of it belongs to; else what was given. Raises UserError for a file that is none."""
    path = epath.Path(model)
    if (path / CONFIG).exists() or not path.exists():
        return model
    inside = [path, *path.parents][:4]  # up to runs/x/checkpoints/12000/parameters
    for below, folder in itertools.pairwise(inside):
        if below.name == "checkpoints" and (folder / CONFIG).exists():
            step = next((inner.name for inner, outer in itertools.pairwise(inside) if outer == below), "")
            return f"{folder}@{step}" if STEP.fullmatch(step) else str(folder)
    if not path.is_file():
        return model
    if (path.parent / CONFIG).exists() and path.suffix in (".safetensors", ".json"):
        return str(path.parent)
    converted = f"python tools/convert_checkpoint.py {shlex.quote(model)} {shlex.quote(str(path.with_suffix('')))}"
    mends = {
        ".gguf": f"a GGUF file is made a folder first, and that is the MODEL:\n{converted}",
        ".safetensors": "weights alone; give a folder that has config.json and a tokenizer beside them",
    }
    pickles = dict.fromkeys(
        (".bin", ".pt", ".pth", ".ckpt", ".pkl"), "a pickle may run code and is not read; save it as safetensors"
    )
    mend = (mends | pickles).get(
        path.suffix, "a file; give a run (runs/x), a step of it (runs/x@12000) or a Hugging Face folder"
    )
    raise UserError(f"--model {model}: {mend}")


def locate_step(found: ModelRef, model: str, wanted: str, run: str, log: Callable[[str], None]) -> int:
    """The step `wanted` of a run, verified; "" = the newest valid one, "best" = of those saved the one that is evaluated best.

    `run` is its identity. Raises UserError.
    """
    folder = steps_folder(found.workdir)
    steps, items = complete_steps(folder), items_read(found)
    if not wanted:
        step = newest_valid(found.workdir, log, quarantine=False, run=run, items=items)
        assert step is not None
        return step
    if wanted == "best":
        name = best.measure(found.config)
        if (step := best.best_step(metrics_file.read(found.workdir, log), name, steps)) == NEVER:
            raise UserError(
                f"--model {model}: none of its saved steps ({', '.join(map(str, steps))}) has a finite {name}"
            )
        wanted = str(step)
    if not STEP.fullmatch(wanted) or int(wanted) not in steps:
        raise UserError(f"--model {model}: no step {wanted!r}; the run has {', '.join(map(str, steps))}, and best")
    if problem := invalid_reason(folder / wanted, run, items):
        others = ", ".join(str(step) for step in steps if step != int(wanted)) or "none"
        raise UserError(f"--model {model}: {problem}; whole are {others}")
    return int(wanted)


def items_read(located: ModelRef) -> frozenset[str]:
    """The Orbax items of a step that hold the model's parameters.

    An average (`optimizer.ema`) is in the optimizer's state; "parameters" is then read for frozen ones alone.
    """
    if not located.config.optimizer.ema or located.base:
        return frozenset({"parameters"})
    program = make_program(located.config, located.vocab_size, parts=located.parts)
    has_frozen = len(program.trained) < len(program.graph.declarations)
    return frozenset({"optimizer", *["parameters"] * has_frozen})


def locate_base(workdir: epath.Path, said: dict[str, str], log: Callable[[str], None], parts: Parts) -> ModelRef:
    """The MODEL with the frozen parameters; `said` is {"place", "hash"} as in config.json. Raises UserError."""
    where = f"put it back, or write its new place into {workdir / CONFIG} (base, place)"
    try:
        found = locate(said["place"], log, parts)
    except RecursionError:
        raise UserError(f"{workdir}: its base is itself, or leads back to it\n{where}") from None
    except UserError as error:
        raise UserError(f"{workdir} needs its base: {str(error).removeprefix('--model ')}\n{where}") from None
    if fingerprint(found) != said["hash"]:
        raise UserError(f"{workdir} was trained over another model than {said['place']} is now\n{where}")
    return found


def context_of(located: ModelRef) -> int:
    """The longest text in tokens that a model can read; a run with `train.init_from` keeps that of its source."""
    kept = {} if located.described else read_config(located.workdir)
    return max(kept.get("context", 0), located.config.data.sequence_length)


def fingerprint(located: ModelRef) -> str:
    """sha256 over the hashes of the files that hold a model's arrays; the path of the folder does not enter."""
    if located.described:
        names = convert_modules()[1].weight_files(str(located.workdir))
        files = {name: file_hash(located.workdir / name) for name in names}
    else:
        files = read_object(steps_folder(located.workdir) / str(located.step) / MANIFEST)["files"]
    below = fingerprint(located.base) if located.base else ""
    return hashlib.sha256(json.dumps([files, below], sort_keys=True).encode()).hexdigest()


def locate_hugging_face(folder: epath.Path) -> ModelRef:
    """The MODEL of a folder with config.json, safetensors and a tokenizer. Raises UserError."""
    described = convert_modules()[0].read_description(str(folder))
    with named(f"--model {folder}: its tokenizer"):
        tokenizer = load(str(folder))
    return ModelRef(folder, 0, described.config, tokenizer, described)


def graph_of(located: ModelRef) -> ModelDef:
    """The model without its parameters, and without LoRA adapters: those are merged into its matrices."""
    model = dataclasses.replace(located.config.model, lora_rank=0)
    return build(model, located.vocab_size, located.config.data.sequence_length, located.parts.block)


def load_parameters(located: ModelRef) -> tuple[ModelDef, dict]:
    """(model, parameters on the mesh that is set): LoRA adapters merged, the average where the run keeps one."""
    program, parameters = load_as_trained(located)
    model = located.config.model
    if not model.lora_rank:
        return program.graph, parameters
    merge = jax.jit(lambda parameters: merged(parameters, program.graph.declarations, model))
    return graph_of(located), merge(parameters)


def load_as_trained(located: ModelRef) -> tuple[TrainSetup, dict]:
    """(what trains a MODEL, its parameters on the mesh that is set), LoRA adapters as they are."""
    program = make_program(located.config, located.vocab_size, parts=located.parts)
    target = abstract(program)
    if located.described:
        hugging_face, _ = convert_modules()
        return program, hugging_face.read_on_mesh(str(located.workdir), located.described, target.parameters)
    trained, frozen = program.split(target.parameters)
    # Only the average of the optimizer's state is read: {"3.average.embedding.table": ..., ...}.
    averages = {name: x for name, x in by_path(target.optimizer_state).items() if ".average." in name}
    items, args = items_read(located), dict[str, Any]()
    if "parameters" in items:
        args["parameters"] = ocp.args.StandardRestore(trained if located.base else target.parameters)
    if "optimizer" in items:
        restore_args = ocp.checkpoint_utils.construct_restore_args(averages)
        args["optimizer"] = ocp.args.PyTreeRestore(averages, restore_args, partial_restore=True)
    with contextlib.closing(ocp.Checkpointer(ocp.CompositeCheckpointHandler())) as orbax:
        found = orbax.restore(steps_folder(located.workdir) / str(located.step), args=ocp.args.Composite(**args))
    parameters = found.parameters if "parameters" in items else {}
    if "optimizer" in items:
        average = [found.optimizer[name] for name in averages]
        parameters = merge_params(parameters, jax.tree.unflatten(jax.tree.structure(trained), average))
    return program, merge_params(frozen_from_base(located.base, frozen), parameters) if located.base else parameters


def frozen_from_base(base: ModelRef, frozen: dict) -> dict:
    """The base's parameters at the paths of `frozen`, cut to its shapes (fewer positions) and laid out like it."""
    found = flatten_mapping(load_parameters(base)[1])
    wanted = flatten_mapping(frozen)
    return unflatten_mapping({path: jax.device_put(found[path][: len(x)], x.sharding) for path, x in wanted.items()})
