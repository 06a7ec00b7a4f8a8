"""What a task asks of a model in the place of pieces: for every head how many logits a token has, and the loss of them.

A head sees one token for all of its segment (labels, value: an encoder's first token, the last token of a model that writes
from left to right), or each token for itself (tags).

Shape suffixes: B batch, T length, C outputs of the head.
"""

import jax
import jax.numpy as jnp


def num_outputs(head: str, labels: tuple[str, ...]) -> int:
    """The logits of a token."""
    return 1 if head == "value" else len(labels)


def losses(head: str, logits_BTC: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """float32 [B, T], to be masked: cross entropy in nats of the target's label, or the squared error of a float32 value."""
    if head == "value":
        return jnp.square(logits_BTC[..., 0].astype(jnp.float32) - targets_BT)
    return label_losses(logits_BTC, targets_BT)


def label_losses(logits_BTC: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """-log softmax(logits)[target] over a few labels, which no device splits, in nats."""
    logits_BTC = logits_BTC.astype(jnp.float32)
    is_target_BTC = jnp.arange(logits_BTC.shape[-1])[None, None] == targets_BT[:, :, None]
    return jax.nn.logsumexp(logits_BTC, axis=-1) - jnp.where(is_target_BTC, logits_BTC, 0).sum(-1)
