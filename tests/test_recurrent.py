"""The cells are those of flax.nnx, and what they cost is counted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import tiny

from lm_jax.model.attention import Context
from lm_jax.model.build import build
from lm_jax.model.layers import merge, split
from lm_jax.model.recurrent import CELLS, Layer
from lm_jax.plan import counts

THEIRS = {"rnn": nnx.SimpleCell, "gru": nnx.GRUCell, "lstm": nnx.OptimizedLSTMCell}
B, T, D = 3, 10, 16


@pytest.mark.parametrize("kind", CELLS)
def test_a_layer_is_the_cell_of_flax_over_time(kind):
    """The same weights, two segments in a row: each is what flax gives for it alone."""
    cell = THEIRS[kind](D, D, rngs=nnx.Rngs(0))
    bias = (cell.dense_h if kind == "lstm" else cell.dense_i).bias
    bias[...] = jax.random.normal(jax.random.key(1), bias.shape)
    parameters = {
        "input": {"kernel": cell.dense_i.kernel[...], "bias": bias[...]},
        "recurrent": cell.dense_h.kernel[...],
    }
    layer = merge(split(Layer(tiny(model__kind=kind, model__model_dim=D).model))[0], parameters)
    x = jax.random.normal(jax.random.key(2), (B, T, D))
    segments = jnp.where(jnp.arange(T) < 4, 1, 2)[None].repeat(B, 0)
    positions = jnp.where(jnp.arange(T) < 4, jnp.arange(T), jnp.arange(T) - 4)[None].repeat(B, 0)
    empty = tuple(jnp.zeros((B, D)) for _ in range(CELLS[kind].num_states))
    found, state = layer(x, Context(positions, segments), empty)
    alone = nnx.RNN(cell)
    expected = jnp.concatenate([alone(x[:, :4]), alone(x[:, 4:])], axis=1)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_array_equal(state[0], found[:, -1])
    padded, kept = layer(x, Context(positions, segments.at[:, 7:].set(0)), empty)
    np.testing.assert_array_equal(kept[0], padded[:, 6])


def test_a_recurrent_model_is_counted():
    """Six FLOPs a parameter inside a product, nothing for pairs of tokens: its cost does not grow with the length."""
    config = tiny(model__kind="lstm")
    counted = counts.count(config, build(config.model, 512, 64).declarations)
    assert counted.parameters == 512 * 64 + 2 * (64 * 256 * 2 + 256)
    assert counted.flops_per_token == 6 * (512 * 64 + 2 * 64 * 256 * 2)
    longer = tiny(model__kind="lstm", data__sequence_length=128)
    assert counts.count(longer, build(config.model, 512, 128).declarations).flops_per_token == counted.flops_per_token
