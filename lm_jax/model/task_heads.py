"""The heads of tasks, which replace the output table: how many outputs each has for a token, and the losses of tasks.

The heads `labels` and `value` answer once a segment (at its first token in an encoder, at its last in a causal model),
`tags` at every token; `spans` compares all tokens of a segment.

Shape suffixes: B batch, T length, S the tokens that each is compared with, C outputs of the head.
"""

import jax
import jax.numpy as jnp

from lm_jax.sharding import constrain

PER_TOKEN = ("tags", "spans")  # heads with outputs of tokens, not of a segment
# The target of a token under the head `spans` is a set of bits: an answer may start or end here, the right one does.
MAY_START, MAY_END, STARTS, ENDS = 1, 2, 4, 8


def num_outputs(head: str, labels: tuple[str, ...]) -> int:
    """How many outputs a head has for a token."""
    return {"value": 1, "spans": 2}.get(head, len(labels))


def losses(head: str, logits_BTC: jax.Array, batch: dict) -> jax.Array:
    """Losses [B, T], to be masked, from the float32 outputs of a head: cross entropy in nats, or the squared error of a value."""
    if head == "value":
        return jnp.square(logits_BTC[..., 0] - batch["targets"])
    if head == "spans":
        return span_losses(logits_BTC, batch["targets"], batch["segment_ids"])
    return label_losses(logits_BTC, batch["targets"])


def label_losses(logits_BTC: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """-log softmax(logits)[target] in nats, [B, T]; the labels are few, and not split over devices."""
    is_target_BTC = jnp.arange(logits_BTC.shape[-1])[None, None] == targets_BT[:, :, None]
    return jax.nn.logsumexp(logits_BTC, axis=-1) - jnp.where(is_target_BTC, logits_BTC, 0).sum(-1)


def span_losses(logits_BTC: jax.Array, targets_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
    """The loss of a segment in nats, at each of its tokens, [B, T] (Devlin et al., arXiv:1810.04805, section 4.2).

    It is the mean of -log softmax(logits)[start of the answer] and the same of its end. Each softmax is over those tokens of
    the segment where an answer may start, or end.
    """
    logits_BSC = constrain(logits_BTC, "batch", None, None)
    targets_BS, segments_BS = (constrain(x, "batch", None) for x in (targets_BT, segment_ids_BT))
    own_BTS = segment_ids_BT[:, :, None] == segments_BS[:, None]

    def loss_of(output: int, may: int, does: int) -> jax.Array:
        logits_B1S = logits_BSC[:, None, :, output]
        candidate_BTS, answer_BTS = (own_BTS & ((targets_BS & bit) > 0)[:, None] for bit in (may, does))
        log_total_BT = jax.nn.logsumexp(jnp.where(candidate_BTS, logits_B1S, -1e9), axis=-1)
        return log_total_BT - jnp.where(answer_BTS, logits_B1S, 0).sum(-1)

    return (loss_of(0, MAY_START, STARTS) + loss_of(1, MAY_END, ENDS)) / 2


def preference_margins(log_BT: jax.Array, batch: dict) -> jax.Array:
    """Margins of direct preference optimisation (arXiv:2305.18290, equation 7), float32 [B, T].

    They are read at the first token of a pair: beta * (log pi(chosen) - log pi(rejected)), less the same of the reference
    model; the loss is -log sigmoid(margin). `log_BT` has log pi of each target. Segments 2k + 1 and 2k + 2 are a pair;
    `weight` is beta at the targets of the chosen answer, -beta at those of the rejected one; `reference` has the
    reference's part.
    """
    pair_BT = (batch["segment_ids"] + 1) // 2
    pair_BS, weighted_BS = (constrain(x, "batch", None) for x in (pair_BT, batch["weight"] * log_BT))
    is_same_BTS = pair_BT[:, :, None] == pair_BS[:, None, :]
    return jnp.where(is_same_BTS, weighted_BS[:, None, :], 0).sum(-1) - batch["reference"]
