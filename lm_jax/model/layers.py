"""Layers: a parameter is declared once (shape, dtype, logical axes, initialiser, input and output dims), without an array.

Shape suffixes: B batch, T length, N tokens (B and T as one dim), D model, I inputs, O outputs, R rank of an adapter.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from lm_jax.config import Model
from lm_jax.sharding import constrain, einsum, reshape, stored, take


@dataclasses.dataclass(frozen=True)
class Declaration:
    """A parameter before it exists. `inputs` and `outputs` are the dims that a product maps from and to; the optimizer's rules
    (weight decay, Muon, Adafactor) read them."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    initializer: Callable[..., jax.Array]
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    layers: tuple[int, ...] = ()  # leading dims over which matrices are stacked: layers, experts
    dtype: jnp.dtype = jnp.dtype("float32")


def declare(shape, axes, initializer, inputs=(), outputs=(), layers=()) -> nnx.Param:
    assert len(shape) == len(axes)
    declared = Declaration(tuple(shape), tuple(axes), initializer, inputs, outputs, layers)
    return nnx.Param(jax.ShapeDtypeStruct(declared.shape, declared.dtype), declared=declared)


def normal(stddev: float) -> Callable[..., jax.Array]:
    return lambda key, shape, dtype, layout: stddev * jax.random.normal(key, shape, dtype, out_sharding=layout)


def constant(value: float) -> Callable[..., jax.Array]:
    return lambda key, shape, dtype, layout: jnp.full(shape, value, dtype, out_sharding=layout)


def make(declared: Declaration, path: tuple[str, ...], root: jax.Array, sharded: bool) -> jax.Array:
    """The initial value, the same bits on every mesh: its key is the root folded with crc32(path) and the index of the layer."""
    key = jax.random.fold_in(root, zlib.crc32("/".join(path).encode()))
    num_stacked = len(declared.layers)
    layout = stored(declared.axes[num_stacked:]) if sharded else None
    create = lambda key: declared.initializer(key, declared.shape[num_stacked:], declared.dtype, layout)
    for size in reversed(declared.shape[:num_stacked]):
        create = repeated(create, size)
    return create(key)


def repeated(create: Callable[[jax.Array], jax.Array], size: int) -> Callable[[jax.Array], jax.Array]:
    """`create`, `size` times over, each with the key folded with its index."""
    return lambda key: jax.vmap(create)(jax.vmap(lambda layer: jax.random.fold_in(key, layer))(jnp.arange(size)))


def row_keys(root: jax.Array, name: str, step: jax.Array, layer: jax.Array | int, row_B: jax.Array) -> jax.Array:
    """One key a row: root folded with crc32(name), step, layer, row. No mesh, batch or process enters."""
    key = jax.random.fold_in(jax.random.fold_in(root, zlib.crc32(name.encode())), step)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.fold_in(key, layer), row_B)


@dataclasses.dataclass(frozen=True)
class Dropout:
    """Dropout of a batch, whose random numbers depend on the root key, the step and the rows [B] of the training stream."""

    root: jax.Array
    step: jax.Array
    row_B: jax.Array

    def __call__(self, x_BTD: jax.Array, rate: float, name: str, layer: jax.Array | int = 0) -> jax.Array:
        """Inverted dropout (arXiv:1207.0580) at a rate above 0, each row from its own key; `name` is the place in a layer."""
        keys_B = row_keys(self.root, f"dropout/{name}", self.step, layer, self.row_B)
        keep_BTD = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x_BTD.shape[1:]))(keys_B)
        return jnp.where(keep_BTD, x_BTD / (1 - rate), 0)


def apply_dropout(
    dropout: Dropout | None, x_BTD: jax.Array, rate: float, name: str, layer: jax.Array | int = 0
) -> jax.Array:
    """`x` with dropout; `x` itself outside of training (`dropout` is None) and at rate 0."""
    return dropout(x_BTD, rate, name, layer) if dropout and rate else x_BTD


