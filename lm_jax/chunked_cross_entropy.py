"""Cross entropy of tokens in chunks: the logits [B, T, V] never exist at once, forward and backward.

Shape suffixes: B batch, T length, D model, V padded vocabulary, N tokens of one device, C tokens of one chunk.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm_jax.collectives import gathered, max_over, part_index, scattered, sum_over
from lm_jax.model.layers import capped
from lm_jax.sharding import computed, on_each_device, platform, precision, stored

CHUNK = 1024  # tokens of a device whose logits exist at the same time
LARGER = {"gpu": 4}  # so many times as many: larger products, 3% more tokens/s of GPT-2 124M on an H200
MOST = 2**28  # logits at the same time, where a chunk is larger


def chunk_size(padded_vocab_size: int) -> int:
    """Tokens of a chunk on the platform that is compiled for, where a device has so many of the vocabulary."""
    return max(CHUNK, min(CHUNK * LARGER.get(platform(), 1), MOST // padded_vocab_size))


def num_chunks(tokens: int, padded_vocab_size: int) -> int:
    """How many chunks a device makes of so many of its tokens."""
    return math.ceil(tokens / chunk_size(padded_vocab_size))


class ChunkSettings(NamedTuple):
    """What `in_chunks` computes of every chunk."""

    vocab_size: int
    z_loss: float
    softcap: float
    with_gradients: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 7))
def in_chunks(vocab_size: int, z_loss: float, hidden_BTD, table_VD, bias_V, targets_BT, mask_BT, softcap: float = 0.0):
    """(objective, cross entropy in nats), sums over the masked tokens, float32 []; see `loss.vocabulary_loss`.

    Output table and bias (or None) are given as they are stored. Each device takes `chunk_size` of its tokens at a time. The
    forward pass computes the gradients beside the sums: three products a chunk, none of them twice. No token leaves its
    device; the table is gathered once, and its gradient scattered once.
    """
    settings = ChunkSettings(vocab_size, z_loss, softcap, with_gradients=False)
    return _on_devices(settings, hidden_BTD, table_VD, bias_V, targets_BT, mask_BT)[:2]


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
    hidden, tokens = computed(("batch", "length", None)), computed(("batch", "length"))
    table, scalar = stored(("vocab", "model")), computed(())
    bias = None if arrays[2] is None else stored(("vocab",))
    outputs = (scalar, scalar, hidden, table, bias) if settings.with_gradients else (scalar, scalar)
    body = functools.partial(_on_a_device, settings)
    return on_each_device(body, (hidden, table, bias, tokens, tokens), outputs)(*arrays)


def _on_a_device(settings: ChunkSettings, hidden_BTD, table_VD, bias_V, targets_BT, mask_BT):
    bias_V = None if bias_V is None else gathered(bias_V, "vocab")
    table_VD = gathered(table_VD.astype(hidden_BTD.dtype), "vocab", "model")
    num = num_chunks(targets_BT.size, len(table_VD))
    size = math.ceil(targets_BT.size / num)
    padding = num * size - targets_BT.size  # masked tokens at the end of the last chunk

    def chunks(x, *shape):
        x_N = x.reshape(-1, *shape)
        return jnp.pad(x_N, [(0, padding)] + [(0, 0)] * len(shape)).reshape(num, size, *shape)

    def add(sums, chunk):
        new, of_hidden_CD = _chunk(settings, table_VD, bias_V, *chunk)
        return jax.tree.map(jnp.add, sums, new), of_hidden_CD

    zeros: tuple[Any, ...] = jnp.zeros(()), jnp.zeros(())
    if settings.with_gradients:
        zeros += jnp.zeros(table_VD.shape), None if bias_V is None else jnp.zeros(bias_V.shape)
    parts = chunks(hidden_BTD, hidden_BTD.shape[-1]), chunks(targets_BT), chunks(mask_BT)
    sums, of_hidden = jax.lax.scan(add, zeros, parts)
    totals = tuple(sum_over(x, "tokens") for x in sums[:2])
    if not settings.with_gradients:
        return totals
    of_hidden_BTD = of_hidden.reshape(-1, hidden_BTD.shape[-1])[: targets_BT.size].reshape(hidden_BTD.shape)
    of_bias_V = None if bias_V is None else scattered(sums[3], "vocab")
    # The backward pass of the layers waits until each device has its part of the table's gradient, and holds no whole one.
    of_hidden_BTD, of_table_VD = jax.lax.optimization_barrier((of_hidden_BTD, scattered(sums[2], "vocab", "model")))
    return *totals, of_hidden_BTD, of_table_VD, of_bias_V


def _chunk(settings: ChunkSettings, table_VD, bias_V, hidden_CD, target_C, mask_C):
    """((objective, cross entropy, gradients of table and bias) of a chunk, gradient of its hidden states)."""
    id_V = part_index("vocab") * len(table_VD) + jnp.arange(len(table_VD))
    full = precision(hidden_CD.dtype)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32, precision=full)
    logits_CV = product("CD,VD->CV", hidden_CD, table_VD)
    logits_CV = logits_CV if bias_V is None else logits_CV + bias_V[None]
    logits_CV = capped(logits_CV, settings.softcap) if settings.softcap else logits_CV
    of_capped_CV = 1 - jnp.square(logits_CV / settings.softcap) if settings.softcap else 1.0  # derivative of the cap
    logits_CV = jnp.where(id_V[None] < settings.vocab_size, logits_CV, -1e9)  # padding of the vocabulary never wins
    is_target_CV = id_V[None] == target_C[:, None]
    highest_C = max_over(logits_CV.max(-1), "vocab")
    powers_CV = jnp.exp(logits_CV - highest_C[:, None])
    total_C = sum_over(powers_CV.sum(-1), "vocab")
    log_total_C = jnp.log(total_C) + highest_C
    target_logit_C = sum_over(jnp.where(is_target_CV, logits_CV, 0).sum(-1), "vocab")
    entropy = ((log_total_C - target_logit_C) * mask_C).sum()
    sums = entropy + settings.z_loss * (jnp.square(log_total_C) * mask_C).sum(), entropy
    if not settings.with_gradients:
        return sums, None
    slope_C = mask_C * (1 + 2 * settings.z_loss * log_total_C) / total_C
    of_logits_CV = powers_CV * slope_C[:, None] - jnp.where(is_target_CV, mask_C[:, None], 0)
    of_logits_CV = of_logits_CV * of_capped_CV if settings.softcap else of_logits_CV
    of_bias_V = None if bias_V is None else of_logits_CV.sum(0)
    of_logits_CV = of_logits_CV.astype(hidden_CD.dtype)
    of_hidden_CD = sum_over(product("CV,VD->CD", of_logits_CV, table_VD), "vocab")
    return (*sums, product("CV,CD->VD", of_logits_CV, hidden_CD), of_bias_V), of_hidden_CD.astype(hidden_CD.dtype)
