"""Encoder-decoder Transformers: T5 1.1 (arXiv:1910.10683, arXiv:2002.05202) with relative positions, or that of 2017 with others.

Shape suffixes: B batch, T target length, S source length, D model, H heads, N buckets, L layers.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lm_jax.config import Model
from lm_jax.model.attention import Attention, Cache, Context, Rotation, rotation, seen_keys
from lm_jax.model.language_model import LanguageModel, Reading
from lm_jax.model.layers import Dropout, Embedding, Norm, declare, merge, normal, over_layers, split, stacked
from lm_jax.model.transformer import KEPT, Mlp, sinusoids
from lm_jax.sharding import constrain, take

BUCKETS, FARTHEST = 32, 128  # of relative positions, and the distance from which all are one


def bounds(exact: int, num: int) -> np.ndarray:
    """Smallest distances of the buckets beyond `exact`, which grow by a factor up to `FARTHEST`; no float decides a border."""
    steps = np.arange(1, num - exact) / (num - exact)
    return np.ceil(np.round(exact * (FARTHEST / exact) ** steps, 9)).astype(np.int32)


def bucket(ahead_BTS: jax.Array, causal: bool) -> jax.Array:
    """The bucket of a key that stands `ahead` of its query (arXiv:1910.10683, section 2.1): half for either side, or one side."""
    num = BUCKETS if causal else BUCKETS // 2
    exact = num // 2
    distance_BTS = jnp.maximum(-ahead_BTS, 0) if causal else jnp.abs(ahead_BTS)
    found_BTS = jnp.minimum(distance_BTS, exact)
    for bound in bounds(exact, num):
        found_BTS = found_BTS + (distance_BTS >= bound)
    return found_BTS if causal else found_BTS + num * (ahead_BTS > 0)


class RelativeBias(nnx.Module):
    """What is added to the logits of every layer, by bucket and head."""

    def __init__(self, config: Model, causal: bool):
        self.causal = causal
        shape = BUCKETS, config.num_heads
        self.table = declare(shape, ("buckets", "heads"), normal(config.init_scale), (0,), (1,))

    def __call__(self, queries: Context, keys: Context) -> jax.Array:
        """-> float32 [B, H, T, S]."""
        bucket_BTS = bucket(keys.positions[:, None, :] - queries.positions[:, :, None], self.causal)
        table_NH = constrain(self.table[...], "buckets", "heads")
        return take(table_NH, bucket_BTS, "batch", "length", None, "heads").transpose(0, 3, 1, 2)


class Layer(nnx.Module):
    """Attention to its own text, in a decoder to the source as well, and an MLP; norms before the branches or after them."""

    def __init__(self, config: Model, decodes: bool):
        self.config, self.name = config, "decoder" if decodes else "encoder"
        stddev = config.init_scale / math.sqrt((3 if decodes else 2) * config.num_layers)
        norm = lambda: Norm({"model": config.model_dim}, config.norm, config.norm_epsilon, config.bias)
        self.attention_norm, self.attention = norm(), Attention(config, 0, stddev, causal=decodes)
        self.cross_norm = norm() if decodes else None
        self.cross = Attention(config, 0, stddev, causal=False) if decodes else None
        self.mlp_norm, self.mlp = norm(), Mlp(config, stddev)

    def __call__(
        self,
        x_BTD: jax.Array,
        context: Context,
        at: tuple[jax.Array | None, Rotation | None],
        layer: jax.Array,
        drop: Dropout | None,
        source: tuple[jax.Array, Context] | None = None,
        cache: Cache | None = None,
    ):
        """-> [B, T, D], and the cache. `at` is what positions give: a bias and a rotation, either may be None."""
        post, rate = self.config.norm_place == "post", self.config.dropout

        def branch(x_BTD, norm: Norm, name: str, function):
            y_BTD, left = function(x_BTD if post else norm(x_BTD))
            y_BTD = drop(y_BTD, rate, f"{self.name}_{name}", layer) if drop and rate else y_BTD
            return norm(x_BTD + y_BTD) if post else x_BTD + y_BTD, left

        own = lambda x_BTD: self.attention(x_BTD, context, at[1], cache, at[0])
        x_BTD, cache = branch(x_BTD, self.attention_norm, "attention", own)
        if self.cross is not None and self.cross_norm is not None:
            look = self.cross
            seen = source and (source[0].astype(x_BTD.dtype), source[1])
            across = lambda x_BTD: look(x_BTD, context, None, None, source=seen)
            x_BTD, _ = branch(x_BTD, self.cross_norm, "cross", across)
        return branch(x_BTD, self.mlp_norm, "mlp", lambda x_BTD: (self.mlp(x_BTD), None))[0], cache


class EncoderDecoder(LanguageModel):
    """`num_layers` layers that read the source, as many that write the target; one embedding for both."""

    def __init__(self, config: Model, num_pieces: int, sequence_length: int):
        super().__init__(config, num_pieces, sequence_length)
        learned, relative = (config.positions == name for name in ("learned", "relative"))
        places = lambda: Embedding(sequence_length, config.model_dim, "positions", config.init_scale / 2)
        norm = lambda: Norm({"model": config.model_dim}, config.norm, config.norm_epsilon, config.bias)
        ends = config.norm_place != "post"  # there the last layers have normalised
        for name, decodes in (("encoder", False), ("decoder", True)):
            setattr(self, f"{name}_positions", places() if learned else None)
            setattr(self, f"{name}_bias", RelativeBias(config, decodes) if relative else None)
            setattr(self, f"{name}_layers", stacked(Layer(config, decodes), config.num_layers))
            setattr(self, f"{name}_norm", norm() if ends else None)

    @staticmethod
    def empty_caches(config: Model, batch: int, slots: int) -> Cache:
        """Zeros [L, B, S, G, K]: what the decoder has written so far."""
        shape = (config.num_layers, batch, slots, config.num_kv_heads, config.head_dim)
        axes = ("layers", "batch", "length", "kv_heads", "head_dim")
        zeros = lambda: constrain(jnp.zeros(shape, config.compute_dtype), *axes)
        return Cache(zeros(), zeros())

    def read(self, batch: dict, drop: Dropout | None = None) -> Reading:
        source = Context(batch["encoder_positions"], batch["encoder_segment_ids"])
        encoded_BSD = self.encode(batch["encoder_tokens"], source, drop)
        target = Context(batch["positions"], batch["segment_ids"])
        return Reading(self.decode(batch["tokens"], target, (encoded_BSD, source), drop)[0])

    def encode(self, tokens_BS: jax.Array, context: Context, drop: Dropout | None = None) -> jax.Array:
        """int32 tokens [B, S] of the source -> [B, S, D]."""
        return self._through("encoder", tokens_BS, context, drop)[0]

    def decode(
        self,
        tokens_BT: jax.Array,
        context: Context,
        source: tuple[jax.Array, Context],
        drop: Dropout | None = None,
        caches: Cache | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """int32 tokens [B, T] -> hidden states [B, T, D], and the caches. A segment sees that of the same id in the source."""
        return self._through("decoder", tokens_BT, context, drop, source, caches)

    def _through(self, stack: str, tokens_BT, context: Context, drop, source=None, caches=None):
        config, part = self.config, lambda name: getattr(self, f"{stack}_{name}")
        x_BTD = self.embed(tokens_BT, context.positions, part("positions"))
        x_BTD = drop(x_BTD, config.dropout, f"{stack}_embedding") if drop and config.dropout else x_BTD
        seen = context if caches is None else seen_keys(context, jax.tree.leaves(caches)[0].shape[-3])
        bias_BHTS = part("bias")(context, seen) if part("bias") else None
        rotary = config.positions == "rotary"
        turn = rotation(context.positions, config.head_dim, config.rotary_base) if rotary else None
        graph, parameters = split(part("layers"))
        if source:  # all layers read it: its gradient is their sum
            source = source[0].astype(jnp.float32), source[1]

        def body(x_BTD, scanned):
            index, parameters, cache = scanned
            layer = merge(graph, parameters)
            return layer(x_BTD, context, (bias_BHTS, turn), index, drop, source, cache)

        if config.remat != "none" and caches is None:
            body = jax.checkpoint(body, policy=KEPT[config.remat], prevent_cse=config.unroll)
        unroll = config.num_layers if config.unroll else 1
        x_BTD, caches = over_layers(body, x_BTD, parameters, caches, unroll)
        x_BTD = part("norm")(x_BTD) if part("norm") else x_BTD
        return drop(x_BTD, config.dropout, f"{stack}_end") if drop and config.dropout else x_BTD, caches

    def embed(self, tokens_BT, positions_BT, learned: Embedding | None) -> jax.Array:
        dtype = jnp.dtype(self.config.compute_dtype)
        x_BTD = self.embedding(tokens_BT, dtype)
        if learned is not None:
            x_BTD = x_BTD + learned(positions_BT, dtype)
        if self.config.positions == "sinusoidal":
            x_BTD = x_BTD + sinusoids(positions_BT, self.config.model_dim).astype(dtype)
        return x_BTD
