"""What the model must never do (see the future, mix documents) and what must not change what it computes."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FAMILIES, tiny

from lm_jax.data import packing
from lm_jax.generate.decoding import next_logits, prefill
from lm_jax.loss import token_losses
from lm_jax.model.attention import Context
from lm_jax.model.build import build
from lm_jax.model.dropout import row_keys
from lm_jax.model.positions import apply_rope, rope_angles
from lm_jax.model.unstacked import is_unstacked

LENGTH = 64


ONE_BODY = dict(model__unroll=False)  # a program for each kind of layer, not for each layer


def make(kind: str, **changes):
    config = tiny(**FAMILIES[kind], **changes)
    graph = build(config.model, vocab_size=500, sequence_length=config.data.sequence_length)
    return graph, jax.jit(lambda: graph.init(jax.random.key(0)))()


def whole(batch: int, length: int = LENGTH) -> Context:
    return Context(jnp.broadcast_to(jnp.arange(length)[None], (batch, length)), jnp.ones((batch, length), jnp.int32))


@functools.partial(jax.jit, static_argnums=0)
def logits(graph, parameters, tokens, context):
    model = graph.module(parameters)
    return model.logits(model(tokens, context)[0])


def random_tokens(*shape):
    return jnp.asarray(np.random.default_rng(0).integers(0, 500, shape), jnp.int32)


def families(*here: str) -> list:
    """All; those that are not named are proofs. In every run each specification is seen with a window, with norms and positions
    of several kinds, and with a recurrent model; test_convert.py has the logits of every family."""
    return [pytest.param(name, marks=[] if name in here else pytest.mark.proof) for name in FAMILIES]


@pytest.mark.parametrize("kind", families("gpt2", "gemma2", "no_positions", "lstm"))
def test_causality_by_gradient(kind):
    """The logits at place t depend on the embeddings of tokens 0..t (within the window) and on no later one."""
    graph, parameters = make(kind, **ONE_BODY if kind != "lstm" else {})
    tokens, context, place = random_tokens(1, LENGTH), whole(1), 40

    def at_place(x_BTD):
        model = graph.module(parameters)
        model.embed = lambda tokens, positions: x_BTD
        return model.logits(model(tokens, context)[0])[0, place].sum()

    embedded = jax.jit(lambda p: graph.module(p).embed(tokens, context.positions))(parameters)
    moved = jnp.abs(jax.jit(jax.grad(at_place))(embedded)).sum(-1)[0]
    assert float(moved[place + 1 :].max()) == 0
    windows = graph.config.window * (graph.config.num_layers // len(graph.config.window))
    first = max(0, place - sum(window - 1 for window in windows)) if all(windows) else 0
    assert float(moved[first : place + 1].min()) > 0
    assert first == 0 or float(moved[:first].max()) == 0


@pytest.mark.parametrize("kind", families("gpt3_banded", "mixtral", "lstm"))
def test_documents_of_a_row_do_not_see_each_other(kind):
    """Packed equals unpacked, and another first document changes no bit of the second's logits and gradients."""
    graph, parameters = make(kind, **ONE_BODY if kind != "lstm" else {})
    first, second = random_tokens(1, 30), random_tokens(1, LENGTH)[:, 30:]
    segments = jnp.repeat(jnp.array([[1, 2]]), jnp.array([30, 34]), axis=1, total_repeat_length=LENGTH)
    positions = jnp.concatenate([jnp.arange(30), jnp.arange(34)])[None]
    packed = Context(positions, segments)

    @jax.jit
    def second_loss(parameters, first):
        out = logits(graph, parameters, jnp.concatenate([first, second], 1), packed)
        return out[:, 30:].astype(jnp.float32).sum(), out[:, 30:]

    (_, one), gradient = jax.value_and_grad(second_loss, has_aux=True)(parameters, first)
    (_, other), gradient_of_other = jax.value_and_grad(second_loss, has_aux=True)(parameters, (first + 7) % 500)
    np.testing.assert_array_equal(one, other)
    layers = next(name for name in gradient if name in ("block_0", "layers"))
    for a, b in zip(jax.tree.leaves(gradient[layers]), jax.tree.leaves(gradient_of_other[layers]), strict=True):
        np.testing.assert_array_equal(a, b)
    alone = logits(graph, parameters, second, whole(1, 34))
    np.testing.assert_allclose(one, alone, atol=2e-5)


def test_a_window_is_as_wide_as_it_says():
    graph, parameters = make("gpt2", model__window=(8,), model__num_layers=1)
    tokens = random_tokens(1, LENGTH)
    out = logits(graph, parameters, tokens, whole(1))
    inside = logits(graph, parameters, tokens.at[0, 40 - 7].add(1), whole(1))
    outside = logits(graph, parameters, tokens.at[0, 40 - 8].add(1), whole(1))
    np.testing.assert_array_equal(out[0, 40], outside[0, 40])
    assert not np.array_equal(out[0, 40], inside[0, 40])


LEVELS = ("none", "dots", "names", "full")
PRODUCT = list(itertools.product((False, True), LEVELS))


