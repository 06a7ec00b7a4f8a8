"""An exponential moving average of the parameters (`optimizer.ema`), which is then the model that is evaluated."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.nnx.traversals import flatten_mapping, unflatten_mapping

from lm_jax.sharding import like


class Average(NamedTuple):
    """State of `average_of_parameters`."""

    num_updates: jax.Array  # int32 []
    average: dict  # like the parameters


def average_of_parameters(decay: float) -> optax.GradientTransformation:
    """Keeps an exponential average of the parameters after the update; the last of a chain. It changes no update.

    The decay of update n = 0, 1, ... is min(decay, (1 + n) / (10 + n)): small at first, so that initial values are forgotten.
    """

    def update(changes, state, parameters):
        count = state.num_updates.astype(jnp.float32)
        share = 1 - jnp.minimum(decay, (1 + count) / (10 + count))
        toward = lambda average, parameter, change: average + share * (parameter + change - average)
        average = jax.tree.map(toward, state.average, parameters, changes)
        return changes, Average(state.num_updates + 1, average)

    init = lambda parameters: Average(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, parameters))
    return optax.GradientTransformation(init, update)


def averaged(parameters: dict, optimizer_state: optax.OptState) -> dict:
    """The parameters of the model that is evaluated: the average of the trained ones where the optimizer keeps one."""
    average = optax.tree.get(optimizer_state, "average")
    if average is None:
        return parameters
    flat = flatten_mapping(parameters)  # the average may be split further
    return unflatten_mapping(flat | {path: like(x, flat[path]) for path, x in flatten_mapping(average).items()})
