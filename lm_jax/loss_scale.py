"""The guard around the optimizer: updates that are not finite are skipped; in float16 the loss is scaled."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

GROW_AFTER = 2000  # finite gradients before the loss scale doubles


def all_finite(tree) -> jax.Array:
    """Whether every number of a tree of arrays is finite: a bool []."""
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.stack([jnp.isfinite(x).all() for x in floats]).all()


class Guarded(NamedTuple):
    """State of `dynamic_loss_scale` and `skip_nonfinite`, always finite."""

    inner: optax.OptState
    scale: jax.Array  # float32 []: what the loss is multiplied by before the next backward pass
    good_steps: jax.Array  # int32 []: updates since the scale last changed
    skipped: jax.Array  # int32 []: updates skipped in all
    in_a_row: jax.Array  # int32 []: updates skipped since the last finite one, at the smallest scale


def skip_nonfinite(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`inner` without the updates that are not finite: the loss scale stays 1."""
    return dynamic_loss_scale(inner, initial=1, largest=1)


def dynamic_loss_scale(
    inner: optax.GradientTransformation, initial: int, largest: int, grow_after: int = GROW_AFTER
) -> optax.GradientTransformationExtraArgs:
    """`inner` on gradients of a loss that was multiplied by `state.scale` (arXiv:1710.03740, section 3.2).

    Where the gradient is not finite, or the parameters or the state of `inner` would not be after the update, the update is
    skipped and counted, and the scale halves, down to 1. After `grow_after` updates in a row it doubles, up to `largest`.
    The scale is a power of two, which changes no bit of a gradient.
    """
    inner = optax.with_extra_args_support(inner)

    def init(parameters):
        zero = lambda: jnp.zeros((), jnp.int32)
        return Guarded(inner.init(parameters), jnp.asarray(initial, jnp.float32), zero(), zero(), zero())

    def update(gradients, state, parameters, **extra):
        if largest > 1:
            gradients = jax.tree.map(lambda gradient: gradient / state.scale, gradients)
        # A trial of the update, which the barrier keeps apart from the real one: chosen in one piece the update would have other
        # last bits, and on a CPU need 0.73 copies of the parameters more (docs/notebook.md). A rule may do less in it, if what
        # it leaves out makes nothing of what is finite that is not.
        trial = jax.lax.optimization_barrier((gradients, state.inner, parameters))
        changes, changed = inner.update(*trial, **extra, trial=True)
        after = optax.apply_updates(trial[2], changes), changed
        finite = jnp.isfinite(optax.tree.norm(gradients)) & all_finite(after)
        changes, changed = inner.update(gradients, state.inner, parameters, **extra)
        # x + -0 is x to the last bit, also where x is -0.
        changes = jax.tree.map(lambda change: jnp.where(finite, change, -0.0), changes)
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), changed, state.inner)
        good_steps = jnp.where(finite, state.good_steps + 1, 0)
        grows = good_steps >= grow_after
        scale = state.scale * jnp.where(finite, jnp.where(grows, 2.0, 1.0), 0.5)
        return changes, Guarded(
            kept,
            jnp.clip(scale, 1.0, float(largest)),
            jnp.where(grows, 0, good_steps),
            state.skipped + jnp.where(finite, 0, 1),
            jnp.where(finite, 0, state.in_a_row + (state.scale <= 1.0)),
        )

    return optax.GradientTransformationExtraArgs(init, update)
