"""The attention layer: projections around `attend`; in generation keys and values come from a cache.

Shape suffixes: B batch, T query length, S key length or cache slots, D model, H heads, G kv heads, K head.
"""

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from lm_jax.config import Model
from lm_jax.model.attention import Context, attend
from lm_jax.model.kv_cache import Cache, extend
from lm_jax.model.layers import Dense, Norm
from lm_jax.model.positions import RopeAngles, apply_rope


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
        """`softcap` bounds the logits (0: no bound); `multiplier` replaces the factor 1 / sqrt(head_dim) (0: it stays)."""
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
        """-> [B, T, D], and the cache (None without one) with the keys and values of these tokens.

        `source` is (hidden states [B, S, D], their context) for attention to another text; None: to `x` itself.
        """
        source_BSD, visible = source or (x_BTD, context)
        q_BTHK, k_BSGK = self.queries_and_keys(x_BTD, source_BSD, rope)
        q_BTHK, k_BSGK = checkpoint_name(q_BTHK, "query"), checkpoint_name(k_BSGK, "key")
        v_BSGK = checkpoint_name(self.value(source_BSD), "value")
        backend = self.config.attention
        if cache is not None:
            (k_BSGK, v_BSGK, visible, cache), backend = extend(cache, k_BSGK, v_BSGK, context, self.window > 0), "auto"
        settings = self.window, backend, self.causal, bias_BHTS, self.softcap
        out_BTHK = attend(q_BTHK, k_BSGK, v_BSGK, context, visible, *settings)
        return checkpoint_name(self.output(out_BTHK), "attention"), cache

    def queries_and_keys(
        self, x_BTD: jax.Array, source_BSD: jax.Array, rope: RopeAngles | None
    ) -> tuple[jax.Array, jax.Array]:
        """[B, T, H, K] and [B, S, G, K], normalised and rotated: their products over sqrt(K) are the logits."""
        q_BTHK, k_BSGK = self.query(x_BTD), self.key(source_BSD)
        if self.query_norm and self.key_norm:
            q_BTHK, k_BSGK = self.query_norm(q_BTHK), self.key_norm(k_BSGK)
        if rope is not None:
            q_BTHK, k_BSGK = apply_rope(q_BTHK, rope), apply_rope(k_BSGK, rope)
        if self.multiplier:
            q_BTHK = q_BTHK * (self.multiplier * self.config.head_dim**0.5)
        return q_BTHK, k_BSGK
