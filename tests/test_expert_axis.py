"""Experts over devices (mesh axis `expert`): what one device computes, to 1e-5 in the loss and in each leaf's gradient."""

import contextlib
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from helpers import FAMILIES, batch, tiny
from save_and_restore import FACTS

from lm_jax import checkpoint, experiment
from lm_jax.batch_ramp import DataState
from lm_jax.config import Mesh
from lm_jax.data import loader
from lm_jax.errors import UserError
from lm_jax.loss import batch_loss
from lm_jax.mesh import legal_meshes, make_mesh, mesh_shape, preflight
from lm_jax.model import expert_parallel, moe
from lm_jax.model.build import build
from lm_jax.plan import devices, estimate, program_text
from lm_jax.sharding import computed, on_each_device
from lm_jax.train_state import fresh, make_program

SMALL = dict(
    model__num_experts=8, model__model_dim=32, model__mlp_dim=48, model__num_heads=2, model__unroll=False,
    model__remat="full", data__global_batch_size=8,
)  # fmt: skip
VOCAB = 500
ALONE = dict(data=1, fsdp=1, tensor=1)


CONFIG = tiny(**FAMILIES["mixtral"] | SMALL)


def on_devices(sizes: dict) -> jax.sharding.Mesh:
    return make_mesh(Mesh(**ALONE | sizes), jax.devices()[: int(np.prod(list(sizes.values())))])


def packed_rows(mesh) -> dict:
    """Eight rows of two documents each, with holes in the mask."""
    both = zip(batch(0).items(), batch(1).values(), strict=True)
    rows = {name: np.concatenate([a, b]) for (name, a), b in both}
    return {name: jax.device_put(x, loader.layout(mesh, x.ndim)) for name, x in rows.items()}


@functools.cache
def first_step(sizes: tuple[tuple[str, int], ...]) -> tuple[dict[str, np.ndarray], str]:
    """The loss, with those of the router, and its gradients by the path of the leaf; and the text of the program."""
    mesh, graph = on_devices(dict(sizes)), build(CONFIG.model, VOCAB, CONFIG.data.sequence_length)
    with jax.set_mesh(mesh):
        parameters = jax.jit(lambda: graph.init(jax.random.key(0), sharded=True))()
        of = lambda parameters, rows: batch_loss(graph, parameters, rows, None, 0.0, (0.5, 0.5)).objective
        step = jax.jit(jax.value_and_grad(of)).lower(parameters, rows := packed_rows(mesh)).compile()
        loss, gradients = step(parameters, rows)
        flat, _ = jax.tree.flatten_with_path({"loss": loss, "gradient": gradients, "parameter": parameters})
        found = {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x) for path, x in flat}
        return found, step.as_text()


