"""A block of one's own: attention and MLP read the same norm, side by side (GPT-J; PaLM, arXiv:2204.02311, section 2).

    python -m lm_jax.main --config experiments/parallel_attention.py
    python -m lm_jax.generate --model runs/parallel_attention --parts experiments/parallel_attention.py --prompt "class"

The quickstart's variant gpt3 with another block: x + attention(norm(x)) + mlp(norm(x)), one norm a layer in place of two. Its
parameters are declared as the ordinary block declares them, so that sharding, optimizers, checkpoints and the KV cache need to
know nothing.
Expected: 2.69 validation bits per byte with --config.train.num_steps=250, where quickstart.py:gpt3 has 2.74.
"""

import quickstart

from lm_jax.model.dropout import apply_dropout
from lm_jax.model.transformer import Block
from lm_jax.parts import Parts
from lm_jax.sharding import constrain, like


def get_config():
    return quickstart.get_config("gpt3")


class Parallel(Block):
    """Attention and MLP of one normed stream, added to it together."""

    def __init__(self, config, window):
        super().__init__(config, window)
        self.mlp_norm = None  # what is not declared is not there

    def __call__(self, x_BTD, context, rope, layer, dropout, cache):
        """-> [B, T, D], and the new cache where one was given."""
        normed_BTD = constrain(self.attention_norm(x_BTD), "batch", "length", None)
        attended_BTD, cache = self.attention(normed_BTD, context, rope, cache)
        y_BTD = like(attended_BTD, x_BTD) + like(self.mlp(normed_BTD), x_BTD)
        return x_BTD + apply_dropout(dropout, y_BTD, self.config.dropout, "block", layer), cache


def get_parts():
    return Parts(block=Parallel)
