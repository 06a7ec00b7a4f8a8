"""The loss of a batch, for every kind of model and task: sums over tokens, divided once, by the global number of tokens.

Shape suffixes: B batch, T length, D model, V padded vocabulary, L layers, C tokens of one chunk (in `answers_BTC` and
`labels_BTC`: outputs of a head).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lm_jax import sharding
from lm_jax.chunked_cross_entropy import in_chunks
from lm_jax.model import task_heads
from lm_jax.model.build import ModelDef
from lm_jax.model.dropout import Dropout
from lm_jax.model.language_model import LanguageModel, ModelOutputs
from lm_jax.model.moe import routing_loss
from lm_jax.model.row_order import balanced, in_row_order

TokenLoss = Callable[[jax.Array, jax.Array], jax.Array]  # float32 logits [B, T, V], int32 targets [B, T] -> [B, T]
SMALL = 2**22  # logits of a device up to which all exist at once: as fast as in chunks


def is_chunked(num_logits: float, dtype: DTypeLike) -> bool:
    """Whether so many logits of a device, from hidden states of this dtype, are computed in chunks.

    Always below float32: without chunks the gradient of the output table would be rounded to that dtype.
    """
    return num_logits > SMALL or jnp.dtype(dtype) != jnp.float32


def token_losses(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """-log softmax(logits)[target] in nats, of float32 logits, [B, T]; also where the vocabulary is split over devices."""
    is_target_BTV = sharding.iota(logits_BTV.shape, "batch", "length", "vocab") == targets_BT[:, :, None]
    return jax.nn.logsumexp(logits_BTV, axis=-1) - jnp.where(is_target_BTV, logits_BTV, 0).sum(-1)


class BatchLoss(NamedTuple):
    """Sums over the masked tokens of a batch, float32 [], and the outputs of a task's head."""

    objective: jax.Array  # what training minimises; it alone has a gradient
    loss: jax.Array  # what is reported: the objective without z-loss and routing losses
    answers_BTC: jax.Array | None = None  # float32: logits of a task's head, or margins of pairs [B, T, 1]


def batch_loss(
    graph: ModelDef,
    parameters: dict,
    batch: dict,
    dropout: Dropout | None = None,
    z_loss: float = 0.0,
    routing: tuple[float, float] = (0.0, 0.0),
    token_loss: TokenLoss = token_losses,
) -> BatchLoss:
    """The loss of a batch by its task: cross entropy of tokens or labels, squared error, or the loss of pairs of answers.

    The objective also has z_loss * log(Z)^2 of every predicted token, Z the denominator of the softmax (arXiv:2204.02311,
    section 5), and the experts' (balance, z) losses times `routing` (`routing_loss`). Where tokens are predicted it has
    `token_loss` in place of the cross entropy.
    """
    batch = {name: balanced(x) if x.ndim > 1 else x for name, x in batch.items()}
    model, mask_BT = graph.module(parameters), batch["loss_mask"]
    outputs = model.read(batch, dropout)
    added = routing_loss(outputs.aux, mask_BT, routing) if any(routing) and graph.config.num_experts else 0.0
    if outputs.hidden_BTD is None or "reference" in batch:
        losses_BT, answers_BTC = answer_losses(model, outputs, batch)
        loss = (losses_BT * mask_BT).sum()
        return BatchLoss(loss + added, loss, in_row_order(answers_BTC))
    if outputs.labels_BTC is None:
        objective, loss = vocabulary_loss(model, outputs.hidden_BTD, batch, z_loss, token_loss)
        return BatchLoss(objective + added, loss)
    # BERT's pretraining: the target of a segment's first token is its next-sentence label, the other targets are tokens.
    is_label_BT = batch["positions"] == 0
    of_tokens = batch | {"loss_mask": mask_BT * ~is_label_BT}
    objective, loss = vocabulary_loss(model, outputs.hidden_BTD, of_tokens, z_loss, token_loss)
    label_loss = (task_heads.label_losses(outputs.labels_BTC, batch["targets"]) * mask_BT * is_label_BT).sum()
    return BatchLoss(objective + added + label_loss, loss + label_loss)


