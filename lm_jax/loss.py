"""The loss of a batch, for every kind of model and task: sums over tokens, divided once, by the global number of tokens.

Shape suffixes: B batch, T length, S a second length, D model, V padded vocabulary, L layers, N tokens of one device, C tokens of
one chunk (in `answers_BTC` and `labels_BTC`: outputs of a head).
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm_jax import collectives, sharding
from lm_jax.model import task_heads
from lm_jax.model.build import ModelDef
from lm_jax.model.language_model import LanguageModel, ModelOutputs
from lm_jax.model.layers import Dropout, capped

CHUNK = 1024  # tokens of a device whose logits exist at the same time
SMALL = 2**22  # logits of a device up to which all exist at once: as fast there, and the bits of earlier versions


def is_chunked(num_logits: float, dtype) -> bool:
    """Whether so many logits of a device, from hidden states of this dtype, are computed in chunks. Always below float32: the
    gradient of the output table would be rounded to that dtype."""
    return num_logits > SMALL or jnp.dtype(dtype) != jnp.float32


def token_losses(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """-log softmax(logits)[target] in nats, of float32 logits, [B, T]; also where the vocabulary is split over devices."""
    is_target_BTV = sharding.iota(logits_BTV.shape, "batch", "length", "vocab") == targets_BT[:, :, None]
    return jax.nn.logsumexp(logits_BTV, axis=-1) - jnp.where(is_target_BTV, logits_BTV, 0).sum(-1)


class BatchLoss(NamedTuple):
    """Sums over the masked tokens of a batch, float32 [], and what a task's head answered."""

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
) -> BatchLoss:
    """The loss of a batch by its task: cross entropy of tokens or labels, squared error, or the loss of pairs of answers.

    To the objective of tokens is added z_loss * log(Z)^2 each, Z the denominator of the softmax (arXiv:2204.02311, section 5);
    with experts also their losses (balance, z) times `routing`, see `routing_loss`.
    """
    model, mask_BT = graph.module(parameters), batch["loss_mask"]
    outputs = model.read(batch, dropout)
    added = routing_loss(outputs.aux, mask_BT, routing) if any(routing) and graph.config.num_experts else 0.0
    if outputs.hidden_BTD is None or "reference" in batch:
        losses_BT, answers_BTC = answer_losses(model, outputs, batch)
        loss = (losses_BT * mask_BT).sum()
        return BatchLoss(loss + added, loss, answers_BTC)
    if outputs.labels_BTC is None:
        objective, loss = vocabulary_loss(model, outputs.hidden_BTD, batch, z_loss)
        return BatchLoss(objective + added, loss)
    # BERT's pretraining: the target of a segment's first token is its next-sentence label, that of others a token.
    is_label_BT = batch["positions"] == 0
    of_tokens = batch | {"loss_mask": mask_BT * ~is_label_BT}
    objective, loss = vocabulary_loss(model, outputs.hidden_BTD, of_tokens, z_loss)
    label_loss = (task_heads.label_losses(outputs.labels_BTC, batch["targets"]) * mask_BT * is_label_BT).sum()
    return BatchLoss(objective + added + label_loss, loss + label_loss)


def answer_losses(model: LanguageModel, outputs: ModelOutputs, batch: dict) -> tuple[jax.Array, jax.Array]:
    """(losses [B, T], to be masked; answers [B, T, C]) of a task that is not the prediction of tokens, float32."""
    if outputs.hidden_BTD is None:
        assert outputs.labels_BTC is not None
        return task_heads.losses(model.config.head, outputs.labels_BTC, batch), outputs.labels_BTC
    margins_BT = preference_margins(model, outputs.hidden_BTD, batch)
    return jax.nn.softplus(-margins_BT), margins_BT[:, :, None]


def routing_loss(losses: list[jax.Array], mask_BT: jax.Array, weights: tuple[float, float]) -> jax.Array:
    """The weighted sum of the experts' (balance, z) losses over layers and rows, each row counted once for every masked token.

    `losses`: for each block of the layer pattern, [L / period, B, 2].
    """
    of_row_B = sum(weight * x_LB2[..., i].sum(0) for x_LB2 in losses for i, weight in enumerate(weights))
    return (of_row_B * mask_BT.sum(1)).sum()


