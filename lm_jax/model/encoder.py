"""BERT (Devlin et al., arXiv:1810.04805): blocks that are not causal, token types, and heads.

In pretraining there are two heads, for masked tokens and for the next sentence; in finetuning there is that of the task.

Shape suffixes: B batch, T length, D model, C labels.
"""

import jax
import jax.numpy as jnp

from lm_jax.config import Model
from lm_jax.model.attention import Context
from lm_jax.model.dropout import Dropout
from lm_jax.model.embedding import Embedding
from lm_jax.model.language_model import ModelOutputs
from lm_jax.model.layers import Dense, constant, declare, model_norm
from lm_jax.model.task_heads import PER_TOKEN
from lm_jax.model.transformer import ACTIVATIONS, Block, Transformer

NUM_SEGMENTS = 2  # token types of BERT: a segment has two texts; the second follows the first (label 0) or does not (1)


class Encoder(Transformer):
    """A Transformer that is not causal. Heads read the first token of a segment, or a masked token."""

    def __init__(self, config: Model, vocab_size: int, sequence_length: int, block: type[Block] = Block):
        super().__init__(config, vocab_size, sequence_length, block)
        dense = lambda num: Dense({"model": config.model_dim}, {"features": num}, config.init_scale, config.bias)
        self.segments = Embedding(NUM_SEGMENTS, config.model_dim, "segments", config.init_scale)
        self.embedding_norm = model_norm(config)
        if config.head not in PER_TOKEN:
            self.pooler = dense(config.model_dim)
        if config.head:
            return
        self.transform, self.transform_norm = dense(config.model_dim), model_norm(config)
        self.output_bias = declare((self.padded_vocab_size,), ("vocab",), constant(0.0)) if config.bias else None
        self.next_sentence = dense(2)

    def __call__(self, tokens_BT, context: Context, dropout: Dropout | None = None, caches=None, types_BT=None):
        """int32 tokens [B, T] -> final states [B, T, D], and the second output of the blocks.

        `types_BT` says to which of two texts a token belongs, 0 or 1 (None: all 0).
        """
        assert caches is None, "an encoder writes no text"
        x_BTD = self.embed(tokens_BT, context.positions)
        types_BT = jnp.zeros_like(tokens_BT) if types_BT is None else types_BT
        x_BTD = self.embedding_norm(x_BTD + self.segments(types_BT, x_BTD.dtype))
        return self.through(x_BTD, context, dropout)

    def read(self, batch: dict, dropout: Dropout | None = None) -> ModelOutputs:
        """The outputs for a batch, which has `token_type_ids` too."""
        context = Context(batch["positions"], batch["segment_ids"])
        states_BTD, aux = self(batch["tokens"], context, dropout, types_BT=batch["token_type_ids"])
        return ModelOutputs(None if self.config.head else self.fill(states_BTD), self.label_logits(states_BTD), aux)

    def fill(self, states_BTD: jax.Array) -> jax.Array:
        """The hidden states [B, T, D] that the masked-token head multiplies with the output table."""
        return self.transform_norm(ACTIVATIONS[self.config.activation](self.transform(states_BTD)))

    def label_logits(self, states_BTD: jax.Array) -> jax.Array:
        """float32 [B, T, C] of the task's head, or of the next sentence; those of segments are read at the first token only."""
        head = self.labels or self.next_sentence
        features_BTD = states_BTD if self.config.head in PER_TOKEN else jnp.tanh(self.pooler(states_BTD))
        return head(features_BTD.astype(jnp.float32))
