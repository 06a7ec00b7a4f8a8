"""Rotary positions in a config.json: `rope_parameters` (new), or `rope_theta` and `rope_scaling` (old), and what we call it."""

import math
from typing import Any

from lm_jax.config import Model
from lm_jax.convert.config_reader import HFConfigReader
from lm_jax.errors import UserError

OFF = (1.0, 1.0, 4.0, 8192.0)  # model.rotary_scaling
# Of each way to scale the fields that are read, with their defaults (`...`: none; of the length: the longest text's).
LENGTH = "original_max_position_embeddings"
KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": ...},
    "llama3": dict.fromkeys(["factor", "low_freq_factor", "high_freq_factor", LENGTH], ...),
    "yarn": {
        **{"factor": ..., LENGTH: ..., "beta_slow": 1.0, "beta_fast": 32.0, "truncate": True},
        **{"attention_factor": None, "mscale": None, "mscale_all_dim": None},
    },
}
EVERY = {"rope_type": "default", "type": "default", "rope_theta": None, "partial_rotary_factor": None}


def read_scaling(part: HFConfigReader, longest: int, known: tuple[str, ...]) -> tuple[str, tuple]:
    """(`model.rotary_scaling_kind`, `model.rotary_scaling`) of an object like `rope_parameters`. Raises UserError."""
    kind = part("rope_type" if "rope_type" in part else "type", str)
    if kind not in known or part.content.get("type", kind) not in (kind, None):
        raise UserError(
            f"{part.where}: rope_type = {kind!r} is not supported; known are {', '.join(known)}, one of them"
        )
    part.defaults = EVERY | KINDS[kind] | ({LENGTH: longest} if LENGTH in KINDS[kind] else {})
    part.nothing_else(f"rotary positions of type {kind}")
    if kind == "default":
        return "llama3", OFF
    factor = part("factor", float)
    if kind == "linear":
        return "llama3", (factor, *OFF[1:3], 0.0)
    length = float(part.size(LENGTH))
    if kind == "llama3":
        return kind, (factor, part("low_freq_factor", float), part("high_freq_factor", float), length)
    part.only(truncate=True, mscale=None, mscale_all_dim=None)
    usual = 0.1 * math.log(factor) + 1 if factor >= 1 else 1.0
    if not math.isclose(found := part("attention_factor", float, usual), usual, rel_tol=1e-6):
        raise UserError(f"{part.where}: attention_factor = {found} is not supported, only {usual}, that of its factor")
    return kind, (factor, part("beta_slow", float, 1.0), part("beta_fast", float, 32.0), length)


def read_rope(
    reader: HFConfigReader,
    layers: str = "",
    base: str = "rope_theta",
    known: tuple[str, ...] = tuple(KINDS),
    partial: bool = False,
) -> dict[str, Any]:
    """The settings of `config.Model` for rotary positions; what is said twice may not differ.

    `layers` is the kind of layers where `rope_parameters` tells kinds apart; `rope_scaling` is not of those with a window.
    `known` are the ways to scale that a family has, `partial` whether rope may be on a part of a head alone.
    """
    names = ["rope_parameters"] if layers == "sliding_attention" else ["rope_parameters", "rope_scaling"]
    parts = [part for name in names if (part := reader.inside(name, EVERY, layers)).content]
    scalings = {read_scaling(part, reader.size("max_position_embeddings"), known) for part in parts}
    share = "partial_rotary_factor"
    for said in () if partial else (reader, *parts):
        said.only(**{share: 1.0})
    bases = {part("rope_theta", float) for part in parts if "rope_theta" in part}
    shares = {part.positive(share) for part in parts if share in part}
    bases |= {reader(base, float)} if base in reader or not bases else set()
    shares |= {reader.positive(share)} if share in reader or not shares else set()
    for what, found in ((base, bases), (share, shares), ("scaling", scalings)):
        if len(found) > 1:
            both = " and ".join(map(str, sorted(found)))
            raise UserError(f"{reader.where}: rotary positions are said twice, {what} is {both}; leave one of them")
    kind, scaling = scalings.pop() if scalings else ("llama3", OFF)
    settings = {"rotary_base": bases.pop(), "rotary_scaling": scaling, "rotary_scaling_kind": kind}
    return settings | {"rotary_share": (shares.pop(),)}


def write_rope(model: Model) -> dict[str, Any]:
    """The fields of rotary positions, for new readers and for old ones."""
    factor, low, high, length = model.rotary_scaling
    scaling: dict[str, Any] = {"rope_type": "default"}
    if factor != 1:
        scaling = {"rope_type": "linear", "factor": factor}
    if factor != 1 and length:
        yarn = model.rotary_scaling_kind == "yarn"
        names = ("beta_slow", "beta_fast") if yarn else ("low_freq_factor", "high_freq_factor")
        ends = dict(zip(names, (low, high), strict=True)) | {LENGTH: max(1, int(length))}
        scaling = scaling | {"rope_type": model.rotary_scaling_kind} | ends
    old = {"rope_theta": model.rotary_base, "rope_scaling": scaling if factor != 1 else None}
    return old | {"rope_parameters": scaling | {"rope_theta": model.rotary_base}}
