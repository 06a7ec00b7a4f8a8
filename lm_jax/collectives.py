"""What a device asks of the others inside `sharding.on_each_device`, by the logical axis that is split; nothing off a mesh."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lm_jax.sharding import computed, mesh_axes, names_of, on_mesh, stored


def sum_over(x: jax.Array, axis: str) -> jax.Array:
    """The sum of every device's `x` over the parts of a logical axis."""
    names = mesh_axes(axis)
    return jax.lax.psum(x, names) if names else x


def max_over(x: jax.Array, axis: str) -> jax.Array:
    """The elementwise maximum of every device's `x` over the parts of a logical axis."""
    names = mesh_axes(axis)
    return jax.lax.pmax(x, names) if names else x


def joined(x: jax.Array, axis: str, dim: int = 0) -> jax.Array:
    """Every device's `x`, put together along `dim` in the order of the parts of a logical axis."""
    names = mesh_axes(axis)
    return jax.lax.all_gather(x, names, axis=dim, tiled=True) if names else x


def part_index(axis: str) -> jax.Array | int:
    """Which part of a logical axis this device holds."""
    names = mesh_axes(axis)
    return jax.lax.axis_index(names) if names else 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def from_all(x: jax.Array, axis: str, dtype: DTypeLike) -> jax.Array:
    """`joined` of float32, sent in `dtype`; its gradient is a sum in float32, `to_owners`."""
    return joined(x.astype(dtype), axis).astype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def to_owners(x: jax.Array, axis: str, dtype: DTypeLike) -> jax.Array:
    """The transpose of `from_all`: a device's part of the sum of every device's `x`, float32; its gradient is sent in `dtype`."""
    names = mesh_axes(axis)
    return jax.lax.psum_scatter(x, names, tiled=True) if names else x


from_all.defvjp(lambda x, *how: (from_all(x, *how), None), lambda axis, dtype, _, of_x: (to_owners(of_x, axis, dtype),))
to_owners.defvjp(
    lambda x, *how: (to_owners(x, *how), None), lambda axis, dtype, _, of_x: (from_all(of_x, axis, dtype),)
)


def gathered(parameter: jax.Array, *axes: str) -> jax.Array:
    """A device's stored part of a parameter -> the part that it computes with."""
    for dim, names in _scattered_dims(axes):
        parameter = jax.lax.all_gather(parameter, names, axis=dim, tiled=True)
    return parameter


def scattered(gradient: jax.Array, *axes: str) -> jax.Array:
    """The transpose of `gathered`: a device's gradient -> its stored part of the sum over all tokens."""
    rest = mesh_axes("tokens")
    for dim, names in _scattered_dims(axes):
        gradient = jax.lax.psum_scatter(gradient, names, scatter_dimension=dim, tiled=True)
        rest = tuple(name for name in rest if name not in names)
    return jax.lax.psum(gradient, rest) if rest else gradient


def _scattered_dims(axes: tuple[str, ...]) -> list[tuple[int, tuple[str, ...]]]:
    """(dim, mesh axes) of the dims that are split only while a parameter is stored."""
    both = zip(stored(axes), computed(axes), strict=True) if on_mesh() else ()
    return [(dim, names_of(kept)) for dim, (kept, used) in enumerate(both) if kept and kept != used]
