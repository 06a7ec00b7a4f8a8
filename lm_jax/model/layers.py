"""Layers: a parameter is declared once (shape, dtype, logical axes, initialiser, input and output dims), without an array.

Shape suffixes: B batch, T length, N tokens (B and T as one dim), D model, I inputs, O outputs, R rank of an adapter.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable, Collection
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from lm_jax.config import Model
from lm_jax.model.unstacked import Turned, times_few
from lm_jax.sharding import constrain, einsum, mesh_axes, platform, reshape, stored, ways

Tree = TypeVar("Tree")  # of arrays

Make = Callable[[jax.Array], jax.Array]  # a key -> an array


@dataclasses.dataclass(frozen=True)
class Declaration:
    """A parameter before its array exists.

    `inputs` and `outputs` are the dims that a product maps from and to: weight decay, Muon and Adafactor read them.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    initializer: Callable[..., jax.Array]
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    layers: tuple[int, ...] = ()  # the leading dims over which matrices are stacked: layers, experts
    dtype: jnp.dtype = jnp.dtype("float32")


def declare(
    shape: Collection[int],
    axes: Collection[str],
    initializer: Callable[..., jax.Array],
    inputs: tuple[int, ...] = (),
    outputs: tuple[int, ...] = (),
    layers: tuple[int, ...] = (),
) -> nnx.Param:
    """A parameter with its declaration as metadata and a shape instead of an array."""
    assert len(shape) == len(axes)
    declared = Declaration(tuple(shape), tuple(axes), initializer, inputs, outputs, layers)
    return nnx.Param(jax.ShapeDtypeStruct(declared.shape, declared.dtype), declared=declared)


def normal(stddev: float) -> Callable[..., jax.Array]:
    """Initialiser: normal numbers with mean 0."""
    return lambda key, shape, dtype, layout: stddev * jax.random.normal(key, shape, dtype, out_sharding=layout)


def constant(value: float) -> Callable[..., jax.Array]:
    """Initialiser: one value everywhere."""
    return lambda key, shape, dtype, layout: jnp.full(shape, value, dtype, out_sharding=layout)


def make(declared: Declaration, path: tuple[str, ...], root: jax.Array, sharded: bool) -> jax.Array:
    """The initial value, the same bits on every mesh: its key is the root folded with crc32(path) and the index of the layer."""
    key = jax.random.fold_in(root, zlib.crc32("/".join(path).encode()))
    num_stacked = len(declared.layers)
    layout = lambda dims: PartitionSpec(*stored(declared.axes)[dims]) if sharded else None
    inner = slice(num_stacked, None)
    create = lambda key: declared.initializer(key, declared.shape[inner], declared.dtype, layout(inner))
    for dim in reversed(range(num_stacked)):
        create = repeated(create, declared.shape[dim], layout(slice(dim, dim + 1)))
    return create(key)


def repeated(create: Make, size: int, layout: PartitionSpec | None) -> Make:
    """`create` for `size` layers (or experts, laid out so), each with the key folded with the index of the layer."""
    index = lambda: jnp.arange(size, out_sharding=layout)
    return lambda key: jax.vmap(create)(jax.vmap(lambda layer: jax.random.fold_in(key, layer))(index()))


