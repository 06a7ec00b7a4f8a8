"""The attention layer: projections around `attend`, and the KV cache of decoding.

Shape suffixes: B batch, T query length, S key length or cache slots, D model, H heads, G kv heads, K head, L layers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from lm_jax.config import Model
from lm_jax.model.attention import Context, attend
from lm_jax.model.layers import Dense, Norm
from lm_jax.model.positions import RopeAngles, apply_rope
from lm_jax.sharding import computed, constrain, iota, on_each_device

AXES = "batch", "length", "kv_heads", "head_dim"  # of a cache


class Cache(NamedTuple):
    """Keys and values of the tokens so far, [B, S, G, K] each; the token at position p is in slot p mod S."""

    keys: jax.Array
    values: jax.Array


def empty_cache(config: Model, num_layers: int, batch: int, slots: int) -> Cache:
    """Zeros [L, B, S, G, K] in the compute dtype, laid out on the mesh that is set."""
    shape = (num_layers, batch, slots, config.num_kv_heads, config.head_dim)
    zeros = lambda: constrain(jnp.zeros(shape, config.compute_dtype), "layers", *AXES)
    return Cache(zeros(), zeros())


def slot_context(context: Context, num_slots: int) -> Context:
    """Position and segment of every slot [B, S] once the tokens of `context` are written: slot s holds the last position p with
    p mod S = s, in segment 1; segment 0 where there is none yet."""
    last_B = jnp.where(context.segment_ids > 0, context.positions, -1).max(axis=1)
    slots_BS = iota((last_B.shape[0], num_slots), "batch", "length")
    positions_BS = last_B[:, None] - (last_B[:, None] - slots_BS) % num_slots
    return Context(positions_BS, (positions_BS >= 0).astype(jnp.int32))


def visible_keys(context: Context, num_slots: int) -> Context:
    """The keys that queries attend to where there is a cache: all slots for one new token; for the many of a prompt, which start
    the cache, each other."""
    return slot_context(context, num_slots) if context.positions.shape[1] == 1 else context


def write(cache_BSGK: jax.Array, new_BTGK: jax.Array, context: Context) -> jax.Array:
    """The cache with new keys or values in the slots of their positions: one token a row, at any position, or a prompt from
    position 0 on, of which the last S tokens stay."""
    length, size = new_BTGK.shape[1], cache_BSGK.shape[1]
    new_BTGK = new_BTGK.astype(cache_BSGK.dtype)
    if length == 1:
        here_BS = iota((len(new_BTGK), size), "batch", "length") == context.positions % size
        written = jnp.where(here_BS[:, :, None, None], new_BTGK, cache_BSGK)
    elif length <= size:
        written = jnp.concatenate([new_BTGK, cache_BSGK[:, length:]], axis=1)
    else:
        take = lambda new_BTGK, at_BS: jnp.take_along_axis(new_BTGK, at_BS[:, :, None, None], axis=1)
        layouts = computed(AXES), computed(("batch", "length"))
        positions_BS = jnp.maximum(slot_context(context, size).positions, 0)
        written = on_each_device(take, layouts, layouts[0])(new_BTGK, positions_BS)
    return constrain(written, *AXES)


class Attention(nnx.Module):
    """Multi-head attention with grouped keys and values (arXiv:2305.13245)."""

    def __init__(
        self,
        config: Model,
        window: int,
        output_stddev: float,
        causal: bool = True,
        softcap: float = 0.0,
        multiplier: float = 0.0,
    ):
        """`softcap` bounds the logits (0: no bound); `multiplier` takes the place of 1 / sqrt(head_dim) (0: it stays)."""
        self.config, self.window, self.causal = config, window, causal
        self.softcap, self.multiplier = softcap, multiplier
        model = {"model": config.model_dim}
        heads = {"heads": config.num_heads, "head_dim": config.head_dim}
        kv_heads = {"kv_heads": config.num_kv_heads, "head_dim": config.head_dim}
        bias = config.bias or config.qkv_bias
        self.query = Dense(model, heads, config.init_scale, bias)
        self.key = Dense(model, kv_heads, config.init_scale, bias)
        self.value = Dense(model, kv_heads, config.init_scale, bias)
        normed = lambda dims: dims if config.qk_norm_whole else {"head_dim": config.head_dim}
        norm = lambda dims: Norm(normed(dims), config.norm, config.norm_epsilon, config.bias)
        self.query_norm = norm(heads) if config.qk_norm else None
        self.key_norm = norm(kv_heads) if config.qk_norm else None
        self.output = Dense(heads, model, output_stddev, config.bias)

    def __call__(
        self,
        x_BTD: jax.Array,
        context: Context,
        rope: RopeAngles | None,
        cache: Cache | None,
        bias_BHTS: jax.Array | None = None,
        source: tuple[jax.Array, Context] | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """-> [B, T, D], and the cache with the keys and values of these tokens.

        `source` is (hidden states [B, S, D], their context) for attention to another text; None: to `x` itself.
        """
        source_BSD, visible = source or (x_BTD, context)
        (q_BTHK, k_BSGK), v_BSGK = self.queries_and_keys(x_BTD, source_BSD, rope), self.value(source_BSD)
        named = zip((q_BTHK, k_BSGK, v_BSGK), ("query", "key", "value"), strict=True)
        q_BTHK, k_BSGK, v_BSGK = (checkpoint_name(x, name) for x, name in named)
        backend = self.config.attention
        if cache is not None:
            cache = Cache(write(cache.keys, k_BSGK, context), write(cache.values, v_BSGK, context))
            visible, backend = visible_keys(context, cache.keys.shape[1]), "auto"
            k_BSGK, v_BSGK = cache if visible is not context else (k_BSGK, v_BSGK)
        more = self.causal, bias_BHTS, self.softcap
        out_BTHK = attend(q_BTHK, k_BSGK, v_BSGK, context, visible, self.window, backend, *more)
        return checkpoint_name(self.output(out_BTHK), "attention"), cache

    def queries_and_keys(self, x_BTD, source_BSD, rope: RopeAngles | None) -> tuple[jax.Array, jax.Array]:
        """[B, T, H, K] and [B, S, G, K], normalised and rotated: their products over sqrt(K) are the logits."""
        q_BTHK, k_BSGK = self.query(x_BTD), self.key(source_BSD)
        if self.query_norm and self.key_norm:
            q_BTHK, k_BSGK = self.query_norm(q_BTHK), self.key_norm(k_BSGK)
        if rope is not None:
            q_BTHK, k_BSGK = apply_rope(q_BTHK, rope), apply_rope(k_BSGK, rope)
        if self.multiplier:
            q_BTHK = q_BTHK * (self.multiplier * self.config.head_dim**0.5)
        return q_BTHK, k_BSGK
