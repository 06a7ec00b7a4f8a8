"""Parallelism is this table: which mesh axis splits each logical axis of a stored parameter and of a computed value.

Model code names logical axes only, through `constrain`, `einsum` and `reshape`. The mesh has Explicit axes: the layout of
every array is part of its type, so that a layout nobody asked for is an error while tracing instead of a slow program.
"""

import functools
import math
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

Tree = TypeVar("Tree")  # of arrays
Names = str | tuple[str, ...] | None  # of mesh axes, the outermost first
AXES = ("data", "fsdp", "expert", "context", "tensor")
APART: ContextVar[tuple[str, ...]] = ContextVar("mesh axes that split nothing in what is traced now", default=())

#   logical axis   a stored parameter   a computed value (also a parameter gathered for use)
TABLE: dict[str, tuple[Names, Names]] = {
    "batch": (None, ("data", "fsdp", "expert")),
    "length": (None, "context"),
    "tokens": (None, ("data", "fsdp", "expert", "context")),  # batch and length as one dim
    "model": (("fsdp", "expert", "context"), None),
    "stream": (None, ("context", "tensor")),  # the length of the stream between products (arXiv:2205.05198)
    "heads": ("tensor", "tensor"),
    "kv_heads": ("tensor", "tensor"),
    "head_dim": (None, None),
    "mlp": ("tensor", "tensor"),
    "rank": (None, None),  # of an adapter, which is small
    "experts": ("expert", "expert"),
    "choices": (None, None),  # what a router may choose
    "vocab": ("tensor", "tensor"),
    "features": (None, None),  # what a product gives to every device of a tensor group: gates, labels
    "positions": (None, None),
    "segments": (None, None),  # of an encoder: the first and the second text
    "buckets": (None, None),  # of relative positions
    "layers": (None, None),
}


def stored(axes: tuple[str, ...], mesh: jax.sharding.Mesh | None = None) -> PartitionSpec:
    """Where a parameter with these logical axes lives between steps; `mesh`: None = the one that is set."""
    return _layout_of([TABLE[axis][0] for axis in axes], mesh)


def computed(axes: tuple[str | None, ...], mesh: jax.sharding.Mesh | None = None) -> PartitionSpec:
    """How a value with these logical axes (None: not split) is laid out while it is computed with; `mesh` as of `stored`."""
    return _layout_of([TABLE[axis][1] if axis else None for axis in axes], mesh)


def _layout_of(dims: Sequence[Names], mesh: jax.sharding.Mesh | None) -> PartitionSpec:
    """A mesh axis splits the first dim that names it, and none where it has one device (off a mesh all are named)."""
    sizes = dict((jax.sharding.get_abstract_mesh() if mesh is None else mesh).shape)
    free = [name for name, size in sizes.items() if size > 1 and name not in APART.get()] if sizes else list(AXES)
    parts: list[Names] = []
    for names in dims:
        found = tuple(name for name in names_of(names) if name in free)
        free = [name for name in free if name not in found]
        parts.append(found[0] if len(found) == 1 else found or None)
    return PartitionSpec(*parts)


def attention_layouts() -> tuple[list[PartitionSpec], PartitionSpec]:
    """Shardings of (queries, keys, values), and of arrays [B, T]."""
    layouts = [computed(("batch", "length", heads, None)) for heads in ("heads", "kv_heads", "kv_heads")]
    return layouts, computed(("batch", "length"))


def on_mesh() -> bool:
    """Whether a mesh is set (`jax.set_mesh`); without one there are no layouts."""
    return not jax.sharding.get_abstract_mesh().empty


def on_a_device() -> bool:
    """Whether this is inside a function of `on_each_device`, where arrays are a device's own and have no layouts."""
    return bool(jax.sharding.get_abstract_mesh().are_all_axes_manual)


def _layout(axes: tuple[str | None, ...]) -> PartitionSpec | None:
    return computed(axes) if on_mesh() and not on_a_device() else None


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


def like(x: jax.Array, other: jax.Array) -> jax.Array:
    """`x` in the layout of `other`."""
    return jax.sharding.reshard(x, jax.typeof(other).sharding.spec) if on_mesh() else x


def num_copies() -> int:
    """How many devices have a copy of each part of the parameters: those of `data`."""
    return int(dict(jax.sharding.get_abstract_mesh().shape).get("data", 1))


def by_copy(function: Callable[..., Tree], copied: object, batch: object) -> Tree:
    """`function(copied, batch)` of each copy of the parameters for its part of the batch: results [data, ...], not added up.

    Inside, `data` splits nothing. Where there is one copy: `function` itself, without that first dim.
    """
    if num_copies() == 1:
        return function(copied, batch)

    def of_one(copied: object, batch: object) -> Tree:
        before = APART.set(("data",))  # until the gradients are traced too
        try:
            result: Tree = jax.tree.map(lambda x: x[None], function(copied, batch))
        finally:
            APART.reset(before)
        return result

    split = PartitionSpec("data")
    on_parts = jax.shard_map(
        of_one, in_specs=(PartitionSpec(), split), out_specs=split, axis_names={"data"}, check_vma=False
    )
    result: Tree = on_parts(copied, batch)
    return result


def over_copies(x: jax.Array) -> jax.Array:
    """The sum over the first dim of a result of `by_copy`, laid out as `spread` would: a device has the part that it updates."""
    if num_copies() == 1:
        return x
    layout = jax.typeof(x).sharding.spec
    dim, wanted = _with_data(x.shape[1:], layout[1:])

    scatter = functools.partial(jax.lax.psum_scatter, scatter_dimension=dim, tiled=True)
    total = lambda x: (jax.lax.psum if dim is None else scatter)(x[0], "data")
    result: jax.Array = on_each_device(total, (layout,), wanted)(x)
    return result


def spread(x: jax.Array) -> jax.Array:
    """`x` split over `data` too, along the first dim that divides, instead of once on each of its devices."""
    layout = jax.typeof(x).sharding.spec
    if num_copies() == 1 or any("data" in names_of(part) for part in layout):
        return x
    result: jax.Array = jax.sharding.reshard(x, _with_data(x.shape, layout)[1])
    return result


def _with_data(shape: tuple[int, ...], layout: Sequence[Names]) -> tuple[int | None, PartitionSpec]:
    """(the first dim that `data` divides as well, the layout where it does)."""
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    for dim, size in enumerate(shape):
        names = (*names_of(layout[dim]), "data")
        if size % math.prod(sizes[name] for name in names) == 0:
            return dim, PartitionSpec(*layout[:dim], names if len(names) > 1 else "data", *layout[dim + 1 :])
    return None, PartitionSpec(*layout)


def mesh_axes(axis: str) -> tuple[str, ...]:
    """The mesh axes that split a computed value's logical axis; () off a mesh."""
    return names_of(computed((axis,))[0]) if on_mesh() else ()


def names_of(part: Names) -> tuple[str, ...]:
    """The mesh axes of one dim of a layout."""
    return (part,) if isinstance(part, str) else part or ()


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