def vocabulary_loss(model: LanguageModel, hidden_BTD: jax.Array, batch: dict, z_loss: float):
    """(objective, cross entropy in nats) of a model that predicts tokens: sums over the masked tokens, float32 []."""
    num_logits = batch["tokens"].size // sharding.ways("tokens") * (model.padded_vocab_size // sharding.ways("vocab"))
    if is_chunked(num_logits, hidden_BTD.dtype):
        hidden_BTD = model.before_table(hidden_BTD)
        arrays = hidden_BTD, model.output_table, model.bias_V, batch["targets"], batch["loss_mask"]
        return in_chunks(model.vocab_size, z_loss, *arrays, model.softcap)
    logits_BTV = model.logits(hidden_BTD)
    loss = (token_losses(logits_BTV, batch["targets"]) * batch["loss_mask"]).sum()
    if not z_loss:
        return loss, loss
    log_total_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    return loss + z_loss * (jnp.square(log_total_BT) * batch["loss_mask"]).sum(), loss


def preference_margins(model: LanguageModel, hidden_BTD: jax.Array, batch: dict) -> jax.Array:
    """The margins of direct preference optimisation (arXiv:2305.18290, equation 7), float32 [B, T], at the first token of a pair:
    beta * (log pi(chosen) - log pi(rejected)), less the same of the reference model. The loss is -log sigmoid(margin).

    Segments 2k + 1 and 2k + 2 are a pair. `weight` is beta at the targets of the chosen answer, -beta at those of the rejected
    one; `reference` is the reference's part, at the first token of the pair. Logits exist for a chunk of tokens at a time, and
    are computed again for the gradient.
    """
    length, padded_vocab_size = hidden_BTD.shape[1], model.padded_vocab_size
    size = max(128, SMALL // padded_vocab_size // max(1, len(hidden_BTD) // sharding.ways("batch")))
    chunk = jax.checkpoint(lambda hidden_BCD, target_BC: -token_losses(model.logits(hidden_BCD), target_BC))
    chunks = (slice(start, min(start + size, length)) for start in range(0, length, size))
    log_BT = jnp.concatenate([chunk(hidden_BTD[:, at], batch["targets"][:, at]) for at in chunks], axis=1)
    pair_BT = (batch["segment_ids"] + 1) // 2
    is_same_BTS = pair_BT[:, :, None] == pair_BT[:, None, :]
    return jnp.where(is_same_BTS, (batch["weight"] * log_BT)[:, None, :], 0).sum(-1) - batch["reference"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 7))
def in_chunks(vocab_size: int, z_loss: float, hidden_BTD, table_VD, bias_V, targets_BT, mask_BT, softcap: float = 0.0):
    """`vocabulary_loss` from final hidden states, output table and bias (or None) as they are stored, in chunks.

    Each device takes `CHUNK` of its tokens at a time. The forward pass computes the gradient of the logits beside them: three
    products a chunk, none of them twice, and float32 [B, T, V] never exists. No token leaves its device; the table is gathered
    once, and its gradient scattered once.
    """
    settings = ChunkSettings(vocab_size, z_loss, softcap, with_gradients=False)
    return _on_devices(settings, hidden_BTD, table_VD, bias_V, targets_BT, mask_BT)[:2]


class ChunkSettings(NamedTuple):
    """What `in_chunks` computes of every chunk."""

    vocab_size: int
    z_loss: float
    softcap: float
    with_gradients: bool


def _forward(vocab_size: int, z_loss: float, *arrays_and_softcap):
    *arrays, softcap = arrays_and_softcap
    settings = ChunkSettings(vocab_size, z_loss, softcap, with_gradients=True)
    *sums, of_hidden, of_table, of_bias = _on_devices(settings, *arrays)
    return tuple(sums), (of_hidden, of_table, of_bias)


def _backward(vocab_size: int, z_loss: float, softcap: float, gradients, cotangents):
    of_hidden, of_table, of_bias = gradients
    scaled = of_hidden.astype(jnp.float32) * cotangents[0]  # a loss scale may be more than float16 can hold
    of_parameters = jax.tree.map(lambda gradient: gradient * cotangents[0], (of_table, of_bias))
    return scaled.astype(of_hidden.dtype), *of_parameters, None, None


in_chunks.defvjp(_forward, _backward)


def _on_devices(settings: ChunkSettings, *arrays):
    """(objective, cross entropy), and with gradients those of hidden states [B, T, D], table [V, D] and bias [V] or None."""
    hidden, tokens = sharding.computed(("batch", "length", None)), sharding.computed(("batch", "length"))
    table, scalar = sharding.stored(("vocab", "model")), sharding.computed(())
    bias = None if arrays[2] is None else sharding.stored(("vocab",))
    outputs = (scalar, scalar, hidden, table, bias) if settings.with_gradients else (scalar, scalar)
    body = functools.partial(_on_a_device, settings)
    return sharding.on_each_device(body, (hidden, table, bias, tokens, tokens), outputs)(*arrays)


