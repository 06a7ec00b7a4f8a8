"""Flash attention for GPUs that reads the segment ids itself: three Pallas kernels, which Triton compiles.

The algorithm is FlashAttention-2's (arXiv:2307.08691): logits of a tile at a time, of which the backward pass keeps the
logarithm of each query's sum. Neither pass has an array [T, T]. A program has `BLOCK` queries (or keys) for its own and walks
through the blocks of the other side that it shares a segment, and a window, with; documents that do not meet cost nothing.

Shape suffixes: B batch, T length, H heads, G kv heads, R = H / G, K head, N = T / BLOCK; in a kernel Q the queries and S the
keys of a tile.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.sharding import PartitionSpec

from lm_jax.sharding import on_each_device

BLOCK = 64  # tokens that a program has for its own; these numbers are the fastest on an H200 (docs/notebook.md)
FORWARD_STEP, BACKWARD_STEP = 64, 64  # tokens of the other side in one round of its loop
PADDING = 2**30  # the id of padding, so that ids ascend in a row
LOWEST = -1e30  # where a running maximum starts: finite, so that a tile that is all -inf weighs exactly 0


class Rule(NamedTuple):
    """What a query sees within its segment, and how the kernels run."""

    window: int
    causal: bool
    interpret: bool = False  # by JAX, on any platform


def on_each_gpu(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    ids_BT: jax.Array,
    rule: Rule,
    heads: list[PartitionSpec],
    tokens: PartitionSpec,
) -> jax.Array:
    """`flash_attention` of arrays on a mesh; `heads` are the layouts of queries, keys and values, `tokens` that of the ids."""
    on_a_device = lambda q, k, v, ids: flash_attention(q, k, v, ids, rule)
    return on_each_device(on_a_device, (*heads, tokens), heads[0])(q_BTHK, k_BTGK, v_BTGK, ids_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def flash_attention(
    q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, ids_BT: jax.Array, rule: Rule
) -> jax.Array:
    """Softmax attention in segments -> [B, T, H, K], in the dtype of the queries; sums are float32.

    `ids_BT` are segment ids, int32. T is a multiple of `BLOCK`, K a power of 2 and at least 16. The key of a query's own
    position is visible to it always. Under `jax.checkpoint` the result and the sums have the name `attended`.
    """
    return _forward(q_BTHK, k_BTGK, v_BTGK, ids_BT, rule)[0]


def _forward(
    q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, ids_BT: jax.Array, rule: Rule
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    batch, length, num_heads, head_dim = q_BTHK.shape
    group = num_heads // k_BTGK.shape[2]
    first_BN, end_BN = meeting_blocks(ids_BT, rule)[0]
    own, row = _own(head_dim), pl.BlockSpec((None, None, BLOCK), lambda n, b, h: (b, h, n))
    other, tokens, blocks = _other(length, head_dim, group), _whole(length), _whole(length // BLOCK)
    out_BTHK, sums_BHT = _call(
        functools.partial(_forward_kernel, rule=rule),
        (length // BLOCK, batch, num_heads),
        [own, other, other, tokens, blocks, blocks],
        [own, row],
        [q_BTHK, jax.ShapeDtypeStruct((batch, num_heads, length), jnp.float32)],
        rule,
    )(q_BTHK, k_BTGK, v_BTGK, ids_BT, first_BN, end_BN)
    out_BTHK, sums_BHT = checkpoint_name(out_BTHK, "attended"), checkpoint_name(sums_BHT, "attended")
    return out_BTHK, (q_BTHK, k_BTGK, v_BTGK, ids_BT, out_BTHK, sums_BHT)


def _backward(rule: Rule, saved: tuple[jax.Array, ...], d_out_BTHK: jax.Array) -> tuple[jax.Array | None, ...]:
    q_BTHK, k_BTGK, v_BTGK, ids_BT, out_BTHK, sums_BHT = saved
    batch, length, num_heads, head_dim = q_BTHK.shape
    num_groups = k_BTGK.shape[2]
    group, num_blocks = num_heads // num_groups, length // BLOCK
    inner_BTH = (out_BTHK.astype(jnp.float32) * d_out_BTHK.astype(jnp.float32)).sum(-1)
    arguments = q_BTHK, k_BTGK, v_BTGK, d_out_BTHK, sums_BHT, inner_BTH.swapaxes(1, 2), ids_BT
    of_queries, of_keys = meeting_blocks(ids_BT, rule)
    own, tokens, blocks = _own(head_dim), _whole(length), _whole(num_blocks)
    other, row = _other(length, head_dim, group), pl.BlockSpec((None, None, BLOCK), lambda n, b, h: (b, h, n))
    (dq_BTHK,) = _call(
        functools.partial(_query_kernel, rule=rule),
        (num_blocks, batch, num_heads),
        [own, other, other, own, row, row, tokens, blocks, blocks],
        [own],
        [q_BTHK],
        rule,
    )(*arguments, *of_queries)
    heads = pl.BlockSpec((None, length, group, head_dim), lambda n, b, g: (b, 0, g, 0))
    rows = pl.BlockSpec((None, group, length), lambda n, b, g: (b, g, 0))
    dk_BTGK, dv_BTGK = _call(
        functools.partial(_key_kernel, rule=rule),
        (num_blocks, batch, num_groups),
        [heads, own, own, heads, rows, rows, tokens, blocks, blocks],
        [own, own],
        [k_BTGK, v_BTGK],
        rule,
    )(*arguments, *of_keys)
    return dq_BTHK, dk_BTGK, dv_BTGK, None


flash_attention.defvjp(_forward, _backward)


def _own(head_dim: int) -> pl.BlockSpec:
    """The block of a program, of one head."""
    return pl.BlockSpec((None, BLOCK, None, head_dim), lambda n, b, h: (b, n, h, 0))


def _other(length: int, head_dim: int, group: int) -> pl.BlockSpec:
    """All keys (or values) of the head that a head's queries look at."""
    return pl.BlockSpec((None, length, None, head_dim), lambda n, b, h: (b, 0, lax.div(h, group), 0))


