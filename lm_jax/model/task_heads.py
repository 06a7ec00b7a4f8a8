"""What a task asks of a model in the place of pieces: for every head how many logits a token has, and the loss of them.

A head sees one token for all of its segment (labels, value: an encoder's first token, the last token of a model that writes
from left to right), each token for itself (tags), or all tokens of a segment against each other (spans).

Shape suffixes: B batch, T length, S length of what a token is compared with, C outputs of the head.
"""

import jax
import jax.numpy as jnp

from lm_jax.sharding import constrain

PER_TOKEN = ("tags", "spans")  # heads whose logits are of tokens, not of a segment
# Where an answer may start and may end, and where it does: bits of a token's target.
MAY_START, MAY_END, STARTS, ENDS = 1, 2, 4, 8


def num_outputs(head: str, labels: tuple[str, ...]) -> int:
    """The logits of a token."""
    return {"value": 1, "spans": 2}.get(head, len(labels))


def losses(head: str, logits_BTC: jax.Array, batch: dict) -> jax.Array:
    """float32 [B, T], of float32 logits, to be masked: cross entropy in nats of the target's label, the squared error of a value,
    or the cross entropy of a segment's span."""
    if head == "value":
        return jnp.square(logits_BTC[..., 0] - batch["targets"])
    if head == "spans":
        return span_losses(logits_BTC, batch["targets"], batch["segment_ids"])
    return label_losses(logits_BTC, batch["targets"])


def label_losses(logits_BTC: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """-log softmax(logits)[target] over a few labels, which no device splits, in nats."""
    is_target_BTC = jnp.arange(logits_BTC.shape[-1])[None, None] == targets_BT[:, :, None]
    return jax.nn.logsumexp(logits_BTC, axis=-1) - jnp.where(is_target_BTC, logits_BTC, 0).sum(-1)


def span_losses(logits_BTC: jax.Array, targets_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
    """At every token the loss of its segment, in nats: the mean of -log softmax at its answer's start and at its end (Devlin et
    al., arXiv:1810.04805, 4.2), each over the tokens of the segment where one may be."""
    logits_BSC = constrain(logits_BTC, "batch", None, None)
    targets_BS, segments_BS = (constrain(x, "batch", None) for x in (targets_BT, segment_ids_BT))
    own_BTS = segment_ids_BT[:, :, None] == segments_BS[:, None]

    def loss_of(place: int, may: int, does: int) -> jax.Array:
        logits_B1S = logits_BSC[:, None, :, place]
        candidate_BTS, answer_BTS = (own_BTS & ((targets_BS & bit) > 0)[:, None] for bit in (may, does))
        log_total_BT = jax.nn.logsumexp(jnp.where(candidate_BTS, logits_B1S, -1e9), axis=-1)
        return log_total_BT - jnp.where(answer_BTS, logits_B1S, 0).sum(-1)

    return (loss_of(0, MAY_START, STARTS) + loss_of(1, MAY_END, ENDS)) / 2
