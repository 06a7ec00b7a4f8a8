"""Low-rank adapters beside dense layers (LoRA, Hu et al., arXiv:2106.09685): added by pattern, merged into the kernels."""

import jax.numpy as jnp
from flax import nnx

from lm_jax.config import Model
from lm_jax.model.layers import Declaration, Dense
from lm_jax.sharding import automatic
from lm_jax.trainable import matching


def adapt(model: nnx.Module, config: Model) -> None:
    """Adds an adapter to each dense layer that `config.lora_pattern` matches. Raises UserError where it matches none."""
    dense = {"/".join(map(str, path)): part for path, part in nnx.iter_modules(model) if isinstance(part, Dense)}
    for path in matching("model.lora_pattern", config.lora_pattern, dense):
        dense[path].adapt(config.lora_rank, config.lora_alpha)


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