def _whole(size: int) -> pl.BlockSpec:
    """A row of an array [B, size]."""
    return pl.BlockSpec((None, size), lambda n, b, h: (b, 0))


def _call(kernel: Callable, grid: tuple[int, ...], inputs: list, outputs: list, like: list, rule: Rule) -> Callable:
    """`kernel` as a function of arrays, run for each (block, row, head)."""
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=inputs,
        out_specs=outputs,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in like],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3 if inputs[0].block_shape[-1] <= 64 else 2),
        interpret=rule.interpret,
        name="flash_attention" + kernel.func.__name__.removesuffix("_kernel"),  # type: ignore[attr-defined]
    )


Bounds = tuple[jax.Array, jax.Array]  # the first block, and the one after the last, int32 [B, N]


def meeting_blocks(ids_BT: jax.Array, rule: Rule) -> tuple[Bounds, Bounds]:
    """Blocks of keys that the queries of each block may see, and blocks of queries that may see its keys.

    Two blocks share a segment only where the ranges of their ids overlap, in whatever order ids are. Blocks between the bounds
    may have nothing to see: the mask of each tile decides, the bounds only save work.
    """
    batch, length = ids_BT.shape
    num_blocks = length // BLOCK
    ids_BNQ = jnp.where(ids_BT == 0, PADDING, ids_BT).reshape(batch, num_blocks, BLOCK)
    low_BN, high_BN = ids_BNQ.min(-1), ids_BNQ.max(-1)
    meet_BNN = (low_BN[:, :, None] <= high_BN[:, None]) & (low_BN[:, None] <= high_BN[:, :, None])  # queries, keys
    if rule.causal:
        ahead_NN = jnp.arange(num_blocks)[:, None] - jnp.arange(num_blocks)[None]
        meet_BNN &= (ahead_NN >= 0)[None]
        if rule.window:
            meet_BNN &= (ahead_NN * BLOCK - (BLOCK - 1) < rule.window)[None]  # its nearest pair
    bounds = []
    for axis in (2, 1):
        first_BN = jnp.argmax(meet_BNN, axis=axis)
        end_BN = num_blocks - jnp.argmax(jnp.flip(meet_BNN, axis), axis=axis)
        bounds.append((first_BN.astype(jnp.int32), end_BN.astype(jnp.int32)))
    return bounds[0], bounds[1]


def _own_tokens() -> tuple[jax.Array, slice | pl.Slice]:
    start = pl.program_id(0) * BLOCK
    return start + jnp.arange(BLOCK), pl.ds(start, BLOCK)


