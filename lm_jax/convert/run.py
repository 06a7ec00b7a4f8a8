"""Parameters from elsewhere as a run at step 0: what `--model` and `train.init_from` take, sharded and verified."""

from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from lm_jax import checkpoint
from lm_jax.config import UserError
from lm_jax.data.objectives import specials
from lm_jax.model.graph import build


def write(workdir: epath.Path, found: checkpoint.Located, parameters: dict, carried: dict[str, bytes]) -> None:
    """The config, the tokenizer and what goes along with it, and the parameters; the manifest last. Raises UserError.

    Pieces that the tokenizer does not have (tables are often rounded up) are left out.
    """
    if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise UserError(f"{workdir} is there and not empty; name another folder")
    workdir.mkdir(parents=True, exist_ok=True)
    tokenizer = found.tokenizer
    for name, content in (carried | {tokenizer.file_name: tokenizer.model}).items():
        (workdir / name).write_bytes(content)
    facts: dict[str, Any] = {"pipeline": 0, "tokenizer": tokenizer.fingerprint, "data": "", "shards": {}}
    checkpoint.write_config(workdir, found.config, {}, facts)
    graph = build(
        found.config.model,
        specials(tokenizer, found.config.data.objective).num_pieces,
        found.config.data.sequence_length,
    )
    kept = jax.tree.map(lambda x, declared: x[: declared.shape[0]], parameters, graph.tree(lambda declared: declared))
    folder = checkpoint.steps_folder(workdir) / "0"
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as orbax:
        orbax.save(folder, args=ocp.args.Composite(parameters=ocp.args.StandardSave(kept)))
    checkpoint.write_manifest(folder, {"step": 0} | {name: facts[name] for name in checkpoint.FACTS})