class Dense(nnx.Module):
    """Affine map from the last `len(inputs)` dims: [B, T, *inputs] -> [B, T, *outputs].

    The product itself has two dims, [B*T, I] x [I, O]: on CPU products of rank 3 cost half as much again.
    """

    lora_a: nnx.Param | None = None
    lora_b: nnx.Param | None = None
    lora_scale = 0.0

    def __init__(self, inputs: dict[str, int], outputs: dict[str, int], stddev: float, bias: bool):
        num_inputs, num_dims = len(inputs), len(inputs) + len(outputs)
        self.num_inputs = num_inputs
        sizes = (*inputs.values(), *outputs.values())
        dims = tuple(range(num_inputs)), tuple(range(num_inputs, num_dims))
        self.kernel = declare(sizes, (*inputs, *outputs), normal(stddev), *dims)
        self.bias = declare(outputs.values(), outputs, constant(0.0)) if bias else None

    def adapt(self, rank: int, alpha: float) -> None:
        """An adapter beside the declared kernel (LoRA, arXiv:2106.09685): x W + alpha / rank * x A B. B is zero at first."""
        of = self.kernel.get_metadata("declared")
        start, middle = len(of.layers), len(of.layers) + len(of.inputs)
        parts = lambda dims: (dims[:start], dims[start:middle], dims[middle:])
        (layers, inputs, outputs), (of_layers, of_inputs, of_outputs) = parts(of.shape), parts(of.axes)
        self.lora_a = declare(
            (*layers, *inputs, rank), (*of_layers, *of_inputs, "rank"), normal(1 / math.sqrt(math.prod(inputs))),
            of.inputs, (middle,), of.layers,
        )  # fmt: skip
        dims = tuple(range(start + 1, start + 1 + len(outputs)))
        shape, axes = (*layers, rank, *outputs), (*of_layers, "rank", *of_outputs)
        self.lora_b = declare(shape, axes, constant(0.0), (start,), dims, of.layers)
        self.lora_scale = alpha / rank

    def __call__(self, x: jax.Array) -> jax.Array:
        of = self.kernel.get_metadata("declared")
        outputs, sizes = of.axes[-len(of.outputs) :], self.kernel[...].shape[self.num_inputs :]
        batch, length = x.shape[:2]
        kernel_IO, axis = as_matrix(self.kernel, x.dtype)
        x_NI = reshape(x, (batch * length, kernel_IO.shape[0]), "tokens", axis)
        y_NO = einsum("NI,IO->NO", x_NI, kernel_IO, "tokens", outputs[0])
        if self.lora_a is not None and self.lora_b is not None:
            a_IR, b_RO = (as_matrix(part, x.dtype)[0] for part in (self.lora_a, self.lora_b))
            x_NR = einsum("NI,IR->NR", x_NI, a_IR, "tokens", "rank")
            y_NO = y_NO + self.lora_scale * einsum("NR,RO->NO", x_NR, b_RO, "tokens", outputs[0])
        if self.bias is not None:
            bias = constrain(self.bias[...], *outputs)
            y_NO = add_bias(outputs[0], y_NO, reshape(bias, (y_NO.shape[1],), outputs[0]))
        return reshape(y_NO, (batch, length, *sizes), "batch", "length", *outputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def add_bias(axis: str, y_NO: jax.Array, bias_O: jax.Array) -> jax.Array:
    """y + bias in float32, in the dtype of y; `axis` is the logical axis of O.

    The gradient of the bias is a sum over all tokens, in float32. Below float32 it is a product with ones: a plain sum would be
    fused with what makes `y`'s gradient, which is then computed once more (0.29 ms a layer instead of 0.06, GPT-2 124M on an H200).
    """
    return (y_NO.astype(bias_O.dtype) + bias_O[None]).astype(y_NO.dtype)


def _add_bias_forward(axis: str, y_NO: jax.Array, bias_O: jax.Array):
    return add_bias(axis, y_NO, bias_O), None


def _add_bias_backward(axis: str, _, of_y_NO: jax.Array):
    if of_y_NO.dtype == jnp.float32:
        return of_y_NO, of_y_NO.sum(0)
    ones_NR = constrain(jnp.ones((of_y_NO.shape[0], 8), of_y_NO.dtype), "tokens", None)
    return of_y_NO, einsum("NR,NO->RO", ones_NR, of_y_NO, None, axis, dtype=jnp.float32)[0]


add_bias.defvjp(_add_bias_forward, _add_bias_backward)


def as_matrix(parameter: nnx.Param, dtype) -> tuple[jax.Array, str]:
    """The parameter of one layer as a matrix [I, O] in `dtype`, and the logical axis of I."""
    declared = parameter.get_metadata("declared")
    axes, num_inputs = declared.axes[len(declared.layers) :], len(declared.inputs)
    sizes = parameter[...].shape
    both = math.prod(sizes[:num_inputs]), math.prod(sizes[num_inputs:])
    x = constrain(parameter[...].astype(dtype), *axes)
    return reshape(x, both, axes[0], axes[num_inputs]), axes[0]


class Norm(nnx.Module):
    """LayerNorm (arXiv:1607.06450) or RMSNorm (arXiv:1910.07467) over the last dims, {axis: size}, in float32."""

    def __init__(self, dims: dict[str, int], kind: str, epsilon: float, bias: bool):
        self.kind, self.epsilon, self.axes = kind, epsilon, tuple(dims)
        sizes = tuple(dims.values())
        self.scale = declare(sizes, self.axes, constant(1.0))
        self.bias = declare(sizes, self.axes, constant(0.0)) if bias and kind == "layernorm" else None

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        num = len(self.axes)
        x, lead, last = x_BTD.astype(jnp.float32), (None,) * (x_BTD.ndim - num), tuple(range(-num, 0))
        if self.kind == "layernorm":
            x = x - x.mean(last, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(last, keepdims=True) + self.epsilon)
        x = x * constrain(self.scale[...], *self.axes)[lead]
        if self.bias is not None:
            x = x + constrain(self.bias[...], *self.axes)[lead]
        return x.astype(x_BTD.dtype)


def model_norm(config: Model) -> Norm:
    """A norm over the model dim, of the kind that the config names."""
    return Norm({"model": config.model_dim}, config.norm, config.norm_epsilon, config.bias)


class Embedding(nnx.Module):
    """A table of vectors, read by id."""

    def __init__(self, num: int, dim: int, axis: str, stddev: float):
        self.table = declare((num, dim), (axis, "model"), normal(stddev), (0,), (1,))

    def __call__(self, ids_BT: jax.Array, dtype) -> jax.Array:
        """-> [B, T, D] in `dtype`. The gradient of the table is a sum over tokens, in float32."""
        axes = self.table.get_metadata("declared").axes
        return take(constrain(self.table[...], *axes), ids_BT, "batch", "length", None).astype(dtype)


def capped(logits: jax.Array, cap: float) -> jax.Array:
    """Logits between -cap and cap, as they are near 0 (Gemma 2, arXiv:2408.00118, section 2)."""
    return cap * jnp.tanh(logits / cap)


def split(block: nnx.Module):
    """A module -> ((graph definition, state), parameters as a plain nested dict); `merge` is the way back."""
    graph, state = nnx.split(block)
    return (graph, state), nnx.to_pure_dict(state)


def merge(graph_and_state, parameters: dict) -> nnx.Module:
    """The module that `split` took apart, with these parameters in place."""
    graph, state = graph_and_state
    # A copy of the containers, not of arrays: `replace_by_pure_dict` writes in place.
    state = jax.tree.map(lambda leaf: leaf, state)
    nnx.replace_by_pure_dict(state, parameters)
    return nnx.merge(graph, state)
