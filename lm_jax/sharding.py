"""Parallelism is this table: which mesh axis splits each logical axis of a stored parameter and of a computed value.

Model code names logical axes only, through `constrain`, `einsum` and `reshape`. The mesh has Explicit axes: the sharding of
every array is part of its type, so that a layout nobody asked for is an error while tracing, not a slow program.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lm_jax.config import Config
from lm_jax.config import Mesh as MeshConfig
from lm_jax.errors import UserError
from lm_jax.model_config import RECURRENT

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


def _on_mesh() -> bool:
    return not jax.sharding.get_abstract_mesh().empty


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x` in the computed layout of its logical axes; for a parameter this is the gather of its fsdp shards."""
    return jax.sharding.reshard(x, computed(axes)) if _on_mesh() else x


def precision(dtype) -> jax.lax.Precision | None:
    """Of a product of arrays of this dtype: float32 is float32 on every platform (by default a TPU rounds it to bfloat16, a GPU
    to TF32), what is narrower has one way to be multiplied."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def einsum(formula: str, x: jax.Array, y: jax.Array, *axes: str | None, dtype=None) -> jax.Array:
    """`jnp.einsum` at `precision` whose result has the computed layout of `axes`, and `dtype` (None: that of x)."""
    layout = computed(axes) if _on_mesh() else None
    full = precision(x.dtype)
    return jnp.einsum(formula, x, y, precision=full, preferred_element_type=dtype, out_sharding=layout)


def reshape(x: jax.Array, shape: tuple[int, ...], *axes: str | None) -> jax.Array:
    """`jnp.reshape` whose result has the computed layout of `axes`."""
    return jnp.reshape(x, shape, out_sharding=computed(axes) if _on_mesh() else None)


def stored_reshape(x: jax.Array, shape: tuple[int, ...], axes: tuple[str, ...]) -> jax.Array:
    """`jnp.reshape` of something that lies as a parameter does, to the stored layout of `axes`."""
    return jnp.reshape(x, shape, out_sharding=stored(axes) if _on_mesh() else None)


def automatic(function, like, *arguments):
    """`function(*arguments)` with the layouts inside left to the compiler; the result lies as `like` does."""
    if not _on_mesh():
        return function(*arguments)
    layouts = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, like)
    return jax.sharding.auto_axes(function, out_sharding=layouts)(*arguments)


def iota(shape: tuple[int, ...], *axes: str | None) -> jax.Array:
    """int32 indices along the last dim of `shape`, in the computed layout of `axes`."""
    layout = computed(axes) if _on_mesh() else None
    return jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1, out_sharding=layout)


def take(table: jax.Array, ids: jax.Array, *axes: str | None) -> jax.Array:
    """Rows of `table` for `ids`, in the computed layout of `axes`.

    A row's gradient is a sum over all that read it, in the dtype of the table: cast what is taken, never the table.
    """
    return table.at[ids].get(out_sharding=computed(axes) if _on_mesh() else None)


def mesh_axes(axis: str) -> tuple[str, ...]:
    """The mesh axes that split a computed value's logical axis; () off a mesh."""
    names = TABLE[axis][1] or ()
    return ((names,) if isinstance(names, str) else names) if _on_mesh() else ()


def ways(axis: str) -> int:
    """Into how many parts a computed value's logical axis is split."""
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    return math.prod(sizes[name] for name in mesh_axes(axis))


def platform() -> str:
    """cpu, gpu or tpu: what the program that is traced will run on."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def on_each_device(function: Callable, inputs: tuple, outputs) -> Callable:
    """`function` of whole arrays whose body is run by every device on its own part of them (off a mesh: as it is).

    The body sees plain arrays and speaks to other devices by the functions below.
    """
    if not _on_mesh():
        return function

    def laid_out_first(*arguments):
        placed = jax.tree.map(jax.sharding.reshard, arguments, inputs)
        return jax.shard_map(function, in_specs=inputs, out_specs=outputs, check_vma=False)(*placed)

    return laid_out_first


def sum_over(x: jax.Array, axis: str) -> jax.Array:
    """The sum of every device's `x` over the parts of a logical axis."""
    names = mesh_axes(axis)
    return jax.lax.psum(x, names) if names else x


