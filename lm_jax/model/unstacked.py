"""Unstacked layers: generation reads the parameters of each layer as arrays of their own.

A loop over tokens reads each array where it lies; out of a stack [L, ...] XLA would copy every layer for every token.
"""

import dataclasses
from collections.abc import Callable

import jax


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
