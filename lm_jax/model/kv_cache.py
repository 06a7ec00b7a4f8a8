"""The KV cache of generation: keys and values of the tokens so far, in slots that are used again where a window ends.

Shape suffixes: B batch, T query length, S cache slots, G kv heads, K head, L layers; R texts that are read on, by C tokens.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm_jax.config import Model
from lm_jax.model.attention import Context
from lm_jax.sharding import computed, constrain, iota, on_each_device, on_mesh

AXES = "batch", "kv_heads", "length", "head_dim"  # of a cache: what a product of all heads reads without turning it


class Cache(NamedTuple):
    """Keys and values of the tokens so far, [B, G, S, K] each; the token at position p is in slot p mod S.

    With `row_R` one text on each part of the batch, by its place there, is read on, several tokens at a time, wherever the ones
    before ended: a prompt in chunks.
    """

    keys: jax.Array
    values: jax.Array
    row_R: jax.Array | None = None  # int32


def is_cache(node: object) -> bool:
    """Whether a node of a tree is a cache."""
    return isinstance(node, Cache)


def continued(caches: Any, row_R: jax.Array) -> Any:
    """A tree whose caches [B, ...] or [L, B, ...] have `row_R`; `plain` is the way back."""

    def one(cache: Cache) -> Cache:
        stacked = cache.keys.shape[:-4]
        layout = computed((*[None] * len(stacked), "batch")) if on_mesh() else None
        return cache._replace(row_R=jnp.broadcast_to(row_R, (*stacked, *row_R.shape), out_sharding=layout))

    return jax.tree.map(one, caches, is_leaf=is_cache)


def plain(caches: Any) -> Any:
    """A tree whose caches are read from position 0 on, or a token at a time."""
    return jax.tree.map(lambda cache: cache._replace(row_R=None), caches, is_leaf=is_cache)


def empty_cache(config: Model, num_layers: int, batch: int, slots: int) -> Cache:
    """Zeros [L, B, G, S, K] in the compute dtype, laid out on the mesh that is set."""
    shape = (num_layers, batch, config.num_kv_heads, slots, config.head_dim)
    zeros = lambda: constrain(jnp.zeros(shape, config.compute_dtype), "layers", *AXES)
    return Cache(zeros(), zeros())


def slot_context(context: Context, num_slots: int) -> Context:
    """Position and segment of every slot, [B, S], once the tokens of `context` are written.

    Slot s holds the last position p with p mod S = s, in segment 1; its segment is 0 where there is no such token yet.
    """
    last_B = jnp.where(context.segment_ids > 0, context.positions, -1).max(axis=1)
    slots_BS = iota((last_B.shape[0], num_slots), "batch", "length")
    positions_BS = last_B[:, None] - (last_B[:, None] - slots_BS) % num_slots
    return Context(positions_BS, (positions_BS >= 0).astype(jnp.int32))


def visible_keys(context: Context, num_slots: int) -> Context:
    """The keys that queries attend to where there is a cache.

    One new token attends to all slots; the tokens of a prompt, which start the cache, attend to each other.
    """
    return slot_context(context, num_slots) if context.positions.shape[1] == 1 else context


def extend(
    cache: Cache, k_BTGK: jax.Array, v_BTGK: jax.Array, context: Context, wraps: bool
) -> tuple[jax.Array, jax.Array, Context, Cache]:
    """(keys, values, their context) that the queries at `context` attend to, and the cache with the new ones in it.

    Where a text is read on, its new tokens attend to what stands before the first of them, and to each other. `wraps`: slots are
    used again, so that new tokens may stand where old ones did that the first of them attend to.
    """
    size, turned = cache.keys.shape[-2], lambda x_BSGK: jnp.swapaxes(x_BSGK, 1, 2)
    keys, values, row_R = cache
    if row_R is not None:
        after = Cache(_read_on(keys, k_BTGK, context, row_R), _read_on(values, v_BTGK, context, row_R), row_R)
        of_texts = lambda cache: (turned(_row(x, row_R)) for x in cache[:2])
        if not wraps:  # what is read is what was written, so that XLA:CPU copies no cache to keep it as it was
            k_BSGK, v_BSGK = of_texts(after)
            return k_BSGK, v_BSGK, slot_context(context, size), after
        before = Context(context.positions[:, :1] - 1, jnp.ones_like(context.segment_ids[:, :1]))
        both = lambda old, new: jnp.concatenate([old, new.astype(old.dtype)], axis=1)
        k_BSGK, v_BSGK = map(both, of_texts(cache), (k_BTGK, v_BTGK))
        return k_BSGK, v_BSGK, Context(*map(both, slot_context(before, size), context)), after
    after = Cache(write(keys, k_BTGK, context), write(values, v_BTGK, context))
    visible = visible_keys(context, size)
    if visible is context:
        return k_BTGK, v_BTGK, visible, after
    return turned(after.keys), turned(after.values), visible, after


def write(cache_BGSK: jax.Array, new_BTGK: jax.Array, context: Context) -> jax.Array:
    """The cache with new keys or values in the slots of their positions, of which the last S tokens stay.

    They are those of one token a row, at any position, or of a prompt from position 0 on. Padding (segment 0) is not written
    where it is one token, or more of them than the cache has slots.
    """
    length, size = new_BTGK.shape[1], cache_BGSK.shape[2]
    new_BGTK = jnp.swapaxes(new_BTGK, 1, 2).astype(cache_BGSK.dtype)
    layouts = computed(AXES), computed(("batch", "length"))
    if length == 1:
        slot_B1 = jnp.where(context.segment_ids > 0, context.positions % size, size)
        written = on_each_device(_put_one, (layouts[0], *layouts), layouts[0])(cache_BGSK, new_BGTK, slot_B1)
    elif length <= size:
        written = jnp.concatenate([new_BGTK, cache_BGSK[:, :, length:]], axis=2)
    else:
        take = lambda new_BGTK, at_BS: jnp.take_along_axis(new_BGTK, at_BS[:, None, :, None], axis=2)
        index_BS = slot_context(context, size).positions - context.positions[:, :1]  # of the new token in each slot
        taken_BGSK = on_each_device(take, layouts, layouts[0])(new_BGTK, jnp.maximum(index_BS, 0))
        written = jnp.where((index_BS >= 0)[:, None, :, None], taken_BGSK, cache_BGSK)
    return constrain(written, *AXES)


def _put_one(cache_BGSK: jax.Array, new_BG1K: jax.Array, slot_B1: jax.Array) -> jax.Array:
    """One token a row where it belongs, nothing where its slot is S: in place, where nobody else holds the cache."""
    batch = len(cache_BGSK)
    rows = (
        jnp.arange(max(batch, 2)) % batch
    )  # one row twice: XLA:CPU makes of one index an update that copies the cache
    new_BGK, slot_B = new_BG1K[rows, :, 0], slot_B1[rows, 0]
    return cache_BGSK.at[rows, :, slot_B].set(new_BGK, mode="drop", unique_indices=batch > 1)


def _row(cache_BGSK: jax.Array, row_R: jax.Array) -> jax.Array:
    """One text of each part of the batch, [R, G, S, K]."""
    layout, own = computed(AXES), computed(("batch",))
    local = lambda x, row: jax.lax.dynamic_slice_in_dim(x, row[0], 1)
    return on_each_device(local, (layout, own), layout)(cache_BGSK, row_R)


def _read_on(cache_BGSK: jax.Array, new_RCGK: jax.Array, context: Context, row_R: jax.Array) -> jax.Array:
    """The cache with several tokens more of those texts, in place; padding (segment 0) is not written."""
    size, last_R1 = cache_BGSK.shape[2], jnp.where(context.segment_ids > 0, context.positions, -1).max(1, keepdims=True)
    stays = (context.segment_ids > 0) & (context.positions > last_R1 - size)
    slot_RC = jnp.where(stays, context.positions % size, size)

    def local(x, new, slot, row):
        rows = jnp.broadcast_to(row[:, None], slot.shape).reshape(-1)
        flat = new.reshape(-1, *new.shape[2:]).astype(x.dtype)
        return x.at[rows, :, slot.reshape(-1)].set(flat, mode="drop")

    layout = computed(AXES)
    tokens, new = computed(("batch", "length")), computed(("batch", "length", "kv_heads", "head_dim"))
    return on_each_device(local, (layout, new, tokens, computed(("batch",))), layout)(
        cache_BGSK, new_RCGK, slot_RC, row_R
    )
