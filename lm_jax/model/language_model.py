"""What every language model has: an embedding, an output table, and how it reads a batch.

Shape suffixes: B batch, T length, N tokens (B and T as one dim), D model, V padded vocabulary, C labels.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lm_jax.config import Model
from lm_jax.model.attention import Context
from lm_jax.model.dropout import Dropout
from lm_jax.model.embedding import Embedding
from lm_jax.model.layers import Dense, capped, tokens_of
from lm_jax.model.task_heads import num_outputs
from lm_jax.model.unstacked import times_few
from lm_jax.sharding import constrain, einsum, iota, platform, reshape

Caches = Any  # of generation, a tree of arrays: each kind of model has its own, and takes no other's


class ModelOutputs(NamedTuple):
    """What the loss of a batch is computed from. Logits of tokens are hidden states times the output table."""

    hidden_BTD: jax.Array | None  # None where a task's head predicts instead of the output table
    labels_BTC: jax.Array | None = None  # float32 logits of that head, or of the next sentence (read at first tokens)
    aux: Any = None  # the routing losses of experts


class LanguageModel(nnx.Module):
    """Embedding and output table. The tables have `padded_vocab_size` rows, the first `vocab_size` of them for tokens."""

    output_bias: nnx.Param | None = None
    softcap, divisor = 0.0, 1.0  # logits are divided by `divisor`, then bounded by `softcap` (0: not at all)

    def __init__(self, config: Model, vocab_size: int, sequence_length: int):
        self.config, self.vocab_size, self.padded_vocab_size = config, vocab_size, padded(vocab_size)
        self.sequence_length = sequence_length
        table = lambda: Embedding(self.padded_vocab_size, config.model_dim, "vocab", config.init_scale)
        self.embedding, self.unembedding = table(), None if config.tie_embedding or config.head else table()
        outputs = {"features": num_outputs(config.head, config.labels)}
        task_head = lambda: Dense({"model": config.model_dim}, outputs, config.init_scale, config.bias)
        self.labels = task_head() if config.head else None

    def __call__(
        self, tokens_BT: jax.Array, context: Context, dropout: Dropout | None = None, caches: Caches = None
    ) -> tuple[jax.Array, Any]:
        """int32 tokens [B, T] -> final hidden states [B, T, D], and what layers return beside them: caches, routing losses."""
        raise NotImplementedError

    @staticmethod
    def empty_caches(config: Model, batch: int, slots: int) -> Caches:
        """The caches before the first token, for `batch` texts of at most `slots` tokens."""
        raise NotImplementedError

    def read(self, batch: dict, dropout: Dropout | None = None) -> ModelOutputs:
        """The outputs for a batch: arrays [B, T] of tokens, positions, segment_ids, and what the kind of model needs."""
        hidden_BTD, aux = self(batch["tokens"], Context(batch["positions"], batch["segment_ids"]), dropout)
        if self.labels is None:
            return ModelOutputs(hidden_BTD, aux=aux)
        return ModelOutputs(None, self.labels(hidden_BTD.astype(jnp.float32)), aux)

    @property
    def output_table(self) -> jax.Array:
        """[V, D] in the stored layout: the logit of a token is its row times the hidden state."""
        return (self.unembedding or self.embedding).table[...]

    @property
    def bias_V(self) -> jax.Array | None:  # noqa: N802  (V is a shape suffix)
        """The bias of the logits, in the stored layout."""
        return None if self.output_bias is None else self.output_bias[...]

    def before_table(self, x_BTD: jax.Array) -> jax.Array:
        """Hidden states as they are multiplied with the output table, which divides the logits by `divisor`."""
        return x_BTD if self.divisor == 1 else x_BTD / self.divisor

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Hidden states [B, T, D] -> float32 logits [B, T, V]; -1e9 for the padding of the vocabulary."""
        x_BTD = self.before_table(x_BTD)
        batch, length, dim = x_BTD.shape
        table_VD = constrain(self.output_table.astype(x_BTD.dtype), "vocab", "model")
        n, sizes_N, tokens = tokens_of(batch, length)
        x_ND = reshape(x_BTD, (*sizes_N, dim), *tokens, None)
        if platform() == "cpu" and length == 1 and n == "N":
            logits = times_few(table_VD, x_ND, "vocab", jnp.float32)
        else:
            logits = einsum(f"{n}D,VD->{n}V", x_ND, table_VD, *tokens, "vocab", dtype=jnp.float32)
        if self.bias_V is not None:
            logits = logits + constrain(self.bias_V, "vocab")[(None,) * len(tokens)]
        if self.softcap:
            logits = capped(logits, self.softcap)
        logits_BTV = reshape(logits, (batch, length, self.padded_vocab_size), "batch", "length", "vocab")
        if self.padded_vocab_size == self.vocab_size:
            return logits_BTV
        real_BTV = iota(logits_BTV.shape, "batch", "length", "vocab") < self.vocab_size
        return jnp.where(real_BTV, logits_BTV, -1e9)


def padded(vocab_size: int) -> int:
    """The vocabulary rounded up to a multiple of 128: whole tiles on every accelerator, divisible over `tensor`."""
    return math.ceil(vocab_size / 128) * 128
