"""Update rules act per layer, decay what stands in a product, and follow the schedule that the config names."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import KERNEL, tiny

from lm_jax.config import Mesh, leaves
from lm_jax.mesh import make_mesh
from lm_jax.model.build import build
from lm_jax.model.layers import Declaration, constant
from lm_jax.optimizer import make_optimizer
from lm_jax.parameter_average import averaged
from lm_jax.schedule import schedule
from lm_jax.update_rules import is_matrix, update_rule

RULES = leaves()["optimizer.name"].metadata["choices"]
# One of the rules that act on each number alone, one of those that look at a whole matrix; the others are proofs.
FEW = [pytest.param(x, marks=[] if x in ("adamw", "muon") else pytest.mark.proof) for x in RULES]
SCALE = Declaration((1,), ("model",), constant(1.0))


def updates(config, tree, declared, num_steps=4):
    """The parameters after a few steps on gradients that depend on them."""
    rule = make_optimizer(config.optimizer, declared)
    state = rule.init(tree)

    @jax.jit
    def update(tree, state, step):
        changes, state = rule.update(jax.tree.map(lambda x: jnp.sin(7 * x + step), tree), state, tree)
        return optax.apply_updates(tree, changes), state

    for step in range(num_steps):
        tree, state = jax.block_until_ready(update(tree, state, step))
    return tree


def wide(name, **more):
    """A model whose matrices are large enough for Adafactor to factor: 128 on both sides."""
    wider = dict(model__model_dim=128, model__head_dim=32, optimizer__warmup=2, optimizer__decay_over=8)
    config = tiny(optimizer__name=name, **wider | more)
    return config, build(config.model, 500, 64)


def start(graph):
    return jax.jit(lambda: graph.init(jax.random.key(0)))()


def of_one_layer(stacked: Declaration) -> Declaration:
    less = lambda dims: tuple(dim - 1 for dim in dims)
    inputs, outputs = less(stacked.inputs), less(stacked.outputs)
    return dataclasses.replace(
        stacked, shape=stacked.shape[1:], axes=stacked.axes[1:], inputs=inputs, outputs=outputs, layers=()
    )


@pytest.mark.parametrize("name", FEW)
def test_stacked_layers_equal_a_list_of_layers(name):
    config, graph = wide(name)
    stacked, declared = start(graph)["block_0"], graph.tree(lambda one: one)["block_0"]
    num_layers = config.model.num_layers
    listed = [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(num_layers)]
    together = updates(config, stacked, declared)
    apart = updates(config, listed, [jax.tree.map(of_one_layer, declared)] * num_layers)
    for layer in range(num_layers):
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(apart[layer]), strict=True):
            np.testing.assert_allclose(a[layer], b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", FEW)
def test_sharded_equals_unsharded(name, eight):
    """On 2x2x2 Explicit devices: heads, MLP and vocabulary over tensor, the residual stream over fsdp."""
    config, graph = wide(name)
    declared = graph.tree(lambda one: one)
    expected = updates(config, start(graph), declared)
    with jax.set_mesh(make_mesh(Mesh(2, 2, 2), eight)):
        parameters = jax.jit(lambda: graph.init(jax.random.key(0), sharded=True))()
        found = updates(config, parameters, declared)
        same_layout = lambda a, b: a.sharding == b.sharding
        assert jax.tree.all(jax.tree.map(same_layout, found, parameters))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=5e-8)


RATE, DECAY = 0.01, 0.1
IN_OPTAX = {
    "adamw": optax.adamw(RATE, 0.9, 0.95, weight_decay=DECAY),
    "adam": optax.adam(RATE, 0.9, 0.95),
    "adafactor": optax.adafactor(RATE, weight_decay_rate=RATE * DECAY),  # Optax does not multiply that by the rate
    "lion": optax.lion(RATE, 0.9, 0.95, weight_decay=DECAY),
    "muon": optax.contrib.muon(RATE, beta=0.9, weight_decay=DECAY, consistent_rms=0.2),
    "sgd": optax.chain(optax.trace(0.9), optax.add_decayed_weights(DECAY), optax.scale(-RATE)),
}


@pytest.mark.parametrize("name", RULES)
def test_five_steps_are_those_of_optax_on_a_plain_matrix(name):
    """Kernels [layers, model, heads, head_dim] against Optax's own optimizer on each layer's [model, heads * head_dim]."""
    config = tiny(
        optimizer__name=name, optimizer__warmup=0, optimizer__schedule="constant", optimizer__learning_rate=RATE,
        optimizer__weight_decay=0.0 if name == "adam" else DECAY, optimizer__clip_norm=0.0,
    ).optimizer  # fmt: skip
    axes = ("layers", "model", "heads", "head_dim")
    declared = Declaration((2, 128, 4, 40), axes, constant(0.0), inputs=(1,), outputs=(2, 3), layers=(0,))
    random = np.random.RandomState(0)
    start, gradients = random.randn(2, 128, 160), random.randn(5, 2, 128, 160) * [[[[1.0]], [[30.0]]]]
    mine = jnp.float32(start.reshape(declared.shape))
    theirs = [jnp.float32(layer) for layer in start]
    rule, optax_rule = make_optimizer(config, declared), IN_OPTAX[name]
    state, optax_states = rule.init(mine), [optax_rule.init(layer) for layer in theirs]
    for gradient in jnp.float32(gradients):
        changes, state = jax.jit(rule.update)(gradient.reshape(declared.shape), state, mine)
        mine = optax.apply_updates(mine, changes)
        for layer in range(2):
            changes, optax_states[layer] = jax.jit(optax_rule.update)(
                gradient[layer], optax_states[layer], theirs[layer]
            )
            theirs[layer] = optax.apply_updates(theirs[layer], changes)
            np.testing.assert_allclose(mine[layer].reshape(128, 160), theirs[layer], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [rule for rule in RULES if rule != "adafactor"])
def test_moments_in_bfloat16_are_rounded_between_updates_and_nowhere_else(name):
    """Each update is that of float32 on what was stored, to the bit; nothing but moments is stored otherwise."""
    config = wide(name)[0].optimizer
    declared = Declaration(
        (2, 8, 12), ("layers", "model", "mlp"), constant(0.0), inputs=(1,), outputs=(2,), layers=(0,)
    )
    exact, rule = (
        update_rule(dataclasses.replace(config, moment_dtype=dtype), declared) for dtype in ("float32", "bfloat16")
    )
    random = np.random.RandomState(0)
    parameter = jnp.float32(random.randn(*declared.shape))
    state, widened = rule.init(parameter), lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x
    for gradient in jnp.float32(random.randn(3, *declared.shape)):
        expected, unrounded = exact.update(gradient, jax.tree.map(widened, state), parameter)
        changes, state = rule.update(gradient, state, parameter)
        np.testing.assert_array_equal(changes, expected)
        for found, x in zip(jax.tree.leaves(state), jax.tree.leaves(unrounded), strict=True):
            is_moment = x.shape == declared.shape
            assert found.dtype == (jnp.bfloat16 if is_moment else x.dtype)
            np.testing.assert_array_equal(found, x.astype(found.dtype))
            assert not is_moment or (x != found).any()


def test_muon_needs_the_memory_of_one_layer_at_a_time():
    """Beside what it reads and writes: the momentum of all layers, which is orthogonalised, and what one layer needs for it."""
    axes, layer = ("layers", "model", "mlp"), 4 * 64 * 256
    declared = Declaration((16, 64, 256), axes, constant(0.0), inputs=(1,), outputs=(2,), layers=(0,))
    rule, x = update_rule(wide("muon")[0].optimizer, declared), jax.ShapeDtypeStruct(declared.shape, jnp.float32)
    compiled = jax.jit(rule.update, donate_argnums=1).lower(x, jax.eval_shape(rule.init, x), x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < (16 + 3) * layer


def test_muon_leaves_tables_norms_and_biases_to_adamw():
    config, graph = wide("muon", optimizer__clip_norm=0.0)
    adamw, declared = wide("adamw", optimizer__clip_norm=0.0)[0], graph.tree(lambda one: one)
    by_muon, by_adamw = (updates(c, start(graph), declared) for c in (config, adamw))
    same = jax.tree.map(lambda a, b: bool(jnp.allclose(a, b, rtol=1e-6, atol=1e-8)), by_muon, by_adamw)
    assert same["embedding"]["table"] and same["positions"]["table"] and same["norm"]["scale"]
    for path, equal in jax.tree_util.tree_leaves_with_path(same["block_0"]):
        assert equal == (path[-1].key != "kernel"), path


def test_decay_is_for_matrices_and_tables():
    config = tiny(model__positions="learned")
    mask = build(config.model, 500, 64).tree(is_matrix)
    assert mask["embedding"]["table"] and mask["positions"]["table"]
    block = mask["block_0"]
    assert block["attention"]["query"]["kernel"] and block["mlp"]["down"]["kernel"]
    assert not block["attention"]["query"]["bias"] and not block["mlp"]["up"]["bias"]
    assert not block["attention_norm"]["scale"] and not mask["norm"]["bias"]


@pytest.mark.parametrize("name", RULES)
def test_decay_shrinks_only_what_is_masked(name):
    decay = 0.0 if name == "adam" else 0.5  # it has none, and is refused one
    config = tiny(
        optimizer__name=name, optimizer__weight_decay=decay, optimizer__warmup=0, optimizer__schedule="constant"
    )
    rule = make_optimizer(config.optimizer, {"kernel": KERNEL, "scale": SCALE})
    tree = {"kernel": jnp.ones((1, 1)), "scale": jnp.ones(1)}
    changes, _ = rule.update(jax.tree.map(jnp.zeros_like, tree), rule.init(tree), tree)
    np.testing.assert_allclose(changes["kernel"], -decay * config.optimizer.learning_rate, rtol=1e-6)
    np.testing.assert_array_equal(changes["scale"], 0)


def test_adamw_follows_its_formula():
    """Two steps by hand (arXiv:1711.05101, algorithm 2) with clipping to norm 1."""
    config = tiny(optimizer__warmup=0, optimizer__schedule="constant", optimizer__learning_rate=0.1).optimizer
    rule = make_optimizer(config, {"w": KERNEL})
    w, m, v, tree = 2.0, 0.0, 0.0, {"w": jnp.array([[2.0]])}
    state = rule.init(tree)
    for t, gradient in enumerate((3.0, -0.5), start=1):
        changes, state = rule.update({"w": jnp.array([[gradient]])}, state, tree)
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
    rule = make_optimizer(config, {"w": KERNEL})
    w, velocity, tree = 2.0, 0.0, {"w": jnp.array([[2.0]])}
    state = rule.init(tree)
    for gradient in (3.0, -0.5):
        changes, state = rule.update({"w": jnp.array([[gradient]])}, state, tree)
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


def rates(name, steps, **changes):
    """The rates of updates 0, 1, ... after a warm-up of 2 over 12 steps to a tenth of 1."""
    lengths = dict(optimizer__warmup=2, optimizer__learning_rate=1.0)
    lengths |= {} if name == "inverse_square_root" else dict(optimizer__decay_over=12, optimizer__decay_to=0.1)
    rate = schedule(tiny(optimizer__schedule=name, **lengths | changes).optimizer)
    return [float(rate(step)) for step in steps]


def test_linear_falls_to_its_end_and_stays():
    np.testing.assert_allclose(rates("linear", range(5)), [0.5, 1, 0.91, 0.82, 0.73], rtol=1e-6)
    np.testing.assert_allclose(rates("linear", [10, 11, 12, 500]), [0.19, 0.1, 0.1, 0.1], rtol=1e-5)


def test_inverse_square_root_follows_its_formula():
    """arXiv:1706.03762, equation 3: the peak times min(n / warmup, sqrt(warmup / n)) at the n-th update, n = 1, 2, ..."""
    expected = [min(n / 2, (2 / n) ** 0.5) for n in range(1, 6)]
    np.testing.assert_allclose(rates("inverse_square_root", range(5)), expected, rtol=1e-6)
    np.testing.assert_allclose(rates("inverse_square_root", [799]), (2 / 800) ** 0.5, rtol=1e-6)
    np.testing.assert_allclose(rates("inverse_square_root", [0, 3], optimizer__warmup=0), [1, 0.5], rtol=1e-6)


def test_warmup_stable_decay_keeps_the_peak_then_falls_in_the_last_fifth():
    long = dict(optimizer__decay_over=20)
    np.testing.assert_allclose(rates("warmup_stable_decay", range(5), **long), [0.5, 1, 1, 1, 1], rtol=1e-6)
    found = rates("warmup_stable_decay", [15, 16, 17, 18, 19, 20, 500], **long)
    np.testing.assert_allclose(found, [1, 0.775, 0.55, 0.325, 0.1, 0.1, 0.1], rtol=1e-5)


def test_five_steps_of_cosine_are_those_of_optax():
    """Optax's first update has rate 0: ours is one ahead of it."""
    expected = optax.warmup_cosine_decay_schedule(0.0, 1.0, 2, 12, 0.1)
    np.testing.assert_allclose(rates("cosine", range(5)), [expected(n + 1) for n in range(5)], rtol=1e-6)


def test_the_average_of_the_parameters_follows_its_formula():
    config = tiny(
        optimizer__ema=0.2, optimizer__name="sgd", optimizer__schedule="constant", optimizer__warmup=0
    ).optimizer
    rule, w = make_optimizer(config, {"w": KERNEL}), {"w": jnp.array([[2.0]])}
    state, average = rule.init(w), 2.0
    assert averaged(w, state) == w
    for n in range(4):
        changes, state = rule.update({"w": jnp.array([[0.5 - n]])}, state, w)
        w = optax.apply_updates(w, changes)
        decay = min(0.2, (1 + n) / (10 + n))
        average = decay * average + (1 - decay) * float(w["w"][0, 0])
        np.testing.assert_allclose(averaged(w, state)["w"], average, rtol=1e-6)
    without = make_optimizer(dataclasses.replace(config, ema=0.0), {"w": KERNEL})
    assert averaged(w, without.init(w)) is w
