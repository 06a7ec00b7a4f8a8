"""Devices -> mesh, also over slices; what does not divide over it is refused before anything compiles; parameter table.

A mesh has the axes `data`, `fsdp` and `tensor` of `lm_jax/sharding.py`, which maps the names that models use to them.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding

from lm_jax.config import Config
from lm_jax.config import Mesh as MeshConfig
from lm_jax.errors import UserError
from lm_jax.model_config import RECURRENT
from lm_jax.sharding import AXES, stored

CAPABILITIES: dict[str, float] = {}  # of each kind of device that a mesh was made of: tracing knows the kind alone


def mesh_shape(config: MeshConfig, num_devices: int) -> dict[str, int]:
    """Sizes of the mesh axes, with -1 filled in.

    Raises UserError where they do not multiply to the devices, or where `data` does not divide into the slices.
    """
    sizes = {axis: getattr(config, axis) for axis in AXES}
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
    CAPABILITIES[devices[0].device_kind] = capability_of(devices[0])
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


def capability_of(device: jax.Device) -> float:
    """The compute capability of an NVIDIA GPU, such as 9.0; 0 of any other device (AMD's is a name)."""
    found = str(getattr(device, "compute_capability", ""))
    return float(found) if re.fullmatch(r"\d+\.\d+", found) else 0.0


def capability() -> float:
    """The `capability_of` the devices that the program which is traced will run on, here or not."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return CAPABILITIES.get(device.device_kind, 0.0) if device else capability_of(jax.local_devices()[0])


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


def batch_shards(sizes: dict[str, int]) -> int:
    """How many ways a batch is split."""
    return sizes["data"] * sizes["fsdp"]


def preflight(config: Config, padded_vocab_size: int, sizes: dict[str, int]) -> None:
    """Raises UserError, before anything compiles, where a dim does not divide over the mesh."""
    model, rows = config.model, config.train.microbatch_rows
    first = "data.batch_ramp[0]" if config.data.batch_ramp[0] else "data.global_batch_size"  # the smallest batch
    smallest = config.data.batch_ramp[0] or config.data.global_batch_size
    blocks = 1 if model.kind in RECURRENT else sizes["tensor"]  # recurrent cells are not split over `tensor`
    checks = [
        ("model.num_heads", model.num_heads, "tensor", blocks),
        ("model.num_kv_heads", model.num_kv_heads, "tensor", blocks),
        ("model.mlp_dim", model.mlp_dim, "tensor", blocks),
        ("the padded vocabulary", padded_vocab_size, "tensor", sizes["tensor"]),
        ("model.model_dim", model.model_dim, "fsdp", sizes["fsdp"]),
        ("model.model_dim", model.model_dim, "tensor", 1 if model.remat == "none" else blocks),
        (first, smallest, "data x fsdp", batch_shards(sizes)),
        ("train.microbatch_rows", smallest if rows == "auto" else int(rows), "data x fsdp", batch_shards(sizes)),
    ]
    for name, size, axis, shards in checks:
        if size % shards:
            above, fitting = _nearest_fitting(size, shards)
            raise UserError(
                f"{'config.' * ('.' in name)}{name} = {size} does not divide over mesh axis {axis} = {shards}\n"
                f"the nearest size that does is {above}; or the nearest {axis} that does is {fitting}"
            )


def legal_meshes(config: Config, padded_vocab_size: int, num_devices: int) -> Iterator[dict[str, int]]:
    """Every split of the devices into (data, fsdp, tensor) that `preflight` accepts."""
    for data in (n for n in range(num_devices, 0, -1) if num_devices % n == 0):
        for fsdp in (n for n in range(num_devices // data, 0, -1) if num_devices // data % n == 0):
            sizes = dict(zip(AXES, (data, fsdp, num_devices // data // fsdp), strict=True))
            try:
                preflight(config, padded_vocab_size, sizes)
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
