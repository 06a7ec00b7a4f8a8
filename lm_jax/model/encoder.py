"""BERT (Devlin et al., arXiv:1810.04805): blocks that see both sides, two segments, and its heads.

Two where it is pretrained, for masked tokens and the next sentence; that of its task where it has one.

Shape suffixes: B batch, T length, D model, V vocabulary, C labels.
"""

import jax
import jax.numpy as jnp

from lm_jax.config import Model
from lm_jax.model.attention import Context
from lm_jax.model.language_model import Reading
from lm_jax.model.layers import Dense, Dropout, Embedding, Norm, constant, declare
from lm_jax.model.task_heads import PER_TOKEN
from lm_jax.model.transformer import ACTIVATIONS, Transformer

NUM_SEGMENTS = 2  # two texts stand in a row; the second follows the first (label 0) or does not (1)


class Encoder(Transformer):
    """A Transformer that is not causal; its first token speaks for the whole segment, the others for what they hid."""

    def __init__(self, config: Model, num_pieces: int, sequence_length: int):
        super().__init__(config, num_pieces, sequence_length)
        norm = lambda: Norm({"model": config.model_dim}, config.norm, config.norm_epsilon, config.bias)
        dense = lambda num: Dense({"model": config.model_dim}, {"features": num}, config.init_scale, config.bias)
        self.segments = Embedding(NUM_SEGMENTS, config.model_dim, "segments", config.init_scale)
        self.embedding_norm = norm()
        if config.head not in PER_TOKEN:
            self.pooler = dense(config.model_dim)
        if config.head:
            return
        self.transform, self.transform_norm = dense(config.model_dim), norm()
        self.output_bias = declare((self.vocab_size,), ("vocab",), constant(0.0)) if config.bias else None
        self.next_sentence = dense(2)

    def __call__(self, tokens_BT, context: Context, drop: Dropout | None = None, caches=None, types_BT=None):
        """int32 tokens [B, T] -> final states [B, T, D], None. `types_BT` says which of the two texts a token is of."""
        assert caches is None, "an encoder writes no text"
        x_BTD = self.embed(tokens_BT, context.positions)
        types_BT = jnp.zeros_like(tokens_BT) if types_BT is None else types_BT
        x_BTD = self.embedding_norm(x_BTD + self.segments(types_BT, x_BTD.dtype))
        return self.through(x_BTD, context, drop)

    def read(self, batch: dict, drop: Dropout | None = None) -> Reading:
        context = Context(batch["positions"], batch["segment_ids"])
        states_BTD, left = self(batch["tokens"], context, drop, types_BT=batch["token_type_ids"])
        return Reading(None if self.config.head else self.fill(states_BTD), self.label_logits(states_BTD), left)

    def fill(self, states_BTD: jax.Array) -> jax.Array:
        """What the masked-token head multiplies with the output table."""
        return self.transform_norm(ACTIVATIONS[self.config.activation](self.transform(states_BTD)))

    def label_logits(self, states_BTD: jax.Array) -> jax.Array:
        """float32 [B, T, C]; of a segment only its first token is asked, but where each token has logits of its own."""
        head = self.labels or self.next_sentence
        seen_BTD = states_BTD if self.config.head in PER_TOKEN else jnp.tanh(self.pooler(states_BTD))
        return head(seen_BTD.astype(jnp.float32))
