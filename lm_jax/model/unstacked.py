"""Parameters as generation reads them: of each layer as arrays of their own, on a CPU with kernels that are turned.

A loop over tokens reads each array where it lies; out of a stack [L, ...] XLA would copy every layer for every token.
Shape suffixes: N tokens, I inputs, O outputs.
"""

import dataclasses
from collections.abc import Callable

import jax

from lm_jax.sharding import einsum


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Unstacked:
    """One array [L, ...] (or a tree of them) as L arrays, one for each layer."""

    layers: tuple

    @staticmethod
    def of(stack) -> "Unstacked":
        """From a tree of arrays [L, ...]; they are copied."""
        num = len(jax.tree.leaves(stack)[0])
        return Unstacked(tuple(jax.tree.map(lambda x, i=i: x[i], stack) for i in range(num)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Turned:
    """The kernel of a dense layer from its outputs to its inputs, [*outputs, *inputs]."""

    kernel: jax.Array


def times_few(kernel_OI: jax.Array, x_NI: jax.Array, output: str, dtype=None) -> jax.Array:
    """Few rows times a turned kernel -> [N, O], with the kernel on the left: XLA:CPU packs what is on the right every time.

    Milliseconds of 60 pairs of 576 x 1,536 and back on two cores, as [N, I] x [I, O] and so: 1 row 31 and 23, 2 rows 51 and 39,
    8 rows 89 and 43, 16 rows 105 and 51, 64 rows 136 and 126. Without the barrier the product would be turned back.
    """
    y_ON = einsum("OI,NI->ON", kernel_OI, x_NI, output, "tokens", dtype=dtype)
    return jax.lax.optimization_barrier(y_ON).T


def _is_node(node) -> bool:
    return isinstance(node, Unstacked)


def is_unstacked(tree) -> bool:
    """Whether a tree has unstacked layers in it."""
    return any(map(_is_node, jax.tree.leaves(tree, is_leaf=_is_node)))


def run_unstacked(body: Callable, x, parameters, caches) -> tuple:
    """As `stack.run_layers`, without a loop in the program: `body(x, (index, parameters, cache))` for one layer after another."""
    num, outputs = len(jax.tree.leaves(parameters, is_leaf=_is_node)[0].layers), []
    for i in range(num):
        of_layer = jax.tree.map(lambda node, i=i: node.layers[i], parameters, is_leaf=_is_node)
        x, output = body(x, (i, of_layer, caches and caches.layers[i]))
        outputs.append(output)
    return x, Unstacked(tuple(outputs))
