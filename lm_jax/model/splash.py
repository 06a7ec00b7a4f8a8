"""Attention by the Pallas kernel for TPUs, which skips blocks of keys that no query of a block may see.

Shape suffixes: B batch, T length, H heads, G kv heads, K head.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from lm_jax.model.row_order import order_of_columns, whole_rows
from lm_jax.sharding import attention_layouts, computed, on_each_device, precision, ways


def splash_attention(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    segment_ids_BT: jax.Array,
    window: int,
    causal: bool = True,
    softcap: float = 0.0,
    interpret: bool = False,
) -> jax.Array:
    """[B, T, H, K] of queries and keys of the same rows, also where rows are split over devices (`row_order.py`)."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # half a second, on a TPU only

    (length, num_heads, head_dim), parts = q_BTHK.shape[1:], ways("length")
    chunk = length if parts == 1 else length // (2 * parts)
    block = next(size for size in (512, 256, 128) if chunk % size == 0)
    blocks = splash.BlockSizes(*8 * (block,))  # three products of the forward pass, five of the backward
    if causal:
        mask = _local_mask()((length, length), (window - 1 if window else None, 0), 0)
        mask.q_sequence = order_of_columns(length)
    else:
        mask = splash.FullMask((length // parts, length))  # the same for all parts
    alike = parts == 1 or not causal

    def kernel_of(num_heads: int) -> Any:
        return splash.make_splash_mha(
            splash.MultiHeadMask([mask] * num_heads),
            head_shards=1,
            q_seq_shards=1 if alike else parts,
            block_sizes=blocks,
            attn_logits_soft_cap=softcap or None,
            residual_checkpoint_name="attended",
            interpret=interpret,
        )

    def attend(
        kernel: Callable, q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, ids_BT: jax.Array
    ) -> jax.Array:
        k_BTGK, v_BTGK, ids_of_keys_BT = (whole_rows(x) for x in (k_BTGK, v_BTGK, ids_BT))
        heads_first = (x.swapaxes(1, 2) for x in (q_BTHK / head_dim**0.5, k_BTGK, v_BTGK))
        full = precision(q_BTHK.dtype)
        with jax.default_matmul_precision(full and "highest"):  # the kernel's products state none
            out_BHTK: jax.Array = jax.vmap(kernel)(*heads_first, splash.SegmentIds(ids_BT, ids_of_keys_BT))
            return out_BHTK.swapaxes(1, 2)

    arrays = q_BTHK, k_BTGK, v_BTGK, segment_ids_BT
    heads, tokens = attention_layouts()
    layouts = *heads, tokens
    if alike:
        whole = lambda q_BTHK, *more: attend(kernel_of(q_BTHK.shape[2]), q_BTHK, *more)
        return on_each_device(whole, layouts, layouts[0])(*arrays)
    kernel = kernel_of(num_heads // ways("heads"))  # its blocks are split as the queries are
    of_kernel = kernel.manual_sharding_spec(NamedSharding(jax.sharding.get_abstract_mesh(), computed((None, "length"))))
    return on_each_device(attend, (of_kernel, *layouts), layouts[0])(kernel, *arrays)


@functools.cache
def _local_mask() -> Any:
    """The kernel's causal mask, quick where a block of it is all the same: of 131,072 tokens there are 65,536 blocks."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    class LocalMask(splash.LocalMask):
        def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
            """What a block of [queries, keys] sees. One value stands for a block of equals: the kernel asks for any and all."""
            queries, keys = self.q_sequence[index[0]], index[1]
            first, last, window = queries.min(), queries.max(), self.window_size[0]
            if last < keys.start or (window is not None and first - window >= keys.stop):
                return np.zeros((1, 1), bool)
            if first >= keys.stop - 1 and (window is None or last - window <= keys.start):
                return np.ones((1, 1), bool)
            block: np.ndarray = super().__getitem__(index)
            return block

    return LocalMask
