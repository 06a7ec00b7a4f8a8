"""Update rules: those of Optax, on the matrix of one layer; which parameters are matrices; what moments are stored in.

Which dims of a parameter are inputs and outputs is read from its declaration, never guessed from its shape. So matrices
decay and vectors do not, and Muon and Adafactor get the matrix of one layer, however parameters are stacked or sharded.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from lm_jax.config import Optimizer
from lm_jax.model.layers import Declaration
from lm_jax.sharding import automatic, stored_reshape

NEWTON_SCHULZ = 5  # iterations of Muon
ORTHOGONAL_BOUND = 2.0  # of a number of a matrix with singular values near 1
MUON_RMS = 0.2  # of Muon's update, that of AdamW's: one learning rate and decay for both (arXiv:2502.16982)
ELEMENTWISE = ("adamw", "adam", "lion", "sgd")  # rules that treat each number of a parameter alone
NAMES_OF_MOMENTS = {"mu", "nu", "trace"}  # in Optax's states
Updated = tuple[optax.Updates, optax.OptState]  # what the update of a rule returns


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
    On a mesh the compiler chooses the layouts inside a rule; results have the layouts of the arguments. What else a rule is
    told (`trial`, of Muon) is the same for all layers.
    """

    def over_layers(one: Declaration, function: Callable) -> Callable:
        for _ in one.layers:
            function = jax.vmap(function)
        return function

    def init(parameters: optax.Params) -> optax.OptState:
        state_of = lambda one, x: over_layers(one, rule_of(one).init)(as_matrix(one, x))
        return jax.tree.map(state_of, declared, parameters)

    def update(
        gradients: optax.Updates, state: optax.OptState, parameters: optax.Params | None = None, **told: bool
    ) -> Updated:
        def one_parameter(
            one: Declaration, gradient: jax.Array, state: optax.OptState, parameter: jax.Array
        ) -> Updated:
            gradient, parameter = as_matrix(one, gradient), as_matrix(one, parameter)
            rule = optax.with_extra_args_support(rule_of(one))
            function = over_layers(one, functools.partial(rule.update, **told))
            changes, state = automatic(function, (gradient, state), gradient, state, parameter)
            return stored_reshape(changes, one.shape, one.axes), state

        both = jax.tree.map(one_parameter, declared, gradients, state, parameters)
        return tuple(jax.tree.map(lambda _, pair, i=i: pair[i], declared, both) for i in range(2))

    return optax.GradientTransformationExtraArgs(init, update)


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
    """Muon of one matrix (github.com/KellerJordan/Muon): orthogonalised momentum, scaled to the RMS of AdamW's updates.

    The momentum is Nesterov's of an average, both without the bias of its start (as Optax has it, whose state this is). In a
    `trial` (`loss_scale.dynamic_loss_scale`) numbers of about the size stand for the orthogonalised matrix, away from zero.
    """

    def update(
        gradient: jax.Array,
        state: optax.contrib.MuonState,
        parameter: jax.Array | None = None,
        trial: bool = False,
        **told: bool,
    ) -> Updated:
        count = state.count + 1
        momentum = (1 - beta) * gradient + beta * state.mu
        ahead = beta * momentum / (1 - beta ** (count + 1)) + (1 - beta) * gradient / (1 - beta**count)
        scale = MUON_RMS * math.sqrt(max(gradient.shape))
        if trial:
            assert parameter is not None
            bound = jnp.where(parameter > 0, -ORTHOGONAL_BOUND, ORTHOGONAL_BOUND)
            ahead = jnp.where(jnp.isfinite(ahead), bound, ahead)
        changes = scale * (ahead if trial else orthogonalised(ahead, state.ns_coeffs))
        return changes, state._replace(count=count, mu=momentum)

    rule = optax.GradientTransformationExtraArgs(optax.contrib.scale_by_muon(beta=beta).init, update)
    return optax.chain(rule)  # the first of a chain in every checkpoint


@jax.custom_batching.sequential_vmap
def orthogonalised(x: jax.Array, coefficients: jax.Array) -> jax.Array:
    """A matrix with its singular values near 1, by Newton and Schulz's iteration of fifth order, float32.

    Of stacked layers one after another: what the iterations keep is there once.
    """
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    wide = x.T if x.shape[0] > x.shape[1] else x
    first, second, third = coefficients

    def iteration(_: int, x: jax.Array) -> jax.Array:
        gram = product(x, x.T)
        return first * x + product(second * gram + product(third * gram, gram), x)

    result = jax.lax.fori_loop(0, NEWTON_SCHULZ, iteration, wide / (jnp.linalg.norm(wide) + 1e-8))
    return result if wide is x else result.T


def with_moments_in(dtype: str, rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """`rule`, an arithmetic of float32, with its moments rounded to `dtype` between updates."""
    rule = optax.with_extra_args_support(rule)

    def cast(state: optax.OptState, to: str) -> optax.OptState:
        def one(path: tuple, x: jax.Array) -> jax.Array:
            return x.astype(to) if NAMES_OF_MOMENTS.intersection(getattr(key, "name", "") for key in path) else x

        return jax.tree_util.tree_map_with_path(one, state)

    def update(
        gradients: optax.Updates, state: optax.OptState, parameters: optax.Params | None = None, **told: bool
    ) -> Updated:
        changes, state = rule.update(gradients, cast(state, "float32"), parameters, **told)
        return changes, cast(state, dtype)

    return optax.GradientTransformationExtraArgs(lambda parameters: cast(rule.init(parameters), dtype), update)


def update_rule(config: Optimizer, declared: dict) -> optax.GradientTransformation:
    """The rule of `optimizer.name`. Elementwise rules take stacked and sharded parameters as they are."""
    if config.name == "adafactor":
        return per_layer(lambda one: adafactor(), declared)
    return with_moments_in(config.moment_dtype, _rule_with_moments(config, declared))


def _rule_with_moments(config: Optimizer, declared: dict) -> optax.GradientTransformation:
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)
    if config.name in ("adam", "adamw"):
        return adam
    if config.name == "lion":
        return optax.scale_by_lion(config.beta1, config.beta2)
    if config.name == "muon":
        hidden = lambda one: is_matrix(one) and not is_table(one)
        return per_layer(lambda one: muon(config.beta1) if hidden(one) else adam, declared)
    assert config.name == "sgd", config.name
    return optax.trace(config.beta1)