def answer_losses(model: LanguageModel, outputs: ModelOutputs, batch: dict) -> tuple[jax.Array, jax.Array]:
    """(losses [B, T], to be masked; answers [B, T, C]) of a task that is not the prediction of tokens, float32."""
    if outputs.hidden_BTD is None:
        assert outputs.labels_BTC is not None
        return task_heads.losses(model.config.head, outputs.labels_BTC, batch), outputs.labels_BTC
    log_BT = by_token(lambda *both: -token_losses(*both), model, outputs.hidden_BTD, batch["targets"])
    margins_BT = task_heads.preference_margins(log_BT, batch)
    return jax.nn.softplus(-margins_BT), margins_BT[:, :, None]


def vocabulary_loss(
    model: LanguageModel, hidden_BTD: jax.Array, batch: dict, z_loss: float, token_loss: TokenLoss = token_losses
) -> tuple[jax.Array, jax.Array]:
    """(objective, cross entropy in nats) of a model that predicts tokens: sums over the masked tokens, float32 []."""
    if token_loss is not token_losses:
        z_losses = lambda logits_BTV: z_loss * jnp.square(jax.nn.logsumexp(logits_BTV, axis=-1)) if z_loss else 0.0
        both = lambda logits, targets: (token_loss(logits, targets) + z_losses(logits), token_losses(logits, targets))
        objective_BT, loss_BT = by_token(both, model, hidden_BTD, batch["targets"])
        return (objective_BT * batch["loss_mask"]).sum(), (loss_BT * batch["loss_mask"]).sum()
    num_logits = batch["tokens"].size // sharding.ways("tokens") * (model.padded_vocab_size // sharding.ways("vocab"))
    if is_chunked(num_logits, hidden_BTD.dtype):
        hidden_BTD = model.before_table(hidden_BTD)
        arrays = hidden_BTD, model.output_table, model.bias_V, batch["targets"], batch["loss_mask"]
        objective, loss = in_chunks(model.vocab_size, z_loss, *arrays, model.softcap)
        return objective, loss
    logits_BTV = model.logits(hidden_BTD)
    loss = (token_losses(logits_BTV, batch["targets"]) * batch["loss_mask"]).sum()
    if not z_loss:
        return loss, loss
    log_total_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    return loss + z_loss * (jnp.square(log_total_BT) * batch["loss_mask"]).sum(), loss


def by_token(function: Callable, model: LanguageModel, hidden_BTD: jax.Array, targets_BT: jax.Array) -> Any:
    """`function(float32 logits [B, T, V], targets [B, T])`, an array [B, T] or a tree of them, of each token for itself.

    Logits exist for a chunk of each row at a time, and are computed again for the gradient.
    """
    rows = max(1, len(hidden_BTD) // sharding.ways("batch"))  # of one device
    parts, size = sharding.ways("length"), max(128, SMALL // model.padded_vocab_size // rows)
    batch, length = len(hidden_BTD), hidden_BTD.shape[1] // parts  # of a part
    by_part = lambda x, *rest: sharding.reshape(x, (batch, parts, -1, *x.shape[2:]), "batch", "length", None, *rest)
    hidden_BPTD, target_BPT = by_part(hidden_BTD, None), by_part(targets_BT)

    @jax.checkpoint
    def chunk(hidden_BPCD: jax.Array, target_BPC: jax.Array) -> Any:
        one_row = lambda x, *rest: sharding.reshape(x, (batch, -1, *x.shape[3:]), "batch", "length", *rest)
        logits_BCV = model.logits(one_row(hidden_BPCD, None))
        return jax.tree.map(by_part, function(logits_BCV, one_row(target_BPC)))

    def whole(*chunks_BPC: jax.Array) -> jax.Array:
        return sharding.reshape(jnp.concatenate(chunks_BPC, axis=2), targets_BT.shape, "batch", "length")

    chunks = (slice(start, min(start + size, length)) for start in range(0, length, size))
    return jax.tree.map(whole, *[chunk(hidden_BPTD[:, :, at], target_BPT[:, :, at]) for at in chunks])
