"""Attention: one function for every backend, always with positions and segments; and the layer around it.

Shape suffixes: B batch, T query length, S key length, D model, H heads, G kv heads, R = H / G, K head.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from lm_jax.config import Model
from lm_jax.errors import UserError
from lm_jax.model.layers import Dense, Norm, capped
from lm_jax.sharding import computed, constrain, einsum, iota, on_each_device, platform, precision, reshape

CHUNK = 256  # queries in one chunk of the chunked backend


class Context(NamedTuple):
    """Who may see whom. A token sees tokens of its own segment at positions p with 0 <= own - p (< window)."""

    positions: jax.Array  # [B, T] int32, from 0 in each segment
    segment_ids: jax.Array  # [B, T] int32, 0 = padding


class Cache(NamedTuple):
    """Keys and values already computed, slot = position: [B, S, G, K] each (stacked over layers outside a layer)."""

    keys: jax.Array
    values: jax.Array


class Ability(NamedTuple):
    """What a backend honours. All four honour segments, windows, grouped heads and both sides; they differ in the rest."""

    platform: str = ""  # "" = any
    dtypes: tuple[str, ...] = ("float32", "float16", "bfloat16")
    head_multiple: int = 1  # that head_dim must be
    largest_head: int = 1024
    length_multiple: int = 1
    cache: bool = False  # queries may be fewer than keys
    bias: bool = False  # something may be added to the logits
    softcap: bool = False  # logits may be bounded


ABILITIES = {
    "splash": Ability("tpu", ("float32", "bfloat16"), head_multiple=64, length_multiple=128, softcap=True),
    "cudnn": Ability("gpu", ("float16", "bfloat16"), head_multiple=8, largest_head=128, length_multiple=2),
    "chunked": Ability(softcap=True),
    "xla": Ability(cache=True, bias=True, softcap=True),
}


class Call(NamedTuple):
    """What is asked of a backend, as far as it is known before anything is computed."""

    platform: str
    dtype: str
    head_dim: int
    num_queries: int
    num_keys: int
    bias: bool = False
    softcap: bool = False


def refusal(backend: str, call: Call) -> str:
    """What of a call a backend cannot honour, "" where it can all."""
    able = ABILITIES[backend]
    if able.platform not in ("", call.platform):
        return f"runs on a {able.platform}, this is a {call.platform}"
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
    """The backend by name, `auto` by platform and length. Raises UserError where it cannot honour the call."""
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


def preflight(config: Model, sequence_length: int, platform: str) -> None:
    """Raises UserError, before anything compiles, where the configured backend cannot train this model there."""
    sizes = config.head_dim, sequence_length, sequence_length
    asked = config.positions == "relative", config.logit_softcap[0] > 0
    choose(config.attention, Call(platform, config.compute_dtype, *sizes, *asked))


def attend(
    q_BTHK,
    k_BSGK,
    v_BSGK,
    queries: Context,
    keys: Context,
    window: int,
    backend: str,
    causal: bool = True,
    bias_BHTS=None,
    softcap: float = 0.0,
) -> jax.Array:
    """Softmax attention (arXiv:1706.03762) in segments and windows, heads in groups -> [B, T, H, K].

    Causal, or of both sides of a token; `bias_BHTS` is added to the logits, which `softcap` bounds (arXiv:2408.00118, section
    2). `xla` builds the whole square of logits.
    The others rely on keys in the order of the queries, so that a token sees no later place, and need no square in the backward
    pass.
    """
    head_dim, num_queries = q_BTHK.shape[-1], q_BTHK.shape[1]
    asked = bias_BHTS is not None, softcap > 0
    backend = choose(backend, Call(platform(), q_BTHK.dtype.name, head_dim, num_queries, k_BSGK.shape[1], *asked))
    if backend == "splash":
        return _splash(q_BTHK, k_BSGK, v_BSGK, keys, window, causal, softcap)
    arguments = q_BTHK, k_BSGK, v_BSGK, queries, keys, window, causal
    if backend == "cudnn":
        return checkpoint_name(_cudnn(*arguments), "attended")
    if backend == "chunked":
        return checkpoint_name(_chunked(*arguments, softcap), "attended")
    return checkpoint_name(_xla(*arguments, softcap, bias_BHTS), "attended")


def _chunked(
    q_BTHK, k_BSGK, v_BSGK, queries: Context, keys: Context, window: int, causal: bool = True, softcap: float = 0.0
) -> jax.Array:
    """`CHUNK` queries at a time against the keys before them, or all; a chunk's square is made again in the backward pass."""
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
    q_BTHK, k_BSGK, v_BSGK, queries: Context, keys: Context, window: int, causal: bool = True, implementation="cudnn"
) -> jax.Array:
    """cuDNN's flash attention. Its public form has no segment ids: segments and windows are a mask, two bytes a pair."""
    fused = functools.partial(jax.nn.dot_product_attention, is_causal=causal, implementation=implementation)
    seen = lambda queries, keys: _seen(queries, keys, window, causal)[:, None]
    on_a_device = lambda q, k, v, queries, keys: fused(q, k, v, mask=seen(queries, keys))
    heads, tokens = _layouts()
    inputs = (*heads, Context(tokens, tokens), Context(tokens, tokens))
    return on_each_device(on_a_device, inputs, heads[0])(q_BTHK, k_BSGK, v_BSGK, queries, keys)


