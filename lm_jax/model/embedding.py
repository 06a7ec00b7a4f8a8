"""A table of vectors, looked up where it is stored.

Shape suffixes: B batch, T length, D model.
"""

import jax
from flax import nnx
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from lm_jax.model.layers import declare, normal
from lm_jax.sharding import computed, constrain, names_of, on_mesh, stored


class Embedding(nnx.Module):
    """A table with a vector for each id."""

    def __init__(self, num: int, dim: int, axis: str, stddev: float):
        self.table = declare((num, dim), (axis, "model"), normal(stddev), (0,), (1,))

    def __call__(self, ids_BT: jax.Array, dtype: DTypeLike) -> jax.Array:
        """-> [B, T, D] in `dtype`. The gradient of the table is a sum over tokens, in float32."""
        return look_up(self.table[...], ids_BT, self.table.get_metadata("declared").axes, dtype)


def look_up(table: jax.Array, ids: jax.Array, axes: tuple[str, ...], dtype: DTypeLike) -> jax.Array:
    """Rows of a stored table [N, D] with the logical `axes` for ids [B, T] -> [B, T, D] in `dtype`.

    The table stays where it is: a device looks its part of the width up for all devices that share D, and they exchange B*T*D
    values, not N*D of the table and as many of its gradient. That is a sum over tokens in the table's dtype.
    """
    if not on_mesh():
        return table[ids].astype(dtype)
    num, width = computed(axes)[0], stored(axes)[1]
    whole = PartitionSpec(
        *(
            tuple(name for name in names_of(part) if name not in names_of(width))
            for part in computed(("batch", "length"))
        )
    )
    table, ids = jax.sharding.reshard(table, PartitionSpec(num, width)), jax.sharding.reshard(ids, whole)
    part = table.at[ids].get(out_sharding=PartitionSpec(*whole, width)).astype(dtype)
    return constrain(part, "batch", "length", None)
