"""The log-probability of a continuation is the full model's, whatever stands beside it and however rows are padded."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FAMILIES, tiny

from lm_jax.config import Mesh
from lm_jax.errors import UserError
from lm_jax.generate.likelihood import POSITIONS, likelihoods, shapes
from lm_jax.generate.request_batches import request_batches
from lm_jax.mesh import make_mesh
from lm_jax.model.attention import Context
from lm_jax.model.build import build

SEES = 100
RNG = np.random.default_rng(0)
# (context, continuation) sizes: short, one token each, a long continuation, a whole window of it, and texts that are too long
SIZES = [(5, 3), (1, 1), (30, 2), (9, 40), (1, 100), (99, 2), (140, 4), (70, 90), (60, 1)]
PAIRS = [(RNG.integers(0, 256, a).tolist(), RNG.integers(0, 256, b).tolist()) for a, b in SIZES]


@functools.cache
def made(name: str, devices: int = 1):
    graph = build(tiny(**{"model__init_scale": 0.2} | FAMILIES[name]).model, 257, SEES)
    mesh = make_mesh(Mesh(), jax.devices()[:devices])
    with jax.set_mesh(mesh):
        return mesh, graph, jax.jit(lambda: graph.init(jax.random.key(0), sharded=True))()


def one_by_one(graph, parameters, pairs):
    """The same by the model alone: a text at a time, padded at its end."""

    @jax.jit
    def logits(tokens, length):
        context = Context(jnp.arange(SEES)[None], (jnp.arange(SEES) < length)[None].astype(jnp.int32))
        module = graph.module(parameters)
        return module.logits(module(tokens, context)[0])[0].astype(jnp.float32)

    for context, continuation in pairs:
        ids = np.array([*context, *continuation], np.int32)[-(SEES + 1) :]
        read, last = ids[:-1], slice(len(ids) - 1 - len(continuation), len(ids) - 1)
        found = np.asarray(jax.nn.log_softmax(logits(np.pad(read, (0, SEES - len(read)))[None], len(read))))[last]
        yield found[np.arange(len(continuation)), continuation].sum(), (found.argmax(-1) == continuation).all()


@pytest.mark.parametrize("name", ["gpt2", pytest.param("gpt3_banded", marks=pytest.mark.proof), "lstm"])
def test_likelihoods_are_those_of_the_full_model(name):
    mesh, graph, parameters = made(name)
    with jax.set_mesh(mesh):
        found = likelihoods(graph, parameters, PAIRS, 4)
        expected = list(one_by_one(graph, parameters, PAIRS))
    np.testing.assert_allclose([x.log_probability for x in found], [x for x, _ in expected], rtol=1e-5)
    assert [x.greedy for x in found] == [greedy for _, greedy in expected]


def test_greedy_is_the_most_probable_path_alone():
    mesh, graph, parameters = made("gpt2")
    with jax.set_mesh(mesh):
        path, context = [], PAIRS[0][0]
        for _ in range(4):
            options = likelihoods(graph, parameters, [(context + path, [piece]) for piece in range(257)], 64)
            assert sum(option.greedy for option in options) == 1
            assert sum(np.exp(option.log_probability) for option in options) == pytest.approx(1, abs=1e-5)
            path.append(int(np.argmax([option.log_probability for option in options])))
        assert likelihoods(graph, parameters, [(context, path)])[0].greedy
        for place in range(4):  # one token of it another
            other = [(piece + (i == place)) % 257 for i, piece in enumerate(path)]
            assert not likelihoods(graph, parameters, [(context, other)])[0].greedy


def test_devices_and_neighbours_do_not_enter():
    found = []
    for devices in (1, 8):
        mesh, graph, parameters = made("llama", devices)
        with jax.set_mesh(mesh):
            found.append([x.log_probability for x in likelihoods(graph, parameters, PAIRS[:4], 2)])
            alone = likelihoods(graph, parameters, PAIRS[3:4], 2)[0].log_probability
        assert alone == pytest.approx(found[-1][3], abs=1e-4)
    np.testing.assert_allclose(*found, rtol=1e-5)


def test_a_continuation_alone_may_not_be_longer_than_the_model_sees():
    mesh, graph, parameters = made("gpt2")
    with jax.set_mesh(mesh), pytest.raises(UserError, match="101 tokens is more than the 100"):
        likelihoods(graph, parameters, [([1], [2] * 101)])
    with jax.set_mesh(mesh), pytest.raises(UserError, match="41 tokens is more than the 40"):
        likelihoods(graph, parameters, [([1], [2] * 41)], limit=40)


def test_a_limit_is_a_shorter_window():
    mesh, graph, parameters = made("llama")
    context, continuation = PAIRS[6]
    with jax.set_mesh(mesh):
        cut = likelihoods(graph, parameters, [(context, continuation)], limit=40)
        same = likelihoods(graph, parameters, [(context[-37:], continuation)])
    assert cut[0].log_probability == pytest.approx(same[0].log_probability, abs=1e-5)


def test_few_shapes_serve_all_lengths():
    lengths = [64, 65, 128, *RNG.integers(1, 5000, 997).tolist()]  # at a border, and behind it
    continuations = [int(RNG.integers(1, length + 1)) for length in lengths]
    shape = shapes(lengths, continuations)
    order = sorted(range(1000), key=lambda i: shape[i], reverse=True)
    batches = request_batches(order, 8, lambda i: shape[i])
    found = [(*shape[batch.requests[0]], batch.requests) for batch in batches]
    assert sorted(i for *_, chosen in found for i in chosen) == list(range(1000))
    assert len({(length, num_last) for length, num_last, _ in found}) <= 16
    for length, num_last, chosen in found:
        assert len(chosen) <= 8 and num_last % POSITIONS == 0 and num_last <= length
        assert all(length / 2 < max(lengths[i], 33) <= length and continuations[i] <= num_last for i in chosen)