def _rounds(first_ref, end_ref, step: int) -> tuple[jax.Array, jax.Array]:
    block = pl.program_id(0)
    return first_ref[block] * (BLOCK // step), end_ref[block] * (BLOCK // step)


def _scale(head_dim: int) -> float:
    """Of logits whose powers are of 2."""
    return math.log2(math.e) / math.sqrt(head_dim)


def _masked(logits, queries, keys, query_ids, key_ids, rule: Rule) -> jax.Array:
    """The logits of what is visible, elsewhere -inf; positions and ids are broadcast against them."""
    visible = query_ids == key_ids
    if rule.causal:
        visible &= queries >= keys
        if rule.window:
            visible &= queries - keys < rule.window
    return jnp.where(visible, logits, -jnp.inf)


def _forward_kernel(q_ref, k_ref, v_ref, ids_ref, first_ref, end_ref, out_ref, sums_ref, *, rule: Rule) -> None:
    """The output of the own queries, and log2 of the sum of each one's powers."""
    queries, own = _own_tokens()
    q_QK, query_ids = q_ref[...], ids_ref[own]

    def step(i, carry):
        out_QK, highest, total = carry
        part = pl.ds(i * FORWARD_STEP, FORWARD_STEP)
        keys = i * FORWARD_STEP + jnp.arange(FORWARD_STEP)
        logits_QS = triton.dot(q_QK, k_ref[part, :].T) * _scale(q_QK.shape[1])
        logits_QS = _masked(logits_QS, queries[:, None], keys[None], query_ids[:, None], ids_ref[part][None], rule)
        new = jnp.maximum(highest, logits_QS.max(1))
        weights_QS, kept = jnp.exp2(logits_QS - new[:, None]), jnp.exp2(highest - new)
        out_QK = out_QK * kept[:, None] + triton.dot(weights_QS.astype(v_ref.dtype), v_ref[part, :])
        return out_QK, new, total * kept + weights_QS.sum(1)

    start = jnp.zeros(q_QK.shape, jnp.float32), jnp.full(BLOCK, LOWEST, jnp.float32), jnp.zeros(BLOCK, jnp.float32)
    out_QK, highest, total = lax.fori_loop(*_rounds(first_ref, end_ref, FORWARD_STEP), step, start)
    out_ref[...] = (out_QK / total[:, None]).astype(out_ref.dtype)
    sums_ref[...] = highest + jnp.log2(total)


def _query_kernel(
    q_ref, k_ref, v_ref, d_ref, sums_ref, inner_ref, ids_ref, first_ref, end_ref, dq_ref, *, rule
) -> None:
    """The gradient of the own queries; `inner` is each query's product of output and its gradient."""
    queries, own = _own_tokens()
    q_QK, d_QK, query_ids = q_ref[...], d_ref[...], ids_ref[own]
    sums, inner = sums_ref[...], inner_ref[...]

    def step(i, dq_QK):
        part = pl.ds(i * BACKWARD_STEP, BACKWARD_STEP)
        keys, k_SK = i * BACKWARD_STEP + jnp.arange(BACKWARD_STEP), k_ref[part, :]
        logits_QS = triton.dot(q_QK, k_SK.T) * _scale(q_QK.shape[1])
        logits_QS = _masked(logits_QS, queries[:, None], keys[None], query_ids[:, None], ids_ref[part][None], rule)
        weights_QS = jnp.exp2(logits_QS - sums[:, None])
        slope_QS = weights_QS * (triton.dot(d_QK, v_ref[part, :].T) - inner[:, None])
        return dq_QK + triton.dot(slope_QS.astype(k_SK.dtype), k_SK)

    rounds = _rounds(first_ref, end_ref, BACKWARD_STEP)
    dq_QK = lax.fori_loop(*rounds, step, jnp.zeros(q_QK.shape, jnp.float32))
    dq_ref[...] = (dq_QK / math.sqrt(q_QK.shape[1])).astype(dq_ref.dtype)


def _key_kernel(
    q_ref, k_ref, v_ref, d_ref, sums_ref, inner_ref, ids_ref, first_ref, end_ref, dk_ref, dv_ref, *, rule: Rule
) -> None:
    """The gradients of the own keys and values, from all heads of their group. Tiles are [keys, queries]."""
    keys, own = _own_tokens()
    k_SK, v_SK, key_ids = k_ref[...], v_ref[...], ids_ref[own]
    rounds = _rounds(first_ref, end_ref, BACKWARD_STEP)

    def step(i, carry, head):
        dk_SK, dv_SK = carry
        part = pl.ds(i * BACKWARD_STEP, BACKWARD_STEP)
        queries = i * BACKWARD_STEP + jnp.arange(BACKWARD_STEP)
        q_QK, d_QK = q_ref[part, head, :], d_ref[part, head, :]
        logits_SQ = triton.dot(k_SK, q_QK.T) * _scale(k_SK.shape[1])
        logits_SQ = _masked(logits_SQ, queries[None], keys[:, None], ids_ref[part][None], key_ids[:, None], rule)
        weights_SQ = jnp.exp2(logits_SQ - sums_ref[head, part][None])
        dv_SK = dv_SK + triton.dot(weights_SQ.astype(d_QK.dtype), d_QK)
        slope_SQ = weights_SQ * (triton.dot(v_SK, d_QK.T) - inner_ref[head, part][None])
        return dk_SK + triton.dot(slope_SQ.astype(q_QK.dtype), q_QK), dv_SK

    of_head = lambda head, carry: lax.fori_loop(*rounds, functools.partial(step, head=head), carry)
    zeros = jnp.zeros(k_SK.shape, jnp.float32)
    dk_SK, dv_SK = lax.fori_loop(0, q_ref.shape[1], of_head, (zeros, zeros))
    dk_ref[...] = (dk_SK / math.sqrt(k_SK.shape[1])).astype(dk_ref.dtype)
    dv_ref[...] = dv_SK.astype(dv_ref.dtype)
