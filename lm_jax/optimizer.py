"""The optimizer: learning-rate schedules and update rules of Optax, weight decay, loss scale, parameter average.

Which dims of a parameter are inputs and outputs is read from its declaration, never guessed from its shape: so matrices
decay and vectors do not, and Muon and Adafactor see the matrix of one layer, however its dims are stacked, split or
sharded.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.nnx.traversals import flatten_mapping, unflatten_mapping

from lm_jax.batch_ramp import UPDATES, Clocks
from lm_jax.config import LARGEST_LOSS_SCALE, Optimizer
from lm_jax.model.layers import Declaration
from lm_jax.sharding import automatic, stored_reshape
from lm_jax.trainable import merge_params

STABLE_SHARE = 0.8  # of the whole length, before warmup_stable_decay decays (arXiv:2405.18392: the last fifth)
GROW_AFTER = 2000  # finite gradients before the loss scale doubles
MUON_RMS = 0.2  # of Muon's update, that of AdamW's: one learning rate and decay for both (arXiv:2502.16982)


def schedule(config: Optimizer, clocks: Clocks = UPDATES) -> optax.Schedule:
    """Learning rate of update number n = 0, 1, ...: linear from 0 (not reached: n + 1) to the peak, then as named.

    `warmup` and `decay_over` are steps by now, each on its own clock: n, and what that is ahead. Cosine as in
    arXiv:1608.03983 without restarts, down to `decay_to`; linear to the same end; inverse square root: peak *
    sqrt(warmup / n) (arXiv:1706.03762); warm-up, stable, decay: the peak, then linear in the last fifth
    (arXiv:2404.06395).
    """
    peak, warmup, end = config.learning_rate, int(config.warmup), int(config.decay_over)
    after_warmup = max(1, end - warmup)
    if config.schedule == "constant":
        after = optax.constant_schedule(peak)
    elif config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, after_warmup, config.decay_to)
    elif config.schedule == "linear":
        after = optax.linear_schedule(peak, config.decay_to * peak, after_warmup)
    elif config.schedule == "inverse_square_root":
        start = max(1, warmup)
        after = lambda count: peak * jnp.sqrt(start / jnp.maximum(start, count + warmup))
    else:
        assert config.schedule == "warmup_stable_decay", config.schedule
        begin = max(0, round(STABLE_SHARE * end) - warmup)
        after = optax.linear_schedule(peak, config.decay_to * peak, max(1, after_warmup - begin), begin)
    rise = optax.linear_schedule(0.0, peak, max(1, warmup))
    falls_from = clocks.warmup if config.schedule == "inverse_square_root" else clocks.decay

    def rate(count):
        rising, falling = count + 1 + clocks.warmup, count + 1 + falls_from
        return jnp.where(rising < warmup, rise(rising), after(jnp.maximum(falling - warmup, 0)))

    return rate


def is_matrix(declared: Declaration) -> bool:
    """Whether a parameter is a matrix or a table, no scale of a norm and no bias: what weight decay acts on."""
    return bool(declared.inputs and declared.outputs)


def is_table(declared: Declaration) -> bool:
    """Whether a matrix is read by index, or gives the logits: one of its dims is the vocabulary, or positions."""
    return is_matrix(declared) and not {"vocab", "positions", "segments", "buckets"}.isdisjoint(declared.axes)


class Average(NamedTuple):
    """State of `average_of_parameters`."""

    num_updates: jax.Array  # int32 []
    average: dict  # like the parameters


def average_of_parameters(decay: float) -> optax.GradientTransformation:
    """Keeps an exponential average of the parameters after the update; the last of a chain. Changes no update.

    The decay starts low, min(decay, (1 + n) / (10 + n)) at update n = 0, 1, ..., so that the initial values are
    forgotten.
    """

    def update(changes, state, parameters):
        count = state.num_updates.astype(jnp.float32)
        share = 1 - jnp.minimum(decay, (1 + count) / (10 + count))
        toward = lambda average, parameter, change: average + share * (parameter + change - average)
        average = jax.tree.map(toward, state.average, parameters, changes)
        return changes, Average(state.num_updates + 1, average)

    init = lambda parameters: Average(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, parameters))
    return optax.GradientTransformation(init, update)


def per_layer(rule_of: Callable[[Declaration], optax.GradientTransformation], declared) -> optax.GradientTransformation:
    """Applies `rule_of(declaration)` to each layer of each parameter: to a matrix [inputs, outputs], or to a vector.

    `declared` is a tree of declarations like the parameters. The state is a tree like the parameters, too, of states of
    rules, stacked over layers. On a mesh the compiler chooses the layouts inside a rule; results have the layouts of
    the arguments.
    """

    def over_layers(one: Declaration, function):
        for _ in one.layers:
            function = jax.vmap(function)
        return function

    def init(parameters):
        state_of = lambda one, x: over_layers(one, rule_of(one).init)(as_matrix(one, x))
        return jax.tree.map(state_of, declared, parameters)

    def update(gradients, state, parameters):
        def one_parameter(one: Declaration, gradient, state, parameter):
            gradient, parameter = as_matrix(one, gradient), as_matrix(one, parameter)
            function = over_layers(one, rule_of(one).update)
            changes, state = automatic(function, (gradient, state), gradient, state, parameter)
            return stored_reshape(changes, one.shape, one.axes), state

        both = jax.tree.map(one_parameter, declared, gradients, state, parameters)
        return tuple(jax.tree.map(lambda _, pair, i=i: pair[i], declared, both) for i in range(2))

    return optax.GradientTransformation(init, update)


def as_matrix(declared: Declaration, x: jax.Array) -> jax.Array:
    """A matrix as [layers, inputs, outputs], all else as [layers, size]; without `layers` where they are not stacked."""
    num_layers = len(declared.layers)
    groups = [declared.inputs, declared.outputs] if is_matrix(declared) else [tuple(range(num_layers, x.ndim))]
    assert sum(groups, declared.layers) == tuple(range(x.ndim)), declared
    shape = *x.shape[:num_layers], *(math.prod(x.shape[dim] for dim in dims) for dims in groups)
    return stored_reshape(x, shape, (*declared.axes[:num_layers], *(declared.axes[dims[0]] for dims in groups)))


def adafactor() -> optax.GradientTransformation:
    """arXiv:1804.04235 without momentum: factored second moments, clipped updates, scaled by the parameter's size."""
    return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms())