class Dense(nnx.Module):
    """Affine map [B, T, *inputs] -> [B, T, *outputs], with an adapter where `lora.py` adds one.

    On a CPU the product is one of matrices, [B*T, I] x [I, O]: those of more dims take half as long again. Elsewhere, and where
    rows are split over devices, the dims stay, for the compiler to lay out: a reshape would copy the gathered kernel.
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

    def __call__(self, x: jax.Array) -> jax.Array:
        """-> [B, T, *outputs] in the dtype of `x`."""
        declared = self.kernel.get_metadata("declared")
        axes = declared.axes[len(declared.layers) :]
        outputs, flat = axes[self.num_inputs :], platform() == "cpu" and ways("length") == 1
        whole = *x.shape[:2], *declared.shape[len(declared.layers) + self.num_inputs :]
        if flat:
            x = reshape(x, (whole[0] * whole[1], math.prod(x.shape[2:])), "tokens", axes[0])
        y = product(x, self.kernel, flat)
        if self.lora_a is not None and self.lora_b is not None:
            y = y + self.lora_scale * product(product(x, self.lora_a, flat), self.lora_b, flat)
        if self.bias is not None:
            bias = constrain(self.bias[...], *outputs)
            y = add_bias(y, reshape(bias, y.shape[1:], outputs[0]) if flat else bias)
        return reshape(y, whole, "batch", "length", *outputs) if flat else y


def product(x: jax.Array, parameter: nnx.Param, flat: bool) -> jax.Array:
    """`x` [B, T, *inputs] times the parameter of one layer -> [B, T, *outputs]; flat: `x` [N, I] -> [N, O].

    A sum over devices that have parts of the inputs is scattered over them by tokens, as a stream is.
    """
    declared = parameter.get_metadata("declared")
    axes, num_inputs = declared.axes[len(declared.layers) :], len(declared.inputs)
    if flat and isinstance(turned := parameter.get_value(), Turned):
        kernel = constrain(turned.kernel.astype(x.dtype), *axes[num_inputs:], *axes[:num_inputs])
        return times_few(reshape(kernel, (-1, x.shape[1]), axes[num_inputs], axes[0]), x, axes[num_inputs])
    if flat:
        return einsum("NI,IO->NO", x, as_matrix(parameter, x.dtype), "tokens", axes[num_inputs])
    inputs, outputs = "IJ"[:num_inputs], "OP"[: len(declared.outputs)]
    kernel = constrain(parameter[...].astype(x.dtype), *axes)
    length = "stream" if mesh_axes(axes[0]) and x.shape[1] % ways("stream") == 0 else "length"
    return einsum(f"BT{inputs},{inputs}{outputs}->BT{outputs}", x, kernel, "batch", length, *axes[num_inputs:])


@jax.custom_vjp
def add_bias(y: jax.Array, bias: jax.Array) -> jax.Array:
    """The sum y + bias, over the last dims of `y`, in float32, in the dtype of y.

    The gradient of the bias is a sum over all tokens in float32. Below float32 it reads the gradient of y as it is stored: fused
    with what makes that, a GPU computes it once more, and slowly.
    """
    return (y.astype(bias.dtype) + bias[(None,) * (y.ndim - bias.ndim)]).astype(y.dtype)


def _add_bias_backward(bias: jax.Array, of_y: jax.Array) -> tuple[jax.Array, jax.Array]:
    if of_y.dtype != jnp.float32:
        of_y = jax.lax.optimization_barrier(of_y)
    return of_y, of_y.astype(jnp.float32).sum(tuple(range(of_y.ndim - bias.ndim)))


add_bias.defvjp(lambda y, bias: (add_bias(y, bias), bias), _add_bias_backward)


def written(x: Tree) -> Tree:
    """`x`, written to memory once: a TPU's compiler would compute it anew inside every product that reads it."""
    return jax.lax.optimization_barrier(x) if platform() == "tpu" else x


def tokens_of(batch: int, length: int) -> tuple[str, tuple[int, ...], tuple[str, ...]]:
    """The tokens of a product: their letters in its formula, their sizes, their logical axes: one dim if that moves nothing."""
    return ("BT", (batch, length), ("batch", "length")) if ways("length") > 1 else ("N", (batch * length,), ("tokens",))


def as_matrix(parameter: nnx.Param, dtype: DTypeLike) -> jax.Array:
    """The parameter of one layer as a matrix [I, O] in `dtype`."""
    declared = parameter.get_metadata("declared")
    axes, num_inputs = declared.axes[len(declared.layers) :], len(declared.inputs)
    sizes = parameter[...].shape
    both = math.prod(sizes[:num_inputs]), math.prod(sizes[num_inputs:])
    x = constrain(parameter[...].astype(dtype), *axes)
    return reshape(x, both, axes[0], axes[num_inputs])


class Norm(nnx.Module):
    """LayerNorm (arXiv:1607.06450) or RMSNorm (arXiv:1910.07467) over the last dims, {axis: size}, in float32."""

    def __init__(self, dims: dict[str, int], kind: str, epsilon: float, bias: bool):
        self.kind, self.epsilon, self.axes = kind, epsilon, tuple(dims)
        sizes = tuple(dims.values())
        self.scale = declare(sizes, self.axes, constant(1.0))
        self.bias = declare(sizes, self.axes, constant(0.0)) if bias and kind == "layernorm" else None

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """-> like `x`, in its dtype."""
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
    """A norm over the model dim, of the kind `config.norm`."""
    return Norm({"model": config.model_dim}, config.norm, config.norm_epsilon, config.bias)


def capped(logits: jax.Array, cap: float) -> jax.Array:
    """Logits bounded by -cap and cap, nearly unchanged near 0 (Gemma 2, arXiv:2408.00118, section 2)."""
    return cap * jnp.tanh(logits / cap)


def split(block: nnx.Module) -> tuple[tuple[nnx.GraphDef, nnx.State], dict]:
    """A module -> ((graph definition, state), parameters as a plain nested dict); `merge` is the way back."""
    graph, state = nnx.split(block)
    return (graph, state), nnx.to_pure_dict(state)


def merge(graph_and_state: tuple[nnx.GraphDef, nnx.State], parameters: dict) -> nnx.Module:
    """The module that `split` took apart, with these parameters in place."""
    graph, state = graph_and_state
    state = jax.tree.map(lambda leaf: leaf, state)  # copies containers, no arrays: the next line writes in place
    nnx.replace_by_pure_dict(state, parameters)
    module: nnx.Module = nnx.merge(graph, state)
    return module
