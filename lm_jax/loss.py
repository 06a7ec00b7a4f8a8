"""Cross entropy as sums: losses and tokens are added up everywhere and divided once, by the global number of tokens."""

import jax
import jax.numpy as jnp

from lm_jax.model.attention import Context
from lm_jax.model.transformer import Dropout, Graph
from lm_jax.sharding import iota


def token_losses(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """-log softmax(logits)[target] in nats, float32 [B, T]; also where the vocabulary is split over devices."""
    logits_BTV = logits_BTV.astype(jnp.float32)
    is_target_BTV = iota(logits_BTV.shape, "batch", "length", "vocab") == targets_BT[:, :, None]
    return jax.nn.logsumexp(logits_BTV, axis=-1) - jnp.where(is_target_BTV, logits_BTV, 0).sum(-1)


def loss_sum(graph: Graph, parameters: dict, batch: dict, drop: Dropout | None = None) -> jax.Array:
    """The sum of the masked token losses of a batch, float32 []."""
    model = graph.module(parameters)
    hidden_BTD, _ = model(batch["tokens"], Context(batch["positions"], batch["segment_ids"]), drop)
    losses_BT = token_losses(model.logits(hidden_BTD), batch["targets"])
    return (losses_BT * batch["loss_mask"]).sum()