def max_over(x: jax.Array, axis: str) -> jax.Array:
    names = mesh_axes(axis)
    return jax.lax.pmax(x, names) if names else x


def part_index(axis: str) -> jax.Array | int:
    """Which part of a logical axis this device holds."""
    names = mesh_axes(axis)
    return jax.lax.axis_index(names) if names else 0


def gathered(parameter: jax.Array, *axes: str) -> jax.Array:
    """A device's stored part of a parameter -> the part that it computes with."""
    for dim, name in _scattered_dims(axes):
        parameter = jax.lax.all_gather(parameter, name, axis=dim, tiled=True)
    return parameter


def scattered(gradient: jax.Array, *axes: str) -> jax.Array:
    """The way back: a device's gradient of what `gathered` gave -> its stored part of the sum over the whole batch."""
    rest = set(mesh_axes("batch"))
    for dim, name in _scattered_dims(axes):
        gradient = jax.lax.psum_scatter(gradient, name, scatter_dimension=dim, tiled=True)
        rest.remove(name)
    return jax.lax.psum(gradient, tuple(rest)) if rest else gradient


def _scattered_dims(axes: tuple[str, ...]) -> list[tuple[int, str]]:
    """(dim, mesh axis) of the dims that are split only while a parameter is stored."""
    split = [(dim, TABLE[axis][0]) for dim, axis in enumerate(axes) if TABLE[axis][0] != TABLE[axis][1]]
    return [(dim, name) for dim, name in split if name] if _on_mesh() else []


def laid_out(shapes):
    """Abstract arrays (of `jax.eval_shape`) with their layouts on the devices of the mesh that is set."""
    mesh = jax.sharding.get_mesh()

    def one(x):
        spec = x.sharding.spec if x.sharding else PartitionSpec()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(one, shapes)


