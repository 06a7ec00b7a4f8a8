"""The families as tables: our parameters, their tensors in a Hugging Face folder, and what lies between; and the two configs.

A row is (our path, their name, kind). A row whose path a model does not have (no bias, no norm of heads) does not count. Kinds:
    linear    [outputs, inputs], as torch.nn.Linear has it
    conv      [inputs, outputs], as GPT-2's Conv1D has it; rows with one name are parts of it, side by side
    vector    as it is, flat
    table     [pieces, dim]; ours is padded to a multiple of 128 pieces
    one_more  a scale w of which 1 + w is used (Gemma)
    query     the same, and a query is also divided by another root than that of its width
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from lm_jax.config import Model, UserError
from lm_jax.convert.fields import DEFAULTS, LARGEST, Theirs

Row = tuple[str, str, str]
LAYER, EXPERT = "{layer}", "{expert}"


class Family(NamedTuple):
    """`read` makes settings of `config.Model` of a config.json, `write` the way back, for what `read` gives."""

    architecture: str
    prefix: str  # of their names, but for the output table's
    rows: tuple[Row, ...]
    read: Callable[[Theirs], dict[str, Any]]
    write: Callable[[Model], dict[str, Any]]
    length: str = "max_position_embeddings"  # where the longest text is said
    kind: str = "transformer"  # `model.kind` of its models
    optional: tuple[str, ...] = ()  # their names start so where a folder may lack them: nought, then


ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu": "gelu_exact",
    "relu": "relu",
}
OFF = (1.0, 1.0, 4.0, 8192.0)  # model.rotary_scaling


# Of each way to scale rotary positions the fields that are read, with their defaults (`...`: none).
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": ...},
    "llama3": dict.fromkeys(["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"], ...),
}
EVERY_ROPE = {"rope_type": "default", "type": "default", "rope_theta": None, "partial_rotary_factor": 1.0}


def read_rope(part: Theirs, longest: int) -> tuple:
    """`model.rotary_scaling` of an object that tells of rotary positions; `longest` where it does not say of which length."""
    kind = part("rope_type" if "rope_type" in part else "type", str)
    if kind not in ROPES or part.content.get("type", kind) not in (kind, None):
        known = ", ".join(ROPES)
        raise UserError(f"{part.where}: rope_type = {kind!r} is not supported; known are {known}, one of them")
    part.defaults = EVERY_ROPE | ROPES[kind]
    if "original_max_position_embeddings" in part.defaults:
        part.defaults["original_max_position_embeddings"] = longest
    part.nothing_else(f"rotary positions of type {kind}")
    part.only(partial_rotary_factor=1.0)
    if kind == "default":
        return OFF
    if kind == "linear":
        return (part("factor", float), *OFF[1:3], 0.0)
    low, high = part("low_freq_factor", float), part("high_freq_factor", float)
    return part("factor", float), low, high, float(part.size("original_max_position_embeddings"))


def read_rotary(theirs: Theirs, layers: str = "", base: str = "rope_theta") -> tuple[float, tuple]:
    """(base, scaling), in `rope_parameters` (new), or `rope_scaling` and the field `base` (old), which may not differ.

    `layers` is the kind of layers where `rope_parameters` tells kinds apart; `rope_scaling` is not of those with a window.
    """
    names = ["rope_parameters"] if layers == "sliding_attention" else ["rope_parameters", "rope_scaling"]
    parts = [theirs.inside(name, EVERY_ROPE, layers) for name in names]
    parts = [part for part in parts if part.content]
    scalings = {read_rope(part, theirs.size("max_position_embeddings")) for part in parts} or {OFF}
    bases = {part("rope_theta", float) for part in parts if "rope_theta" in part}
    bases |= {theirs(base, float)} if base in theirs or not bases else set()
    if len(bases) > 1 or len(scalings) > 1:
        what = f"{base} is {' and '.join(map(str, sorted(bases)))}" if len(bases) > 1 else "scalings differ"
        raise UserError(f"{theirs.where}: rotary positions are said twice, and {what}; leave one of them")
    return bases.pop(), scalings.pop()


def write_rotary(model: Model) -> dict[str, Any]:
    """In the fields that new readers look at, and those that old ones do."""
    factor, low, high, length = model.rotary_scaling
    scaling: dict[str, Any] = {"rope_type": "default"}
    if factor != 1:
        scaling = {"rope_type": "linear", "factor": factor}
    if factor != 1 and length:
        ends = {"low_freq_factor": low, "high_freq_factor": high, "original_max_position_embeddings": int(length)}
        scaling = scaling | {"rope_type": "llama3"} | ends
    old = {"rope_theta": model.rotary_base, "rope_scaling": scaling if factor != 1 else None}
    return old | {"rope_parameters": scaling | {"rope_theta": model.rotary_base}}


def repeating(windows: list[int]) -> tuple[int, ...]:
    """The shortest pattern whose repetition the layers' windows are."""
    sizes = (n for n in range(1, len(windows) + 1) if len(windows) % n == 0)
    return tuple(next(windows[:n] for n in sizes if windows == windows[:n] * (len(windows) // n)))


def windows(model: Model) -> list[int]:
    """Of each layer."""
    return list(model.window) * (model.num_layers // len(model.window))


def layer_types(model: Model) -> list[str]:
    return ["sliding_attention" if window else "full_attention" for window in windows(model)]


def read_windows(theirs: Theirs, is_local: Callable[[int], bool]) -> tuple[int, ...]:
    """By `layer_types`, or by `is_local(layer)` where the config does not have them."""
    num, window = theirs.size("num_hidden_layers", largest=LARGEST), theirs.size("sliding_window", 0)
    kinds = theirs("layer_types", list, ["sliding_attention" if is_local(i) else "full_attention" for i in range(num)])
    if len(kinds) != num or not {"sliding_attention", "full_attention"}.issuperset(map(str, kinds)):
        raise UserError(f"{theirs.where}: layer_types are not sliding_attention or full_attention of {num} layers")
    if "sliding_attention" in kinds and not window:
        raise UserError(f"{theirs.where}: sliding_attention without a sliding_window")
    return repeating([window if kind == "sliding_attention" else 0 for kind in kinds])


def read_shared(theirs: Theirs, layers: str = "", activation: str = "hidden_act") -> dict[str, Any]:
    """What Llama, Mistral, Qwen, Gemma and Mixtral have in common."""
    base, scaling = read_rotary(theirs, layers)
    return {
        "num_layers": theirs.size("num_hidden_layers", largest=LARGEST),
        "model_dim": theirs.size("hidden_size"),
        "num_heads": theirs.size("num_attention_heads"),
        "num_kv_heads": theirs.size("num_key_value_heads", 0),
        "head_dim": theirs.size("head_dim", 0),
        "mlp_dim": theirs.size("intermediate_size"),
        "norm_epsilon": theirs("rms_norm_eps", float),
        "activation": theirs.choice(activation, ACTIVATIONS),
        "tie_embedding": theirs("tie_word_embeddings", bool),
        **{"bias": False, "gated": True, "norm": "rmsnorm", "positions": "rotary"},
        **{"rotary_base": base, "rotary_scaling": scaling},
    }


def write_shared(model: Model) -> dict[str, Any]:
    return {
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.model_dim,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "intermediate_size": model.mlp_dim,
        "rms_norm_eps": model.norm_epsilon,
        "hidden_act": their_activation(model.activation),
        "tie_word_embeddings": model.tie_embedding,
        **write_rotary(model),
    }


def read_llama(theirs: Theirs) -> dict[str, Any]:
    theirs.only(rope_interleaved=False)
    biases = theirs("attention_bias", bool), theirs("mlp_bias", bool)
    if biases[0] != biases[1]:
        raise UserError(f"{theirs.where}: attention_bias and mlp_bias differ, which is not supported")
    return read_shared(theirs) | {"bias": biases[0]}


def write_llama(model: Model) -> dict[str, Any]:
    return write_shared(model) | {"attention_bias": model.bias, "mlp_bias": model.bias}


def their_activation(ours: str) -> str:
    return next(theirs for theirs, name in ACTIVATIONS.items() if name == ours)


def read_mistral(theirs: Theirs) -> dict[str, Any]:
    theirs.only(attention_bias=False, mlp_bias=False)
    window = theirs.size("sliding_window", 0)
    return read_shared(theirs) | {"window": (window,)}


def write_mistral(model: Model) -> dict[str, Any]:
    return write_shared(model) | {"sliding_window": model.window[0] or None}


def read_qwen(theirs: Theirs) -> dict[str, Any]:
    """Qwen2 has biases of queries, keys and values, Qwen3 norms of heads."""
    theirs.only(attention_bias=False, mlp_bias=False)
    second = theirs.content.get("model_type") == "qwen2"
    if second:
        theirs.only(use_mrope=False)
    used, first = theirs("use_sliding_window", bool), theirs("max_window_layers", int)
    window = read_windows(theirs, lambda layer: layer >= first) if used else (0,)
    return read_shared(theirs) | {"qkv_bias": second, "qk_norm": not second, "window": window}


def write_qwen(model: Model) -> dict[str, Any]:
    window = max(model.window)
    used = {"use_sliding_window": window > 0, "sliding_window": window or None, "layer_types": layer_types(model)}
    return write_shared(model) | used | {"max_window_layers": 0}


def read_gemma(theirs: Theirs) -> dict[str, Any]:
    theirs.only(final_logit_softcapping=None, attn_logit_softcapping=None, use_bidirectional_attention=False)
    theirs.only(attention_bias=False, mlp_bias=False)
    theirs.inside("rope_parameters", {"full_attention": {}, "sliding_attention": {}}).nothing_else("rotary positions")
    if not (pre := theirs("query_pre_attn_scalar", float)) > 0:
        raise UserError(f"{theirs.where}: query_pre_attn_scalar = {pre}: expected more than 0")
    every = theirs.size("sliding_window_pattern")
    near, near_scaling = read_rotary(theirs, "sliding_attention", "rope_local_base_freq")
    if near_scaling != OFF:
        raise UserError(f"{theirs.where}: scaled rotary positions in layers with a window are not supported")
    return read_shared(theirs, "full_attention", "hidden_activation") | {
        "rotary_local_base": near,
        "window": read_windows(theirs, lambda layer: (layer + 1) % every != 0),
        **{"qk_norm": True, "norm_place": "both", "scale_embedding": True},
    }


def query_scale(family: str, content: dict[str, Any], head_dim: int) -> float:
    """What queries are multiplied by where their products with keys are divided by another root than that of `head_dim`."""
    name = "query_pre_attn_scalar"
    pre = Theirs(content, "config.json", DEFAULTS[family])(name, float) if name in DEFAULTS[family] else head_dim
    return math.sqrt(head_dim / pre)


def write_gemma(model: Model) -> dict[str, Any]:
    near = {"rope_type": "default", "rope_theta": model.rotary_local_base or model.rotary_base}
    ours = write_shared(model)
    del ours["hidden_act"]
    return ours | {
        "hidden_activation": their_activation(model.activation).replace("gelu_new", "gelu_pytorch_tanh"),
        "sliding_window": max(model.window) or None,
        "layer_types": layer_types(model),
        "query_pre_attn_scalar": model.head_dim,
        "rope_local_base_freq": near["rope_theta"],
        "rope_parameters": {"full_attention": ours["rope_parameters"], "sliding_attention": near},
    }


def read_mixtral(theirs: Theirs) -> dict[str, Any]:
    names = {"num_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok"}
    return read_mistral(theirs) | {ours: theirs.size(name, largest=LARGEST) for ours, name in names.items()}


def write_mixtral(model: Model) -> dict[str, Any]:
    experts = max(1, model.num_experts)
    chosen = min(model.experts_per_token, experts)
    return write_mistral(model) | {"num_local_experts": experts, "num_experts_per_tok": chosen}


def read_gpt2(theirs: Theirs) -> dict[str, Any]:
    theirs.only(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False)
    return {
        "num_layers": theirs.size("n_layer", largest=LARGEST),
        "model_dim": theirs.size("n_embd"),
        "num_heads": theirs.size("n_head"),
        "mlp_dim": theirs.size("n_inner", 0),
        "norm_epsilon": theirs("layer_norm_epsilon", float),
        "activation": theirs.choice("activation_function", ACTIVATIONS),
        "tie_embedding": theirs("tie_word_embeddings", bool),
    }


def write_gpt2(model: Model) -> dict[str, Any]:
    return {
        "n_layer": model.num_layers,
        "n_embd": model.model_dim,
        "n_head": model.num_heads,
        "n_inner": model.mlp_dim,
        "layer_norm_epsilon": model.norm_epsilon,
        "activation_function": their_activation(model.activation),
        "tie_word_embeddings": model.tie_embedding,
    }


def dense(ours: str, theirs: str, kind: str = "linear") -> tuple[Row, ...]:
    return (f"{ours}/kernel", f"{theirs}.weight", kind), (f"{ours}/bias", f"{theirs}.bias", "vector")


def norm(ours: str, theirs: str, kind: str = "vector") -> tuple[Row, ...]:
    return (f"{ours}/scale", f"{theirs}.weight", kind), (f"{ours}/bias", f"{theirs}.bias", "vector")


TABLES: tuple[Row, ...] = (
    ("embedding/table", "embed_tokens.weight", "table"),
    ("unembedding/table", "lm_head.weight", "table"),
)
ATTENTION: tuple[Row, ...] = (
    *dense("block/attention/query", "layers.{layer}.self_attn.q_proj"),
    *dense("block/attention/key", "layers.{layer}.self_attn.k_proj"),
    *dense("block/attention/value", "layers.{layer}.self_attn.v_proj"),
    *dense("block/attention/output", "layers.{layer}.self_attn.o_proj"),
)
MLP: tuple[Row, ...] = (
    *dense("block/mlp/gate", "layers.{layer}.mlp.gate_proj"),
    *dense("block/mlp/up", "layers.{layer}.mlp.up_proj"),
    *dense("block/mlp/down", "layers.{layer}.mlp.down_proj"),
)
NORMS: tuple[Row, ...] = (
    *norm("block/attention_norm", "layers.{layer}.input_layernorm"),
    *norm("block/attention/query_norm", "layers.{layer}.self_attn.q_norm"),
    *norm("block/attention/key_norm", "layers.{layer}.self_attn.k_norm"),
    *norm("block/mlp_norm", "layers.{layer}.post_attention_layernorm"),
    *norm("norm", "norm"),
)
GEMMA_NORMS: tuple[Row, ...] = (
    *norm("block/attention_norm", "layers.{layer}.input_layernorm", "one_more"),
    *norm("block/attention/query_norm", "layers.{layer}.self_attn.q_norm", "query"),
    *norm("block/attention/key_norm", "layers.{layer}.self_attn.k_norm", "one_more"),
    *norm("block/attention_post_norm", "layers.{layer}.post_attention_layernorm", "one_more"),
    *norm("block/mlp_norm", "layers.{layer}.pre_feedforward_layernorm", "one_more"),
    *norm("block/mlp_post_norm", "layers.{layer}.post_feedforward_layernorm", "one_more"),
    *norm("norm", "norm", "one_more"),
)
EXPERTS: tuple[Row, ...] = (
    *dense("block/mlp/router", "layers.{layer}.block_sparse_moe.gate"),
    ("block/mlp/gate", "layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight", "linear"),
    ("block/mlp/up", "layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight", "linear"),
    ("block/mlp/down", "layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight", "linear"),
)
GPT2: tuple[Row, ...] = (
    ("embedding/table", "wte.weight", "table"),
    ("unembedding/table", "lm_head.weight", "table"),
    ("positions/table", "wpe.weight", "conv"),
    *norm("block/attention_norm", "h.{layer}.ln_1"),
    *dense("block/attention/query", "h.{layer}.attn.c_attn", "conv"),
    *dense("block/attention/key", "h.{layer}.attn.c_attn", "conv"),
    *dense("block/attention/value", "h.{layer}.attn.c_attn", "conv"),
    *dense("block/attention/output", "h.{layer}.attn.c_proj", "conv"),
    *norm("block/mlp_norm", "h.{layer}.ln_2"),
    *dense("block/mlp/up", "h.{layer}.mlp.c_fc", "conv"),
    *dense("block/mlp/down", "h.{layer}.mlp.c_proj", "conv"),
    *norm("norm", "ln_f"),
)
LLAMA = TABLES + ATTENTION + MLP + NORMS

# In the order in which an export looks for a family that can say all that a model is.
FAMILIES: dict[str, Family] = {
    "gpt2": Family("GPT2LMHeadModel", "transformer.", GPT2, read_gpt2, write_gpt2, "n_positions"),
    "llama": Family("LlamaForCausalLM", "model.", LLAMA, read_llama, write_llama),
    "mistral": Family("MistralForCausalLM", "model.", LLAMA, read_mistral, write_mistral),
    "qwen2": Family("Qwen2ForCausalLM", "model.", LLAMA, read_qwen, write_qwen),
    "qwen3": Family("Qwen3ForCausalLM", "model.", LLAMA, read_qwen, write_qwen),
    "gemma3_text": Family(
        "Gemma3ForCausalLM", "model.", TABLES + ATTENTION + MLP + GEMMA_NORMS, read_gemma, write_gemma
    ),
    "mixtral": Family(
        "MixtralForCausalLM", "model.", TABLES + ATTENTION + NORMS + EXPERTS, read_mixtral, write_mixtral
    ),
}
