"""Update rules act per layer, decay what stands in a product, and follow the schedule that the config names."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import tiny

from lm_jax.config import leaves
from lm_jax.model import transformer
from lm_jax.optimizer import decays, make_optimizer, schedule

RULES = leaves()["optimizer.name"].metadata["choices"]


def updates(config, tree, mask, num_steps=4):
    """The parameters after a few steps on gradients that depend on them."""
    rule = make_optimizer(config.optimizer, mask)
    state = rule.init(tree)

    @jax.jit
    def update(tree, state, step):
        changes, state = rule.update(jax.tree.map(lambda x: jnp.sin(7 * x + step), tree), state, tree)
        return optax.apply_updates(tree, changes), state

    for step in range(num_steps):
        tree, state = update(tree, state, step)
    return tree


@pytest.mark.parametrize("name", RULES)
def test_stacked_layers_equal_a_list_of_layers(name):
    config = tiny(optimizer__name=name, optimizer__warmup=2, train__num_steps=8, optimizer__decay_over=8)
    graph = transformer.build(config.model, 500, 64)
    stacked, mask = graph.init(jax.random.key(0))["block_0"], graph.tree(decays)["block_0"]
    num_layers = config.model.num_layers
    listed = [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(num_layers)]
    together = updates(config, stacked, mask)
    apart = updates(config, listed, [mask] * num_layers)
    for layer in range(num_layers):
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(apart[layer]), strict=True):
            np.testing.assert_allclose(a[layer], b, rtol=1e-6, atol=1e-8)


def test_decay_is_for_matrices_and_tables():
    config = tiny(model__positions="learned")
    mask = transformer.build(config.model, 500, 64).tree(decays)
    assert mask["embedding"]["table"] and mask["positions"]["table"]
    block = mask["block_0"]
    assert block["attention"]["query"]["kernel"] and block["mlp"]["down"]["kernel"]
    assert not block["attention"]["query"]["bias"] and not block["mlp"]["up"]["bias"]
    assert not block["attention_norm"]["scale"] and not mask["norm"]["bias"]


@pytest.mark.parametrize("name", RULES)
def test_decay_shrinks_only_what_is_masked(name):
    config = tiny(
        optimizer__name=name, optimizer__weight_decay=0.5, optimizer__warmup=0, optimizer__schedule="constant"
    )
    rule = make_optimizer(config.optimizer, {"kernel": True, "scale": False})
    tree = {"kernel": jnp.ones(3), "scale": jnp.ones(3)}
    changes, _ = rule.update(jax.tree.map(jnp.zeros_like, tree), rule.init(tree), tree)
    np.testing.assert_allclose(changes["kernel"], -0.5 * config.optimizer.learning_rate, rtol=1e-6)
    np.testing.assert_array_equal(changes["scale"], 0)


def test_adamw_follows_its_formula():
    """Two steps by hand (arXiv:1711.05101, algorithm 2) with clipping to norm 1."""
    config = tiny(optimizer__warmup=0, optimizer__schedule="constant", optimizer__learning_rate=0.1).optimizer
    rule = make_optimizer(config, {"w": True})
    w, m, v, tree = 2.0, 0.0, 0.0, {"w": jnp.array(2.0)}
    state = rule.init(tree)
    for t, gradient in enumerate((3.0, -0.5), start=1):
        changes, state = rule.update({"w": jnp.array(gradient)}, state, tree)
        tree = optax.apply_updates(tree, changes)
        gradient = max(-1.0, min(1.0, gradient))
        m, v = config.beta1 * m + (1 - config.beta1) * gradient, config.beta2 * v + (1 - config.beta2) * gradient**2
        adam = m / (1 - config.beta1**t) / ((v / (1 - config.beta2**t)) ** 0.5 + config.epsilon)
        w -= 0.1 * (adam + config.weight_decay * w)
        np.testing.assert_allclose(tree["w"], w, rtol=1e-5)


def test_sgd_with_momentum_follows_its_formula():
    config = tiny(
        optimizer__name="sgd", optimizer__warmup=0, optimizer__schedule="constant", optimizer__learning_rate=0.1,
        optimizer__weight_decay=0.0, optimizer__clip_norm=0.0,
    ).optimizer  # fmt: skip
    rule = make_optimizer(config, {"w": True})
    w, velocity, tree = 2.0, 0.0, {"w": jnp.array(2.0)}
    state = rule.init(tree)
    for gradient in (3.0, -0.5):
        changes, state = rule.update({"w": jnp.array(gradient)}, state, tree)
        tree = optax.apply_updates(tree, changes)
        velocity = 0.9 * velocity + gradient
        w -= 0.1 * velocity
        np.testing.assert_allclose(tree["w"], w, rtol=1e-6)


def test_the_schedule_rises_falls_and_stays():
    config = tiny(
        optimizer__learning_rate=1.0, optimizer__warmup=10, optimizer__decay_over=110, optimizer__decay_to=0.1
    )
    rate = schedule(config.optimizer)
    np.testing.assert_allclose(rate(0), 0.1, rtol=1e-6)  # the first update already moves
    np.testing.assert_allclose(rate(9), 1.0)
    np.testing.assert_allclose(rate(59), 0.1 + 0.9 * 0.5, rtol=1e-5)  # half of the cosine
    np.testing.assert_allclose([rate(109), rate(1000)], 0.1, rtol=1e-5)
    constant = schedule(
        tiny(optimizer__schedule="constant", optimizer__learning_rate=1.0, optimizer__warmup=10).optimizer
    )
    np.testing.assert_allclose([constant(4), constant(9), constant(1000)], [0.5, 1, 1])
