"""A model without its arrays: its config here and its config.json there, by the tables of families.py.

Nothing is guessed: a config.json is refused that does not say all that a model is, and a model that no config.json can say.
"""

import dataclasses
from typing import Any, NamedTuple

from lm_jax.config import Config, Model, default_config
from lm_jax.config_check import resolve_found
from lm_jax.convert import encoders, families, heads
from lm_jax.convert.config_fields import per_layer
from lm_jax.errors import UserError
from lm_jax.model.build import ModelDef, build
from lm_jax.model_config import OBJECTIVES, OF_TRAINING

FAMILIES = families.FAMILIES | encoders.FAMILIES
WITHOUT_TABLE = ("rotary", "relative")  # positions that any length has


class Description(NamedTuple):
    """A model without its arrays: what config.json says."""

    family: str
    config: Config
    vocab_size: int
    content: dict[str, Any]


def describe(content: Any, where: str, tokenizer: str) -> Description:
    """What a config.json says, `where` for messages. Raises UserError for what it lacks and what is not supported."""
    if not isinstance(content, dict):
        raise UserError(f"{where} is no JSON object")
    name = content.get("model_type")
    if name == "gemma3":
        raise UserError(f"{where}: model_type = 'gemma3' is the model with images; its text part is 'gemma3_text'")
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(f"{where}: model_type = {name!r} is not supported; known are {', '.join(FAMILIES)}")
    if "quantization_config" in content:
        raise UserError(f"{where}: quantised weights are not read; take the model's own weights")
    family = FAMILIES[name]
    reader = family.reader(name, content, where)
    length = reader.size(family.length) - family.first_position
    vocab_size = reader.size("vocab_size", largest=2**31 - 1)
    config = default_config()
    config.model.update(family.read(reader))
    config.model.compute_dtype = "float32"  # a model of others' making, computed as they prove theirs
    config.data.sequence_length, config.data.tokenizer = max(length, 2), tokenizer
    config.data.objective = OBJECTIVES.get(config.model.kind, ("causal",))[0]
    heads.read(family, content, where, config)
    try:
        return Description(name, resolve_found(config), vocab_size, content)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def graph_of(described: Description) -> ModelDef:
    """The model, built without arrays."""
    return build(described.config.model, described.vocab_size, described.config.data.sequence_length)


def what_it_is(model: Model) -> dict[str, Any]:
    """The settings of a model that a config.json must say, {name: value}; what is written has its adapters merged."""
    found = {name: value for name, value in dataclasses.asdict(model).items() if name not in OF_TRAINING}
    windows = tuple(per_layer(model, model.window))
    of_rotary = {"rotary_base", "rotary_scaling", "rotary_scaling_kind", "rotary_share", "rotary_local_base"}
    unused = set() if model.positions == "rotary" else of_rotary
    unused |= set() if model.num_experts else {"experts_per_token"}
    unused |= set() if model.qk_norm else {"qk_norm_whole"}
    unused |= set() if model.rotary_scaling[0] != 1 and model.rotary_scaling[3] else {"rotary_scaling_kind"}
    if model.rotary_scaling[0] == 1:
        found["rotary_scaling"] = 1
    if model.rotary_local_base in (0.0, model.rotary_base) and model.rotary_scaling[0] == 1 or not any(windows):
        found["rotary_local_base"] = model.rotary_base
    found |= {
        "window": windows,
        "qkv_bias": model.qkv_bias or model.bias,
        "rotary_share": tuple(per_layer(model, model.rotary_share)),
    }
    return {name: value for name, value in found.items() if name not in unused}


def description_of(config: Config, vocab_size: int, ids: dict[str, Any] | None = None, context: int = 0) -> Description:
    """The family that can say all that a model is, and its config.json, with the fields `ids` of its text.

    `context` is the longest text, in tokens, of a model whose positions have no table. Raises UserError that names what the
    nearest family cannot say.
    """
    reasons, kind = {}, config.model.kind
    length = config.data.sequence_length
    for name, family in FAMILIES.items():
        if family.kind != kind or not family.is_written or config.model.head not in ("", *family.heads):
            continue
        content: dict[str, Any] = {"model_type": name, "architectures": [family.architecture]}
        content.update(dtype="float32", torch_dtype="float32", vocab_size=vocab_size, **(ids or {}))
        content[family.length] = max(length, context) if config.model.positions in WITHOUT_TABLE else length
        if kind == "transformer":  # a family's own may be beyond this vocabulary: then no model is built
            content.setdefault("pad_token_id", None)
        content |= family.write(config.model) | heads.written(family, config.model)
        found = describe(content, name, "bytes")
        here, there = what_it_is(config.model), what_it_is(found.config.model)
        differing = [key for key in here.keys() | there.keys() if here.get(key) != there.get(key)]
        if not differing:
            return found
        reasons[name] = [f"{key} = {here.get(key)!r} ({there.get(key)!r} there)" for key in sorted(differing)]
    if not reasons:
        head = f" with the head {config.model.head!r} of this task" if config.model.head else ""
        raise UserError(f"no Hugging Face family is of config.model.kind = {kind}{head}")
    name, differing = min(reasons.items(), key=lambda item: len(item[1]))
    raise UserError(
        f"no Hugging Face family has this model; nearest is {name}, and yours differs in config.model {', '.join(differing)}\n"
        "experiments/small_decoders.py has families that can be exported"
    )
