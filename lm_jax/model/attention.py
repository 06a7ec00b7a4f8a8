"""Attention: one function for every backend, always with positions and segments; and the layer around it.

Shape suffixes: B batch, T query length, S key length, D model, H heads, G kv heads, R = H / G, K head.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lm_jax.config import Model, UserError
from lm_jax.model.layers import Dense
from lm_jax.sharding import constrain, einsum, reshape

CHUNK = 256  # queries in one chunk of the chunked backend


class Context(NamedTuple):
    """Who may see whom. A token sees tokens of its own segment at positions p with 0 <= own - p (< window)."""

    positions: jax.Array  # [B, T] int32, from 0 in each segment
    segment_ids: jax.Array  # [B, T] int32, 0 = padding


class Cache(NamedTuple):
    """Keys and values already computed, slot = position: [B, S, G, K] each (stacked over layers outside a layer)."""

    keys: jax.Array
    values: jax.Array


def attend(q_BTHK, k_BSGK, v_BSGK, queries: Context, keys: Context, window: int, backend: str) -> jax.Array:
    """Causal softmax attention (arXiv:1706.03762) in segments and windows, heads in groups -> [B, T, H, K].

    `xla` builds the whole square of logits. `chunked` takes `CHUNK` queries at a time against the keys before them and
    recomputes the square in the backward pass; it relies on keys in the order of the queries and refuses anything else.
    """
    num_queries, num_keys = q_BTHK.shape[1], k_BSGK.shape[1]
    if backend == "auto":
        backend = "chunked" if num_queries == num_keys and num_queries >= 2 * CHUNK else "xla"
    if backend == "xla" or num_queries <= CHUNK:
        return _attend(q_BTHK, k_BSGK, v_BSGK, queries, keys, window=window)
    if num_queries != num_keys:
        raise UserError(f"attention backend chunked: {num_queries} queries, {num_keys} keys: use xla with a cache")
    out = []
    for start in range(0, num_queries, CHUNK):
        stop = min(start + CHUNK, num_queries)
        first = max(0, start - window + 1) // CHUNK * CHUNK if window else 0
        part = lambda context, a, b: Context(*(x[:, a:b] for x in context))
        attend_chunk = jax.checkpoint(functools.partial(_attend, window=window))
        out.append(
            attend_chunk(
                q_BTHK[:, start:stop],
                k_BSGK[:, first:stop],
                v_BSGK[:, first:stop],
                part(queries, start, stop),
                part(keys, first, stop),
            )
        )
    return jnp.concatenate(out, axis=1)


def _attend(q_BTHK, k_BSGK, v_BSGK, queries: Context, keys: Context, window: int) -> jax.Array:
    batch, num_queries, num_heads, head_dim = q_BTHK.shape
    num_groups = k_BSGK.shape[2]
    shape = (batch, num_queries, num_groups, num_heads // num_groups, head_dim)
    q_BTGRK = reshape(q_BTHK / head_dim**0.5, shape, "batch", "length", "kv_heads", None, None)
    logits_BGRTS = einsum("BTGRK,BSGK->BGRTS", q_BTGRK, k_BSGK, "batch", "kv_heads", None, None, None)
    distance_BTS = queries.positions[:, :, None] - keys.positions[:, None, :]
    seen_BTS = (queries.segment_ids[:, :, None] == keys.segment_ids[:, None, :]) & (distance_BTS >= 0)
    if window:
        seen_BTS &= distance_BTS < window
    logits_BGRTS = jnp.where(seen_BTS[:, None, None], logits_BGRTS.astype(jnp.float32), jnp.finfo(jnp.float32).min / 2)
    weights_BGRTS = jax.nn.softmax(logits_BGRTS, axis=-1).astype(v_BSGK.dtype)
    out = einsum("BGRTS,BSGK->BTGRK", weights_BGRTS, v_BSGK, "batch", "length", "kv_heads", None, None)
    return reshape(out, q_BTHK.shape, "batch", "length", "heads", None)


class Rotation(NamedTuple):
    """Cosines and sines of rotary positions, float32 [B, T, 1, K / 2]: made once, used by every layer."""

    cos: jax.Array
    sin: jax.Array


def rotation(positions_BT: jax.Array, head_dim: int, base: float) -> Rotation:
    """Angles of rotary positions (arXiv:2104.09864): position * base^(-2k / head_dim)."""
    half = head_dim // 2
    frequency_K = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_BT1K = positions_BT[:, :, None, None].astype(jnp.float32) * frequency_K[None, None, None]
    return Rotation(*jax.lax.optimization_barrier((jnp.cos(angle_BT1K), jnp.sin(angle_BT1K))))


def rotate(x_BTHK: jax.Array, by: Rotation) -> jax.Array:
    """Each pair (k, k + half) turned by its angle, in float32."""
    first, second = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * by.cos - second * by.sin, second * by.cos + first * by.sin], axis=-1)
    return turned.astype(x_BTHK.dtype)


def write(cache_BSGK: jax.Array, new_BTGK: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """The cache with `new` in the slots of its positions: one token a row anywhere, or many from slot 0 on."""
    new_BTGK = new_BTGK.astype(cache_BSGK.dtype)
    if new_BTGK.shape[1] == 1:
        slots_S = jnp.arange(cache_BSGK.shape[1])
        return jnp.where((slots_S[None] == positions_BT)[:, :, None, None], new_BTGK, cache_BSGK)
    return jnp.concatenate([new_BTGK, cache_BSGK[:, new_BTGK.shape[1] :]], axis=1)


class Attention(nnx.Module):
    """Multi-head attention with grouped keys and values (arXiv:2305.13245)."""

    def __init__(self, config: Model, window: int, output_stddev: float):
        self.config, self.window = config, window
        model = {"model": config.model_dim}
        heads = {"heads": config.num_heads, "head_dim": config.head_dim}
        kv_heads = {"kv_heads": config.num_kv_heads, "head_dim": config.head_dim}
        self.query = Dense(model, heads, config.init_scale, config.bias)
        self.key = Dense(model, kv_heads, config.init_scale, config.bias)
        self.value = Dense(model, kv_heads, config.init_scale, config.bias)
        self.output = Dense(heads, model, output_stddev, config.bias)

    def __call__(self, x_BTD, context: Context, turn: Rotation | None, cache: Cache | None, cached: Context | None):
        """-> [B, T, D] and the cache with this call's keys and values. `cached` says what every slot of it holds."""
        q_BTHK, k_BTGK, v_BTGK = self.query(x_BTD), self.key(x_BTD), self.value(x_BTD)
        if turn is not None:
            q_BTHK, k_BTGK = rotate(q_BTHK, turn), rotate(k_BTGK, turn)
        if cache is not None:
            assert cached is not None
            axes = ("batch", "length", "kv_heads", "head_dim")
            k_BTGK = constrain(write(cache.keys, k_BTGK, context.positions), *axes)
            v_BTGK = constrain(write(cache.values, v_BTGK, context.positions), *axes)
            cache = Cache(k_BTGK, v_BTGK)
            backend = "xla"
        else:
            cached, backend = context, self.config.attention
        out_BTHK = attend(q_BTHK, k_BTGK, v_BTGK, context, cached, self.window, backend)
        return self.output(out_BTHK), cache