def muon(beta: float) -> optax.GradientTransformation:
    """Momentum made orthogonal, of one matrix (github.com/KellerJordan/Muon), its entries as large as AdamW's."""
    rule = optax.contrib.scale_by_muon(beta=beta)

    def in_float32(changes, state, parameters):
        with jax.default_matmul_precision("highest"):
            return rule.update(changes, state, parameters)

    def as_large_as_adamw(changes, parameters):
        return MUON_RMS * math.sqrt(max(changes.shape)) * changes

    momentum = optax.GradientTransformation(rule.init, in_float32)
    return optax.chain(momentum, optax.stateless(as_large_as_adamw))


def update_rule(config: Optimizer, declared) -> optax.GradientTransformation:
    """The rule of `optimizer.name`. Elementwise rules take stacked and sharded parameters as they are."""
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)
    if config.name in ("adam", "adamw"):
        return adam
    if config.name == "lion":
        return optax.scale_by_lion(config.beta1, config.beta2)
    if config.name == "adafactor":
        return per_layer(lambda one: adafactor(), declared)
    if config.name == "muon":
        hidden = lambda one: is_matrix(one) and not is_table(one)
        return per_layer(lambda one: muon(config.beta1) if hidden(one) else adam, declared)
    assert config.name == "sgd", config.name
    return optax.trace(config.beta1)


