"""A stack of equal layers: declared as one, then scanned or unrolled, with what the backward pass keeps of each layer.

Shape suffixes: L layers.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from lm_jax.model.layers import merge, split

# `config.remat`: what a layer keeps for the backward pass beside its input; the rest is computed again. From most to least
# memory: every product; what attention made, so that only the MLP's first half is computed twice; nothing.
_policies = jax.checkpoint_policies
POLICIES = {
    "dots": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable, _policies.save_only_these_names("attended")
    ),
    "names": _policies.save_only_these_names("query", "key", "value", "attended", "attention"),
    "full": _policies.nothing_saveable,
}


def stacked(layer: nnx.Module, num: int) -> nnx.Module:
    """The same module, every declared parameter with a new leading dim of `num` layers. Changes `layer` in place."""
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Unstacked:
    """Unstacked layers: one array [L, ...] (or a tree of them) as L arrays, one for each layer.

    A loop over tokens reads each where it lies; out of a stack XLA copies every layer for every token.
    """

    layers: tuple

    @staticmethod
    def of(stack) -> "Unstacked":
        """From a tree of arrays [L, ...]."""
        num = len(jax.tree.leaves(stack)[0])
        return Unstacked(tuple(jax.tree.map(lambda x, i=i: x[i], stack) for i in range(num)))


def _is_node(node) -> bool:
    return isinstance(node, Unstacked)


def is_unstacked(tree) -> bool:
    """Whether a tree has unstacked layers in it."""
    return any(map(_is_node, jax.tree.leaves(tree, is_leaf=_is_node)))


def run_layers(modules: Sequence[nnx.Module], apply: Callable, x, caches, remat: str, unroll: bool):
    """`x` after all layers, and the second outputs of `apply` of each, stacked over the layers.

    `modules` are stacked; `apply(layers, x, index, cache) -> (x, output)` runs one layer of each of them, one after the other.
    `caches` is a tree of arrays [L, ...], or None. Where parameters are unstacked (then `caches` are, too) the program has no
    loop, and its outputs are unstacked.
    """
    graphs, parameters = zip(*map(split, modules), strict=True)

    def body(x, scanned):
        index, parameters, cache = scanned
        return apply([merge(*both) for both in zip(graphs, parameters, strict=True)], x, index, cache)

    if remat != "none":  # unrolled, XLA would otherwise recognise the recomputed expressions, and keep them
        body = jax.checkpoint(body, policy=POLICIES[remat], prevent_cse=unroll)
    if not is_unstacked(parameters):
        num = len(jax.tree.leaves(parameters)[0])
        return jax.lax.scan(body, x, (jnp.arange(num), parameters, caches), unroll=num if unroll else 1)
    num, outputs = len(jax.tree.leaves(parameters, is_leaf=_is_node)[0].layers), []
    for i in range(num):
        of_layer = jax.tree.map(lambda node, i=i: node.layers[i], parameters, is_leaf=_is_node)
        x, output = body(x, (i, of_layer, caches and caches.layers[i]))
        outputs.append(output)
    return x, Unstacked(tuple(outputs))
