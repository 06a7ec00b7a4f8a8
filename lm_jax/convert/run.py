"""Parameters from elsewhere as a run at step 0: what `--model` and `train.init_from` take, sharded and verified.

The same of what was trained alone, with the name and the hash of the model that has the rest.
"""

import os
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.nnx.traversals import flatten_mapping, unflatten_mapping

from lm_jax import checkpoint, load_model, manifest, run_folder, step_folders
from lm_jax.convert import hugging_face
from lm_jax.data import special_ids
from lm_jax.data.objectives import specials
from lm_jax.errors import UserError
from lm_jax.model.build import build
from lm_jax.regular_files import is_url


def write(
    workdir: epath.Path,
    found: load_model.ModelRef,
    parameters: dict,
    carried: dict[str, bytes],
    base: load_model.ModelRef | None = None,
) -> None:
    """The config, the tokenizer and what goes along with it, and the parameters; the manifest last. Raises UserError.

    Pieces that the tokenizer does not have (tables are often rounded up) are left out. With `base` the parameters are those
    that it does not have.
    """
    if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise UserError(f"{workdir} is there and not empty; name another folder")
    workdir.mkdir(parents=True, exist_ok=True)
    tokenizer = found.tokenizer
    for name, content in (carried | special_ids.files(tokenizer, found.special_ids)).items():
        (workdir / name).write_bytes(content)
    facts: dict[str, Any] = {"pipeline": 0, "tokenizer": tokenizer.fingerprint, "data": "", "shards": {}}
    facts["run"] = run_folder.run_identity({}, found.config, facts)
    said = found.parts.record | (
        {"base": {"place": path_of(base), "hash": load_model.fingerprint(base)}} if base else {}
    )
    run_folder.write_config(workdir, found.config, {}, facts | said | {"context": load_model.context_of(found)})
    graph = build(
        found.config.model,
        specials(tokenizer, found.config.data.objective).vocab_size,
        found.config.data.sequence_length,
        found.parts.block,
    )
    flat = flatten_mapping(parameters).items()
    kept = unflatten_mapping({path: x[: graph.declarations[path].shape[0]] for path, x in flat})
    folder = step_folders.steps_folder(workdir) / "0"
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as orbax:
        orbax.save(folder, args=ocp.args.Composite(parameters=ocp.args.StandardSave(kept)))
    manifest.write_manifest(folder, {"step": 0} | {name: facts[name] for name in checkpoint.FACTS})


def write_part(workdir: epath.Path, found: load_model.ModelRef, base: load_model.ModelRef) -> None:
    """Only what was trained of a MODEL, with where its base lies and what it is. Raises UserError."""
    carried = hugging_face.carried_files(str(base.workdir))
    write(workdir, found, trained_part(found, base), carried, base)


def path_of(located: load_model.ModelRef) -> str:
    """The name by which a MODEL is found again: its path, and of a run the step."""
    path = str(located.workdir) if is_url(located.workdir) else os.path.abspath(located.workdir)
    return path if located.described else f"{path}@{located.step}"


def trained_part(found: load_model.ModelRef, base: load_model.ModelRef) -> dict:
    """The parameters of a MODEL that were trained, if all others are the base's to the bit. Raises UserError."""
    program, parameters = load_model.load_as_trained(found)
    part, frozen = program.split(parameters)
    if not frozen:
        raise UserError(f"all of {found.workdir} was trained; what can lie over a base has config.optimizer.trainable")
    have = load_model.graph_of(base).declarations
    flat = flatten_mapping(frozen)
    apart = ["/".join(path) for path, x in flat.items() if path not in have or have[path].shape[1:] != x.shape[1:]]
    if not apart:
        beneath = flatten_mapping(load_model.frozen_from_base(base, frozen))
        apart = ["/".join(path) for path, x in flat.items() if not np.array_equal(x, beneath[path])]
    if apart:
        raise UserError(
            f"{found.workdir} was not trained over {path_of(base)}: {len(apart)} of the {len(flat)} parameters that were not "
            f"trained differ, such as {apart[0]}\nname the MODEL that config.train.init_from named"
        )
    return part
