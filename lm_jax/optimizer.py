"""The optimizer: what is done around an update rule: clipping, weight decay, the rate of the schedule, the guard."""

from collections.abc import Callable

import jax
import optax
from flax.nnx.traversals import flatten_mapping, unflatten_mapping

from lm_jax.batch_ramp import UPDATES, Clocks
from lm_jax.config import LARGEST_LOSS_SCALE, Optimizer
from lm_jax.loss_scale import dynamic_loss_scale, skip_nonfinite
from lm_jax.parameter_average import average_of_parameters
from lm_jax.schedule import schedule
from lm_jax.sharding import like, spread
from lm_jax.update_rules import ELEMENTWISE, Updated, is_matrix, update_rule


def at_rates(rule: optax.GradientTransformation, factors: dict) -> optax.GradientTransformation:
    """`rule` with its updates multiplied by `factors`, {path: factor}; the state is that of `rule`."""

    def update(gradients: optax.Updates, state: optax.OptState, parameters: optax.Params | None = None) -> Updated:
        changes, state = rule.update(gradients, state, parameters)
        flat = flatten_mapping(changes)
        return unflatten_mapping({path: factors[path] * change for path, change in flat.items()}), state

    return optax.GradientTransformation(rule.init, update)


def over_data(rule: optax.GradientTransformation, elementwise: bool) -> optax.GradientTransformation:
    """`rule`, with its state and its work split over `data` (arXiv:1910.02054, ZeRO-1) where it treats each number alone.

    Gradients may be split over `data` or not; updates are laid out as the parameters.
    """
    place: Callable = spread if elementwise else lambda x: x

    def update(gradients: optax.Updates, state: optax.OptState, parameters: optax.Params | None = None) -> Updated:
        placed = jax.tree.map(place, parameters)
        changes, state = rule.update(jax.tree.map(like, gradients, placed), state, placed)
        return jax.tree.map(like, changes, parameters), state

    return optax.GradientTransformation(lambda parameters: rule.init(jax.tree.map(place, parameters)), update)


def make_optimizer(
    config: Optimizer,
    declared: dict,
    factors: dict | None = None,
    clocks: Clocks = UPDATES,
    rule: Callable = update_rule,
) -> optax.GradientTransformation:
    """Clip by global norm, update rule, decoupled decay (arXiv:1711.05101), schedule, average; takes mean gradients.

    `declared` is a tree of declarations like the trained parameters, `factors` is {path: share of the learning rate}
    for `layer_decay`, `clocks` counts the steps of the schedule. An update that is not finite is skipped.
    """
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    decay = optax.add_decayed_weights(config.weight_decay, mask=jax.tree.map(is_matrix, declared))
    parts = [clip, rule(config, declared)] + [decay] * (config.name != "adam")
    average = [average_of_parameters(config.ema)] if config.ema else []
    rate = optax.scale_by_learning_rate(schedule(config, clocks))
    rate = at_rates(rate, factors) if factors and config.layer_decay < 1 else rate
    whole = optax.chain(*parts, rate, *average)
    largest = LARGEST_LOSS_SCALE
    guarded = dynamic_loss_scale(whole, config.loss_scale, largest) if config.loss_scale else skip_nonfinite(whole)
    return over_data(guarded, rule is update_rule and config.name in ELEMENTWISE)
