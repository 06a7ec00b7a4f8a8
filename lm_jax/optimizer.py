"""The optimizer: learning-rate schedules, update rules of Optax, weight decay.

Which dims of a parameter are inputs and outputs is read from its declaration, never guessed from its shape. So matrices
decay and vectors do not, and Muon and Adafactor get the matrix of one layer, however parameters are stacked or sharded.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax.nnx.traversals import flatten_mapping, unflatten_mapping
from jax.typing import ArrayLike

from lm_jax.batch_ramp import UPDATES, Clocks
from lm_jax.config import LARGEST_LOSS_SCALE, Optimizer
from lm_jax.loss_scale import dynamic_loss_scale, skip_nonfinite
from lm_jax.model.layers import Declaration
from lm_jax.parameter_average import average_of_parameters
from lm_jax.sharding import automatic, stored_reshape

STABLE_SHARE = 0.8  # of the whole length, before warmup_stable_decay decays (arXiv:2405.18392: the last fifth)
MUON_RMS = 0.2  # of Muon's update, that of AdamW's: one learning rate and decay for both (arXiv:2502.16982)
Updated = tuple[optax.Updates, optax.OptState]  # what the update of a rule returns


def schedule(config: Optimizer, clocks: Clocks = UPDATES) -> optax.Schedule:
    """Learning rate of update number n = 0, 1, ...: it rises linearly to the peak (update 0 has 1 / warmup of it), then as named.

    `warmup` and `decay_over` are in steps here; the clock of each counts n plus an offset (`clocks`). Cosine: arXiv:1608.03983
    without restarts, down to `decay_to`; linear: to the same end; inverse square root: peak * sqrt(warmup / n)
    (arXiv:1706.03762); warm-up, stable, decay: the peak, then linear in the last fifth (arXiv:2404.06395).
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

    def rate(count: ArrayLike) -> jax.Array:
        rising, falling = count + 1 + clocks.warmup, count + 1 + falls_from
        return jnp.where(jnp.less(rising, warmup), rise(rising), after(jnp.maximum(falling - warmup, 0)))

    return rate


def is_matrix(declared: Declaration) -> bool:
    """Whether a parameter is a matrix or a table, not a bias or the scale of a norm: weight decay acts on matrices."""
    return bool(declared.inputs and declared.outputs)


def is_table(declared: Declaration) -> bool:
    """Whether a matrix is an embedding or an output table: one of its dims is the vocabulary, positions or the like."""
    return is_matrix(declared) and not {"vocab", "positions", "segments", "buckets"}.isdisjoint(declared.axes)


def per_layer(
    rule_of: Callable[[Declaration], optax.GradientTransformation], declared: dict
) -> optax.GradientTransformation:
    """Applies `rule_of(declaration)` to each layer of each parameter: to a matrix [inputs, outputs], or to a vector.

    `declared` is a tree of declarations like the parameters, and the state a tree of the rules' states, stacked over layers.
    On a mesh the compiler chooses the layouts inside a rule; results have the layouts of the arguments.
    """

    def over_layers(one: Declaration, function: Callable) -> Callable:
        for _ in one.layers:
            function = jax.vmap(function)
        return function

    def init(parameters: optax.Params) -> optax.OptState:
        state_of = lambda one, x: over_layers(one, rule_of(one).init)(as_matrix(one, x))
        return jax.tree.map(state_of, declared, parameters)

    def update(gradients: optax.Updates, state: optax.OptState, parameters: optax.Params | None = None) -> Updated:
        def one_parameter(
            one: Declaration, gradient: jax.Array, state: optax.OptState, parameter: jax.Array
        ) -> Updated:
            gradient, parameter = as_matrix(one, gradient), as_matrix(one, parameter)
            function = over_layers(one, rule_of(one).update)
            changes, state = automatic(function, (gradient, state), gradient, state, parameter)
            return stored_reshape(changes, one.shape, one.axes), state

        both = jax.tree.map(one_parameter, declared, gradients, state, parameters)
        return tuple(jax.tree.map(lambda _, pair, i=i: pair[i], declared, both) for i in range(2))

    return optax.GradientTransformation(init, update)


def as_matrix(declared: Declaration, x: jax.Array) -> jax.Array:
    """A matrix as [layers, inputs, outputs], other parameters as [layers, size]; without `layers` where there is no stack."""
    num_layers = len(declared.layers)
    groups = [declared.inputs, declared.outputs] if is_matrix(declared) else [tuple(range(num_layers, x.ndim))]
    assert sum(groups, declared.layers) == tuple(range(x.ndim)), declared
    shape = *x.shape[:num_layers], *(math.prod(x.shape[dim] for dim in dims) for dims in groups)
    return stored_reshape(x, shape, (*declared.axes[:num_layers], *(declared.axes[dims[0]] for dims in groups)))


def adafactor() -> optax.GradientTransformation:
    """Adafactor (arXiv:1804.04235) without momentum: factored second moments, clipped updates, scaled by the parameter's RMS."""
    return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms())


def muon(beta: float) -> optax.GradientTransformation:
    """Muon of one matrix (github.com/KellerJordan/Muon): orthogonalised momentum, scaled to the RMS of AdamW's updates."""
    rule = optax.contrib.scale_by_muon(beta=beta)

    def in_float32(changes: optax.Updates, state: optax.OptState, parameters: optax.Params | None = None) -> Updated:
        with jax.default_matmul_precision("highest"):
            updated: Updated = rule.update(changes, state, parameters)
            return updated

    def as_large_as_adamw(changes: jax.Array, parameters: jax.Array | None) -> jax.Array:
        return MUON_RMS * math.sqrt(max(changes.shape)) * changes

    momentum = optax.GradientTransformation(rule.init, in_float32)
    return optax.chain(momentum, optax.stateless(as_large_as_adamw))


def update_rule(config: Optimizer, declared: dict) -> optax.GradientTransformation:
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


def at_rates(rule: optax.GradientTransformation, factors: dict) -> optax.GradientTransformation:
    """`rule` with its updates multiplied by `factors`, {path: factor}; the state is that of `rule`."""

    def update(gradients: optax.Updates, state: optax.OptState, parameters: optax.Params | None = None) -> Updated:
        changes, state = rule.update(gradients, state, parameters)
        flat = flatten_mapping(changes)
        return unflatten_mapping({path: factors[path] * change for path, change in flat.items()}), state

    return optax.GradientTransformation(rule.init, update)


def make_optimizer(
    config: Optimizer, declared: dict, factors: dict | None = None, clocks: Clocks = UPDATES
) -> optax.GradientTransformationExtraArgs:
    """Clip by global norm, update rule, decoupled decay (arXiv:1711.05101), schedule, average; takes mean gradients.

    `declared` is a tree of declarations like the trained parameters, `factors` is {path: share of the learning rate}
    for `layer_decay`, `clocks` counts the steps of the schedule. An update that is not finite is skipped.
    """
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    decay = optax.add_decayed_weights(config.weight_decay, mask=jax.tree.map(is_matrix, declared))
    parts = [clip, update_rule(config, declared)] + [decay] * (config.name != "adam")
    average = [average_of_parameters(config.ema)] if config.ema else []
    rate = optax.scale_by_learning_rate(schedule(config, clocks))
    rate = at_rates(rate, factors) if factors and config.layer_decay < 1 else rate
    whole = optax.chain(*parts, rate, *average)
    return (
        dynamic_loss_scale(whole, config.loss_scale, LARGEST_LOSS_SCALE) if config.loss_scale else skip_nonfinite(whole)
    )
