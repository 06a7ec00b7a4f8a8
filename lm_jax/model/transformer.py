"""The Transformer, one stack of blocks; as it is, a decoder.

Shape suffixes: B batch, T length, D model, F mlp, V vocabulary, L layers. Layers are stacked: the body of the scan is one
*period* of the layer pattern (`config.window`), its parameters are [L / period, ...].
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lm_jax.config import Model
from lm_jax.model.attention import Attention, Cache, Context, Rotation, rotation
from lm_jax.model.language_model import LanguageModel
from lm_jax.model.layers import Dense, Dropout, Embedding, Norm, merge, over_layers, split, stacked
from lm_jax.model.moe import Experts
from lm_jax.sharding import constrain

ACTIVATIONS = {
    "gelu": jax.nn.gelu,
    "gelu_exact": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}

# What a layer keeps for the backward pass beside its input; the rest is computed again. From most to least memory:
# every product; what attention made, so that only the MLP's first half is done twice; nothing.
_policies = jax.checkpoint_policies
KEPT = {
    "dots": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable, _policies.save_only_these_names("attended")
    ),
    "names": _policies.save_only_these_names("query", "key", "value", "attended", "attention"),
    "full": _policies.nothing_saveable,
}


class Mlp(nnx.Module):
    """Two products with an activation between; gated: the activation of one half scales the other (arXiv:2002.05202)."""

    def __init__(self, config: Model, output_stddev: float):
        self.config = config
        model, mlp = {"model": config.model_dim}, {"mlp": config.mlp_dim}
        self.up = Dense(model, mlp, config.init_scale, config.bias)
        self.gate = Dense(model, mlp, config.init_scale, config.bias) if config.gated else None
        self.down = Dense(mlp, model, output_stddev, config.bias)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        activation = ACTIVATIONS[self.config.activation]
        h_BTF = activation(self.up(x_BTD)) if self.gate is None else activation(self.gate(x_BTD)) * self.up(x_BTD)
        return self.down(h_BTF)


class Block(nnx.Module):
    """Transformer block; residual outputs start smaller by sqrt(2 layers) (GPT-2).

    The stream x becomes, by `config.norm_place`, for both branches f (attention, then MLP):
    pre: x + f(norm(x)) (arXiv:2002.04745); post: norm(x + f(x)) (arXiv:1706.03762); both: x + norm(f(norm(x)));
    branch: x + norm(f(x)) (arXiv:2501.00656).
    """

    def __init__(self, config: Model, window: int):
        self.config = config
        output_stddev = config.init_scale / math.sqrt(2 * config.num_layers)
        norm = lambda: Norm({"model": config.model_dim}, config.norm, config.norm_epsilon, config.bias)
        causal, before = config.kind != "encoder", config.norm_place != "branch"
        self.attention_norm = norm() if before else None
        constants = config.logit_softcap[0], config.multipliers[2]
        self.attention = Attention(config, window, output_stddev, causal, *constants)
        activation = ACTIVATIONS[config.activation]
        self.mlp_norm = norm() if before else None
        self.mlp = Experts(config, output_stddev, activation) if config.num_experts else Mlp(config, output_stddev)
        after = config.norm_place in ("both", "branch")
        self.attention_post_norm = norm() if after else None
        self.mlp_post_norm = norm() if after else None

    def __call__(
        self,
        x_BTD,
        context: Context,
        turn: Rotation | None,
        layer,
        drop: Dropout | None,
        cache: Cache | None,
    ):
        post, rate, multiplier = self.config.norm_place == "post", self.config.dropout, self.config.multipliers[1]
        before = lambda x_BTD, norm: x_BTD if post or norm is None else norm(x_BTD)

        def join(x_BTD, y_BTD, name: str, norm: Norm | None, post_norm: Norm | None):
            y_BTD = post_norm(y_BTD) if post_norm else y_BTD
            y_BTD = y_BTD if multiplier == 1 else y_BTD * multiplier
            x_BTD = x_BTD + (drop(y_BTD, rate, name, layer) if drop and rate else y_BTD)
            return norm(x_BTD) if post and norm else x_BTD

        y_BTD, cache = self.attention(before(x_BTD, self.attention_norm), context, turn, cache)
        x_BTD = join(x_BTD, y_BTD, "attention", self.attention_norm, self.attention_post_norm)
        y_BTD = before(x_BTD, self.mlp_norm)
        routing = None
        if isinstance(self.mlp, Experts):
            y_BTD, routing = self.mlp(y_BTD, context.segment_ids)
        else:
            y_BTD = self.mlp(y_BTD)
        left = routing if cache is None else cache
        return join(x_BTD, y_BTD, "mlp", self.mlp_norm, self.mlp_post_norm), left


class Transformer(LanguageModel):
    """Embedding, blocks, final norm, output table."""

    def __init__(self, config: Model, num_pieces: int, sequence_length: int):
        super().__init__(config, num_pieces, sequence_length)
        self.softcap, self.divisor = config.logit_softcap[1], config.multipliers[3]
        self.period = len(config.window)
        learned = config.positions == "learned"
        self.positions = (
            Embedding(sequence_length, config.model_dim, "positions", config.init_scale / 2) if learned else None
        )
        for index, window in enumerate(config.window):
            setattr(self, f"block_{index}", stacked(Block(config, window), config.num_layers // self.period))
        ends = config.norm_place != "post"  # there the last block has normalised
        self.norm = Norm({"model": config.model_dim}, config.norm, config.norm_epsilon, config.bias) if ends else None

    @staticmethod
    def empty_caches(config: Model, batch: int, slots: int) -> list[Cache]:
        """Zeros [L / period, B, S, G, K] for each block of the period, on the mesh that is set; a window needs no more slots."""
        axes = ("layers", "batch", "length", "kv_heads", "head_dim")

        def zeros(window: int):
            size = min(slots, window) if window else slots
            shape = (config.num_layers // len(config.window), batch, size, config.num_kv_heads, config.head_dim)
            return constrain(jnp.zeros(shape, config.compute_dtype), *axes)

        return [Cache(zeros(window), zeros(window)) for window in config.window]

    def __call__(
        self,
        tokens_BT: jax.Array,
        context: Context,
        drop: Dropout | None = None,
        caches: list[Cache] | None = None,
    ) -> tuple[jax.Array, Any]:
        """int32 tokens [B, T] -> final hidden states [B, T, D], and what the blocks leave behind, stacked over the periods.

        For each block of the period that is its cache where there was one, else the routing losses [B, 2] of its experts.
        """
        return self.through(self.embed(tokens_BT, context.positions), context, drop, caches)

    def through(
        self,
        x_BTD: jax.Array,
        context: Context,
        drop: Dropout | None = None,
        caches: list[Cache] | None = None,
    ):
        """What `__call__` gives for tokens, for embedded tokens [B, T, D]."""
        if drop and self.config.dropout:
            x_BTD = drop(x_BTD, self.config.dropout, "embedding")
        turns = self.rotations(context.positions)
        graphs, stacks = zip(*(split(getattr(self, f"block_{i}")) for i in range(self.period)), strict=True)
        recomputed = self.config.remat != "none" and caches is None
        # What is kept of the stream between layers is split over devices that all hold it, and gathered in every layer.
        kept = "kept" if recomputed else None

        def body(x_BTD, scanned):
            step, layers, caches = scanned
            x_BTD = constrain(x_BTD, "batch", "length", None) if recomputed else x_BTD
            left = []
            for i, graph in enumerate(graphs):
                block = merge(graph, layers[i])
                cache = caches[i] if caches else None
                x_BTD, of_block = block(x_BTD, context, turns[i], step * self.period + i, drop, cache)
                left.append(of_block)
            return constrain(x_BTD, "batch", "length", kept), left

        num_periods = self.config.num_layers // self.period
        if recomputed:  # unrolled, XLA would find the same expressions and keep them after all
            body = jax.checkpoint(body, policy=KEPT[self.config.remat], prevent_cse=self.config.unroll)
        unroll = num_periods if self.config.unroll else 1
        x_BTD, left = over_layers(body, constrain(x_BTD, "batch", "length", kept), stacks, caches, unroll)
        x_BTD = constrain(x_BTD, "batch", "length", None)
        return self.norm(x_BTD) if self.norm else x_BTD, left

    def rotations(self, positions_BT: jax.Array) -> list[Rotation | None]:
        """Of each block of the period; blocks with a window may have another base, without scaling (Gemma 3), and each its
        share of a head's width (0: none)."""
        config = self.config
        made: dict[tuple[int, tuple], Rotation] = {}  # blocks that turn alike share one

        def of_block(window: int, share: float) -> Rotation | None:
            width = int(config.head_dim * share)
            if config.positions != "rotary" or not width:
                return None
            how: tuple = (config.rotary_base, config.rotary_scaling, config.rotary_scaling_kind)
            how = (config.rotary_local_base,) if window and config.rotary_local_base else how
            if (width, how) not in made:
                made[width, how] = rotation(positions_BT, width, *how)
            return made[width, how]

        return [of_block(*kind) for kind in zip(config.window, shares(config), strict=True)]

    def embed(self, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        dtype = jnp.dtype(self.config.compute_dtype)
        x_BTD = self.embedding(tokens_BT, dtype)
        if self.config.scale_embedding:
            x_BTD = x_BTD * jnp.asarray(math.sqrt(self.config.model_dim), dtype)
        if self.config.multipliers[0] != 1:
            x_BTD = x_BTD * self.config.multipliers[0]
        if self.positions is not None:
            x_BTD = x_BTD + self.positions(positions_BT, dtype)
        if self.config.positions == "sinusoidal":
            x_BTD = x_BTD + sinusoids(positions_BT, self.config.model_dim).astype(dtype)
        return x_BTD


def shares(config: Model) -> tuple[float, ...]:
    """`config.rotary_share` of each block of the period."""
    return config.rotary_share * (len(config.window) // len(config.rotary_share))


def sinusoids(positions_BT: jax.Array, dim: int) -> jax.Array:
    """Fixed positions (arXiv:1706.03762, section 3.5), sines then cosines -> float32 [B, T, D]."""
    frequency = 10_000.0 ** (-jnp.arange(dim // 2, dtype=jnp.float32) / (dim // 2))
    angle = positions_BT[:, :, None].astype(jnp.float32) * frequency[None, None]
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
