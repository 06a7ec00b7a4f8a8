"""Devices -> mesh, also over slices; what does not divide over it is refused before anything compiles; parameter table.

A mesh has the axes of `lm_jax/sharding.py`, which maps the names that models use to them.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding

from lm_jax.config import Config
from lm_jax.config import Mesh as MeshConfig
from lm_jax.errors import UserError
from lm_jax.model_config import ONE_STACK, RECURRENT
from lm_jax.sharding import AXES, names_of, stored


def mesh_shape(config: MeshConfig, num_devices: int) -> dict[str, int]:
    """Sizes of the mesh axes, with -1 filled in; an "auto" that is not decided (lm_jax/decide.py) is 1.

    Raises UserError where they do not multiply to the devices, or where `data` does not divide into the slices.
    """
    sizes = {axis: 1 if (size := getattr(config, axis)) == "auto" else size for axis in AXES}
    known = math.prod(size for size in sizes.values() if size > 0)
    if -1 in sizes.values():
        if num_devices % known:
            raise _device_error(sizes, known, num_devices, f"leaves no whole rest of {num_devices} devices")
        sizes = {axis: num_devices // known if size == -1 else size for axis, size in sizes.items()}
    elif known > num_devices:
        raise _device_error(sizes, known, num_devices, f"is {known} devices, here are {num_devices}")
    if sizes["data"] % (slices := max(1, config.slices)):
        above, fitting = _nearest_fitting(sizes["data"], slices)
        raise UserError(
            f"config.mesh.slices = {slices} does not divide mesh axis data = {sizes['data']}: slices split it, and no other\n"
            f"the nearest data that does is {above}; or the nearest slices that do are {fitting}"
        )
    return sizes


def _nearest_fitting(size: int, shards: int) -> tuple[int, int]:
    """(the next size that `shards` divides, the largest number up to `shards` that divides `size`)."""
    return math.ceil(size / shards) * shards, max(n for n in range(1, shards + 1) if size % n == 0)


def _device_error(sizes: dict[str, int], known: int, num_devices: int, problem: str) -> UserError:
    near = max(n for n in range(1, num_devices + 1) if num_devices % n == 0 and n <= max(known, 1))
    return UserError(
        f"config.mesh {'x'.join(map(str, sizes.values()))} ({', '.join(sizes)}) {problem}\n"
        f"the nearest product that fits is {near}; -1 takes the rest\n"
        f"to try {known} devices on a CPU: JAX_NUM_CPU_DEVICES={known} python -m lm_jax.main ..."
    )


def make_mesh(config: MeshConfig, devices=None) -> jax.sharding.Mesh:
    """The mesh of these devices (None: of all that there are).

    Slices are the outermost part of `data`, so that only its collectives cross from one slice to another. Raises
    UserError where the devices are not so many slices, or a slice has too few of them.
    """
    devices = devices or jax.devices()
    slices = by_slice(devices, config.slices)
    sizes = mesh_shape(dataclasses.replace(config, slices=len(slices)), len(devices))
    inside = tuple((sizes | {"data": sizes["data"] // len(slices)}).values())
    if min(map(len, slices)) < (each := math.prod(inside)):
        raise UserError(
            f"config.mesh takes {each} devices of each slice, and the slices have {', '.join(map(str, map(len, slices)))}"
        )
    # Two mesh axes may share a side of a torus: 8 x 8 chips of a cube of 4 x 4 x 4.
    arranged = functools.partial(mesh_utils.create_device_mesh, inside, allow_split_physical_axes=True)
    parts = [arranged(part[:each]) for part in slices]
    return jax.sharding.Mesh(np.concatenate(parts, AXES.index("data")), AXES, (AxisType.Explicit,) * len(AXES))


def by_slice(devices: list, asked: int) -> list[list]:
    """The devices, grouped by their `slice_index`; CPU devices, which have none, in `asked` equal groups.

    Raises UserError where there are not `asked` slices (-1: as many as there are).
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


def with_whole_rows(mesh: jax.sharding.Mesh) -> jax.sharding.Mesh:
    """The devices of a mesh, those of `context` as a part of `fsdp`: parameters stay where they are."""
    data, fsdp, expert, context, tensor = mesh.devices.shape
    devices = mesh.devices.swapaxes(2, 3).reshape(data, fsdp * context, expert, 1, tensor)
    return jax.sharding.Mesh(devices, AXES, mesh.axis_types)


