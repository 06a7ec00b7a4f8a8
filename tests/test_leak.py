"""Documents packed into one row do not see each other: rows of the stream, the whole model, each attention backend."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny

from lm_jax.data import best_fit, packing, shards
from lm_jax.loss import batch_loss
from lm_jax.model.attention import Context
from lm_jax.model.build import build

LENGTH = 520  # more than one chunk of the chunked backend
SIZES = [180, 300, 40]


@functools.cache
def model(backend: str):
    config = tiny(model__attention=backend, model__window=(0, 100), data__sequence_length=LENGTH)
    graph = build(config.model, vocab_size=500, sequence_length=LENGTH)
    return graph, jax.jit(lambda: graph.init(jax.random.key(0)))()


def split(seed: int = 0) -> shards.Split:
    """Three documents; the seed changes the first alone."""
    tokens = np.random.RandomState(0).randint(0, 500, sum(SIZES))
    tokens[: SIZES[0]] = np.random.RandomState(seed).randint(0, 500, SIZES[0])
    return shards.Split(tokens.astype(np.uint16), np.cumsum([0, *SIZES]), 1)


def row(found: packing.Stream | best_fit.BestFit, i: int = 0) -> dict:
    return {name: jnp.asarray(x)[None] for name, x in found.row(i).items()}


@pytest.mark.parametrize("backend", ["xla", "chunked"])
def test_a_packed_loss_is_the_sum_of_the_losses_of_its_documents(backend):
    graph, parameters = model(backend)
    loss = jax.jit(lambda batch: batch_loss(graph, parameters, batch).loss)
    packed = best_fit.BestFit(split(), LENGTH, 0, document_id=499)
    assert packed.rows_per_epoch == 1
    alone = []
    for first, last in zip(split().offsets, split().offsets[1:], strict=False):
        tokens = split().tokens[first:last]
        one = shards.Split(tokens, np.array([0, len(tokens)]), 1)
        alone.append(float(loss(row(best_fit.BestFit(one, LENGTH, 0, document_id=499)))))
    np.testing.assert_allclose(float(loss(row(packed))), sum(alone), rtol=1e-6)


@pytest.mark.parametrize(
    ("backend", "way"),  # each once; the other two pairs are proofs
    [
        ("xla", "split"),
        ("chunked", "best_fit"),
        pytest.param("xla", "best_fit", marks=pytest.mark.proof),
        pytest.param("chunked", "split", marks=pytest.mark.proof),
    ],
)
def test_another_document_changes_no_bit_of_this_one(backend, way):
    graph, parameters = model(backend)
    make = lambda seed: (
        packing.Stream(split(seed), LENGTH, 0) if way == "split" else best_fit.BestFit(split(seed), LENGTH, 0, 499)
    )
    one, other = row(make(0)), row(make(1))
    changed = {int(segment) for segment in one["segment_ids"][one["tokens"] != other["tokens"]]}
    assert len(changed) == 1 and int(one["segment_ids"].max()) == 3
    kept = (one["segment_ids"] != changed.pop()) & (one["targets"] == other["targets"])

    @jax.jit
    def logits_and_gradient(batch):
        def of(parameters):
            module = graph.module(parameters)
            hidden, _ = module(batch["tokens"], Context(batch["positions"], batch["segment_ids"]), None)
            logits = module.logits(hidden)
            return jnp.where(kept[:, :, None], logits, 0).sum(), logits

        return jax.value_and_grad(of, has_aux=True)(parameters)

    (_, a), gradient_a = logits_and_gradient(one)
    (_, b), gradient_b = logits_and_gradient(other)
    np.testing.assert_array_equal(a[kept], b[kept])
    for x, y in zip(jax.tree.leaves(gradient_a["block_0"]), jax.tree.leaves(gradient_b["block_0"]), strict=True):
        np.testing.assert_array_equal(x, y)
