"""Attention: one function for every backend, always with positions and segments.

Shape suffixes: B batch, T query length, S key length, D model, H heads, G kv heads, R = H / G, K head.
"""

import functools
from importlib.util import find_spec
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lm_jax.config import Model
from lm_jax.errors import UserError
from lm_jax.model.context_attention import Chunks, attend_over_devices
from lm_jax.model.layers import capped
from lm_jax.model.splash import splash_attention
from lm_jax.model_config import plain
from lm_jax.plan.devices import has_bfloat16
from lm_jax.sharding import attention_layouts, device, einsum, on_each_device, reshape, ways

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
    split: bool = False  # rows over devices
    bfloat16: bool = False  # needs a device that multiplies in it, whatever the dtype: a GPU of compute capability 8.0


ABILITIES = {
    "splash": Ability("tpu", ("float32", "bfloat16"), 64, length_multiple=128, softcap=True, split=True),
    "flash": Ability("gpu", ("float16", "bfloat16"), 64, 128, length_multiple=128, bfloat16=True),
    "cudnn": Ability("gpu", ("float16", "bfloat16"), 8, 128, length_multiple=2, bfloat16=True),
    "chunked": Ability(softcap=True, split=True),
    "xla": Ability(cache=True, bias=True, softcap=True, split=True),
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
    parts: int = 1  # of a row, on as many devices
    bfloat16: bool = True  # whether the device multiplies in it


def refusal(backend: str, call: Call) -> str:
    """Why a backend cannot compute a call, as the end of a sentence that starts with its name; "" where it can."""
    able = ABILITIES[backend]
    if able.platform not in ("", call.platform):
        return f"runs on a {able.platform}, this is a {call.platform}"
    if backend == "flash" and not find_spec("jax.experimental.pallas.triton"):
        return "needs Pallas's compiler for Triton, which this JAX no longer has"
    if able.bfloat16 and not call.bfloat16:
        return "runs on GPUs from Ampere on (compute capability 8.0), this is an older one"
    if call.dtype not in able.dtypes:
        return f"computes in {' or '.join(able.dtypes)}, model.compute_dtype is {call.dtype}"
    if call.head_dim % able.head_multiple or call.head_dim > able.largest_head:
        limit = f"a multiple of {able.head_multiple} up to {able.largest_head}"
        return f"takes heads as wide as {limit}, model.head_dim is {call.head_dim}"
    if call.parts > 1 and not able.split:
        return f"takes whole rows, and the mesh splits each over {call.parts} devices"
    multiple = able.length_multiple * (2 * call.parts if call.parts > 1 else 1)  # a device has two chunks of a row
    if call.num_queries % multiple:
        return f"takes lengths that are a multiple of {multiple}, this one is {call.num_queries}"
    if call.num_queries != call.num_keys and (call.parts > 1 or not able.cache):
        return f"has no cache: {call.num_queries} queries, {call.num_keys} keys"
    if call.bias and (call.parts > 1 or not able.bias):
        return "adds nothing to the logits, which relative positions need"
    if call.softcap and not able.softcap:
        return "does not bound the logits, which model.logit_softcap asks for"
    return ""


def choose(backend: str, call: Call) -> str:
    """The name of the backend; `auto` is decided by platform and length. Raises UserError where it cannot compute the call."""
    able = [name for name in ABILITIES if not refusal(name, call)]
    if not able:
        raise UserError(
            f"config.mesh.context = {call.parts}: attention {refusal('xla', call)}\nsay --config.mesh.context=1"
        )
    short = call.num_queries < 2 * CHUNK and "chunked" in able
    if backend == "auto":
        return next(name for name in able if not (short and name == "chunked"))
    if backend not in able:
        raise UserError(
            f"config.model.attention = {backend!r} {refusal(backend, call)}\n"
            f"the nearest backend that can is {able[0]}: --config.model.attention={able[0]}"
        )
    return backend


def preflight(config: Model, sequence_length: int, platform: str, parts: int = 1, bfloat16: bool = True) -> str:
    """The backend that trains this model there, with rows split over `parts` devices, which multiply in bfloat16 or not.

    Raises UserError, before anything compiles, where the configured one cannot.
    """
    sizes = config.head_dim, sequence_length, sequence_length
    asked = config.positions == "relative", config.logit_softcap[0] > 0
    return choose(config.attention, Call(platform, plain(config).compute_dtype, *sizes, *asked, parts, bfloat16))


class Inputs(NamedTuple):
    """What a backend computes with: arrays, and which keys are visible (`attend`)."""

    q_BTHK: jax.Array
    k_BSGK: jax.Array
    v_BSGK: jax.Array
    queries: Context
    keys: Context
    window: int
    causal: bool
    softcap: float


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
    keys in the order of the queries, key i at the position of query i. Where rows are split over devices, queries and keys
    are those of a row in the order of `row_order.py`. Raises UserError where `backend` cannot do it.
    """
    here, sizes = device(), (q_BTHK.shape[-1], q_BTHK.shape[1], k_BSGK.shape[1])
    asked = bias_BHTS is not None, softcap > 0
    call = Call(here.platform, q_BTHK.dtype.name, *sizes, *asked, ways("length"), has_bfloat16(here))
    backend = choose(backend, call)
    if backend == "splash":
        return splash_attention(q_BTHK, k_BSGK, v_BSGK, keys.segment_ids, window, causal, softcap)
    if backend == "flash":
        from lm_jax.model.flash_attention import Rule, on_each_gpu  # half a second, on a GPU only

        return on_each_gpu(q_BTHK, k_BSGK, v_BSGK, keys.segment_ids, Rule(window, causal), *attention_layouts())
    inputs = Inputs(q_BTHK, k_BSGK, v_BSGK, queries, keys, window, causal, softcap)
    if ways("length") > 1:
        part = lambda q, k, v, own, others: _xla(Inputs(q, k, v, own, others, window, causal, softcap))
        chunks = Chunks(CHUNK if backend == "chunked" else 0, window, causal)
        out_BTHK = attend_over_devices(part, chunks, q_BTHK, k_BSGK, v_BSGK, queries)
    elif backend == "cudnn":
        out_BTHK = _cudnn(inputs)
    elif backend == "chunked":
        out_BTHK = _chunked(inputs)
    else:
        out_BTHK = _xla(inputs, bias_BHTS)
    named_BTHK: jax.Array = checkpoint_name(out_BTHK, "attended")
    return named_BTHK


def _chunked(inputs: Inputs) -> jax.Array:
    """`CHUNK` queries at a time with the keys they may see; the backward pass computes the logits of a chunk again."""
    q_BTHK, k_BSGK, v_BSGK, queries, keys = inputs[:5]
    num_queries, num_keys = q_BTHK.shape[1], k_BSGK.shape[1]
    if num_queries <= CHUNK:
        return _xla(inputs)
    attend_chunk = jax.checkpoint(lambda q, k, v, own, others: _xla(Inputs(q, k, v, own, others, *inputs[5:])))
    out = []
    for start in range(0, num_queries, CHUNK):
        own = slice(start, min(start + CHUNK, num_queries))
        first = max(0, start - inputs.window + 1) // CHUNK * CHUNK if inputs.window else 0
        visible = slice(first, own.stop if inputs.causal else num_keys)
        contexts = (Context(*(x[:, part] for x in context)) for context, part in ((queries, own), (keys, visible)))
        out.append(attend_chunk(q_BTHK[:, own], k_BSGK[:, visible], v_BSGK[:, visible], *contexts))
    return jnp.concatenate(out, axis=1)


def _cudnn(inputs: Inputs, implementation: Literal["xla", "cudnn"] = "cudnn") -> jax.Array:
    """Flash attention of cuDNN. JAX's function has no segment ids: the mask says them, two bytes for each query and key."""
    *arrays, window, causal, _ = inputs
    fused = functools.partial(jax.nn.dot_product_attention, is_causal=causal, implementation=implementation)
    mask = lambda queries, keys: attention_mask(queries, keys, window, causal)[:, None]
    on_a_device = lambda q, k, v, queries, keys: fused(q, k, v, mask=mask(queries, keys))
    heads, tokens = attention_layouts()
    layouts = (*heads, *2 * [Context._make((tokens, tokens))])
    return on_each_device(on_a_device, layouts, heads[0])(*arrays)


def attention_mask(queries: Context, keys: Context, window: int, causal: bool = True) -> jax.Array:
    """Which keys are visible to each query, bool [B, T, S]. A window looks back only."""
    mask_BTS = queries.segment_ids[:, :, None] == keys.segment_ids[:, None, :]
    if not causal:
        return mask_BTS
    distance_BTS = queries.positions[:, :, None] - keys.positions[:, None, :]
    mask_BTS = mask_BTS & (distance_BTS >= 0)
    return mask_BTS & (distance_BTS < window) if window else mask_BTS


def _xla(inputs: Inputs, bias_BHTS: jax.Array | None = None) -> jax.Array:
    """All logits at once, in plain JAX: for any platform, with caches and biases."""
    q_BTHK, k_BSGK, v_BSGK, queries, keys, window, causal, softcap = inputs
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
    first, second = ("BGRTS", weights_BGRTS), ("BSGK", v_BSGK)
    if num_queries == 1:  # the other way round, in which values that lie as in a cache are read as they are
        first, second = second, first
    formula = f"{first[0]},{second[0]}->BTGRK"
    out = einsum(formula, first[1], second[1], "batch", "length", "kv_heads", None, None)
    return reshape(out, q_BTHK.shape, "batch", "length", "heads", None)