def batch_shards(sizes: dict[str, int]) -> int:
    """How many ways a batch is split."""
    return sizes["data"] * sizes["fsdp"] * sizes["expert"]


def _product(sizes: dict[str, int], *axes: str) -> tuple[str, int]:
    """(what a message calls these mesh axes, how many devices they are)."""
    said = [axis for axis in axes if axis not in ("expert", "context") or sizes[axis] > 1]
    return " x ".join(said), math.prod(sizes[axis] for axis in axes)


def preflight(config: Config, padded_vocab_size: int, sizes: dict[str, int]) -> None:
    """Raises UserError, before anything compiles, where a dim does not divide over the mesh."""
    model, rows = config.model, config.train.microbatch_rows
    first = "data.batch_ramp[0]" if config.data.batch_ramp[0] else "data.global_batch_size"  # the smallest batch
    smallest = config.data.batch_ramp[0] or config.data.global_batch_size
    batch, context = _product(sizes, "data", "fsdp", "expert"), sizes["context"]
    blocks = 1 if model.kind in RECURRENT else sizes["tensor"]  # recurrent cells are not split over `tensor`
    checks = [
        ("model.num_heads", model.num_heads, "tensor", blocks),
        ("model.num_kv_heads", model.num_kv_heads, "tensor", blocks),
        ("model.mlp_dim", model.mlp_dim, "tensor", blocks),
        ("the padded vocabulary", padded_vocab_size, "tensor", sizes["tensor"]),
        ("model.num_experts", model.num_experts, "expert", sizes["expert"]),
        ("model.model_dim", model.model_dim, *_product(sizes, "fsdp", "expert", "context")),
        ("data.sequence_length", config.data.sequence_length, "2 x context", 2 * context if context > 1 else 1),
        (first, smallest, *batch),
        ("train.microbatch_rows", smallest if rows == "auto" else int(rows), *batch),
    ]
    if sizes["expert"] > 1 and not model.num_experts:
        raise UserError(
            f"config.mesh.expert = {sizes['expert']}: the model has no experts (model.num_experts = 0)\n"
            "to split its parameters say mesh.fsdp or mesh.tensor, copies of them mesh.data"
        )
    if context > 1 and model.kind not in ONE_STACK["model.kind"]:
        raise UserError(
            f"config.mesh.context = {context}: a model of the kind {model.kind} needs whole rows; say --config.mesh.context=1\n"
            "mesh.data and mesh.fsdp split the rows of a batch"
        )
    for name, size, axis, shards in checks:
        if size % shards:
            above, fitting = _nearest_fitting(size, shards)
            raise UserError(
                f"{'config.' * ('.' in name)}{name} = {size} does not divide over mesh axis {axis} = {shards}\n"
                f"the nearest size that does is {above}; or the nearest {axis} that does is {fitting}"
            )


def legal_meshes(config: Config, padded_vocab_size: int, num_devices: int) -> Iterator[dict[str, int]]:
    """Every split of the devices over the mesh axes that `preflight` accepts."""
    for split in _splits(num_devices, len(AXES)):
        sizes = dict(zip(AXES, split, strict=True))
        try:
            preflight(config, padded_vocab_size, sizes)
        except UserError:
            continue
        yield sizes


def _splits(num_devices: int, num_axes: int) -> Iterator[tuple[int, ...]]:
    """Every tuple of so many sizes whose product is the number of devices, the largest sizes first."""
    if num_axes == 1:
        yield (num_devices,)
        return
    for size in (n for n in range(num_devices, 0, -1) if num_devices % n == 0):
        yield from ((size, *rest) for rest in _splits(num_devices // size, num_axes - 1))


def parameter_table(declarations: dict, mesh: jax.sharding.Mesh) -> str:
    """One line a parameter: path, shape, logical axes, mesh axes, bytes per device."""
    rows = [("parameter", "shape", "logical axes", "mesh axes", "KiB per device")]
    for path, declared in declarations.items():
        layout = NamedSharding(mesh, stored(declared.axes, mesh))
        size = math.prod(layout.shard_shape(declared.shape)) * jnp.dtype(declared.dtype).itemsize
        spec = ", ".join(" x ".join(names_of(part)) or "-" for part in layout.spec)
        shape, axes = " x ".join(map(str, declared.shape)), ", ".join(declared.axes)
        rows.append(("/".join(path), shape, axes, spec, f"{size / 1024:,.1f}"))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