def _on_a_device(settings: ChunkSettings, hidden_BTD, table_VD, bias_V, targets_BT, mask_BT):
    bias_V = None if bias_V is None else collectives.gathered(bias_V, "vocab")
    table_VD = collectives.gathered(table_VD.astype(hidden_BTD.dtype), "vocab", "model")
    num_chunks = math.ceil(targets_BT.size / CHUNK)
    size = math.ceil(targets_BT.size / num_chunks)
    padding = num_chunks * size - targets_BT.size  # masked tokens at the end of the last chunk

    def chunks(x, *shape):
        x_N = x.reshape(-1, *shape)
        return jnp.pad(x_N, [(0, padding)] + [(0, 0)] * len(shape)).reshape(num_chunks, size, *shape)

    def add(sums, chunk):
        new, of_hidden_CD = _chunk(settings, table_VD, bias_V, *chunk)
        return jax.tree.map(jnp.add, sums, new), of_hidden_CD

    zeros: tuple[Any, ...] = jnp.zeros(()), jnp.zeros(())
    if settings.with_gradients:
        zeros += jnp.zeros(table_VD.shape), None if bias_V is None else jnp.zeros(bias_V.shape)
    parts = chunks(hidden_BTD, hidden_BTD.shape[-1]), chunks(targets_BT), chunks(mask_BT)
    sums, of_hidden = jax.lax.scan(add, zeros, parts)
    totals = tuple(collectives.sum_over(x, "batch") for x in sums[:2])
    if not settings.with_gradients:
        return totals
    of_hidden_BTD = of_hidden.reshape(-1, hidden_BTD.shape[-1])[: targets_BT.size].reshape(hidden_BTD.shape)
    of_bias_V = None if bias_V is None else collectives.scattered(sums[3], "vocab")
    return *totals, of_hidden_BTD, collectives.scattered(sums[2], "vocab", "model"), of_bias_V


def _chunk(settings: ChunkSettings, table_VD, bias_V, hidden_CD, target_C, mask_C):
    """((objective, cross entropy, gradients of table and bias) of a chunk, gradient of its hidden states)."""
    id_V = collectives.part_index("vocab") * len(table_VD) + jnp.arange(len(table_VD))
    full = sharding.precision(hidden_CD.dtype)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32, precision=full)
    logits_CV = product("CD,VD->CV", hidden_CD, table_VD)
    logits_CV = logits_CV if bias_V is None else logits_CV + bias_V[None]
    logits_CV = capped(logits_CV, settings.softcap) if settings.softcap else logits_CV
    of_capped_CV = 1 - jnp.square(logits_CV / settings.softcap) if settings.softcap else 1.0  # derivative of the cap
    logits_CV = jnp.where(id_V[None] < settings.vocab_size, logits_CV, -1e9)  # padding of the vocabulary never wins
    is_target_CV = id_V[None] == target_C[:, None]
    highest_C = collectives.max_over(logits_CV.max(-1), "vocab")
    powers_CV = jnp.exp(logits_CV - highest_C[:, None])
    total_C = collectives.sum_over(powers_CV.sum(-1), "vocab")
    log_total_C = jnp.log(total_C) + highest_C
    target_logit_C = collectives.sum_over(jnp.where(is_target_CV, logits_CV, 0).sum(-1), "vocab")
    entropy = ((log_total_C - target_logit_C) * mask_C).sum()
    sums = entropy + settings.z_loss * (jnp.square(log_total_C) * mask_C).sum(), entropy
    if not settings.with_gradients:
        return sums, None
    slope_C = mask_C * (1 + 2 * settings.z_loss * log_total_C) / total_C
    of_logits_CV = powers_CV * slope_C[:, None] - jnp.where(is_target_CV, mask_C[:, None], 0)
    of_logits_CV = of_logits_CV * of_capped_CV if settings.softcap else of_logits_CV
    of_bias_V = None if bias_V is None else of_logits_CV.sum(0)
    of_logits_CV = of_logits_CV.astype(hidden_CD.dtype)
    of_hidden_CD = collectives.sum_over(product("CV,VD->CD", of_logits_CV, table_VD), "vocab")
    return (*sums, product("CV,CD->VD", of_logits_CV, hidden_CD), of_bias_V), of_hidden_CD.astype(hidden_CD.dtype)
