"""Attention: one function for every backend, always with positions and segments.

Shape suffixes: B batch, T query length, S key length, D model, H heads, G kv heads, R = H / G, K head.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from lm_jax.config import Model
from lm_jax.errors import UserError
from lm_jax.mesh import capability
from lm_jax.model.layers import capped
from lm_jax.sharding import computed, einsum, on_each_device, platform, precision, reshape

CHUNK = 256  # queries in one chunk of the chunked backend


class Context(NamedTuple):
    """Where tokens stand.

    A query at position t sees the keys of its own segment at positions s, causal: 0 <= t - s, and t - s < window where there
    is a window.
    """

    positions: jax.Array  # [B, T] int32, from 0 in each segment
    segment_ids: jax.Array  # [B, T] int32, 0 = padding


class Ability(NamedTuple):
    """What a backend can compute. All honour segments, windows, grouped heads, causal and not; the rest differs."""

    platform: str = ""  # "" = any
    dtypes: tuple[str, ...] = ("float32", "float16", "bfloat16")
    head_multiple: int = 1  # head_dim is a multiple of it
    largest_head: int = 1024  # head_dim at most
    length_multiple: int = 1
    cache: bool = False  # fewer queries than keys
    bias: bool = False  # added to the logits
    softcap: bool = False  # that bounds the logits
    capability: float = 0.0  # compute capability of the GPU at least


ABILITIES = {
    "splash": Ability("tpu", ("float32", "bfloat16"), head_multiple=64, length_multiple=128, softcap=True),
    "flash": Ability("gpu", ("float16", "bfloat16"), 64, 128, length_multiple=128, capability=8.0),
    "cudnn": Ability("gpu", ("float16", "bfloat16"), head_multiple=8, largest_head=128, length_multiple=2),
    "chunked": Ability(softcap=True),
    "xla": Ability(cache=True, bias=True, softcap=True),
}


class Call(NamedTuple):
    """What a backend is asked to compute, as far as it is known before tracing."""

    platform: str
    dtype: str
    head_dim: int
    num_queries: int
    num_keys: int
    bias: bool = False
    softcap: bool = False
    capability: float = 0.0  # 0 of what is no NVIDIA GPU


def refusal(backend: str, call: Call) -> str:
    """Why a backend cannot compute a call, as the end of a sentence that starts with its name; "" where it can."""
    able = ABILITIES[backend]
    if able.platform not in ("", call.platform):
        return f"runs on a {able.platform}, this is a {call.platform}"
    if call.capability < able.capability:
        return f"needs compute capability {able.capability}, this GPU has {call.capability or 'none'}"
    if call.dtype not in able.dtypes:
        return f"computes in {' or '.join(able.dtypes)}, model.compute_dtype is {call.dtype}"
    if call.head_dim % able.head_multiple or call.head_dim > able.largest_head:
        limit = f"a multiple of {able.head_multiple} up to {able.largest_head}"
        return f"takes heads as wide as {limit}, model.head_dim is {call.head_dim}"
    if call.num_queries % able.length_multiple:
        return f"takes lengths that are a multiple of {able.length_multiple}, this one is {call.num_queries}"
    if call.num_queries != call.num_keys and not able.cache:
        return f"has no cache: {call.num_queries} queries, {call.num_keys} keys"
    if call.bias and not able.bias:
        return "adds nothing to the logits, which relative positions need"
    if call.softcap and not able.softcap:
        return "does not bound the logits, which model.logit_softcap asks for"
    return ""


def choose(backend: str, call: Call) -> str:
    """The name of the backend; `auto` is decided by platform and length. Raises UserError where it cannot compute the call."""
    able = [name for name in ABILITIES if not refusal(name, call)]
    short = call.num_queries < 2 * CHUNK and "chunked" in able
    if backend == "auto":
        return next(name for name in able if not (short and name == "chunked"))
    if backend not in able:
        raise UserError(
            f"config.model.attention = {backend!r} {refusal(backend, call)}\n"
            f"the nearest backend that can is {able[0]}: --config.model.attention={able[0]}"
        )
    return backend


def preflight(config: Model, sequence_length: int, platform: str, compute_capability: float = 0.0) -> None:
    """Raises UserError, before anything compiles, where the configured backend cannot train this model there."""
    sizes = config.head_dim, sequence_length, sequence_length
    asked = config.positions == "relative", config.logit_softcap[0] > 0
    choose(config.attention, Call(platform, config.compute_dtype, *sizes, *asked, compute_capability))


def attend(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    queries: Context,
    keys: Context,
    window: int,
    backend: str,
    causal: bool = True,
    bias_BHTS: jax.Array | None = None,
    softcap: float = 0.0,
) -> jax.Array:
    """Softmax attention (arXiv:1706.03762) in segments and windows, heads in groups -> [B, T, H, K].

    `window` 0: none. `bias_BHTS` is added to the logits, which `softcap` (0: none) bounds (arXiv:2408.00118, section 2).
    The backend `xla` builds all logits, float32 [B, H, T, S]. The others keep no such array for the backward pass; they take
    keys in the order of the queries, key i at the position of query i. Raises UserError where `backend` cannot do it.
    """
    sizes = q_BTHK.shape[-1], q_BTHK.shape[1], k_BSGK.shape[1]
    asked = bias_BHTS is not None, softcap > 0
    backend = choose(backend, Call(platform(), q_BTHK.dtype.name, *sizes, *asked, capability()))
    if backend == "splash":
        return _splash(q_BTHK, k_BSGK, v_BSGK, keys, window, causal, softcap)
    if backend == "flash":
        from lm_jax.model.flash_attention import Rule, on_each_gpu  # half a second, on a GPU only

        return on_each_gpu(q_BTHK, k_BSGK, v_BSGK, keys.segment_ids, Rule(window, causal), *_layouts())
    arguments = q_BTHK, k_BSGK, v_BSGK, queries, keys, window, causal
    if backend == "cudnn":
        out_BTHK = _cudnn(*arguments)
    elif backend == "chunked":
        out_BTHK = _chunked(*arguments, softcap)
    else:
        out_BTHK = _xla(*arguments, softcap, bias_BHTS)
    named_BTHK: jax.Array = checkpoint_name(out_BTHK, "attended")
    return named_BTHK


def _chunked(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    queries: Context,
    keys: Context,
    window: int,
    causal: bool = True,
    softcap: float = 0.0,
) -> jax.Array:
    """`CHUNK` queries at a time with the keys they may see; the backward pass computes the logits of a chunk again."""
    num_queries, num_keys = q_BTHK.shape[1], k_BSGK.shape[1]
    if num_queries <= CHUNK:
        return _xla(q_BTHK, k_BSGK, v_BSGK, queries, keys, window, causal, softcap)
    out = []
    for start in range(0, num_queries, CHUNK):
        stop = min(start + CHUNK, num_queries)
        first = max(0, start - window + 1) // CHUNK * CHUNK if window else 0
        last = stop if causal else num_keys
        part = lambda context, a, b: Context(*(x[:, a:b] for x in context))
        attend_chunk = jax.checkpoint(functools.partial(_xla, window=window, causal=causal, softcap=softcap))
        out.append(
            attend_chunk(
                q_BTHK[:, start:stop],
                k_BSGK[:, first:last],
                v_BSGK[:, first:last],
                part(queries, start, stop),
                part(keys, first, last),
            )
        )
    return jnp.concatenate(out, axis=1)


def _cudnn(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    queries: Context,
    keys: Context,
    window: int,
    causal: bool = True,
    implementation: Literal["xla", "cudnn"] = "cudnn",
) -> jax.Array:
    """Flash attention of cuDNN. JAX's function has no segment ids: the mask says them, two bytes for each query and key."""
    fused = functools.partial(jax.nn.dot_product_attention, is_causal=causal, implementation=implementation)
    mask = lambda queries, keys: attention_mask(queries, keys, window, causal)[:, None]
    on_a_device = lambda q, k, v, queries, keys: fused(q, k, v, mask=mask(queries, keys))
    heads, tokens = _layouts()
    inputs = (*heads, *2 * [Context._make((tokens, tokens))])
    return on_each_device(on_a_device, inputs, heads[0])(q_BTHK, k_BSGK, v_BSGK, queries, keys)


