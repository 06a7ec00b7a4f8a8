"""Sampling cuts where it says, decoding is the model's own greedy path, and a seed gives the same text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import command, tiny

from lm_jax.config import Mesh, UserError
from lm_jax.generate import Sampling, generate, sample
from lm_jax.model.attention import Context
from lm_jax.model.graph import build
from lm_jax.sharding import make_mesh

LOGITS = jnp.log(jnp.array([0.5, 0.25, 0.15, 0.07, 0.03]))
GREEDY = Sampling(temperature=0.0)


def draw(num=4000, **settings):
    settings = Sampling(**{"temperature": 1.0, "top_k": 0, "top_p": 1.0} | settings)
    keys = jax.random.split(jax.random.key(settings.seed), num)
    logits = jnp.broadcast_to(LOGITS[None], (num, 5))
    drawn = np.asarray(sample(logits, keys, settings.temperature, settings.top_k, settings.top_p))
    return np.bincount(drawn, minlength=5) / num


def test_samples_have_the_model_s_frequencies():
    np.testing.assert_allclose(draw(), np.exp(LOGITS), atol=0.03)
    np.testing.assert_allclose(draw(temperature=0.5), np.exp(2 * LOGITS) / np.exp(2 * LOGITS).sum(), atol=0.03)


def test_top_k_and_top_p_cut_the_tail():
    np.testing.assert_allclose(draw(top_k=2), [2 / 3, 1 / 3, 0, 0, 0], atol=0.03)
    np.testing.assert_allclose(
        draw(top_p=0.76), np.array([0.5, 0.25, 0.15, 0, 0]) / 0.9, atol=0.03
    )  # the piece that crosses stays
    np.testing.assert_array_equal(draw(top_p=0.01), [1, 0, 0, 0, 0])
    np.testing.assert_array_equal(draw(temperature=0.0), [1, 0, 0, 0, 0])
    np.testing.assert_array_equal(draw(top_k=1), [1, 0, 0, 0, 0])


@pytest.fixture(scope="module")
def model(corpus):
    config = tiny(model__positions="rotary", model__init_scale=0.2)
    graph = build(config.model, corpus.tokenizer.num_pieces, 64)
    mesh = make_mesh(Mesh(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        yield graph, jax.jit(lambda: graph.init(jax.random.key(0), sharded=True))(), corpus.tokenizer


PROMPTS = ["def ", "import os\n\nclass A:\n", "x"]


def test_greedy_decoding_is_the_path_of_the_full_model(model):
    graph, parameters, tokenizer = model
    limit, ids = 20, [tokenizer.document_id, *tokenizer.encode(PROMPTS[1])]
    expected = list(ids)

    @jax.jit
    def next_token(tokens, length):
        context = Context(jnp.arange(64)[None], (jnp.arange(64) < length)[None].astype(jnp.int32))
        module = graph.module(parameters)
        return jnp.argmax(module.logits(module(tokens, context)[0])[0, length - 1])

    for _ in range(limit):
        padded = np.pad(expected, (0, 64 - len(expected)))[None].astype(np.int32)
        expected.append(int(next_token(padded, len(expected))))
        if expected[-1] == tokenizer.document_id:
            break
    out = generate(graph, parameters, tokenizer, [PROMPTS[1]], limit, GREEDY)[0]
    assert out == tokenizer.decode([t for t in expected[len(ids) :] if t != tokenizer.document_id])


def test_a_prompt_s_text_does_not_depend_on_its_neighbours(model):
    graph, parameters, tokenizer = model
    together = generate(graph, parameters, tokenizer, PROMPTS, 16, GREEDY)
    apart = [generate(graph, parameters, tokenizer, [prompt], 16, GREEDY)[0] for prompt in PROMPTS]
    assert together == apart


def test_a_seed_gives_the_same_text_on_any_mesh(model, eight):
    graph, parameters, tokenizer = model
    run = lambda parameters, seed: generate(graph, parameters, tokenizer, PROMPTS[:2], 16, Sampling(seed=seed))
    first = run(parameters, 0)
    assert run(parameters, 0) == first and run(parameters, 1) != first and first[0] != first[1]


def test_other_mesh_same_text(model, eight):
    graph, parameters, tokenizer = model
    first = generate(graph, parameters, tokenizer, PROMPTS, 16, GREEDY)
    with jax.set_mesh(make_mesh(Mesh(2, 1, 4), eight)):
        sharded = jax.jit(lambda: graph.init(jax.random.key(0), sharded=True))()
        assert generate(graph, sharded, tokenizer, PROMPTS, 16, GREEDY) == first


def test_more_than_the_model_sees_is_refused(model):
    graph, parameters, tokenizer = model
    with pytest.raises(UserError, match="at most"):
        generate(graph, parameters, tokenizer, ["def "], 64, GREEDY)
    with pytest.raises(UserError, match="shorten the prompt"):
        generate(graph, parameters, tokenizer, ["x = 1\n" * 64], 1, GREEDY)
    room = 64 - 1 - len(tokenizer.encode("def "))
    assert generate(graph, parameters, tokenizer, ["def "], room, GREEDY)


def test_the_command_prints_prompts_and_continuations(finished):
    arguments = (
        "generate",
        "--model",
        str(finished),
        "--prompt",
        "def ",
        "--prompt",
        "class ",
        "--max_new_tokens",
        "8",
    )
    first, again = command(*arguments), command(*arguments)
    assert first.returncode == 0, first.stderr
    assert first.stdout == again.stdout and first.stdout.startswith("def ") and "\n\nclass " in first.stdout


def test_without_a_prompt_it_asks(finished):
    result = command("generate", "--model", str(finished), "--max_new_tokens", "4", input="def \n\n")
    assert result.returncode == 0 and "def " in result.stdout and "a prompt a line" in result.stderr
