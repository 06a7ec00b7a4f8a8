"""Experts over devices: each computes its own experts, for the tokens of all devices of its group. No token is left out.

A group is the devices that split the experts. The tokens of all of it come to each device, which sorts what is routed to its
own experts to the front; what it makes of them is summed over the group and goes back to where the tokens are. No kernel
leaves its device, and the result is exact whatever the router says.

`jax.lax.ragged_all_to_all` would send a token only where it is routed. A CPU has none, and its buffer has to hold the same worst
case: all tokens of the group on one device. Here only tokens are held for that case, `rows` of them are computed at a time,
and only as many chunks as the router fills: a balanced router costs a device what its own tokens would.

Shape suffixes: B batch, T length, N tokens of the group, D model, F mlp, E experts of a device, C chosen experts of a token,
S sorted rows (a token for one of its experts), R rows of a chunk.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lm_jax.collectives import from_all, joined, part_index, to_owners
from lm_jax.sharding import ways

Mlps = Callable[..., jax.Array]  # (x_RD sorted by expert, sizes_E, *kernels) -> [R, D]
Kernels = tuple[jax.Array, ...]  # [E, D, F] or [E, F, D]


def of_own_experts(
    mlps: Mlps, x_BTD: jax.Array, weights_BTC: jax.Array, chosen_BTC: jax.Array, kernels: Kernels
) -> jax.Array:
    """Inside `on_each_device`: a device's tokens after the experts of its whole group, float32 [B, T, D].

    Sums over experts and devices are in float32, and so are their gradients; tokens and the gradients of results are sent
    in the dtype of `x_BTD`.
    """
    dim, num_chosen, num_own = x_BTD.shape[-1], chosen_BTC.shape[-1], len(kernels[0])
    x_ND = from_all(x_BTD.reshape(-1, dim).astype(jnp.float32), "experts", x_BTD.dtype)
    weights, chosen = (joined(x.reshape(-1), "experts") for x in (weights_BTC, chosen_BTC))  # [N * C]
    own = chosen - part_index("experts") * num_own
    own = jnp.where((own >= 0) & (own < num_own), own, num_own)  # the last: another device's
    # A token chooses an expert once, so that a device has at most min(C, E) rows of it.
    rows, num_chunks = chosen_BTC.size, math.ceil(ways("experts") * min(num_chosen, num_own) / num_chosen)
    order_S = jnp.argsort(own, stable=True)[: num_chunks * rows]
    ends_E = jnp.cumsum(jnp.bincount(own, length=num_own + 1)[:num_own]).astype(jnp.int32)
    x_SD = x_ND[order_S // num_chosen].astype(x_BTD.dtype)
    with jax.named_scope("experts"):  # by which `plan` knows these loops
        y_SD = in_chunks(mlps, rows, x_SD, ends_E, kernels)
    y_SD = y_SD.astype(jnp.float32) * weights[order_S][:, None]
    y_ND = jnp.zeros_like(x_ND).at[order_S // num_chosen].add(y_SD)
    return to_owners(y_ND, "experts", x_BTD.dtype).reshape(x_BTD.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def in_chunks(mlps: Mlps, rows: int, x_SD: jax.Array, ends_E: jax.Array, kernels: Kernels) -> jax.Array:
    """`mlps` of sorted rows, `rows` at a time, [S, D]; expert e has those up to ends_E[e], and those after the last are 0.

    The backward pass computes each chunk again. The gradient of a kernel is a sum over chunks in float32.
    """

    def add(i: jax.Array, y_SD: jax.Array) -> jax.Array:
        return _put(y_SD, _chunk(mlps, _sizes(ends_E, i, rows), _part(x_SD, i, rows), kernels), i)

    return jax.lax.fori_loop(0, _num_filled(ends_E, rows), add, jnp.zeros_like(x_SD))


def _forward(mlps: Mlps, rows: int, x_SD: jax.Array, ends_E: jax.Array, kernels: Kernels) -> tuple:
    return in_chunks(mlps, rows, x_SD, ends_E, kernels), (x_SD, ends_E, kernels)


def _backward(mlps: Mlps, rows: int, saved: tuple, of_y_SD: jax.Array) -> tuple:
    x_SD, ends_E, kernels = saved

    def add(i: jax.Array, sums: tuple) -> tuple:
        chunk = functools.partial(_chunk, mlps, _sizes(ends_E, i, rows))
        of_x_RD, of_kernels = jax.vjp(chunk, _part(x_SD, i, rows), kernels)[1](_part(of_y_SD, i, rows))
        return _put(sums[0], of_x_RD, i), jax.tree.map(jnp.add, sums[1], of_kernels)

    zeros = jnp.zeros_like(x_SD), tuple(jnp.zeros(kernel.shape, jnp.float32) for kernel in kernels)
    of_x_SD, of_kernels = jax.lax.fori_loop(0, _num_filled(ends_E, rows), add, zeros)
    return of_x_SD, None, tuple(x.astype(kernel.dtype) for x, kernel in zip(of_kernels, kernels, strict=True))


in_chunks.defvjp(_forward, _backward)


def _chunk(mlps: Mlps, sizes_E: jax.Array, x_RD: jax.Array, kernels: Kernels) -> jax.Array:
    """`ragged_dot` says nothing of rows behind all groups (a TPU does not write them): they are 0, and so are their gradients."""
    is_own_R1 = (jnp.arange(len(x_RD)) < sizes_E.sum())[:, None]
    return jnp.where(is_own_R1, mlps(jnp.where(is_own_R1, x_RD, 0), sizes_E, *kernels), 0)


def _num_filled(ends_E: jax.Array, rows: int) -> jax.Array:
    return (ends_E[-1] + rows - 1) // rows


def _sizes(ends_E: jax.Array, i: jax.Array, rows: int) -> jax.Array:
    """Rows of each expert in chunk `i`."""
    return jnp.diff(jnp.clip(ends_E - i * rows, 0, rows), prepend=0)


def _part(x_SD: jax.Array, i: jax.Array, rows: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x_SD, i * rows, rows)


def _put(x_SD: jax.Array, part_RD: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x_SD, part_RD, i * len(part_RD), 0)