def all_finite(tree) -> jax.Array:
    """Whether every number of a tree of arrays is finite: a bool []."""
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.stack([jnp.isfinite(x).all() for x in floats]).all()


class Guarded(NamedTuple):
    """State of `dynamic_loss_scale`, always finite."""

    inner: optax.OptState
    scale: jax.Array  # float32 []: what the loss is multiplied by before the next backward pass
    good_steps: jax.Array  # int32 []: updates since the scale last changed
    skipped: jax.Array  # int32 []: updates that were not made
    in_a_row: jax.Array  # int32 []: the last of these, at the smallest scale


def dynamic_loss_scale(
    inner: optax.GradientTransformation, initial: int = 1, largest: int = 1, grow_after: int = GROW_AFTER
) -> optax.GradientTransformationExtraArgs:
    """`inner` on gradients of a loss that was multiplied by `state.scale` (arXiv:1710.03740, section 3.2).

    Where the gradient is not finite, or the parameters or `inner` would not be after the update, nothing of it reaches
    them: the update is skipped and counted, the scale halves, down to 1. After `grow_after` updates in a row it
    doubles, up to `largest`. Powers of two change no bit of a gradient. With the defaults the scale stays 1, and this
    is a guard alone.
    """
    inner = optax.with_extra_args_support(inner)

    def init(parameters):
        zero = lambda: jnp.zeros((), jnp.int32)
        return Guarded(inner.init(parameters), jnp.asarray(initial, jnp.float32), zero(), zero(), zero())

    def update(gradients, state, parameters, **extra):
        if largest > 1:
            gradients = jax.tree.map(lambda gradient: gradient / state.scale, gradients)
        # Judged apart, on what the compiler cannot see to be the same, so that the update itself is the program it was.
        apart = jax.lax.optimization_barrier((gradients, state.inner, parameters))
        changes, changed = inner.update(*apart, **extra)
        finite = jnp.isfinite(optax.tree.norm(gradients)) & all_finite(
            (optax.apply_updates(apart[2], changes), changed)
        )
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


def at_rates(rule: optax.GradientTransformation, factors: dict) -> optax.GradientTransformation:
    """`rule` with its changes multiplied by `factors`, {path: factor}; the state is that of `rule`."""

    def update(gradients, state, parameters=None):
        changes, state = rule.update(gradients, state, parameters)
        flat = flatten_mapping(changes)
        return unflatten_mapping({path: factors[path] * change for path, change in flat.items()}), state

    return optax.GradientTransformation(rule.init, update)


def make_optimizer(
    config: Optimizer, declared, factors: dict | None = None, clocks: Clocks = UPDATES
) -> optax.GradientTransformationExtraArgs:
    """Clip by global norm, update rule, decoupled decay (arXiv:1711.05101), schedule, average; takes mean gradients.

    `declared` is a tree of declarations like the trained parameters, `factors` is {path: share of the learning rate}
    for `layer_decay`, `clocks` counts the steps of the schedule. The whole chain is inside `dynamic_loss_scale`.
    """
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    decay = optax.add_decayed_weights(config.weight_decay, mask=jax.tree.map(is_matrix, declared))
    parts = [clip, update_rule(config, declared)] + [decay] * (config.name != "adam")
    average = [average_of_parameters(config.ema)] if config.ema else []
    rate = optax.scale_by_learning_rate(schedule(config, clocks))
    rate = at_rates(rate, factors) if factors and config.layer_decay < 1 else rate
    whole = optax.chain(*parts, rate, *average)
    return dynamic_loss_scale(whole, config.loss_scale or 1, LARGEST_LOSS_SCALE if config.loss_scale else 1)


def averaged(parameters: dict, optimizer_state: optax.OptState) -> dict:
    """The parameters of the model: where the optimizer keeps an average of the trained ones, with that average."""
    average = optax.tree.get(optimizer_state, "average")
    return parameters if average is None else merge_params(parameters, average)
