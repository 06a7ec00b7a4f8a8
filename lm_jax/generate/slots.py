"""The server's device programs: a chunk of a prompt is read, every text grows by one token. Their shapes never change.

An encoder-decoder reads a prompt whole, in one of few widths.

Whoever else is there changes no bit of an answer: a prompt is always read in the same chunks, by the same program, and a text is
a row of its own in both. Shape suffixes: B slots, R rows of a chunk (one on each part of the batch), C tokens of a chunk,
S tokens of a source, D model, V vocabulary, W words of 32 bits, A alternatives.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm_jax.generate.sampling import Sampling, keys, sample
from lm_jax.model.attention import Context
from lm_jax.model.build import ModelDef
from lm_jax.model.encoder_decoder import EncoderDecoder
from lm_jax.model.kv_cache import continued, is_cache, plain
from lm_jax.model.unstacked import Unstacked, is_unstacked
from lm_jax.sharding import computed, constrain, iota, on_each_device

ALTERNATIVES = 20  # most probable tokens that can be asked for beside the one that is written


class Feed(NamedTuple):
    """What the host says for the next token of every slot."""

    token_B: Any  # int32: that is read; -1: the one drawn last in this slot
    position_B: Any  # int32: where it stands; -1: nobody is in the slot
    step_B: Any  # int32: tokens written before, which chooses the random numbers
    sampling: Sampling
    allowed_BW: Any  # int32: a bit for each token that may come
    with_alternatives: Any  # bool


class Written(NamedTuple):
    """The new tokens, with the model's log-probabilities before temperature and cuts."""

    token_B: jax.Array
    sure_B: jax.Array
    best_BA: jax.Array  # the most probable tokens, 0 where nobody asks
    best_sure_BA: jax.Array


class Sourced(NamedTuple):
    """What an encoder-decoder has of every slot: the caches of what it writes, and what its encoder made of what it reads."""

    caches: Any
    source_BSD: jax.Array
    segment_BS: jax.Array  # int32: 1 where the source has a token


def empty_caches(graph: ModelDef, parameters: dict, num_slots: int, max_length: int):
    """The caches of `num_slots` texts of at most `max_length` tokens."""

    def make():
        caches = graph.empty_caches(num_slots, max_length)
        caches = Unstacked.of(caches) if is_unstacked(parameters) else caches
        if graph.config.kind != "encoder_decoder":
            return caches
        zeros = lambda *shape: constrain(jnp.zeros(shape, jnp.int32), "batch", *[None] * (len(shape) - 1))
        source_BSD = zeros(num_slots, max_length, graph.config.model_dim).astype(graph.config.compute_dtype)
        return Sourced(caches, source_BSD, zeros(num_slots, max_length))

    return jax.jit(make)()


def _take(caches, slot_R, dim: int):
    """One row of every part of the batch, [R, ...] each; slots count from the first one of the part."""
    row = computed(("batch",))
    local = lambda x, slot: jax.lax.dynamic_slice_in_dim(x, slot[0], 1, dim)
    take = lambda x: on_each_device(local, (_layout(x), row), _layout(x))(x, slot_R)
    return jax.tree.map(take, caches)


def _put(caches, rows, slot_R, dim: int):
    """The caches with these rows in place of their own."""
    row = computed(("batch",))
    local = lambda x, new, slot: jax.lax.dynamic_update_slice_in_dim(x, new, slot[0], dim)
    put = lambda x, new: on_each_device(local, (_layout(x), _layout(x), row), _layout(x))(x, new, slot_R)
    return jax.tree.map(put, caches, rows)


def _dim_of_rows(caches) -> int:
    return 0 if is_unstacked(caches) else 1  # a stack is [L, B, ...]


def _layout(x: jax.Array) -> jax.sharding.PartitionSpec:
    return jax.typeof(x).sharding.spec


@functools.partial(jax.jit, donate_argnames=("caches",))
def copy_rows(caches, source_R, target_R):
    """The caches with slot `source` of each part of the batch in slot `target`, too."""
    dim = _dim_of_rows(caches)
    return _put(caches, _take(caches, constrain(source_R, "batch"), dim), constrain(target_R, "batch"), dim)


