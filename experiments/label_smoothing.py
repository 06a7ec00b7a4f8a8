"""A loss of one's own: label smoothing (Szegedy et al., arXiv:1512.00567, section 7; 0.1 as in arXiv:1706.03762).

    python -m lm_jax.main --config experiments/label_smoothing.py
    python -m lm_jax.evaluate --model runs/label_smoothing --parts experiments/label_smoothing.py

The quickstart's variant gpt3, trained towards 0.9 of the target and 0.1 of all tokens alike. It is what training minimises;
what is logged and evaluated stays the cross entropy, so that perplexity and bits per byte can be compared.
Expected: 2.74 validation bits per byte with --config.train.num_steps=250, as quickstart.py:gpt3 has without it.
"""

import jax
import jax.numpy as jnp
import quickstart

from lm_jax.loss import token_losses
from lm_jax.parts import Parts

SMOOTHING = 0.1


def get_config():
    return quickstart.get_config("gpt3")


def smoothed(logits_BTV, targets_BT):
    """Cross entropy in nats with a target that is mixed with the uniform distribution, [B, T]."""
    is_token_BTV = logits_BTV > -1e8  # the padding of the vocabulary has -1e9
    mean_BT = jnp.where(is_token_BTV, logits_BTV, 0).sum(-1) / is_token_BTV.sum(-1)
    uniform_BT = jax.nn.logsumexp(logits_BTV, axis=-1) - mean_BT
    return (1 - SMOOTHING) * token_losses(logits_BTV, targets_BT) + SMOOTHING * uniform_BT


def get_parts():
    return Parts(loss=smoothed)
