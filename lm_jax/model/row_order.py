"""In which order the devices of a row's tokens hold them, so that causal attention is as much work for each.

A row is cut into 2c chunks for c devices. Device i holds chunks i and 2c-1-i: its queries see few keys and many. Nothing
but attention looks at the order: positions and segment ids say where a token stands.

Shape suffixes: B batch, T length; c parts of a row, h tokens of a chunk.
"""

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax.collectives import joined
from lm_jax.sharding import constrain, reshape, ways


def balanced(x_BT: jax.Array) -> jax.Array:
    """An array [B, T, ...] in the order of the row -> in that of the devices; `x` itself where rows are not split."""
    return _laid_out(_to_balanced(_whole(x_BT), ways("length"))) if ways("length") > 1 else x_BT


def in_row_order(x_BT: jax.Array) -> jax.Array:
    """The inverse of `balanced`."""
    return _laid_out(_to_row_order(_whole(x_BT), ways("length"))) if ways("length") > 1 else x_BT


def whole_rows(x_BT: jax.Array) -> jax.Array:
    """Inside `on_each_device`: the part of a balanced array [B, T, ...] -> all of it, in the order of the row."""
    return _to_row_order(joined(x_BT, "length", 1), ways("length")) if ways("length") > 1 else x_BT


def order_of_columns(length: int) -> np.ndarray:
    """int32 [T]: which token of a row stands in each column of a balanced array."""
    order = np.arange(length, dtype=np.int32).reshape(2, ways("length"), -1)
    return np.stack([order[0], order[1, ::-1]], axis=1).reshape(-1)


def _whole(x_BT: jax.Array) -> jax.Array:
    return constrain(x_BT, "batch", *[None] * (x_BT.ndim - 1))


def _laid_out(x_BT: jax.Array) -> jax.Array:
    return constrain(x_BT, "batch", "length", *[None] * (x_BT.ndim - 2))


def _to_balanced(x_BT: jax.Array, num_parts: int) -> jax.Array:
    x_B2ch = _reshaped(x_BT, 2, num_parts, x_BT.shape[1] // (2 * num_parts))
    return _reshaped(jnp.stack([x_B2ch[:, 0], x_B2ch[:, 1, ::-1]], axis=2), x_BT.shape[1], dims=4)


def _to_row_order(x_BT: jax.Array, num_parts: int) -> jax.Array:
    x_Bc2h = _reshaped(x_BT, num_parts, 2, x_BT.shape[1] // (2 * num_parts))
    return _reshaped(jnp.stack([x_Bc2h[:, :, 0], x_Bc2h[:, ::-1, 1]], axis=1), x_BT.shape[1], dims=4)


def _reshaped(x: jax.Array, *sizes: int, dims: int = 2) -> jax.Array:
    """`x` with other sizes for its dims 1 ... dims - 1."""
    shape = (len(x), *sizes, *x.shape[dims:])
    return reshape(x, shape, "batch", *[None] * (len(shape) - 1))
