"""What one step changes, as a histogram for each layer of each parameter, in TensorBoard: of the steps that evaluations follow.

Shape suffixes: L layers, N numbers of a layer, E limits.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lm_jax import metrics
from lm_jax.model.layers import Declaration
from lm_jax.open_run import Run

NUM_BINS = 30  # of one width, from the largest fall to a rise as large


class Histogram(NamedTuple):
    """Of the changes of one layer: how many are over the limit before and not over each of `limits_E`."""

    limits_E: np.ndarray
    counts_E: np.ndarray
    low: float
    high: float
    total: float
    squares: float


def look(run: Run, writer: metrics.Writer | metrics.NullWriter) -> None:
    """Called after each step: keeps the parameters where `log.trackers` asks to see the next one, and shows it after that one.

    They are copied, for the step takes its own: once more as many bytes, for as long as a step.
    """
    trained = run.plan.program.split(run.state.parameters)[0]
    if run.before and run.before[0] == run.data.step - 1:
        declared = run.plan.program.graph.declarations
        writer.histograms(run.data.step, changes(declared, run.before[1], trained))
    step = run.data.step + 1
    is_next = "histograms" in run.config.log.trackers and (
        run.is_due(run.config.evaluate.every, step) or step == run.num_steps
    )
    run.before = (run.data.step, jax.tree.map(jnp.copy, trained)) if is_next else None


def changes(declared: dict[tuple[str, ...], Declaration], before: dict, after: dict) -> dict[str, Histogram]:
    """{"updates/block_0/mlp/up/kernel/3": of its fourth layer, "updates/embedding/table": of all of it, ...}."""
    then, now = (nnx.traversals.flatten_mapping(tree) for tree in (before, after))
    found: dict[str, Histogram] = {}
    for path, x in now.items():
        is_stack, name = declared[path].axes[:1] == ("layers",), "/".join(("updates", *path))
        parts = [np.asarray(part) for part in _counted(then[path], x, is_stack)]
        for layer, one in enumerate(zip(*parts, strict=True)):
            limits_E, below_E, *sums = one
            counts_E = np.diff(below_E, prepend=0)
            found[f"{name}/{layer}" if is_stack else name] = Histogram(limits_E, counts_E, *map(float, sums))
    return found


@functools.partial(jax.jit, static_argnames="is_stack")
def _counted(before: jax.Array, after: jax.Array, is_stack: bool) -> list[jax.Array]:
    """[limits [L, E], how many are not over them [L, E], least, largest, sum, sum of squares [L]], whole on every device."""

    def found(before: jax.Array, after: jax.Array) -> list[jax.Array]:
        x_LN = (after.astype(jnp.float32) - before.astype(jnp.float32)).reshape(len(after) if is_stack else 1, -1)
        largest_L = jnp.maximum(jnp.abs(x_LN).max(1), 1e-30)
        limits_EL = jnp.linspace(-1.0, 1.0, NUM_BINS + 1)[1:, None] * largest_L[None]
        below_EL = jax.lax.map(lambda limit_L: (x_LN <= limit_L[:, None]).sum(1, dtype=jnp.int32), limits_EL)
        return [limits_EL.T, below_EL.T, x_LN.min(1), x_LN.max(1), x_LN.sum(1), (x_LN**2).sum(1)]

    return jax.sharding.auto_axes(found, out_sharding=jax.sharding.PartitionSpec())(before, after)
