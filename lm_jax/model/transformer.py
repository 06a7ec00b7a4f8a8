"""The Transformer, one stack of blocks: decoders, and the base of encoders.

Shape suffixes: B batch, T length, S cache slots, D model, F mlp, G kv heads, K head, L layers. Layers are stacked: the body of
the scan is one *period* of the layer pattern (`config.window`), and its parameters are [L / period, ...].
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lm_jax.config import Model
from lm_jax.model.attention import Context
from lm_jax.model.attention_layer import Attention
from lm_jax.model.dropout import Dropout, apply_dropout
from lm_jax.model.kv_cache import Cache, empty_cache
from lm_jax.model.language_model import LanguageModel
from lm_jax.model.layers import Dense, Norm, model_norm, written
from lm_jax.model.moe import Experts
from lm_jax.model.positions import RopeAngles, add_positions, learned_positions, rope_of_blocks
from lm_jax.model.stack import run_layers, stacked
from lm_jax.sharding import constrain, like, ways

ACTIVATIONS = {
    "gelu": jax.nn.gelu,
    "gelu_exact": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


class Mlp(nnx.Module):
    """Two dense layers with an activation between; gated: the activation of a third scales the first (arXiv:2002.05202)."""

    def __init__(self, config: Model, output_stddev: float):
        self.config = config
        model, mlp = {"model": config.model_dim}, {"mlp": config.mlp_dim}
        self.up = Dense(model, mlp, config.init_scale, config.bias)
        self.gate = Dense(model, mlp, config.init_scale, config.bias) if config.gated else None
        self.down = Dense(mlp, model, output_stddev, config.bias)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """-> [B, T, D]."""
        activation = ACTIVATIONS[self.config.activation]
        if self.gate is None:
            return self.down(activation(self.up(x_BTD)))
        gate_BTF, up_BTF = written((self.gate(x_BTD), self.up(x_BTD)))
        return self.down(written(activation(gate_BTF) * up_BTF))


class Block(nnx.Module):
    """Transformer block: attention, then an MLP or experts; output kernels start smaller by sqrt(2 layers) (GPT-2).

    Each is a branch f of the residual stream x. By `config.norm_place` the stream becomes
    pre: x + f(norm(x)) (arXiv:2002.04745); post: norm(x + f(x)) (arXiv:1706.03762);
    both: x + norm(f(norm(x))); branch: x + norm(f(x)) (arXiv:2501.00656).
    """

    def __init__(self, config: Model, window: int):
        self.config = config
        output_stddev = config.init_scale / math.sqrt(2 * config.num_layers)
        causal, before = config.kind != "encoder", config.norm_place != "branch"
        self.attention_norm = model_norm(config) if before else None
        constants = config.logit_softcap[0], config.multipliers[2]
        self.attention = Attention(config, window, output_stddev, causal, *constants)
        activation = ACTIVATIONS[config.activation]
        self.mlp_norm = model_norm(config) if before else None
        self.mlp = Experts(config, output_stddev, activation) if config.num_experts else Mlp(config, output_stddev)
        after = config.norm_place in ("both", "branch")
        self.attention_post_norm = model_norm(config) if after else None
        self.mlp_post_norm = model_norm(config) if after else None

    def __call__(
        self,
        x_BTD: jax.Array,
        context: Context,
        rope: RopeAngles | None,
        layer: jax.Array | int,
        dropout: Dropout | None,
        cache: Cache | None,
    ) -> tuple[jax.Array, Any]:
        """-> [B, T, D], and the new cache where one was given, else the routing losses [B, 2] of experts, else None."""
        post, rate, multiplier = self.config.norm_place == "post", self.config.dropout, self.config.multipliers[1]

        def before(x_BTD: jax.Array, norm: Norm | None) -> jax.Array:
            return constrain(x_BTD if post or norm is None else norm(x_BTD), "batch", "length", None)

        def join(x_BTD: jax.Array, y_BTD: jax.Array, name: str, norm: Norm | None, post_norm: Norm | None) -> jax.Array:
            y_BTD = like(y_BTD, x_BTD)
            y_BTD = post_norm(y_BTD) if post_norm else y_BTD
            y_BTD = y_BTD if multiplier == 1 else y_BTD * multiplier
            x_BTD = x_BTD + apply_dropout(dropout, y_BTD, rate, name, layer)
            return norm(x_BTD) if post and norm else x_BTD

        y_BTD, cache = self.attention(before(x_BTD, self.attention_norm), context, rope, cache)
        x_BTD = join(x_BTD, y_BTD, "attention", self.attention_norm, self.attention_post_norm)
        y_BTD = before(x_BTD, self.mlp_norm)
        routing = None
        if isinstance(self.mlp, Experts):
            y_BTD, routing = self.mlp(y_BTD, context.segment_ids)
        else:
            y_BTD = self.mlp(y_BTD)
        aux = routing if cache is None else cache
        return join(x_BTD, y_BTD, "mlp", self.mlp_norm, self.mlp_post_norm), aux


class Transformer(LanguageModel):
    """Embedding, blocks (each a `block(config, window)`), final norm, output table."""

    def __init__(self, config: Model, vocab_size: int, sequence_length: int, block: type[Block] = Block):
        super().__init__(config, vocab_size, sequence_length)
        self.softcap, self.divisor = config.logit_softcap[1], config.multipliers[3]
        self.period = len(config.window)
        self.positions = learned_positions(config, sequence_length)
        for index, window in enumerate(config.window):
            setattr(self, f"block_{index}", stacked(block(config, window), config.num_layers // self.period))
        self.norm = model_norm(config) if config.norm_place != "post" else None  # there the last block has normalised

    @staticmethod
    def empty_caches(config: Model, batch: int, slots: int) -> list[Cache]:
        """Zeros [L / period, B, S, G, K] for each block of the period; one with a window has no more slots than that."""
        num_periods = config.num_layers // len(config.window)
        sizes = [min(slots, window) if window else slots for window in config.window]
        return [empty_cache(config, num_periods, batch, size) for size in sizes]

    def __call__(
        self, tokens_BT: jax.Array, context: Context, dropout: Dropout | None = None, caches: list[Cache] | None = None
    ) -> tuple[jax.Array, Any]:
        """int32 tokens [B, T] -> final hidden states [B, T, D], and the second output of each block of the period.

        That is its caches, or the routing losses [L / period, B, 2] of its experts, stacked over the periods.
        """
        return self.through(self.embed(tokens_BT, context.positions), context, dropout, caches)

    def through(
        self, x_BTD: jax.Array, context: Context, dropout: Dropout | None = None, caches: list[Cache] | None = None
    ) -> tuple[jax.Array, Any]:
        """As `__call__`, from embedded tokens [B, T, D]."""
        config = self.config
        x_BTD = apply_dropout(dropout, x_BTD, config.dropout, "embedding")
        rope, remat = rope_of_blocks(config, context.positions), config.remat if caches is None else "none"
        # Devices of a tensor group share the stream's tokens out: each norms and keeps its own, and products gather them.
        split = "stream" if caches is None and x_BTD.shape[1] % ways("stream") == 0 else "length"

        def period(
            blocks: list[Block], x_BTD: jax.Array, index: jax.Array, caches: list[Cache] | None
        ) -> tuple[jax.Array, list]:
            aux = []
            for i, block in enumerate(blocks):
                cache = caches[i] if caches else None
                x_BTD, of_block = block(x_BTD, context, rope[i], index * self.period + i, dropout, cache)
                aux.append(of_block)
            return x_BTD, aux

        blocks = [getattr(self, f"block_{i}") for i in range(self.period)]
        x_BTD = constrain(x_BTD, "batch", split, None)
        x_BTD, aux = run_layers(blocks, period, x_BTD, caches, remat, config.unroll is True)
        x_BTD = constrain(x_BTD, "batch", "length", None)
        return self.norm(x_BTD) if self.norm else x_BTD, aux

    def embed(self, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """int32 tokens and positions [B, T] -> [B, T, D] in the compute dtype."""
        dtype = jnp.dtype(self.config.compute_dtype)
        x_BTD = self.embedding(tokens_BT, dtype)
        if self.config.scale_embedding:
            x_BTD = x_BTD * jnp.asarray(math.sqrt(self.config.model_dim), dtype)
        if self.config.multipliers[0] != 1:
            x_BTD = x_BTD * self.config.multipliers[0]
        return add_positions(x_BTD, positions_BT, self.config, self.positions)
