"""Layers: a parameter is declared once (shape, dtype, logical axes, initialiser, input and output dims), without an array.

Shape suffixes: B batch, T length, N tokens (B and T as one dim), D model, I inputs, O outputs, R rank of an adapter.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable, Collection

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from lm_jax.config import Model
from lm_jax.sharding import constrain, einsum, reshape, stored, take

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

    The product is one of matrices, [B*T, I] x [I, O]: on a CPU products of rank 3 take half as long again.
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
            y_NO = add_bias(y_NO, reshape(bias, (y_NO.shape[1],), outputs[0]))
        return reshape(y_NO, (batch, length, *sizes), "batch", "length", *outputs)


@jax.custom_vjp
def add_bias(y_NO: jax.Array, bias_O: jax.Array) -> jax.Array:
    """The sum y + bias, in float32, in the dtype of y.

    The gradient of the bias is a sum over all tokens in float32. Below float32 it reads the gradient of y as it is stored: fused
    with what makes that, a GPU computes it once more, and slowly.
    """
    return (y_NO.astype(bias_O.dtype) + bias_O[None]).astype(y_NO.dtype)


def _add_bias_backward(_: None, of_y_NO: jax.Array) -> tuple[jax.Array, jax.Array]:
    if of_y_NO.dtype != jnp.float32:
        of_y_NO = jax.lax.optimization_barrier(of_y_NO)
    return of_y_NO, of_y_NO.astype(jnp.float32).sum(0)


add_bias.defvjp(lambda y_NO, bias_O: (add_bias(y_NO, bias_O), None), _add_bias_backward)


def as_matrix(parameter: nnx.Param, dtype: DTypeLike) -> tuple[jax.Array, str]:
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


class Embedding(nnx.Module):
    """A table with a vector for each id."""

    def __init__(self, num: int, dim: int, axis: str, stddev: float):
        self.table = declare((num, dim), (axis, "model"), normal(stddev), (0,), (1,))

    def __call__(self, ids_BT: jax.Array, dtype: DTypeLike) -> jax.Array:
        """-> [B, T, D] in `dtype`. The gradient of the table is a sum over tokens, in float32."""
        axes = self.table.get_metadata("declared").axes
        return take(constrain(self.table[...], *axes), ids_BT, "batch", "length", None).astype(dtype)


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
