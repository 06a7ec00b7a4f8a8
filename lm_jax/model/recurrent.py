"""Recurrent language models, the baselines that the Transformer replaced: same tables, loss, step and sharding.

Shape suffixes: B batch, T length, D model, G the outputs of all gates in one dim, L layers.

The cells compute what those of `flax.nnx` do (SimpleCell, GRUCell, OptimizedLSTMCell); a test compares them. Those create their
arrays at once, without declarations and meshes, and multiply the inputs token by token; here one product serves all tokens.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lm_jax.config import Model
from lm_jax.model.attention import Context
from lm_jax.model.dropout import Dropout, apply_dropout
from lm_jax.model.language_model import LanguageModel
from lm_jax.model.layers import Dense, declare, normal
from lm_jax.model.stack import run_layers, stacked
from lm_jax.sharding import constrain, einsum

State = tuple[jax.Array, ...]  # float32 [B, D] each, the cell's output first


def rnn(state: State, x_BG, h_BG) -> State:
    """Elman's network (Cognitive Science 14, 1990): h' = tanh(W x + U h + b)."""
    return (jnp.tanh(x_BG + h_BG),)


def gru(state: State, x_BG, h_BG) -> State:
    """Gated recurrent unit (arXiv:1406.1078), the reset gate after the product, gates r, z, n."""
    (x_r, x_z, x_n), (h_r, h_z, h_n) = jnp.split(x_BG, 3, axis=-1), jnp.split(h_BG, 3, axis=-1)
    update = jax.nn.sigmoid(x_z + h_z)
    new = jnp.tanh(x_n + jax.nn.sigmoid(x_r + h_r) * h_n)
    return ((1 - update) * new + update * state[0],)


def lstm(state: State, x_BG, h_BG) -> State:
    """Long short-term memory (Neural Computation 9, 1997) with forget gates (12, 2000), gates i, f, g, o."""
    enter, forget, new, leave = jnp.split(x_BG + h_BG, 4, axis=-1)
    cell = jax.nn.sigmoid(forget) * state[1] + jax.nn.sigmoid(enter) * jnp.tanh(new)
    return jax.nn.sigmoid(leave) * jnp.tanh(cell), cell


def open_forget_gates(key, shape: tuple[int], dtype, layout) -> jax.Array:
    """Biases of an LSTM whose forget gates start open, at 1 (Jozefowicz et al., ICML 2015); the others at 0."""
    return jnp.repeat(jnp.array([0, 1, 0, 0], dtype), shape[0] // 4)


class Cell(NamedTuple):
    """A recurrent cell: one step, and its sizes in multiples of D."""

    step: Callable[[State, jax.Array, jax.Array], State]  # (state, products of input [B, G], of last output) -> state
    num_states: int
    num_gates: int  # G / D


CELLS = {"rnn": Cell(rnn, 1, 1), "gru": Cell(gru, 1, 3), "lstm": Cell(lstm, 2, 4)}


class Layer(nnx.Module):
    """One cell over the tokens of a row. Its state is 0 before the first token of a segment; padding does not change it."""

    def __init__(self, config: Model):
        self.config = config
        dim, gates = config.model_dim, CELLS[config.kind].num_gates * config.model_dim
        self.input = Dense({"model": dim}, {"features": gates}, config.init_scale, config.bias)
        if config.bias and config.kind == "lstm":
            self.input.bias = declare((gates,), ("features",), open_forget_gates)
        self.recurrent = declare((dim, gates), ("model", "features"), normal(config.init_scale), (0,), (1,))

    def __call__(self, x_BTD: jax.Array, context: Context, state: State) -> tuple[jax.Array, State]:
        """-> [B, T, D], and the state after the last token."""
        kernel_DG = constrain(self.recurrent[...], "model", "features")  # float32: its gradient is a sum over time
        step = CELLS[self.config.kind].step

        def over_time(state: State, inputs):
            x_BG, position_B1, segment_B1 = inputs
            state = tuple(jnp.where((position_B1 == 0) & (segment_B1 > 0), 0, x_BD) for x_BD in state)
            h_BG = einsum("BD,DG->BG", state[0].astype(x_BTD.dtype), kernel_DG.astype(x_BTD.dtype), "batch", "features")
            after = step(state, x_BG.astype(jnp.float32), h_BG.astype(jnp.float32))
            state = tuple(jnp.where(segment_B1 > 0, new, old) for new, old in zip(after, state, strict=True))
            return state, state[0].astype(x_BTD.dtype)

        context_BT1 = [x_BT[:, :, None] for x_BT in context]
        inputs = jax.tree.map(lambda x: x.swapaxes(0, 1), (self.input(x_BTD), *context_BT1))
        state, y_TBD = jax.lax.scan(over_time, state, inputs)
        return y_TBD.swapaxes(0, 1), state


class Recurrent(LanguageModel):
    """Embedding, layers of cells, output table; dropout between layers, never over time (arXiv:1409.2329)."""

    def __init__(self, config: Model, vocab_size: int, sequence_length: int):
        super().__init__(config, vocab_size, sequence_length)
        self.layers = stacked(Layer(config), config.num_layers)

    @staticmethod
    def empty_caches(config: Model, batch: int, slots: int) -> State:
        """The states before the first token, zeros [L, B, D] each; they have one size for every length of text."""
        shape, axes = (config.num_layers, batch, config.model_dim), ("layers", "batch", None)
        return tuple(constrain(jnp.zeros(shape), *axes) for _ in range(CELLS[config.kind].num_states))

    def __call__(self, tokens_BT, context: Context, dropout: Dropout | None = None, caches=None):
        """int32 tokens [B, T] -> hidden states [B, T, D], and the states after the last token where `caches` are given."""
        config = self.config
        x_BTD = apply_dropout(dropout, self.embed(tokens_BT, context.positions), config.dropout, "embedding")

        def apply(layers, x_BTD, index, state):
            y_BTD, state = layers[0](x_BTD, context, state)
            return apply_dropout(dropout, y_BTD, config.dropout, "layer", index), state

        # A cell has nothing that is worth keeping: any `config.remat` recomputes it whole.
        remat = "full" if config.remat != "none" and caches is None else "none"
        states = self.empty_caches(config, len(tokens_BT), 0) if caches is None else caches
        x_BTD, states = run_layers([self.layers], apply, x_BTD, states, remat, config.unroll is True)
        return x_BTD.astype(jnp.dtype(config.compute_dtype)), None if caches is None else states

    def embed(self, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """int32 tokens [B, T] -> [B, T, D] in the compute dtype; a recurrent model needs no positions."""
        return self.embedding(tokens_BT, jnp.dtype(self.config.compute_dtype))
