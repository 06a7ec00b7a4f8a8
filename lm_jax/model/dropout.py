"""Dropout, whose random numbers depend on neither batch, mesh nor process.

Shape suffixes: B batch, T length, D model.
"""

import dataclasses
import zlib

import jax
import jax.numpy as jnp

from lm_jax.model.row_order import balanced
from lm_jax.sharding import like


def row_keys(root: jax.Array, name: str, step: jax.Array, layer: jax.Array | int, row_B: jax.Array) -> jax.Array:
    """One key a row: root folded with crc32(name), step, layer, row, so that mesh, batch and process do not matter."""
    key = jax.random.fold_in(jax.random.fold_in(root, zlib.crc32(name.encode())), step)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.fold_in(key, layer), row_B)


@dataclasses.dataclass(frozen=True)
class Dropout:
    """Dropout of a batch: its random numbers depend on root key, step and the rows' numbers [B] in the training stream."""

    root: jax.Array
    step: jax.Array
    row_B: jax.Array

    def __call__(self, x_BTD: jax.Array, rate: float, name: str, layer: jax.Array | int = 0) -> jax.Array:
        """Inverted dropout (arXiv:1207.0580) at a rate above 0, each row from its own key; `name` says where in a layer."""
        keys_B = row_keys(self.root, f"dropout/{name}", self.step, layer, self.row_B)
        keep_BTD = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x_BTD.shape[1:]))(keys_B)
        return jnp.where(like(balanced(keep_BTD), x_BTD), x_BTD / (1 - rate), 0)


def apply_dropout(
    dropout: Dropout | None, x_BTD: jax.Array, rate: float, name: str, layer: jax.Array | int = 0
) -> jax.Array:
    """`x` with dropout; `x` itself outside of training (`dropout` is None) and at rate 0."""
    return dropout(x_BTD, rate, name, layer) if dropout and rate else x_BTD
