"""Parallelism is this table: which mesh axis splits each logical axis of a stored parameter and of a computed value.

Model code names logical axes only, through `constrain`, `einsum` and `reshape`. The mesh has Explicit axes: the layout of
every array is part of its type, so that a layout nobody asked for is an error while tracing instead of a slow program.
"""

import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

Tree = TypeVar("Tree")  # of arrays
AXES = ("data", "fsdp", "tensor")

#   logical axis   a stored parameter   a computed value (also a parameter gathered for use)
TABLE: dict[str, tuple[str | None, str | tuple[str, ...] | None]] = {
    "batch": (None, ("data", "fsdp")),
    "length": (None, None),
    "tokens": (None, ("data", "fsdp")),  # batch and length as one dim
    "model": ("fsdp", None),
    "kept": (None, "tensor"),  # the stream between layers, where the backward pass computes them again
    "heads": ("tensor", "tensor"),
    "kv_heads": ("tensor", "tensor"),
    "head_dim": (None, None),
    "mlp": ("tensor", "tensor"),
    "rank": (None, None),  # of an adapter, which is small
    "experts": (None, None),
    "choices": (None, None),  # what a router may choose
    "vocab": ("tensor", "tensor"),
    "features": (None, None),  # what a product gives to every device of a tensor group: gates, labels
    "positions": (None, None),
    "segments": (None, None),  # of an encoder: the first and the second text
    "buckets": (None, None),  # of relative positions
    "layers": (None, None),
}


def stored(axes: tuple[str, ...]) -> PartitionSpec:
    """Where a parameter with these logical axes lives between steps."""
    return PartitionSpec(*(TABLE[axis][0] for axis in axes))


def computed(axes: tuple[str | None, ...]) -> PartitionSpec:
    """How a value with these logical axes (None: not split) is laid out while it is computed with."""
    return PartitionSpec(*(TABLE[axis][1] if axis else None for axis in axes))


def on_mesh() -> bool:
    """Whether a mesh is set (`jax.set_mesh`); without one there are no layouts."""
    return not jax.sharding.get_abstract_mesh().empty


def _layout(axes: tuple[str | None, ...]) -> PartitionSpec | None:
    return computed(axes) if on_mesh() else None


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x` in the computed layout of its logical axes; for a parameter this is the gather of its fsdp shards."""
    return jax.sharding.reshard(x, computed(axes)) if on_mesh() else x


def precision(dtype: DTypeLike) -> jax.lax.Precision | None:
    """The precision of a product of arrays of this dtype: HIGHEST for float32, None (one way only) for narrower dtypes.

    Otherwise a TPU would round float32 to bfloat16, and a GPU to TF32.
    """
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def einsum(formula: str, x: jax.Array, y: jax.Array, *axes: str | None, dtype: DTypeLike | None = None) -> jax.Array:
    """`jnp.einsum` at `precision` whose result has the computed layout of `axes`, and `dtype` (None: that of x)."""
    full, layout = precision(x.dtype), _layout(axes)
    return jnp.einsum(formula, x, y, precision=full, preferred_element_type=dtype, out_sharding=layout)


def reshape(x: jax.Array, shape: tuple[int, ...], *axes: str | None) -> jax.Array:
    """`jnp.reshape` whose result has the computed layout of `axes`."""
    return jnp.reshape(x, shape, out_sharding=_layout(axes))


def stored_reshape(x: jax.Array, shape: tuple[int, ...], axes: tuple[str, ...]) -> jax.Array:
    """`jnp.reshape` of a parameter or its gradient, in the stored layout, to the stored layout of `axes`."""
    return jnp.reshape(x, shape, out_sharding=stored(axes) if on_mesh() else None)


def automatic(function: Callable[..., Tree], like: Tree, *arguments: object) -> Tree:
    """`function(*arguments)` with the layouts inside left to the compiler; the result has the layouts of `like`."""
    if not on_mesh():
        return function(*arguments)
    layouts = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, like)
    result: Tree = jax.sharding.auto_axes(function, out_sharding=layouts)(*arguments)
    return result


def iota(shape: tuple[int, ...], *axes: str | None) -> jax.Array:
    """int32 indices along the last dim of `shape`, in the computed layout of `axes`."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1, out_sharding=_layout(axes))


def take(table: jax.Array, ids: jax.Array, *axes: str | None) -> jax.Array:
    """Rows of `table` for `ids`, in the computed layout of `axes`.

    A row's gradient is a sum over all that read it, in the dtype of the table: cast what is taken, never the table.
    """
    return table.at[ids].get(out_sharding=_layout(axes))


def mesh_axes(axis: str) -> tuple[str, ...]:
    """The mesh axes that split a computed value's logical axis; () off a mesh."""
    names = TABLE[axis][1] or ()
    return ((names,) if isinstance(names, str) else names) if on_mesh() else ()


def ways(axis: str) -> int:
    """Into how many parts a computed value's logical axis is split."""
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    return math.prod(sizes[name] for name in mesh_axes(axis))


def device() -> jax.Device | jax.sharding.AbstractDevice:
    """What the program that is traced will run on: `platform` (cpu, gpu or tpu) and `device_kind`."""
    return jax.sharding.get_abstract_mesh().abstract_device or jax.local_devices()[0]


def platform() -> str:
    """cpu, gpu or tpu: what the program that is traced will run on."""
    return device().platform


def on_each_device(function: Callable[..., Tree], inputs: tuple, outputs: PartitionSpec | tuple) -> Callable[..., Tree]:
    """`function` of whole arrays, run by every device on its part of them (`jax.shard_map`); off a mesh, `function`.

    `inputs` and `outputs` are the layouts of arguments and results. Inside, arrays are local: `collectives.py` has what
    reaches the other devices.
    """
    if not on_mesh():
        return function

    def laid_out_first(*arguments: object) -> Tree:
        placed = jax.tree.map(jax.sharding.reshard, arguments, inputs)
        return jax.shard_map(function, in_specs=inputs, out_specs=outputs, check_vma=False)(*placed)

    return laid_out_first


def laid_out(shapes: Tree) -> Tree:
    """Abstract arrays (of `jax.eval_shape`) with their layouts on the devices of the mesh that is set."""
    mesh = jax.sharding.get_mesh()

    def one(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = x.sharding.spec if x.sharding else PartitionSpec()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    result: Tree = jax.tree.map(one, shapes)
    return result
