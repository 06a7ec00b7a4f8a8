"""Every legal mesh of the devices at hand agrees: the same initial bits, the same losses; `--show` prints the table.

python -m lm_jax.verify --config experiments/quickstart.py:smoke        (JAX_NUM_CPU_DEVICES=8 for eight fake devices)

With `--config.mesh.slices=2` those that two slices can split as well. `expert` and `context` alone and with one other axis.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterable
from typing import NamedTuple

import jax
import numpy as np

from lm_jax import cli, decide, distributed, experiment
from lm_jax.config import Mesh
from lm_jax.data import corpus_verification, loader
from lm_jax.data.mixture import Mixture
from lm_jax.data.objectives import specials
from lm_jax.errors import UserError
from lm_jax.mesh import by_slice, legal_meshes, mesh_shape, parameter_table, preflight
from lm_jax.model.language_model import padded
from lm_jax.open_data import open_data
from lm_jax.parts import of_experiment
from lm_jax.run_plan import Plan, make_plan
from lm_jax.terminal import Terminal
from lm_jax.train_state import fresh
from lm_jax.train_step import compile_step

TOLERANCE = 1e-5  # of losses, relative, float32: meshes add up in another order


class Trace(NamedTuple):
    """What a few steps did: hash of the initial parameters, losses, parameters at the end (on the host)."""

    digest: str
    losses: list[float]
    parameters: dict


def trace(plan: Plan, stream: loader.Rows, num_steps: int) -> Trace:
    """Trains `num_steps` from the start, each on the full batch in the plan's microbatches."""
    rows, size = plan.config.data.global_batch_size, plan.microbatch
    with jax.set_mesh(plan.mesh):
        state = jax.jit(lambda: fresh(plan.program))()
        digest = hashlib.sha256(
            b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(state.parameters))
        ).hexdigest()
        one_step = compile_step(plan.program, plan.mesh, one_microbatch=size == rows)
        batches = loader.batches(stream, plan.mesh, 0, num_steps * rows // size, size)
        losses = []
        for _ in range(num_steps):
            outcome = one_step(state, rows // size, batches, lambda done: False)
            assert outcome is not None  # no step is given up
            state, metrics = outcome
            losses.append(float(metrics["train/loss"]))
        return Trace(digest[:12], losses, jax.tree.map(np.asarray, state.parameters))


def hashed_whole(mixed: Mixture) -> str:
    """Hashes every file of the shards, of which a start hashes the large ones in turn. Raises UserError for a damaged one."""
    found = []
    for corpus in mixed.corpora.values():
        corpus_verification.verify(
            corpus.folder, corpus.manifest, "prepare it again, or of the cache remove it", whole=True
        )
        found += list(corpus.manifest["files"].values())
    return f"{len(found)} files, {sum(file['bytes'] for file in found) / 1e6:,.1f} MB: all as they were written"


def is_verified(sizes: dict[str, int]) -> bool:
    """Whether a mesh is tried: of the many with `expert` or `context` those that split by at most one axis more."""
    return sizes["expert"] == sizes["context"] == 1 or sum(size > 1 for size in sizes.values()) <= 2


def main(arguments: list[str]) -> int:
    """Runs the command with its arguments. Returns the exit code; raises UserError."""
    overrides, rest = experiment.split_overrides(arguments)
    parser = cli.Parser("lm_jax.verify", __doc__)
    parser.add_argument("--config", required=True, help="an experiment file, file.py:variant; it is executed")
    parser.add_argument("--show", action="store_true", help="only print the parameters on the config's mesh")
    parser.add_argument(
        "--files", action="store_true", help="only hash every file of the data, also those that are large"
    )
    parser.add_argument("--num_steps", type=int, default=3)
    parser.reads({"show": (False,)}, "num_steps")
    flags = parser.parse_args(rest)
    if flags.num_steps < 1:
        parser.error(f"--num_steps {flags.num_steps}: at least 1")
    config, _ = experiment.load_config(flags.config, overrides)
    log, here = Terminal(), distributed.devices()
    sizes = mesh_shape(config.mesh, len(here))
    mixed = open_data(config, log)
    if flags.files:
        log(hashed_whole(mixed))
        return 0
    stream = mixed.stream(config.data)
    vocab_size = specials(mixed.tokenizer, config.data.objective).vocab_size
    site = decide.at_hand(here, distributed.own(here))
    known = functools.partial(make_plan, site=site, parts=of_experiment(flags.config))
    planned = lambda changed: known(changed, vocab_size, here, stream.rows_per_epoch)
    if flags.show:
        plan = planned(config)
        log(parameter_table(plan.program.graph.declarations, plan.mesh))
        return 0
    whole = config.data.global_batch_size if config.train.microbatch_rows == "auto" else config.train.microbatch_rows
    exact = decide.replaced(config, {"model.compute_dtype": "float32", "train.microbatch_rows": whole})
    slices = sorted({len(by_slice(here, -1)), len(by_slice(here, config.mesh.slices))})
    legal = [sizes for sizes in legal_meshes(exact, padded(vocab_size), len(here)) if is_verified(sizes)]
    meshes = [Mesh(**sizes, slices=n) for n in slices for sizes in legal if sizes["data"] % n == 0]
    if not meshes:
        preflight(exact, padded(vocab_size), sizes)
        raise UserError(f"no mesh of {len(here)} devices is legal for {flags.config}")
    num_meshes = f"{len(meshes)} legal meshes of {len(here)} {here[0].device_kind} devices"
    log(f"{num_meshes}, {flags.num_steps} steps each, float32")
    plans = (planned(dataclasses.replace(exact, mesh=mesh)) for mesh in meshes)
    agree = compare(plans, stream, flags.num_steps, log)
    log(f"all agree to {TOLERANCE:.0e}" if agree else "not all meshes agree")
    return 0 if agree else cli.EXIT_FAULT


def compare(plans: Iterable[Plan], stream: loader.Rows, num_steps: int, log: Terminal) -> bool:
    """Whether the meshes of all plans agree with the first; a line about each is said."""
    first, agree = None, True
    for plan in plans:
        found = trace(plan, stream, num_steps)
        first = first or found
        apart = max(abs(a - b) / abs(b) for a, b in zip(found.losses, first.losses, strict=True))
        same = found.digest == first.digest and apart <= TOLERANCE
        agree &= same
        axes = " ".join(f"{name} {size}" for name, size in dataclasses.asdict(plan.config.mesh).items())
        losses = " ".join(f"{loss:.6f}" for loss in found.losses)
        verdict = "agrees" if same else "DIFFERS"
        log(f"{axes}   initial {found.digest}   losses {losses}   apart {apart:.1e}   {verdict}")
    return agree


if __name__ == "__main__":
    cli.run_command(main)
