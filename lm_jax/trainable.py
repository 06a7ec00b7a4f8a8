"""Which parameters of a model are trained, by a pattern over their paths, and the learning rate of each layer.

A parameter that is not trained has no gradient and no optimizer state, and no bit of it changes.
"""

import difflib
import re
from collections.abc import Iterable

import numpy as np
from flax.nnx import traversals

from lm_jax.config import Config, Model
from lm_jax.errors import UserError
from lm_jax.model.layers import Declaration

Path = tuple[str, ...]


def matching(key: str, pattern: str, paths: Iterable[str]) -> list[str]:
    """The paths in which the pattern that `config.<key>` holds is found; "" is found in all.

    Raises UserError where it is no regular expression, or is found in none, with the nearest parts of paths.
    """
    paths = list(paths)
    try:
        found = [path for path in paths if re.search(pattern, path)]
    except re.error as error:
        raise UserError(f"config.{key} = {pattern!r} is no regular expression: {error}") from None
    if not found:
        split = [path.split("/") for path in paths]
        parts = {"/".join(path[i:j]) for path in split for j in range(len(path) + 1) for i in range(j)}
        near = difflib.get_close_matches(pattern, sorted(parts), n=3, cutoff=0.5) or sorted({path[0] for path in split})
        raise UserError(
            f"config.{key} = {pattern!r} is found in none of the {len(paths)} paths there are; near are {', '.join(near)}\n"
            "all parameters: python -m lm_jax.verify --config ... --show"
        )
    return found


def trained_paths(config: Config, declarations: dict[Path, Declaration]) -> frozenset[Path]:
    """The parameters that are trained. Raises UserError for a pattern that names none."""
    names = {"/".join(path): path for path in declarations}
    return frozenset(names[name] for name in matching("optimizer.trainable", config.optimizer.trainable, names))


def partition_params(parameters: dict, paths: frozenset[Path]) -> tuple[dict, dict]:
    """A nested dict -> (the parameters at `paths`, the others), two nested dicts."""
    flat = traversals.flatten_mapping(parameters)
    inside, outside = ({path: x for path, x in flat.items() if (path in paths) is want} for want in (True, False))
    return traversals.unflatten_mapping(inside), traversals.unflatten_mapping(outside)


def merge_params(parameters: dict, part: dict) -> dict:
    """The union of two nested dicts; a parameter of `part` replaces one of the same path."""
    flat = traversals.flatten_mapping(parameters) | traversals.flatten_mapping(part)
    return traversals.unflatten_mapping(flat)


def rates(config: Config, declarations: dict[Path, Declaration]) -> dict[Path, np.ndarray]:
    """{path: factor of the learning rate}, layer_decay^depth: float32 [], or [layers, 1, ...] where layers are stacked.

    Lower layers learn slower (arXiv:2003.10555, appendix A; the depths are those of arXiv:2106.08254).
    """
    decay = config.optimizer.layer_decay
    return {
        path: np.asarray(decay ** depth(path, declared, config.model), np.float32)
        for path, declared in declarations.items()
    }


def depth(path: Path, declared: Declaration, config: Model) -> np.ndarray:
    """Counted from the output: 0 for heads and a final norm, 1 for the last layer, num_layers + 1 for embeddings."""
    if declared.axes[0] == "layers":
        num_periods, dims = declared.shape[0], (1,) * (len(declared.shape) - 1)
        period = config.num_layers // num_periods
        first = int(path[0].removeprefix("block_")) if period > 1 else 0
        return (config.num_layers - first - period * np.arange(num_periods)).reshape(-1, *dims)
    tables = {"positions", "segments", "buckets"}
    lowest = path[0].startswith("embedding") or declared.axes[0] in tables
    return np.array(config.num_layers + 1 if lowest else 0)
