"""Evaluation counts every token once, whatever the batch and the devices."""

import itertools
import json

import jax
import numpy as np
import pytest
from helpers import command, tiny

from lm_jax import evaluate, load_model
from lm_jax.config import Mesh
from lm_jax.data import loader, shards
from lm_jax.evaluator import Evaluator
from lm_jax.loss import token_losses
from lm_jax.mesh import make_mesh
from lm_jax.model.attention import Context
from lm_jax.model.build import build


@pytest.fixture(scope="module")
def held(corpus) -> loader.HeldOutRows:
    """37 documents, cut to at most 200 tokens each, so that rows start and end inside documents."""
    split = corpus.splits["train"]
    documents = [
        split.tokens[start : min(start + 200, end)]
        for start, end in zip(split.offsets[:37], split.offsets[1:38], strict=True)
    ]
    offsets = np.cumsum([0, *map(len, documents)])
    num_bytes = sum(corpus.tokenizer.bytes_per_piece[document].sum() for document in documents)
    return loader.HeldOutRows(
        shards.Split(np.concatenate(documents), offsets, int(num_bytes)), 64, corpus.tokenizer.document_id
    )


@pytest.fixture(scope="module")
def graph(corpus):
    return build(tiny().model, corpus.tokenizer.vocab_size, 64)


@pytest.fixture(scope="module")
def by_hand(corpus, graph, held):
    """(sum of losses, tokens) one row at a time, added up in float64 on the host."""
    parameters = jax.jit(lambda: graph.init(jax.random.key(0)))()

    @jax.jit
    def losses(tokens, targets, context):
        model = graph.module(parameters)
        return token_losses(model.logits(model(tokens[None], context)[0]), targets[None])[0]

    total, count = 0.0, 0
    for i in range(held.num_rows):
        row = held.row(i)
        context = Context(row["positions"][None], row["segment_ids"][None])
        out = np.asarray(losses(row["tokens"], row["targets"], context), np.float64)
        total, count = total + (out * row["loss_mask"]).sum(), count + int(row["loss_mask"].sum())
    return total, count


FEW = ((1, 1), (8, 4))  # the other pairs are proofs


@pytest.mark.parametrize(
    ("devices", "batch"),
    [
        pytest.param(*pair, marks=[] if pair in FEW else pytest.mark.proof)
        for pair in itertools.product((1, 8), (1, 4, 8))
    ],
)
def test_37_documents_whatever_the_batch_and_devices(corpus, graph, held, by_hand, devices, batch):
    assert held.split.num_documents == 37 and held.num_rows % 8
    mesh = make_mesh(Mesh(), jax.devices()[:devices])
    with jax.set_mesh(mesh):
        parameters = jax.jit(lambda: graph.init(jax.random.key(0), sharded=True))()
        totals = Evaluator(graph, mesh, corpus.tokenizer, batch * devices)(parameters, held)
    assert totals.tokens == by_hand[1] == len(held.split.tokens)
    assert totals.num_bytes == held.split.num_bytes
    np.testing.assert_allclose(totals.loss, by_hand[0], rtol=1e-6)


def test_a_part_of_the_rows(corpus, graph, held):
    mesh = make_mesh(Mesh(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        parameters = jax.jit(lambda: graph.init(jax.random.key(0), sharded=True))()
        totals = Evaluator(graph, mesh, corpus.tokenizer, 4)(parameters, held, num_rows=3)
    assert totals.tokens == 3 * 64


@pytest.mark.parametrize("inside", ["checkpoints", "checkpoints/2", "checkpoints/2/parameters", "config.json", ""])
def test_what_lies_inside_of_a_run_is_taken_for_it(finished, inside):
    found = load_model.locate(str(finished / inside))
    assert (str(found.workdir), found.step) == (str(finished), 2)
    assert load_model.whole(str(finished / inside)) == f"{finished}" + "@2" * ("/2" in inside)


def test_the_command_prints_one_object(finished, eight, capsys):
    """On one device as a real process, on eight in this one."""
    line = ["--model", str(finished), "--split", "test", "--batch_size"]
    result = command("evaluate", *line, "1")
    assert result.returncode == 0, result.stderr
    capsys.readouterr()
    assert evaluate.main([*line, "8"]) == 0
    printed = {1: result.stdout, 8: capsys.readouterr().out}
    found = {devices: json.loads(text.strip().split("\n")[-1]) for devices, text in printed.items()}
    assert found[1]["split"] == "test" and found[1]["step"] == 2
    assert found[1]["documents"] > 5 and found[1]["tokens"] == found[8]["tokens"]
    np.testing.assert_allclose(found[1]["eval/loss"], found[8]["eval/loss"], rtol=1e-6)
    bits = found[1]["eval/loss"] / np.log(2) * found[1]["tokens"] / found[1]["bytes"]
    np.testing.assert_allclose(found[1]["eval/bits_per_byte"], bits, rtol=1e-6)