def mesh_shape(config: MeshConfig, num_devices: int) -> dict[str, int]:
    """Sizes of the mesh axes with -1 filled in. Raises UserError where they do not multiply to the devices, or slices do not
    split `data`."""
    sizes = {axis: getattr(config, axis) for axis in AXES}
    known = math.prod(size for size in sizes.values() if size > 0)
    if -1 in sizes.values():
        if num_devices % known:
            raise _device_error(sizes, known, num_devices, f"leaves no whole rest of {num_devices} devices")
        sizes = {axis: num_devices // known if size == -1 else size for axis, size in sizes.items()}
    elif known > num_devices:
        raise _device_error(sizes, known, num_devices, f"is {known} devices, here are {num_devices}")
    if sizes["data"] % (slices := max(1, config.slices)):
        above = math.ceil(sizes["data"] / slices) * slices
        fitting = max(n for n in range(1, slices + 1) if sizes["data"] % n == 0)
        raise UserError(
            f"config.mesh.slices = {slices} does not divide mesh axis data = {sizes['data']}: slices split it, and no other\n"
            f"the nearest data that does is {above}; or the nearest slices that do are {fitting}"
        )
    return sizes


def _device_error(sizes: dict[str, int], known: int, num_devices: int, problem: str) -> UserError:
    near = max(n for n in range(1, num_devices + 1) if num_devices % n == 0 and n <= max(known, 1))
    return UserError(
        f"config.mesh {'x'.join(map(str, sizes.values()))} ({', '.join(sizes)}) {problem}\n"
        f"the nearest product that fits is {near}; -1 takes the rest\n"
        f"to try {known} devices on a CPU: JAX_NUM_CPU_DEVICES={known} python -m lm_jax.main ..."
    )


def make_mesh(config: MeshConfig, devices=None) -> jax.sharding.Mesh:
    """The mesh of these devices. Slices split `data` before anything else does: its collectives alone cross from one to
    another. Raises UserError where the devices are not so many slices."""
    devices = devices or jax.devices()
    slices = by_slice(devices, config.slices)
    sizes = mesh_shape(dataclasses.replace(config, slices=len(slices)), len(devices))
    inside = tuple((sizes | {"data": sizes["data"] // len(slices)}).values())
    if min(map(len, slices)) < (each := math.prod(inside)):
        raise UserError(
            f"config.mesh takes {each} devices of each slice, and the slices have {', '.join(map(str, map(len, slices)))}"
        )
    explicit = (AxisType.Explicit,) * len(AXES)
    parts = [jax.make_mesh(inside, AXES, explicit, devices=part[:each]).devices for part in slices]
    return jax.sharding.Mesh(np.concatenate(parts, AXES.index("data")), AXES, explicit)


def by_slice(devices: list, asked: int) -> list[list]:
    """The devices by the slice that they say they are of; equal parts of them, in order, where they pretend (a CPU).

    Raises UserError where `asked`, which is -1 or a number of slices, is another number.
    """
    found: dict[int, list] = {}
    for device in devices:
        found.setdefault(getattr(device, "slice_index", 0), []).append(device)
    if len(found) == 1 and devices[0].platform == "cpu" and asked > 1:
        each = len(devices) // asked
        return [devices[i * each : (i + 1) * each] for i in range(asked)]
    if asked not in (-1, len(found)):
        raise UserError(
            f"config.mesh.slices = {asked}: these {len(devices)} devices are {len(found)} slice{'s' * (len(found) > 1)}\n"
            f"say --config.mesh.slices={len(found)}"
        )
    return [found[index] for index in sorted(found)]


def batch_shards(sizes: dict[str, int]) -> int:
    """How many ways a batch is split."""
    return sizes["data"] * sizes["fsdp"]


def preflight(config: Config, vocab_size: int, sizes: dict[str, int]) -> None:
    """Raises UserError, before anything compiles, where a dim does not divide over the mesh."""
    model, data = config.model, config.data
    smallest = data.batch_ramp[0] or data.global_batch_size
    rows, recurrent = config.train.microbatch_rows, model.kind in RECURRENT
    checks = [
        ("model.num_heads", model.num_heads, "tensor", 1 if recurrent else sizes["tensor"]),
        ("model.num_kv_heads", model.num_kv_heads, "tensor", 1 if recurrent else sizes["tensor"]),
        ("model.mlp_dim", model.mlp_dim, "tensor", 1 if recurrent else sizes["tensor"]),
        ("the padded vocabulary", vocab_size, "tensor", sizes["tensor"]),
        ("model.model_dim", model.model_dim, "fsdp", sizes["fsdp"]),
        ("model.model_dim", model.model_dim, "tensor", 1 if model.remat == "none" or recurrent else sizes["tensor"]),
        (
            "data.batch_ramp[0]" if data.batch_ramp[0] else "data.global_batch_size",
            smallest,
            "data x fsdp",
            batch_shards(sizes),
        ),
        ("train.microbatch_rows", smallest if rows == "auto" else int(rows), "data x fsdp", batch_shards(sizes)),
    ]
    for name, size, axis, shards in checks:
        if size % shards:
            above = math.ceil(size / shards) * shards
            fitting = max(n for n in range(1, shards + 1) if size % n == 0)
            raise UserError(
                f"{'config.' * ('.' in name)}{name} = {size} does not divide over mesh axis {axis} = {shards}\n"
                f"the nearest size that does is {above}; or the nearest {axis} that does is {fitting}"
            )


def legal_meshes(config: Config, vocab_size: int, num_devices: int) -> Iterator[dict[str, int]]:
    """Every split of the devices into (data, fsdp, tensor) that `preflight` accepts."""
    for data in (n for n in range(num_devices, 0, -1) if num_devices % n == 0):
        for fsdp in (n for n in range(num_devices // data, 0, -1) if num_devices // data % n == 0):
            sizes = dict(zip(AXES, (data, fsdp, num_devices // data // fsdp), strict=True))
            try:
                preflight(config, vocab_size, sizes)
            except UserError:
                continue
            yield sizes


def parameter_table(declarations: dict, mesh: jax.sharding.Mesh) -> str:
    """One line a parameter: path, shape, logical axes, mesh axes, bytes per device."""
    rows = [("parameter", "shape", "logical axes", "mesh axes", "KiB per device")]
    for path, declared in declarations.items():
        layout = NamedSharding(mesh, stored(declared.axes))
        size = math.prod(layout.shard_shape(declared.shape)) * jnp.dtype(declared.dtype).itemsize
        spec = ", ".join(axis or "-" for axis in layout.spec)
        shape, axes = " x ".join(map(str, declared.shape)), ", ".join(declared.axes)
        rows.append(("/".join(path), shape, axes, spec, f"{size / 1024:,.1f}"))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
