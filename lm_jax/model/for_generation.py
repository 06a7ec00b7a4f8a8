"""A model's parameters as generation reads them."""

import jax.numpy as jnp
from flax import nnx

from lm_jax.model.layers import Declaration
from lm_jax.model.unstacked import Turned, Unstacked
from lm_jax.sharding import platform, ways

Path = tuple[str, ...]
DENSE = "kernel", "lora_a", "lora_b"  # names of the parameters of `layers.Dense`


def unstacked(declarations: dict[Path, Declaration], parameters: dict) -> dict:
    """A copy in which every stack [L, ...] is L arrays (`Unstacked`); on a CPU the kernels of dense layers are `Turned`, too."""
    on_cpu = platform() == "cpu" and ways("length") == 1

    def of(path: Path, x):
        declared, is_dense = declarations[path], path[-1] in DENSE
        if "layers" not in declared.axes:
            return x
        if on_cpu and is_dense and len(declared.layers) == 1:  # else of experts
            num = len(declared.inputs)
            x = Turned(jnp.moveaxis(x, range(1, 1 + num), range(-num, 0)))
        return Unstacked.of(x)

    flat = nnx.traversals.flatten_mapping(parameters)
    made: dict = nnx.traversals.unflatten_mapping({path: of(path, x) for path, x in flat.items()})
    return made
