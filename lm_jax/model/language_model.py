"""What every language model has: a vocabulary with its two tables, and how it reads a batch.

Shape suffixes: B batch, T length, N tokens (B and T as one dim), D model, V vocabulary.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lm_jax.config import Model
from lm_jax.model.attention import Context
from lm_jax.model.layers import Dense, Dropout, Embedding, capped
from lm_jax.model.task_heads import num_outputs
from lm_jax.sharding import constrain, einsum, iota, reshape


class Reading(NamedTuple):
    """Of a batch: the hidden states whose products with the output table are the logits (None: no piece is predicted), and
    what else predicts."""

    hidden_BTD: jax.Array | None
    labels_BTC: jax.Array | None = (
        None  # float32 logits of a task's head, or of next sentence at a segment's first token
    )
    left: Any = None  # behind by the blocks: the routing losses of experts


class LanguageModel(nnx.Module):
    """Embedding and output table. `vocab_size` is padded; `num_pieces` of it are real."""

    output_bias: nnx.Param | None = None
    softcap, divisor = 0.0, 1.0  # of the logits: what bounds them (0: nothing), and by what they are divided

    def __init__(self, config: Model, num_pieces: int, sequence_length: int):
        self.config, self.num_pieces, self.vocab_size = config, num_pieces, padded(num_pieces)
        self.sequence_length = sequence_length
        table = lambda: Embedding(self.vocab_size, config.model_dim, "vocab", config.init_scale)
        self.embedding, self.unembedding = table(), None if config.tie_embedding or config.head else table()
        outputs = {"features": num_outputs(config.head, config.labels)}
        of_task = lambda: Dense({"model": config.model_dim}, outputs, config.init_scale, config.bias)
        self.labels = of_task() if config.head else None

    def __call__(self, tokens_BT: jax.Array, context: Context, drop: Dropout | None = None, caches=None):
        """int32 tokens [B, T] -> final hidden states [B, T, D], and what layers leave behind, such as caches."""
        raise NotImplementedError

    @staticmethod
    def empty_caches(config: Model, batch: int, slots: int):
        """What `caches` is before the first token of `batch` texts of at most `slots` tokens."""
        raise NotImplementedError

    def read(self, batch: dict, drop: Dropout | None = None) -> Reading:
        """What a batch of contract `[batch, length]` arrays gives for the loss."""
        hidden_BTD, left = self(batch["tokens"], Context(batch["positions"], batch["segment_ids"]), drop)
        if self.labels is None:
            return Reading(hidden_BTD, left=left)
        return Reading(None, self.labels(hidden_BTD.astype(jnp.float32)), left)

    @property
    def output_table(self) -> jax.Array:
        """[V, D] as it is stored: a piece's logit is its row times the hidden state."""
        return (self.unembedding or self.embedding).table[...]

    @property
    def bias_V(self) -> jax.Array | None:
        """What is added to the logits, as it is stored."""
        return None if self.output_bias is None else self.output_bias[...]

    def before_table(self, x_BTD: jax.Array) -> jax.Array:
        """Hidden states as they are multiplied with the output table, smaller where logits are divided by a constant."""
        return x_BTD if self.divisor == 1 else x_BTD / self.divisor

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Hidden states [B, T, D] -> float32 logits [B, T, V]; padding of the vocabulary never wins."""
        x_BTD = self.before_table(x_BTD)
        batch, length, dim = x_BTD.shape
        table_VD = constrain(self.output_table.astype(x_BTD.dtype), "vocab", "model")
        x_ND = reshape(x_BTD, (batch * length, dim), "tokens", None)
        logits = einsum("ND,VD->NV", x_ND, table_VD, "tokens", "vocab", dtype=jnp.float32)
        if self.bias_V is not None:
            logits = logits + constrain(self.bias_V, "vocab")[None]
        if self.softcap:
            logits = capped(logits, self.softcap)
        logits_BTV = reshape(logits, (batch, length, self.vocab_size), "batch", "length", "vocab")
        if self.vocab_size == self.num_pieces:
            return logits_BTV
        real_BTV = iota(logits_BTV.shape, "batch", "length", "vocab") < self.num_pieces
        return jnp.where(real_BTV, logits_BTV, -1e9)


def padded(num_pieces: int) -> int:
    """The vocabulary rounded up to a multiple of 128: whole tiles on every accelerator, divisible over `tensor`."""
    return math.ceil(num_pieces / 128) * 128
