"""Low-rank adapters beside dense layers (LoRA, Hu et al., arXiv:2106.09685): added by pattern, merged into the kernels."""

import math

import jax.numpy as jnp
from flax import nnx

from lm_jax.config import Model
from lm_jax.model.layers import Declaration, Dense, constant, declare, normal
from lm_jax.sharding import automatic
from lm_jax.trainable import matching


def adapt(model: nnx.Module, config: Model) -> None:
    """Adds an adapter to each dense layer that `config.lora_pattern` matches. Raises UserError where it matches none."""
    dense = {"/".join(map(str, path)): part for path, part in nnx.iter_modules(model) if isinstance(part, Dense)}
    for path in matching("model.lora_pattern", config.lora_pattern, dense):
        add_adapter(dense[path], config.lora_rank, config.lora_alpha)


def add_adapter(dense: Dense, rank: int, alpha: float) -> None:
    """Declares an adapter beside the kernel W of a dense layer: x W + alpha / rank * x A B. B is zero at first."""
    kernel = dense.kernel.get_metadata("declared")
    start, middle = len(kernel.layers), len(kernel.layers) + len(kernel.inputs)
    parts = lambda dims: (dims[:start], dims[start:middle], dims[middle:])
    (layers, inputs, outputs), (of_layers, of_inputs, of_outputs) = parts(kernel.shape), parts(kernel.axes)
    stddev = 1 / math.sqrt(math.prod(inputs))
    shape, axes = (*layers, *inputs, rank), (*of_layers, *of_inputs, "rank")
    dense.lora_a = declare(shape, axes, normal(stddev), kernel.inputs, (middle,), kernel.layers)
    shape, axes = (*layers, rank, *outputs), (*of_layers, "rank", *of_outputs)
    dims = tuple(range(start + 1, start + 1 + len(outputs)))
    dense.lora_b = declare(shape, axes, constant(0.0), (start,), dims, kernel.layers)
    dense.lora_scale = alpha / rank


def merged(parameters: dict, declarations: dict[tuple[str, ...], Declaration], config: Model) -> dict:
    """The parameters of the same model without adapters: W + alpha / rank * A B, laid out as W is."""
    flat, scale = nnx.traversals.flatten_mapping(parameters), config.lora_alpha / max(1, config.lora_rank)
    for path in [path for path in flat if path[-1] == "lora_a"]:
        layers = [declarations[path].shape[dim] for dim in declarations[path].layers]

        def add(kernel, a, b, layers=layers):
            a, b = a.reshape(*layers, -1, config.lora_rank), b.reshape(*layers, config.lora_rank, -1)
            return kernel + scale * jnp.matmul(a, b, precision="highest").reshape(kernel.shape)

        a, b, kernel = flat.pop(path), flat.pop((*path[:-1], "lora_b")), (*path[:-1], "kernel")
        flat[kernel] = automatic(add, flat[kernel], flat[kernel], a, b)
    return nnx.traversals.unflatten_mapping(flat)