def _splash(
    q_BTHK, k_BSGK, v_BSGK, context: Context, window: int, causal=True, softcap: float = 0.0, interpret: bool = False
) -> jax.Array:
    """The Pallas kernel that skips what no query of a block may see, forwards and backwards."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # half a second, on a TPU only

    length, head_dim = q_BTHK.shape[1], q_BTHK.shape[3]
    block = next(size for size in (512, 256, 128) if length % size == 0)
    blocks = splash.BlockSizes(*8 * (block,))  # three products of the forward pass, five of the backward
    square = length, length
    mask = splash.LocalMask(square, (window - 1 if window else None, 0), 0) if causal else splash.FullMask(square)

    def on_a_device(q_BTHK, k_BSGK, v_BSGK, ids_BT):
        kernel = splash.make_splash_mha_single_device(
            splash.MultiHeadMask([mask] * q_BTHK.shape[2]),
            block_sizes=blocks,
            attn_logits_soft_cap=softcap or None,
            residual_checkpoint_name="attended",
            interpret=interpret,
        )
        rows = (x.swapaxes(1, 2) for x in (q_BTHK / head_dim**0.5, k_BSGK, v_BSGK))
        full = precision(q_BTHK.dtype)
        with jax.default_matmul_precision(full and "highest"):  # the kernel's products say nothing of it
            return jax.vmap(kernel)(*rows, splash.SegmentIds(ids_BT, ids_BT)).swapaxes(1, 2)

    heads, tokens = _layouts()
    return on_each_device(on_a_device, (*heads, tokens), heads[0])(q_BTHK, k_BSGK, v_BSGK, context.segment_ids)


def _layouts():
    """Of queries, keys and values, and of what stands beside them, [B, T]."""
    layouts = [computed(("batch", "length", heads, None)) for heads in ("heads", "kv_heads", "kv_heads")]
    return layouts, computed(("batch", "length"))


def _seen(queries: Context, keys: Context, window: int, causal: bool = True) -> jax.Array:
    """Which keys each query sees, bool [B, T, S]. Windows look back."""
    seen_BTS = queries.segment_ids[:, :, None] == keys.segment_ids[:, None, :]
    if not causal:
        return seen_BTS
    distance_BTS = queries.positions[:, :, None] - keys.positions[:, None, :]
    seen_BTS = seen_BTS & (distance_BTS >= 0)
    return seen_BTS & (distance_BTS < window) if window else seen_BTS


def _xla(
    q_BTHK,
    k_BSGK,
    v_BSGK,
    queries: Context,
    keys: Context,
    window: int,
    causal: bool = True,
    softcap: float = 0.0,
    bias_BHTS=None,
) -> jax.Array:
    batch, num_queries, num_heads, head_dim = q_BTHK.shape
    num_groups = k_BSGK.shape[2]
    shape = (batch, num_queries, num_groups, num_heads // num_groups, head_dim)
    q_BTGRK = reshape(q_BTHK / head_dim**0.5, shape, "batch", "length", "kv_heads", None, None)
    logits_BGRTS = einsum("BTGRK,BSGK->BGRTS", q_BTGRK, k_BSGK, "batch", "kv_heads", None, None, None)
    if bias_BHTS is not None:
        like = logits_BGRTS.shape
        logits_BGRTS = logits_BGRTS + reshape(bias_BHTS, like, "batch", "kv_heads", None, None, None)
    if softcap:
        logits_BGRTS = capped(logits_BGRTS.astype(jnp.float32), softcap)
    seen_BTS = _seen(queries, keys, window, causal)
    logits_BGRTS = jnp.where(seen_BTS[:, None, None], logits_BGRTS.astype(jnp.float32), jnp.finfo(jnp.float32).min / 2)
    weights_BGRTS = jax.nn.softmax(logits_BGRTS, axis=-1).astype(v_BSGK.dtype)
    out = einsum("BGRTS,BSGK->BTGRK", weights_BGRTS, v_BSGK, "batch", "length", "kv_heads", None, None)
    return reshape(out, q_BTHK.shape, "batch", "length", "heads", None)


class Rotation(NamedTuple):
    """Cosines and sines of rotary positions, float32 [B, T, 1, turned width / 2]: made once, used by every layer."""

    cos: jax.Array
    sin: jax.Array


def rotation(
    positions_BT: jax.Array, width: int, base: float, scaling: tuple = (1.0, 1.0, 4.0, 0.0), kind: str = "llama3"
) -> Rotation:
    """Angles of rotary positions (arXiv:2104.09864): position * base^(-2k / width), scaled as `scaled` or `yarn` says."""
    half = width // 2
    frequency_K = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    size = 1.0
    if scaling[0] != 1:
        by_kind = functools.partial(yarn, base=base) if kind == "yarn" else scaled
        frequency_K = by_kind(frequency_K, *scaling)
        size = 0.1 * math.log(scaling[0]) + 1 if kind == "yarn" else 1.0  # arXiv:2309.00071, section 3.4
    angle_BT1K = positions_BT[:, :, None, None].astype(jnp.float32) * frequency_K[None, None, None]
    turns = jnp.cos(angle_BT1K), jnp.sin(angle_BT1K)
    turns = turns if size == 1 else (size * turns[0], size * turns[1])
    return Rotation(*jax.lax.optimization_barrier(turns))


def scaled(frequency_K: jax.Array, factor: float, low: float, high: float, length: float) -> jax.Array:
    """Slow frequencies divided by `factor`, fast ones kept, a linear passage between (Llama 3, arXiv:2407.21783, section 3.2).

    What turns less than `low` times over `length` tokens is slow, more than `high` times fast. `length` 0: all are slow.
    """
    turns_K = length * frequency_K / (2 * jnp.pi)
    share_K = jnp.clip((turns_K - low) / (high - low), 0, 1)
    return frequency_K * (share_K + (1 - share_K) / factor)


def yarn(frequency_K: jax.Array, factor: float, low: float, high: float, length: float, base: float) -> jax.Array:
    """`scaled` with a passage that is linear in the index k, between whole ones (YaRN, arXiv:2309.00071, section 3.2)."""
    half = len(frequency_K)
    at = lambda turns: half * math.log(length / (turns * 2 * math.pi)) / math.log(base)  # the index that turns so often
    first, last = max(math.floor(at(high)), 0), min(math.ceil(at(low)), 2 * half - 1)
    share_K = 1 - jnp.clip((jnp.arange(half, dtype=jnp.float32) - first) / (max(last - first, 0) or 0.001), 0, 1)
    return frequency_K * (share_K + (1 - share_K) / factor)


def rotate(x_BTHK: jax.Array, by: Rotation) -> jax.Array:
    """Each pair (k, k + half) of the turned width turned by its angle, in float32; what is beyond stays."""
    width = 2 * by.cos.shape[-1]
    if width < x_BTHK.shape[-1]:
        return jnp.concatenate([rotate(x_BTHK[..., :width], by), x_BTHK[..., width:]], axis=-1)
    first, second = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * by.cos - second * by.sin, second * by.cos + first * by.sin], axis=-1)
    return turned.astype(x_BTHK.dtype)


def held(context: Context, size: int) -> Context:
    """What the slots of a cache hold once the tokens of `context` are in it: slot s the last position p with p mod size = s."""
    last_B = jnp.where(context.segment_ids > 0, context.positions, -1).max(axis=1)
    slots_BS = iota((last_B.shape[0], size), "batch", "length")
    positions_BS = last_B[:, None] - (last_B[:, None] - slots_BS) % size
    return Context(positions_BS, (positions_BS >= 0).astype(jnp.int32))


def seen_keys(context: Context, size: int) -> Context:
    """What queries look at where there is a cache: one token at all that it holds, many, which begin it, at each other."""
    return held(context, size) if context.positions.shape[1] == 1 else context


def write(cache_BSGK: jax.Array, new_BTGK: jax.Array, context: Context) -> jax.Array:
    """The cache with `new` in the slots of its positions: one token a row anywhere, or the last of many that begin it."""
    axes, length, size = ("batch", "length", "kv_heads", "head_dim"), new_BTGK.shape[1], cache_BSGK.shape[1]
    new_BTGK = new_BTGK.astype(cache_BSGK.dtype)
    if length == 1:
        here_BS = iota((len(new_BTGK), size), "batch", "length") == context.positions % size
        written = jnp.where(here_BS[:, :, None, None], new_BTGK, cache_BSGK)
    elif length <= size:
        written = jnp.concatenate([new_BTGK, cache_BSGK[:, length:]], axis=1)
    else:
        take = lambda new_BTGK, at_BS: jnp.take_along_axis(new_BTGK, at_BS[:, :, None, None], axis=1)
        layouts = computed(axes), computed(("batch", "length"))
        written = on_each_device(take, layouts, layouts[0])(new_BTGK, jnp.maximum(held(context, size).positions, 0))
    return constrain(written, *axes)


class Attention(nnx.Module):
    """Multi-head attention with grouped keys and values (arXiv:2305.13245)."""

    def __init__(
        self,
        config: Model,
        window: int,
        output_stddev: float,
        causal: bool = True,
        softcap: float = 0.0,
        multiplier: float = 0.0,
    ):
        """`softcap` bounds the logits, 0: nothing does; `multiplier` makes them of products, 0: 1 / sqrt(head_dim)."""
        self.config, self.window, self.causal = config, window, causal
        self.softcap, self.multiplier = softcap, multiplier
        model = {"model": config.model_dim}
        heads = {"heads": config.num_heads, "head_dim": config.head_dim}
        kv_heads = {"kv_heads": config.num_kv_heads, "head_dim": config.head_dim}
        bias = config.bias or config.qkv_bias
        self.query = Dense(model, heads, config.init_scale, bias)
        self.key = Dense(model, kv_heads, config.init_scale, bias)
        self.value = Dense(model, kv_heads, config.init_scale, bias)
        normed = lambda dims: dims if config.qk_norm_whole else {"head_dim": config.head_dim}
        norm = lambda dims: Norm(normed(dims), config.norm, config.norm_epsilon, config.bias)
        self.query_norm = norm(heads) if config.qk_norm else None
        self.key_norm = norm(kv_heads) if config.qk_norm else None
        self.output = Dense(heads, model, output_stddev, config.bias)

    def __call__(
        self,
        x_BTD,
        context: Context,
        turn: Rotation | None,
        cache: Cache | None,
        bias_BHTS: jax.Array | None = None,
        source: tuple[jax.Array, Context] | None = None,
    ):
        """-> [B, T, D] and the cache with this call's keys and values.

        `source` is what is looked at, [B, S, D] with its context, where that is not `x` itself.
        """
        seen_BSD, seen = source or (x_BTD, context)
        (q_BTHK, k_BTGK), v_BTGK = self.queries_and_keys(x_BTD, seen_BSD, turn), self.value(seen_BSD)
        named = zip((q_BTHK, k_BTGK, v_BTGK), ("query", "key", "value"), strict=True)
        q_BTHK, k_BTGK, v_BTGK = (checkpoint_name(x, name) for x, name in named)
        backend = self.config.attention
        if cache is not None:
            cache = Cache(write(cache.keys, k_BTGK, context), write(cache.values, v_BTGK, context))
            seen, backend = seen_keys(context, cache.keys.shape[1]), "auto"
            k_BTGK, v_BTGK = cache if seen is not context else (k_BTGK, v_BTGK)
        more = self.causal, bias_BHTS, self.softcap
        out_BTHK = attend(q_BTHK, k_BTGK, v_BTGK, context, seen, self.window, backend, *more)
        return checkpoint_name(self.output(out_BTHK), "attention"), cache

    def queries_and_keys(self, x_BTD, seen_BSD, turn: Rotation | None) -> tuple[jax.Array, jax.Array]:
        """[B, T, H, K] and [B, S, G, K], normalised and turned: their products over sqrt(K) are the logits."""
        q_BTHK, k_BSGK = self.query(x_BTD), self.key(seen_BSD)
        if self.query_norm and self.key_norm:
            q_BTHK, k_BSGK = self.query_norm(q_BTHK), self.key_norm(k_BSGK)
        if turn is not None:
            q_BTHK, k_BSGK = rotate(q_BTHK, turn), rotate(k_BSGK, turn)
        if self.multiplier:
            q_BTHK = q_BTHK * (self.multiplier * self.config.head_dim**0.5)
        return q_BTHK, k_BSGK
