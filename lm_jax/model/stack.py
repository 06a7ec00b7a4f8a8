"""A stack of equal layers: declared as one, then scanned or unrolled, with what the backward pass keeps of each layer.

Shape suffixes: L layers.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from lm_jax.model.layers import merge, split
from lm_jax.model.unstacked import is_unstacked, run_unstacked

Output = TypeVar("Output")  # of a layer: a tree of arrays

# `config.remat`: what a layer keeps for the backward pass beside its input; the rest is computed again. From most to least
# memory: every product; the results of attention, so that only the MLP's first half is computed twice; nothing.
_policies = jax.checkpoint_policies
POLICIES = {
    "dots": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable, _policies.save_only_these_names("attended")
    ),
    "names": _policies.save_only_these_names("query", "key", "value", "attended", "attention"),
    "full": _policies.nothing_saveable,
}


def stacked(layer: nnx.Module, num: int) -> nnx.Module:
    """`layer`, changed in place: every declared parameter has a new leading dim of `num` layers."""
    for _, variable in nnx.to_flat_state(nnx.state(layer, nnx.Param)):
        one = variable.get_metadata("declared")
        shifted = lambda dims: tuple(dim + 1 for dim in dims)
        stack = dataclasses.replace(
            one,
            shape=(num, *one.shape),
            axes=("layers", *one.axes),
            inputs=shifted(one.inputs),
            outputs=shifted(one.outputs),
            layers=(0, *shifted(one.layers)),
        )
        variable.set_metadata("declared", stack)
        variable.set_raw_value(jax.ShapeDtypeStruct(stack.shape, stack.dtype))
    return layer


def run_layers(
    modules: Sequence[nnx.Module],
    apply: Callable[..., tuple[jax.Array, Output]],
    x: jax.Array,
    caches: object,
    remat: str,
    unroll: bool,
) -> tuple[jax.Array, Output]:
    """(`x` after all layers, the outputs of `apply` of each layer, stacked over the layers).

    `modules` are stacked; `apply(layers, x, index, cache) -> (x, output)` runs one layer of each of them, one after the other.
    `caches` is a tree of arrays [L, ...], or None. With unstacked parameters (then `caches` are, too) outputs are unstacked.
    """
    graphs, parameters = zip(*map(split, modules), strict=True)

    def body(x: jax.Array, scanned: tuple) -> tuple[jax.Array, Output]:
        index, parameters, cache = scanned
        return apply([merge(*both) for both in zip(graphs, parameters, strict=True)], x, index, cache)

    if remat != "none":  # unrolled, XLA would otherwise recognise the recomputed expressions, and keep them
        body = jax.checkpoint(body, policy=POLICIES[remat], prevent_cse=unroll)
    if is_unstacked(parameters):
        return run_unstacked(body, x, parameters, caches)
    num = len(jax.tree.leaves(parameters)[0])
    return jax.lax.scan(body, x, (jnp.arange(num), parameters, caches), unroll=num if unroll else 1)
