"""The fields of config.json files, each described once for both ways: how it is read, and how it is written.

A `Part` is one field, or a few that only make sense together. A family is a tuple of parts, written in their order.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from lm_jax.config import Model
from lm_jax.convert.config_reader import LARGEST, HFConfigReader
from lm_jax.convert.rotary import read_rope, write_rope
from lm_jax.errors import UserError

Settings = dict[str, Any]


class Part(NamedTuple):
    """Some fields of a config.json, and the settings of `config.Model` that they stand for."""

    defaults: Settings  # what `transformers` takes where the file has no such field; `...`: the file must have it
    read: Callable[[HFConfigReader], Settings] = lambda reader: {}
    write: Callable[[Model], Settings] = lambda model: {}


class Kind(NamedTuple):
    """How the value of one field is read and written."""

    read: Callable[[HFConfigReader, str], Any]
    write: Callable[[Any], Any] = lambda value: value


def choice(known: dict[str, str]) -> Kind:
    """One word of {theirs: ours}. Of several for one meaning the first is written; by default the first of all."""
    words = {ours: theirs for theirs, ours in reversed(known.items())}
    return Kind(lambda reader, name: reader.choice(name, known), lambda ours: words.get(ours, next(iter(known))))


ACTIVATIONS = {
    **{"silu": "silu", "swish": "silu", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu"},
    **{"gelu": "gelu_exact", "relu": "relu"},
}
SIZE = Kind(lambda reader, name: reader.size(name))
COUNT = Kind(lambda reader, name: reader.size(name, largest=LARGEST))  # of layers, or of experts
DERIVED = Kind(lambda reader, name: reader.size(name, 0))  # 0: follows from others
NUMBER = Kind(lambda reader, name: reader(name, float))
FLAG = Kind(lambda reader, name: reader(name, bool))
ACTIVATION = choice(ACTIVATIONS)
GEMMA_ACTIVATION = ACTIVATION._replace(
    write=lambda ours: ACTIVATION.write(ours).replace("gelu_new", "gelu_pytorch_tanh")
)


def field(theirs: str, ours: str, kind: Kind = SIZE, default: Any = ...) -> Part:
    """One field that is one setting."""
    return Part(
        {theirs: default},
        lambda reader: {ours: kind.read(reader, theirs)},
        lambda model: {theirs: kind.write(getattr(model, ours))},
    )


def must_say(*names: str) -> Part:
    """Fields that `describe` reads: how many tokens there are, and how long a text may be."""
    return Part(dict.fromkeys(names, ...))


def only(**values: Any) -> Part:
    """Fields with one supported value, which is their default as well; not written."""

    def read(reader: HFConfigReader) -> Settings:
        reader.only(**values)
        return {}

    return Part(values, read)


def written(**values: Any) -> Part:
    """Fields that are written for other readers and not read here."""
    return Part({}, write=lambda model: values)


def only_written(**values: Any) -> Part:
    """Fields with one supported value, which is written."""
    return only(**values)._replace(write=written(**values).write)


def always(**settings: Any) -> Part:
    """Settings of every model of a family, whatever its config.json says."""
    return Part({}, lambda reader: settings)


def per_layer(model: Model, setting: tuple) -> list:
    """A setting that has one value for each layer of a period, for every layer."""
    return list(setting) * (model.num_layers // len(setting))


def repeating(layers: list) -> tuple:
    """The shortest pattern that repeated gives the layers."""
    sizes = (n for n in range(1, len(layers) + 1) if len(layers) % n == 0)
    return tuple(next(layers[:n] for n in sizes if layers == layers[:n] * (len(layers) // n)))


# Windows


def window_part(read: Callable[[HFConfigReader], Settings], **defaults: Any) -> Part:
    """The window fields of a family, with their defaults."""

    def write(model: Model) -> Settings:
        window = max(model.window)
        kinds = ["sliding_attention" if size else "full_attention" for size in per_layer(model, model.window)]
        fields = {
            **{"use_sliding_window": window > 0, "sliding_window": window or None, "layer_types": kinds},
            **{"max_window_layers": 0, "no_rope_layers": [int(x > 0) for x in per_layer(model, model.rotary_share)]},
        }
        return {name: value for name, value in fields.items() if name in defaults}

    return Part(defaults, read, write)


def window_of(reader: HFConfigReader) -> int:
    """The window that a config names, 0 where there is none or it is switched off."""
    off = "use_sliding_window" in reader.defaults and not reader("use_sliding_window", bool)
    return 0 if off else reader.size("sliding_window", 0)


def _one_window(reader: HFConfigReader) -> Settings:
    return {"window": (window_of(reader),)}


def window_of_each(reader: HFConfigReader, is_local: Callable[[int], bool]) -> list[int]:
    """The window of each layer: by `layer_types`, or by `is_local(layer)` where the config does not have them."""
    num, window = reader.size("num_hidden_layers", largest=LARGEST), window_of(reader)
    kinds = reader("layer_types", list, ["sliding_attention" if is_local(i) else "full_attention" for i in range(num)])
    if len(kinds) != num or not {"sliding_attention", "full_attention"}.issuperset(map(str, kinds)):
        raise UserError(f"{reader.where}: layer_types are not sliding_attention or full_attention of {num} layers")
    if "sliding_attention" in kinds and not window:
        raise UserError(f"{reader.where}: sliding_attention without a sliding_window")
    return [window if kind == "sliding_attention" else 0 for kind in kinds]


def _read_qwen_windows(reader: HFConfigReader) -> Settings:
    window, first = window_of(reader), reader("max_window_layers", int)
    return {"window": repeating(window_of_each(reader, lambda layer: window > 0 and layer >= first))}


def _read_gemma2_windows(reader: HFConfigReader) -> Settings:
    return {"window": repeating(window_of_each(reader, lambda layer: layer % 2 == 0))}


def _read_gemma3_windows(reader: HFConfigReader) -> Settings:
    every = reader.size("sliding_window_pattern")
    return {"window": repeating(window_of_each(reader, lambda layer: (layer + 1) % every != 0))}


def _read_smollm3_windows(reader: HFConfigReader) -> Settings:
    """Layers of `no_rope_layers` 0 have no positions, and a window where there is one."""
    num, every = reader.size("num_hidden_layers", largest=LARGEST), reader.size("no_rope_layer_interval")
    with_rope = reader("no_rope_layers", list, [int((layer + 1) % every != 0) for layer in range(num)])
    if len(with_rope) != num or not all(type(x) is int and x in (0, 1) for x in with_rope):
        raise UserError(f"{reader.where}: no_rope_layers are not 0 or 1 of {num} layers")
    window = window_of(reader)
    windows = window_of_each(reader, lambda layer: window > 0 and not with_rope[layer])
    pattern, share = zip(*repeating(list(zip(windows, map(float, with_rope), strict=True))), strict=True)
    return {"window": pattern, "rotary_share": share if len(set(share)) > 1 else share[:1]}


WINDOW = window_part(_one_window, sliding_window=None)
SWITCHED_WINDOW = window_part(_one_window, use_sliding_window=False, sliding_window=4096)
QWEN_WINDOWS = window_part(
    _read_qwen_windows, use_sliding_window=False, sliding_window=4096, max_window_layers=28, layer_types=None
)
GEMMA2_WINDOWS = window_part(_read_gemma2_windows, sliding_window=4096, layer_types=None)
GEMMA3_WINDOWS = window_part(_read_gemma3_windows, sliding_window=4096, sliding_window_pattern=6, layer_types=None)
SMOLLM3_WINDOWS = window_part(
    _read_smollm3_windows,
    **{"use_sliding_window": False, "sliding_window": None, "layer_types": None},
    **{"no_rope_layers": None, "no_rope_layer_interval": 4},
)

# Positions

ROPE_FIELDS = {"rope_theta": 10_000.0, "rope_scaling": None, "rope_parameters": None, "partial_rotary_factor": 1.0}
ROPE = Part(ROPE_FIELDS, read_rope, write_rope)


def _write_unscaled_rope(model: Model) -> Settings:
    parameters = {"rope_type": "default", "rope_theta": model.rotary_base, **_write_rope_share(model)}
    return {"rope_theta": model.rotary_base, "rope_scaling": None, "rope_parameters": parameters}


def _write_rope_share(model: Model) -> Settings:
    return {"partial_rotary_factor": model.rotary_share[0] or 1.0}


PHI3_ROPE = Part(ROPE_FIELDS, lambda reader: read_rope(reader, known=("default",), partial=True), _write_unscaled_rope)
PHI3_ROPE_SHARE = Part({}, write=_write_rope_share)  # once more, beside the others


def _read_gemma3_rope(reader: HFConfigReader) -> Settings:
    """Layers with a window have a base of their own."""
    reader.inside("rope_parameters", {"full_attention": {}, "sliding_attention": {}}).nothing_else("rotary positions")
    local = read_rope(reader, "sliding_attention", "rope_local_base_freq")
    if local["rotary_scaling"][0] != 1:
        raise UserError(f"{reader.where}: scaled rotary positions in layers with a window are not supported")
    base = local["rotary_base"] if any(_read_gemma3_windows(reader)["window"]) else 0.0
    return {"rotary_local_base": base} | read_rope(reader, "full_attention")


def _write_gemma3_rope(model: Model) -> Settings:
    fields, local = write_rope(model), {"rope_type": "default"} | _write_local_rope(model, "rope_theta")
    return fields | {"rope_parameters": {"full_attention": fields["rope_parameters"], "sliding_attention": local}}


def _write_local_rope(model: Model, name: str = "rope_local_base_freq") -> Settings:
    return {name: model.rotary_local_base or model.rotary_base}


GEMMA3_ROPE = Part(
    ROPE_FIELDS | {"rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0}, _read_gemma3_rope, _write_gemma3_rope
)
GEMMA3_LOCAL_ROPE = Part({}, write=_write_local_rope)  # once more, for old readers

# Biases, experts, multipliers


def _read_biases(reader: HFConfigReader) -> Settings:
    biases = reader("attention_bias", bool), reader("mlp_bias", bool)
    if biases[0] != biases[1]:
        raise UserError(f"{reader.where}: attention_bias and mlp_bias differ, which is not supported")
    return {"bias": biases[0]}


NO_BIASES = only(attention_bias=False, mlp_bias=False)
BIASES = Part(NO_BIASES.defaults, _read_biases, lambda model: {"attention_bias": model.bias, "mlp_bias": model.bias})


def experts(*names: str, num: int | None, chosen: int) -> Part:
    """Fields of a mixture of experts; their number may stand under any of `names`, of which the first is written."""

    def read(reader: HFConfigReader) -> Settings:
        found = {name: reader.size(name, largest=LARGEST) for name in names if name in reader}
        found = found or {names[-1]: reader.size(names[-1], largest=LARGEST)}
        if len(set(found.values())) > 1:
            said = ", ".join(f"{name} = {number}" for name, number in found.items())
            raise UserError(f"{reader.where}: {said}; leave one of them")
        both = {"num_experts": next(iter(found.values()))}
        return both | {"experts_per_token": reader.size("num_experts_per_tok", largest=LARGEST)}

    def write(model: Model) -> Settings:
        number = max(1, model.num_experts)
        return {names[0]: number, "num_experts_per_tok": min(model.experts_per_token, number)}

    return Part(dict.fromkeys(names) | {names[-1]: num, "num_experts_per_tok": chosen}, read, write)


def _read_gemma_scales(reader: HFConfigReader) -> Settings:
    scalar, head_dim = reader.positive("query_pre_attn_scalar"), reader.size("head_dim", 0)
    caps = tuple(reader.positive(f"{name}_logit_softcapping", 0.0) for name in ("attn", "final"))
    return {"multipliers": (1.0, 1.0, 0.0 if scalar == head_dim else scalar**-0.5, 1.0), "logit_softcap": caps}


def _write_gemma_scales(model: Model) -> Settings:
    scale, (attention, output) = model.multipliers[2], model.logit_softcap
    scalar = round(min(max(scale, 1e-6), 1e6) ** -2) if scale else model.head_dim
    caps = {"attn_logit_softcapping": attention or None, "final_logit_softcapping": output or None}
    return {"query_pre_attn_scalar": max(scalar, 1)} | caps


def gemma_scales(attention: float | None, output: float | None) -> Part:
    """What products of queries and keys are divided by, and the soft caps of attention and of logits."""
    caps = {"attn_logit_softcapping": attention, "final_logit_softcapping": output}
    return Part({"query_pre_attn_scalar": 256.0} | caps, _read_gemma_scales, _write_gemma_scales)


MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")


def _read_multipliers(reader: HFConfigReader) -> Settings:
    embedding, branch, attention, output = (reader.positive(name) for name in MULTIPLIERS)
    head_dim = reader.size("head_dim", 0) or reader.size("hidden_size") // reader.size("num_attention_heads")
    usual = head_dim > 0 and attention == head_dim**-0.5
    return {"multipliers": (embedding, branch, 0.0 if usual else attention, output)}


def _write_multipliers(model: Model) -> Settings:
    embedding, branch, attention, output = model.multipliers
    return dict(zip(MULTIPLIERS, (embedding, branch, attention or model.head_dim**-0.5, output), strict=True))


GRANITE_MULTIPLIERS = Part(dict.fromkeys(MULTIPLIERS, 1.0), _read_multipliers, _write_multipliers)
