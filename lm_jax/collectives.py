"""What a device asks of the others inside `sharding.on_each_device`, by the logical axis that is split; nothing off a mesh."""

import jax

from lm_jax.sharding import TABLE, mesh_axes, on_mesh


def sum_over(x: jax.Array, axis: str) -> jax.Array:
    """The sum of every device's `x` over the parts of a logical axis."""
    names = mesh_axes(axis)
    return jax.lax.psum(x, names) if names else x


def max_over(x: jax.Array, axis: str) -> jax.Array:
    """The elementwise maximum of every device's `x` over the parts of a logical axis."""
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
    """The transpose of `gathered`: a device's gradient -> its stored part of the sum over the whole batch."""
    rest = set(mesh_axes("batch"))
    for dim, name in _scattered_dims(axes):
        gradient = jax.lax.psum_scatter(gradient, name, scatter_dimension=dim, tiled=True)
        rest.remove(name)
    return jax.lax.psum(gradient, tuple(rest)) if rest else gradient


def _scattered_dims(axes: tuple[str, ...]) -> list[tuple[int, str]]:
    """(dim, mesh axis) of the dims that are split only while a parameter is stored."""
    split = [(dim, TABLE[axis][0]) for dim, axis in enumerate(axes) if TABLE[axis][0] != TABLE[axis][1]]
    return [(dim, name) for dim, name in split if name] if on_mesh() else []
