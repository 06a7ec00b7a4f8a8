"""Attention where the tokens of a row are split over devices: each has its own queries, and gathers all keys and values.

Arrays are in the order of `row_order.py`. Positions and segment ids decide what a query sees, as on one device.

Shape suffixes: B batch, T queries of one device, S keys of a whole row, H heads, G kv heads, K head.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm_jax.collectives import part_index
from lm_jax.model.row_order import whole_rows
from lm_jax.sharding import attention_layouts, on_each_device, ways

Attend = Callable[..., jax.Array]  # (queries, keys, values, the Context of queries, of keys) -> [B, T, H, K]


class Chunks(NamedTuple):
    """How a device goes through its queries."""

    size: int  # queries at a time; 0 = all, whose logits are kept for the backward pass
    window: int
    causal: bool


def attend_over_devices(attend: Attend, chunks: Chunks, q_BTHK, k_BTGK, v_BTGK, context) -> jax.Array:
    """[B, T, H, K] of all devices, laid out as the queries; `attend` computes the chunks in plain JAX."""
    layouts, tokens = attention_layouts()

    def on_a_device(q_BTHK, k_BTGK, v_BTGK, queries):
        arrays = jax.tree.map(whole_rows, (k_BTGK, v_BTGK, queries))
        return _own_queries(attend, chunks, q_BTHK, queries, *arrays)

    inputs = (*layouts, type(context)(tokens, tokens))
    return on_each_device(on_a_device, inputs, layouts[0])(q_BTHK, k_BTGK, v_BTGK, context)


def _own_queries(attend: Attend, chunks: Chunks, q_BTHK, queries, k_BSGK, v_BSGK, keys) -> jax.Array:
    """The two chunks of the row that a device holds, in parts of `chunks.size` queries.

    Which keys a causal part may see depends on the device, and shapes may not: of the first chunk of a device it is at most
    the first half of a row.
    """
    half, parts = q_BTHK.shape[1] // 2, ways("length")
    index, length = part_index("length"), k_BSGK.shape[1]
    size = min(chunks.size or half, half)
    chunk_of_row = index, 2 * parts - 1 - index  # of the row's 2c
    after_largest = parts * half, length  # where these chunks end, on the device whose chunk is the last
    out = []
    for held, (chunk, end) in enumerate(zip(chunk_of_row, after_largest, strict=True)):
        for start in range(0, half, size):
            stop = min(start + size, half)
            last = end - half + stop if chunks.causal else length
            width = min(last, stop - start + chunks.window - 1) if chunks.window and chunks.causal else last
            first = jnp.maximum(chunk * half + stop - width, 0) if width < last else 0
            keys_of = lambda x, first=first, width=width: _columns(x, first, width)
            own = lambda x, start=start, stop=stop, held=held: x[:, held * half + start : held * half + stop]
            part: Any = (own(q_BTHK), *map(keys_of, (k_BSGK, v_BSGK)))
            part += jax.tree.map(own, queries), jax.tree.map(keys_of, keys)
            out.append((jax.checkpoint(attend) if chunks.size else attend)(*part))
    return jnp.concatenate(out, axis=1)


def _columns(x_BS: jax.Array, first: jax.Array | int, width: int) -> jax.Array:
    """`width` columns from `first` on, which may depend on the device."""
    if isinstance(first, int):
        return x_BS[:, first : first + width]
    return jax.lax.dynamic_slice_in_dim(x_BS, first, width, axis=1)