@functools.partial(jax.jit, static_argnames=("graph",), donate_argnames=("caches",))
def read_chunk(graph: ModelDef, parameters: dict, caches, tokens_RC, start_R, num_R, slot_R):
    """The caches after `num` tokens, which stand from position `start` on, were read in `slot` of each part of the batch."""
    tokens_RC = constrain(tokens_RC, "batch", None)
    start_R, num_R, slot_R = (constrain(x, "batch") for x in (start_R, num_R, slot_R))
    index_RC = iota(tokens_RC.shape, "batch", "length")
    positions_RC = jnp.minimum(start_R[:, None] + index_RC, graph.sequence_length - 1)
    context = Context(positions_RC, (index_RC < num_R[:, None]).astype(jnp.int32))
    model = graph.module(parameters)
    if any(map(is_cache, jax.tree.leaves(caches, is_leaf=is_cache))):
        return plain(model(tokens_RC, context, None, continued(caches, slot_R))[1])
    _, rows = model(tokens_RC, context, None, _take(caches, slot_R, dim := _dim_of_rows(caches)))  # recurrent states
    return _put(caches, rows, slot_R, dim)


@functools.partial(jax.jit, static_argnames=("graph",), donate_argnames=("caches",))
def read_source(graph: ModelDef, parameters: dict, caches: Sourced, tokens_RS, num_R, slot_R) -> Sourced:
    """The caches after a text of `num` tokens was encoded for `slot` of each part of the batch; of none where `num` is 0."""
    tokens_RS = constrain(tokens_RS, "batch", None)
    num_R, slot_R = (constrain(x, "batch") for x in (num_R, slot_R))
    positions_RS = iota(tokens_RS.shape, "batch", "length")
    segment_RS = (positions_RS < num_R[:, None]).astype(jnp.int32)
    model = graph.module(parameters)
    assert isinstance(model, EncoderDecoder)
    encoded_RSD = model.encode(tokens_RS, Context(positions_RS, segment_RS))
    before = tuple(caches[1:])
    room = caches.segment_BS.shape[1] - tokens_RS.shape[1]
    wide = lambda new, old: jnp.pad(
        jax.sharding.reshard(new.astype(old.dtype), _layout(old)), ((0, 0), (0, room), (0, 0))[: new.ndim]
    )
    new = tuple(map(wide, (encoded_RSD, segment_RS), before))
    is_new = lambda x: jnp.expand_dims(num_R > 0, tuple(range(1, x.ndim)))
    rows = jax.tree.map(lambda x, old: jnp.where(is_new(x), x, old), new, _take(before, slot_R, 0))
    return Sourced(caches.caches, *_put(before, rows, slot_R, 0))


@functools.partial(jax.jit, static_argnames=("graph",), donate_argnames=("caches",))
def write_token(graph: ModelDef, parameters: dict, caches, drawn_B, feed: Feed) -> tuple[Any, Written]:
    """The caches and the next token of every slot."""
    feed = jax.tree.map(lambda x: constrain(x, *["batch", None][: x.ndim]), feed)
    model = graph.module(parameters)
    token_B1 = jnp.where(feed.token_B < 0, drawn_B, feed.token_B)[:, None]
    position_B1 = feed.position_B[:, None]
    context = Context(jnp.maximum(position_B1, 0), (position_B1 >= 0).astype(jnp.int32))
    if isinstance(caches, Sourced):
        assert isinstance(model, EncoderDecoder)
        source = caches.source_BSD, Context(iota(caches.segment_BS.shape, "batch", None), caches.segment_BS)
        hidden_B1D, own = model.decode(token_B1, context, source, None, caches.caches)
        caches = caches._replace(caches=own)
    else:
        hidden_B1D, caches = model(token_B1, context, None, caches)
    logits_BV = constrain(model.logits(hidden_B1D), "batch", "length", None)[:, 0]
    layouts = _layout(logits_BV), jax.tree.map(_layout, feed)
    row, matrix = computed(("batch",)), computed(("batch", None))
    return caches, Written(*on_each_device(_choose, layouts, (row, row, matrix, matrix))(logits_BV, feed))


def _choose(logits_BV, feed: Feed) -> tuple[jax.Array, ...]:
    """The next token of the slots of one device."""
    sure_BV = jax.nn.log_softmax(logits_BV.astype(jnp.float32))
    shifts = jnp.arange(32, dtype=jnp.int32)[None, None]
    allowed_BV = (feed.allowed_BW[:, :, None] >> shifts & 1).reshape(logits_BV.shape) > 0
    token_B = sample(jnp.where(allowed_BV, logits_BV, -jnp.inf), keys(feed.sampling.seed, feed.step_B), feed.sampling)
    sure_B = jnp.take_along_axis(sure_BV, token_B[:, None], axis=1)[:, 0]
    none = lambda: (jnp.zeros((len(token_B), ALTERNATIVES)), jnp.zeros((len(token_B), ALTERNATIVES), jnp.int32))
    best_sure_BA, best_BA = jax.lax.cond(
        feed.with_alternatives, lambda: tuple(jax.lax.top_k(sure_BV, ALTERNATIVES)), none
    )
    return token_B, sure_B, best_BA, best_sure_BA