@pytest.mark.parametrize(
    ("kind", "programs"),
    [
        pytest.param("llama", [*PRODUCT[:4], PRODUCT[-1]], id="llama"),  # unrolled once
        *(pytest.param(kind, PRODUCT, marks=pytest.mark.proof, id=f"{kind} all") for kind in ("llama", "gpt3_banded")),
    ],
)
def test_recomputing_and_unrolling_change_nothing_but_memory(kind, programs):
    """Values and gradients agree to 1e-5; temporaries of the scanned gradient fall from level to level."""
    graph, parameters = make(kind)
    tokens, memory, expected = random_tokens(8, LENGTH), {}, None

    for unroll, remat in programs:
        other = build(dataclasses.replace(graph.config, remat=remat, unroll=unroll), 500, LENGTH)
        loss = lambda parameters, model=other: (model.module(parameters)(tokens, whole(8))[0] ** 2).sum() / tokens.size
        compiled = jax.jit(jax.value_and_grad(loss)).lower(parameters).compile()
        memory[unroll, remat] = compiled.memory_analysis().temp_size_in_bytes
        found = jax.tree.leaves(compiled(parameters))
        expected = expected or found
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=f"{remat} {unroll}")
    levels = [memory[False, remat] for remat in LEVELS]
    assert levels == sorted(set(levels), reverse=True), memory


CACHED = families("sinusoidal_relu", "qwen3", "gemma3", "lstm")


@pytest.mark.parametrize(
    ("kind", "unroll"), [*(pytest.param(*one.values, True, marks=one.marks) for one in CACHED), ("llama", False)]
)
def test_cached_decode_equals_full_forward(kind, unroll):
    """At every place, for prompts of different lengths in one batch; layers apart or in one stack."""
    graph, parameters = make(kind, model__unroll=unroll)
    tokens, lengths = random_tokens(2, LENGTH), jnp.array([20, 33])
    full = logits(graph, parameters, tokens, whole(2))
    parameters = graph.unstacked(parameters)
    assert is_unstacked(parameters) == unroll

    prompt = jnp.where(jnp.arange(40)[None] < lengths[:, None], tokens[:, :40], 499)  # padding is not zeros
    state = prefill(graph, parameters, prompt, lengths, LENGTH)
    step, rows = jax.jit(lambda state: next_logits(graph, parameters, state)), jnp.arange(2)
    for _ in range(30):
        out, caches = step(state)
        np.testing.assert_allclose(out, full[rows, state.position_B], atol=1e-4)
        state = state._replace(
            caches=caches, token_B=tokens[rows, state.position_B + 1], position_B=state.position_B + 1
        )
    size = lambda caches: sum(x.size for x in jax.tree.leaves(caches))
    assert size(graph.empty_caches(2, LENGTH)) == size(state.caches)


def test_padding_of_the_vocabulary_never_wins():
    graph, parameters = make("gpt2")
    out = logits(graph, parameters, random_tokens(1, LENGTH), whole(1))
    assert out.shape[-1] == 512 and float(out[..., 500:].max()) <= -1e8
    losses = token_losses(out, random_tokens(1, LENGTH))
    expected = -jax.nn.log_softmax(out[..., :500])[0, jnp.arange(LENGTH), random_tokens(1, LENGTH)[0]]
    np.testing.assert_allclose(losses[0], expected, rtol=1e-5)


def test_residual_outputs_start_smaller():
    graph, parameters = make("gpt2")
    block = parameters["block_0"]
    np.testing.assert_allclose(block["mlp"]["up"]["kernel"].std(), 0.02, rtol=0.05)
    np.testing.assert_allclose(block["mlp"]["down"]["kernel"].std(), 0.02 / np.sqrt(2 * 2), rtol=0.05)
    np.testing.assert_allclose(block["attention"]["output"]["kernel"].std(), 0.02 / np.sqrt(2 * 2), rtol=0.05)
    assert not np.array_equal(block["mlp"]["up"]["kernel"][0], block["mlp"]["up"]["kernel"][1])


def test_dropout_of_a_row_depends_on_nothing_but_the_row():
    """The same row has the same mask in any batch; another step, layer or name has another."""
    root = jax.random.key(0)
    bits = lambda *arguments: np.asarray(jax.vmap(jax.random.bits)(row_keys(root, *arguments)))
    rows = jnp.arange(8, dtype=jnp.uint32)
    together = bits("mlp", 3, 1, rows)
    np.testing.assert_array_equal(together[4:6], bits("mlp", 3, 1, rows[4:6]))
    others = [bits("attention", 3, 1, rows), bits("mlp", 4, 1, rows), bits("mlp", 3, 2, rows)]
    assert len({tuple(x) for x in (together, *others)}) == 4


def test_rows_restart_positions_and_segments():
    row = packing.make_row([(7, np.arange(5)), (8, np.arange(10, 14))], 8, 3)
    assert row["tokens"].tolist() == [0, 1, 2, 3, 4, 10, 11, 12]
    assert row["targets"].tolist() == [1, 2, 3, 4, 10, 11, 12, 13]
    assert row["segment_ids"].tolist() == [1, 1, 1, 1, 1, 2, 2, 2]
    assert row["positions"].tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert row["loss_mask"].sum() == 8


def test_a_rotation_is_rounded_once_each_way():
    """Below float32 the turned half is a product, which is exact; the gradient is that of the formula in float32."""
    positions_BT = jnp.arange(12)[None] * 37
    x, of_y = jax.random.normal(jax.random.key(0), (2, 1, 12, 3, 16), jnp.bfloat16)
    angles = rope_angles(positions_BT, 12, 1e4)  # of the first 12 of 16
    cos, sin = angles.cos, angles.sin

    def formula(x):
        first, second, rest = x[..., :6], x[..., 6:12], x[..., 12:]
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], -1)

    for dtype in ("bfloat16", "float32"):
        expected, pull = jax.vjp(formula, x.astype(jnp.float32))
        found, found_pull = jax.vjp(lambda x: apply_rope(x, angles), x.astype(dtype))
        np.testing.assert_array_equal(found, expected.astype(dtype))
        (gradient,) = pull(of_y.astype(jnp.float32))
        np.testing.assert_array_equal(found_pull(of_y.astype(dtype))[0], gradient.astype(dtype))