def assert_agrees(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        if name.startswith("parameter"):
            np.testing.assert_array_equal(found[name], x, err_msg=name)
        else:
            assert np.linalg.norm(found[name] - x) <= 1e-5 * np.linalg.norm(x), name


ALL = dict(expert=8)
MESHES = [
    dict(expert=expert, **other)
    for expert, other in itertools.product((2, 4, 8), ({}, dict(data=2), dict(fsdp=2), dict(tensor=2)))
    if expert * (2 if other else 1) <= 8
] + [dict(fsdp=2, expert=2, tensor=2)]


def name(sizes: dict) -> str:
    return " ".join(f"{axis} {size}" for axis, size in sizes.items())


@pytest.mark.parametrize(
    "sizes", [pytest.param(m, marks=[] if m == ALL else pytest.mark.proof, id=name(m)) for m in MESHES]
)
def test_the_first_step_is_that_of_one_device(sizes):
    assert_agrees(first_step(tuple(sizes.items()))[0], first_step(())[0])


NUM = 32  # tokens
# Which two of eight experts each of them chooses.
ROUTINGS = {
    "spread": lambda n: (n % 8, (n + 3) % 8),
    "all to one device": lambda n: (0 * n, 0 * n + 1),
    "all to the last expert and another": lambda n: (0 * n + 7, n % 7),
    "nearly all to one": lambda n: (0 * n, np.where(n == 20, 6, 1)),
}


def arrays_of(routing: str) -> tuple:
    """Tokens, the router's weights, chosen experts, kernels, and gradients of the results."""
    random = np.random.default_rng(0)
    normal = lambda *shape: random.normal(size=shape).astype(np.float32)
    weights = random.uniform(0.1, 1, (8, NUM // 8, 2)).astype(np.float32)
    chosen = np.stack(ROUTINGS[routing](np.arange(NUM)), -1).reshape(weights.shape).astype(np.int32)
    kernels = normal(8, 16, 24), normal(8, 16, 24), normal(8, 24, 16)
    return normal(8, NUM // 8, 16), weights, chosen, kernels, normal(8, NUM // 8, 16)


def experts_on(num: int):
    """(what `arrays_of` gives) -> tokens after their experts; gradients of tokens, weights and kernels."""
    mesh = on_devices(dict(expert=num))
    with jax.set_mesh(mesh):
        tokens, of_kernel = computed(("batch", "length", None)), computed(("experts", None, None))
        body = functools.partial(moe._on_a_device, jax.nn.silu)
        apply = on_each_device(body, (tokens, tokens, tokens, *[of_kernel] * 3), tokens)

    @jax.jit
    def whole(x, weights, chosen, kernels, of_y):
        y, back = jax.vjp(lambda x, weights, kernels: apply(x, weights, chosen, *kernels), x, weights, kernels)
        return y, back(jax.sharding.reshard(of_y, tokens))

    def on_mesh(*arrays) -> list[np.ndarray]:
        with jax.set_mesh(mesh):
            return [np.asarray(x) for x in jax.tree.leaves(whole(*arrays))]

    return on_mesh


experts = functools.cache(experts_on)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_exact_whatever_the_router_says(routing):
    """Up to all tokens of all devices at one of them."""
    arrays = arrays_of(routing)
    for found, expected in zip(experts(4)(*arrays), experts(1)(*arrays), strict=True):
        assert np.linalg.norm(found - expected) <= 1e-6 * np.linalg.norm(expected)


def test_nothing_leaks_between_tokens():
    """What the experts make of a token depends on no other one, whichever devices have them: the gradient is 0 to the bit."""
    *arrays, of_y = arrays_of("nearly all to one")
    is_read = np.arange(NUM).reshape(8, -1, 1) == 21
    _, of_x, of_weights, *_ = experts(4)(*arrays, of_y * is_read)
    for found in (of_x, of_weights):
        assert ((found != 0) == is_read).all()


def test_rows_behind_all_experts_are_not_read(monkeypatch):
    """A TPU does not write them, forward and backward: what stands there, nan too, reaches neither a result nor a gradient."""
    arrays, product = arrays_of("nearly all to one"), jax.lax.ragged_dot
    expected = experts(4)(*arrays)

    def unwritten(x, kernels, group_sizes, precision):
        is_written = (jnp.arange(len(x)) < group_sizes.sum())[:, None]
        plain = functools.partial(product, group_sizes=group_sizes, precision=precision)
        run = jax.custom_vjp(lambda x, kernels: jnp.where(is_written, plain(x, kernels), jnp.nan))

        def backward(saved, of_y):
            of_x, of_kernels = jax.vjp(plain, *saved)[1](jnp.where(is_written, of_y, 0))
            return jnp.where(is_written, of_x, jnp.nan), of_kernels

        run.defvjp(lambda x, kernels: (run(x, kernels), (x, kernels)), backward)
        return run(x, kernels)

    monkeypatch.setattr(jax.lax, "ragged_dot", unwritten)
    for found, x in zip(experts_on(4)(*arrays), expected, strict=True):
        np.testing.assert_array_equal(found, x)


MUTANTS = {
    "results are not summed": ("to_owners", lambda x, axis, dtype: x[: len(x) // 4]),
    "tokens stay at home": ("from_all", lambda x, axis, dtype: jnp.concatenate([x] * 4)),
    "only the first chunk": ("_num_filled", lambda ends_E, rows: jnp.int32(1)),
}


@pytest.mark.parametrize(
    "mutant", [pytest.param(m, marks=[] if m == "results are not summed" else pytest.mark.proof) for m in MUTANTS]
)
def test_what_is_dropped_is_seen(mutant, monkeypatch):
    arrays = arrays_of("all to one device")
    monkeypatch.setattr(expert_parallel, *MUTANTS[mutant])
    expected, found = experts(1)(*arrays), experts_on(4)(*arrays)
    apart = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(found, expected, strict=True)]
    assert max(apart) > 1e-2


def test_what_four_devices_saved_one_goes_on_with(tmp_path):
    """Experts, their moments and the rest, saved from `expert` 4: the same bits on one device."""
    program = make_program(CONFIG, VOCAB)
    with jax.set_mesh(on_devices(dict(expert=4))):
        state = jax.jit(lambda: fresh(program))()
        gate = state.parameters["block_0"]["mlp"]["gate"]
        assert gate.addressable_shards[0].data.shape == (2, 2, 32, 48)  # layers, experts of a device
        with contextlib.closing(checkpoint.Saver(epath.Path(tmp_path), program.config, FACTS)) as saver:
            saver.save(state, DataState(0, 24))
    with jax.set_mesh(on_devices({})):
        found, data = checkpoint.restore(epath.Path(tmp_path), 0, program)
    assert data.cursor == 24
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)


def gathered(sizes: dict) -> set[tuple[int, ...]]:
    """Sorted sizes of the kernels that the program of the first step gathers for its experts, a layer: F is 48 nowhere else."""
    found, _ = program_text.computations(first_step(tuple(sizes.items()))[1])
    lines = [line for part in found.values() for line in part if line.op.startswith("all-gather")]
    shapes = [dims for line in lines for _, dims in program_text.dims(line.shape)]
    assert shapes
    width = 48 // sizes.get("tensor", 1)
    return {tuple(sorted(n for n in dims if n > 1)) for dims in shapes if width in dims}


def test_no_gathered_experts_in_the_program():
    """With the axis alone no device is given a kernel."""
    assert gathered(ALL) == set()


@pytest.mark.proof
def test_experts_that_are_gathered():
    """Without the axis those of a layer [E, D, F]; beside fsdp those of a device, [E / expert, D, F / tensor]."""
    assert gathered(dict(fsdp=8)) == {(8, 32, 48)}
    assert gathered(dict(fsdp=2, expert=2, tensor=2)) == {(4, 24, 32)}


@pytest.mark.parametrize(
    ("changes", "sizes", "words"),
    [
        (dict(model__num_experts=6), dict(expert=4), ["model.num_experts = 6", "mesh axis expert = 4", "is 8", "is 3"]),
        (
            dict(data__global_batch_size=4, train__microbatch_rows=4), dict(expert=4, fsdp=2),
            ["global_batch_size = 4", "data x fsdp x expert = 8"],
        ),
    ],
)  # fmt: skip
def test_what_does_not_divide_is_refused(changes, sizes, words):
    refused(tiny(**FAMILIES["mixtral"] | SMALL | changes), sizes, words)


def test_a_dense_model_has_nothing_to_split():
    refused(tiny(), dict(expert=2), ["config.mesh.expert = 2", "no experts", "mesh.fsdp", "mesh.tensor", "mesh.data"])
    assert all(sizes["expert"] == 1 for sizes in legal_meshes(tiny(), 512, 8))
    some = [sizes["expert"] for sizes in legal_meshes(CONFIG, 512, 8)]
    assert set(some) == {1, 2, 4, 8}


def test_a_plan_counts_kernels_in_use_and_tokens_on_links():
    """Mixtral on v5p:4x4x4: 3 x 8 kernels [4096, 14336] a layer; two rows of 4,096 tokens a device, recomputed, bfloat16."""
    kernels, model_dim = 3 * 8 * 4096 * 14336, 4096
    found = {}
    for expert in (1, 8):
        config, _ = experiment.load_config(
            "experiments/decoders.py:mixtral_8x7b", {"train.microbatch_rows": 128, "model.remat": "full"}
        )
        config = dataclasses.replace(config, mesh=Mesh(data=1, fsdp=-1, tensor=1, expert=expert))
        found[expert] = estimate.estimate(config, devices.parse("v5p:4x4x4"))
    assert found[1].memory["experts"] == kernels * 2 * 2
    assert found[8].memory["experts"] == kernels / 8 * (2 + 4) + 8 * 2 * 4096 * model_dim * 3 * 2
    moved = {
        name: estimate.seconds(found[8])[f"links {name}"] * estimate.ring(found[8], name) for name in ("fsdp", "expert")
    }
    others = 2 * found[8].costs.parameters - 32 * 2 * kernels  # bytes
    assert moved["fsdp"] == pytest.approx(7 / 8 * 8 * 3 * (others + 32 * 2 * kernels / 8))
    of_tokens = 8 * 32 * 2 * 4096 * model_dim * 8 * (3 * 2 + 2 * 4)  # 8 microbatches of 32 layers
    assert moved["expert"] == pytest.approx(7 / 8 * (8 * 3 * others / 8 + of_tokens))


def refused(config, sizes, words):
    config = dataclasses.replace(config, mesh=Mesh(**ALONE | sizes))
    with pytest.raises(UserError) as error:
        preflight(config, 512, mesh_shape(config.mesh, 8))
    assert all(word in str(error.value) for word in words), error.value