def _splash(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    context: Context,
    window: int,
    causal: bool = True,
    softcap: float = 0.0,
    interpret: bool = False,
) -> jax.Array:
    """The Pallas kernel for TPUs: it skips blocks of keys that no query of a block may see, in both passes."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # half a second, on a TPU only

    length, head_dim = q_BTHK.shape[1], q_BTHK.shape[3]
    block = next(size for size in (512, 256, 128) if length % size == 0)
    blocks = splash.BlockSizes(*8 * (block,))  # three products of the forward pass, five of the backward
    square = length, length
    mask = splash.LocalMask(square, (window - 1 if window else None, 0), 0) if causal else splash.FullMask(square)

    def on_a_device(q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, ids_BT: jax.Array) -> jax.Array:
        kernel = splash.make_splash_mha_single_device(
            splash.MultiHeadMask([mask] * q_BTHK.shape[2]),
            block_sizes=blocks,
            attn_logits_soft_cap=softcap or None,
            residual_checkpoint_name="attended",
            interpret=interpret,
        )
        heads_first = (x.swapaxes(1, 2) for x in (q_BTHK / head_dim**0.5, k_BSGK, v_BSGK))
        full = precision(q_BTHK.dtype)
        with jax.default_matmul_precision(full and "highest"):  # the kernel's products state none
            out_BHTK: jax.Array = jax.vmap(kernel)(*heads_first, splash.SegmentIds(ids_BT, ids_BT))
            return out_BHTK.swapaxes(1, 2)

    heads, tokens = _layouts()
    return on_each_device(on_a_device, (*heads, tokens), heads[0])(q_BTHK, k_BSGK, v_BSGK, context.segment_ids)


def _layouts() -> tuple[list[PartitionSpec], PartitionSpec]:
    """Shardings of (queries, keys, values), and of arrays [B, T]."""
    layouts = [computed(("batch", "length", heads, None)) for heads in ("heads", "kv_heads", "kv_heads")]
    return layouts, computed(("batch", "length"))


def attention_mask(queries: Context, keys: Context, window: int, causal: bool = True) -> jax.Array:
    """Which keys are visible to each query, bool [B, T, S]. A window looks back only."""
    mask_BTS = queries.segment_ids[:, :, None] == keys.segment_ids[:, None, :]
    if not causal:
        return mask_BTS
    distance_BTS = queries.positions[:, :, None] - keys.positions[:, None, :]
    mask_BTS = mask_BTS & (distance_BTS >= 0)
    return mask_BTS & (distance_BTS < window) if window else mask_BTS


def _xla(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    queries: Context,
    keys: Context,
    window: int,
    causal: bool = True,
    softcap: float = 0.0,
    bias_BHTS: jax.Array | None = None,
) -> jax.Array:
    """All logits at once, in plain JAX: for any platform, with caches and biases."""
    batch, num_queries, num_heads, head_dim = q_BTHK.shape
    num_groups = k_BSGK.shape[2]
    shape = (batch, num_queries, num_groups, num_heads // num_groups, head_dim)
    q_BTGRK = reshape(q_BTHK / head_dim**0.5, shape, "batch", "length", "kv_heads", None, None)
    logits_BGRTS = einsum("BTGRK,BSGK->BGRTS", q_BTGRK, k_BSGK, "batch", "kv_heads", None, None, None)
    if bias_BHTS is not None:
        bias_BGRTS = reshape(bias_BHTS, logits_BGRTS.shape, "batch", "kv_heads", None, None, None)
        logits_BGRTS = logits_BGRTS + bias_BGRTS
    if softcap:
        logits_BGRTS = capped(logits_BGRTS.astype(jnp.float32), softcap)
    mask_BTS = attention_mask(queries, keys, window, causal)
    logits_BGRTS = jnp.where(mask_BTS[:, None, None], logits_BGRTS.astype(jnp.float32), jnp.finfo(jnp.float32).min / 2)
    weights_BGRTS = jax.nn.softmax(logits_BGRTS, axis=-1).astype(v_BSGK.dtype)
    out = einsum("BGRTS,BSGK->BTGRK", weights_BGRTS, v_BSGK, "batch", "length", "kv_heads", None, None)
    return reshape(out, q_BTHK.shape, "batch", "length", "heads", None)
