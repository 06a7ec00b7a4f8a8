"""Encoder-decoder Transformers: T5 1.1 (arXiv:1910.10683, arXiv:2002.05202) with relative positions, that of 2017 with others.

Shape suffixes: B batch, T target length, S source length or cache slots, D model, H heads, G kv heads, K head, L layers.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from lm_jax.config import Model
from lm_jax.model.attention import Context
from lm_jax.model.attention_layer import Attention
from lm_jax.model.dropout import Dropout, apply_dropout
from lm_jax.model.embedding import Embedding
from lm_jax.model.kv_cache import Cache, empty_cache, visible_keys
from lm_jax.model.language_model import LanguageModel, ModelOutputs
from lm_jax.model.layers import Norm, model_norm
from lm_jax.model.positions import RelativeBias, RopeAngles, add_positions, learned_positions, rope_angles
from lm_jax.model.stack import run_layers, stacked
from lm_jax.model.transformer import Mlp
from lm_jax.sharding import like


class Layer(nnx.Module):
    """Self-attention, in a decoder also attention to the source, and an MLP; norms before the branches, or after them."""

    def __init__(self, config: Model, decodes: bool):
        self.config, self.name = config, "decoder" if decodes else "encoder"
        stddev = config.init_scale / math.sqrt((3 if decodes else 2) * config.num_layers)
        self.attention_norm, self.attention = model_norm(config), Attention(config, 0, stddev, causal=decodes)
        self.cross_norm = model_norm(config) if decodes else None
        self.cross = Attention(config, 0, stddev, causal=False) if decodes else None
        self.mlp_norm, self.mlp = model_norm(config), Mlp(config, stddev)

    def __call__(
        self,
        x_BTD: jax.Array,
        context: Context,
        bias_BHTS: jax.Array | None,
        rope: RopeAngles | None,
        layer: jax.Array,
        dropout: Dropout | None,
        source: tuple[jax.Array, Context] | None = None,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """-> [B, T, D], and the cache of self-attention. `bias_BHTS` and `rope` are what positions give, None where nothing."""
        post, rate = self.config.norm_place == "post", self.config.dropout

        def branch(x_BTD, norm: Norm, name: str, function):
            y_BTD, aux = function(x_BTD if post else norm(x_BTD))
            y_BTD = apply_dropout(dropout, like(y_BTD, x_BTD), rate, f"{self.name}_{name}", layer)
            return norm(x_BTD + y_BTD) if post else x_BTD + y_BTD, aux

        attend_self = lambda x_BTD: self.attention(x_BTD, context, rope, cache, bias_BHTS)
        x_BTD, cache = branch(x_BTD, self.attention_norm, "attention", attend_self)
        if self.cross is not None and self.cross_norm is not None:
            cross, source = self.cross, source and (source[0].astype(x_BTD.dtype), source[1])
            attend_source = lambda x_BTD: cross(x_BTD, context, None, None, source=source)
            x_BTD, _ = branch(x_BTD, self.cross_norm, "cross", attend_source)
        return branch(x_BTD, self.mlp_norm, "mlp", lambda x_BTD: (self.mlp(x_BTD), None))[0], cache


class EncoderDecoder(LanguageModel):
    """`num_layers` layers that read the source, as many that write the target; one embedding for both."""

    def __init__(self, config: Model, vocab_size: int, sequence_length: int):
        super().__init__(config, vocab_size, sequence_length)
        relative, post = config.positions == "relative", config.norm_place == "post"
        for name, decodes in (("encoder", False), ("decoder", True)):
            setattr(self, f"{name}_positions", learned_positions(config, sequence_length))
            setattr(self, f"{name}_bias", RelativeBias(config, decodes) if relative else None)
            setattr(self, f"{name}_layers", stacked(Layer(config, decodes), config.num_layers))
            setattr(self, f"{name}_norm", None if post else model_norm(config))  # post: the last layer has normalised

    @staticmethod
    def empty_caches(config: Model, batch: int, slots: int) -> Cache:
        """The cache of the decoder's self-attention, zeros [L, B, G, S, K]."""
        return empty_cache(config, config.num_layers, batch, slots)

    def read(self, batch: dict, dropout: Dropout | None = None) -> ModelOutputs:
        """The outputs of the decoder for a batch, which has `encoder_*` arrays too."""
        source = Context(batch["encoder_positions"], batch["encoder_segment_ids"])
        encoded_BSD = self.encode(batch["encoder_tokens"], source, dropout)
        target = Context(batch["positions"], batch["segment_ids"])
        return ModelOutputs(self.decode(batch["tokens"], target, (encoded_BSD, source), dropout)[0])

    def encode(self, tokens_BS: jax.Array, context: Context, dropout: Dropout | None = None) -> jax.Array:
        """int32 tokens [B, S] of the source -> [B, S, D]."""
        return self._through("encoder", tokens_BS, context, dropout)[0]

    def decode(
        self,
        tokens_BT: jax.Array,
        context: Context,
        source: tuple[jax.Array, Context],
        dropout: Dropout | None = None,
        caches: Cache | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """int32 tokens [B, T] -> hidden states [B, T, D], and the caches.

        `source` is (encoded source [B, S, D], its context): a target segment attends to the source segment of the same id.
        """
        return self._through("decoder", tokens_BT, context, dropout, source, caches)

    def _through(self, stack: str, tokens_BT, context: Context, dropout, source=None, caches=None):
        """The stack "encoder" or "decoder", from tokens to final states."""
        config, part = self.config, lambda name: getattr(self, f"{stack}_{name}")
        x_BTD = self.embed(tokens_BT, context.positions, part("positions"))
        x_BTD = apply_dropout(dropout, x_BTD, config.dropout, f"{stack}_embedding")
        visible = context if caches is None else visible_keys(context, jax.tree.leaves(caches)[0].shape[-2])
        bias_BHTS = part("bias")(context.positions, visible.positions) if part("bias") else None
        rotary = config.positions == "rotary"
        rope = rope_angles(context.positions, config.head_dim, config.rotary_base) if rotary else None
        if source:  # float32, because its gradient is a sum over all layers
            source = source[0].astype(jnp.float32), source[1]

        def apply(layers, x_BTD, index, cache):
            return layers[0](x_BTD, context, bias_BHTS, rope, index, dropout, source, cache)

        remat = config.remat if caches is None else "none"
        x_BTD, caches = run_layers([part("layers")], apply, x_BTD, caches, remat, config.unroll is True)
        x_BTD = part("norm")(x_BTD) if part("norm") else x_BTD
        return apply_dropout(dropout, x_BTD, config.dropout, f"{stack}_end"), caches

    def embed(self, tokens_BT, positions_BT, learned: Embedding | None) -> jax.Array:
        """int32 tokens and their positions [B, T] -> [B, T, D], in the compute dtype."""
        x_BTD = self.embedding(tokens_BT, jnp.dtype(self.config.compute_dtype))
        return add_positions(x_BTD, positions_BT, self.config, learned)
