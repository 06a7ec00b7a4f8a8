"""The families as tables: our parameters, their tensors in a Hugging Face folder, and what lies between; and the two configs.

A row is (our path, their name, kind). A row whose path a model does not have (no bias, no norm of heads) does not count. Kinds:
    linear    [outputs, inputs], as torch.nn.Linear has it
    conv      [inputs, outputs], as GPT-2's Conv1D has it
    vector    as it is, flat
    table     [pieces, dim]; ours is padded to a multiple of 128 pieces
    one_more  a scale w of which 1 + w is used (Gemma)
Rows that share a name are parts of one tensor, side by side: Phi-3's queries, keys and values.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from lm_jax.config import Model
from lm_jax.convert.fields import LARGEST, Theirs
from lm_jax.convert.rotary import read_rotary, write_rotary
from lm_jax.errors import UserError

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


def repeating(layers: list) -> tuple:
    """The shortest pattern whose repetition the layers are."""
    sizes = (n for n in range(1, len(layers) + 1) if len(layers) % n == 0)
    return tuple(next(layers[:n] for n in sizes if layers == layers[:n] * (len(layers) // n)))


def windows(model: Model) -> list[int]:
    """Of each layer."""
    return list(model.window) * (model.num_layers // len(model.window))


def shares(model: Model) -> list[float]:
    """Of each layer the share of a head that rotary positions turn."""
    return list(model.rotary_share) * (model.num_layers // len(model.rotary_share))


def layer_types(model: Model) -> list[str]:
    return ["sliding_attention" if window else "full_attention" for window in windows(model)]


def read_windows(theirs: Theirs, window: int, is_local: Callable[[int], bool]) -> list[int]:
    """Of each layer: by `layer_types`, or by `is_local(layer)` where the config does not have them."""
    num = theirs.size("num_hidden_layers", largest=LARGEST)
    kinds = theirs("layer_types", list, ["sliding_attention" if is_local(i) else "full_attention" for i in range(num)])
    if len(kinds) != num or not {"sliding_attention", "full_attention"}.issuperset(map(str, kinds)):
        raise UserError(f"{theirs.where}: layer_types are not sliding_attention or full_attention of {num} layers")
    if "sliding_attention" in kinds and not window:
        raise UserError(f"{theirs.where}: sliding_attention without a sliding_window")
    return [window if kind == "sliding_attention" else 0 for kind in kinds]


def read_shared(theirs: Theirs, mlp: str = "intermediate_size", activation: str = "hidden_act") -> dict[str, Any]:
    """What Llama and all that came after it have in common, but for rotary positions."""
    return {
        "num_layers": theirs.size("num_hidden_layers", largest=LARGEST),
        "model_dim": theirs.size("hidden_size"),
        "num_heads": theirs.size("num_attention_heads"),
        "num_kv_heads": theirs.size("num_key_value_heads", 0),
        "head_dim": theirs.size("head_dim", 0),
        "mlp_dim": theirs.size(mlp),
        "norm_epsilon": theirs("rms_norm_eps", float),
        "activation": theirs.choice(activation, ACTIVATIONS),
        "tie_embedding": theirs("tie_word_embeddings", bool),
        **{"bias": False, "gated": True, "norm": "rmsnorm", "positions": "rotary"},
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


def read_biased(theirs: Theirs) -> dict[str, Any]:
    """`read_shared` where a config says whether there are biases."""
    biases = theirs("attention_bias", bool), theirs("mlp_bias", bool)
    if biases[0] != biases[1]:
        raise UserError(f"{theirs.where}: attention_bias and mlp_bias differ, which is not supported")
    return read_shared(theirs) | {"bias": biases[0]}


def read_llama(theirs: Theirs) -> dict[str, Any]:
    theirs.only(rope_interleaved=False)
    return read_biased(theirs) | read_rotary(theirs)


def write_llama(model: Model) -> dict[str, Any]:
    return write_shared(model) | {"attention_bias": model.bias, "mlp_bias": model.bias}


def their_activation(ours: str) -> str:
    return next(theirs for theirs, name in ACTIVATIONS.items() if name == ours)


def read_mistral(theirs: Theirs) -> dict[str, Any]:
    theirs.only(attention_bias=False, mlp_bias=False)
    return read_shared(theirs) | read_rotary(theirs) | {"window": (theirs.size("sliding_window", 0),)}


def write_mistral(model: Model) -> dict[str, Any]:
    return write_shared(model) | {"sliding_window": model.window[0] or None}


def read_qwen(theirs: Theirs) -> dict[str, Any]:
    """Qwen2 has biases of queries, keys and values, Qwen3 norms of heads."""
    theirs.only(attention_bias=False, mlp_bias=False)
    second = theirs.content.get("model_type") == "qwen2"
    if second:
        theirs.only(use_mrope=False)
    window = theirs.size("sliding_window", 0) if theirs("use_sliding_window", bool) else 0
    first = theirs("max_window_layers", int)
    pattern = repeating(read_windows(theirs, window, lambda layer: window > 0 and layer >= first))
    more = {"qkv_bias": second, "qk_norm": not second, "window": pattern}
    return read_shared(theirs) | read_rotary(theirs) | more


def write_qwen(model: Model) -> dict[str, Any]:
    window = max(model.window)
    used = {"use_sliding_window": window > 0, "sliding_window": window or None, "layer_types": layer_types(model)}
    return write_shared(model) | used | {"max_window_layers": 0}


def read_gemma(theirs: Theirs) -> dict[str, Any]:
    """What Gemma 2 and 3 have in common, but for positions and windows."""
    theirs.only(attention_bias=False, mlp_bias=False, use_bidirectional_attention=False)
    found = read_shared(theirs, activation="hidden_activation")
    pre = theirs.positive("query_pre_attn_scalar")
    caps = (theirs.positive(f"{name}_logit_softcapping", 0.0) for name in ("attn", "final"))
    return found | {
        "multipliers": (1.0, 1.0, 0.0 if pre == found["head_dim"] else pre**-0.5, 1.0),
        **{"logit_softcap": tuple(caps), "norm_place": "both", "scale_embedding": True},
    }


def read_gemma2(theirs: Theirs) -> dict[str, Any]:
    window = theirs.size("sliding_window", 0)
    pattern = repeating(read_windows(theirs, window, lambda layer: layer % 2 == 0))
    return read_gemma(theirs) | read_rotary(theirs) | {"window": pattern}


def read_gemma3(theirs: Theirs) -> dict[str, Any]:
    """Of attention's soft cap `transformers` 5 keeps the field and computes nothing: nobody knows what it means."""
    theirs.only(attn_logit_softcapping=None)
    theirs.inside("rope_parameters", {"full_attention": {}, "sliding_attention": {}}).nothing_else("rotary positions")
    every, window = theirs.size("sliding_window_pattern"), theirs.size("sliding_window", 0)
    near = read_rotary(theirs, "sliding_attention", "rope_local_base_freq")
    if near["rotary_scaling"][0] != 1:
        raise UserError(f"{theirs.where}: scaled rotary positions in layers with a window are not supported")
    pattern = repeating(read_windows(theirs, window, lambda layer: (layer + 1) % every != 0))
    more = {"rotary_local_base": near["rotary_base"] if any(pattern) else 0.0, "window": pattern, "qk_norm": True}
    return read_gemma(theirs) | read_rotary(theirs, "full_attention") | more


def write_gemma2(model: Model) -> dict[str, Any]:
    ours, (attention, output) = write_shared(model), model.logit_softcap
    del ours["hidden_act"]
    scalar = round(min(max(model.multipliers[2], 1e-6), 1e6) ** -2) if model.multipliers[2] else model.head_dim
    return ours | {
        "hidden_activation": their_activation(model.activation).replace("gelu_new", "gelu_pytorch_tanh"),
        "sliding_window": max(model.window) or None,
        "layer_types": layer_types(model),
        "query_pre_attn_scalar": max(scalar, 1),
        **{"attn_logit_softcapping": attention or None, "final_logit_softcapping": output or None},
    }


def write_gemma3(model: Model) -> dict[str, Any]:
    ours, near = write_gemma2(model), model.rotary_local_base or model.rotary_base
    kinds = {"full_attention": ours["rope_parameters"]}
    kinds["sliding_attention"] = {"rope_type": "default", "rope_theta": near}
    return ours | {"rope_local_base_freq": near, "rope_parameters": kinds}


def read_mixtral(theirs: Theirs) -> dict[str, Any]:
    names = {"num_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok"}
    return read_mistral(theirs) | {ours: theirs.size(name, largest=LARGEST) for ours, name in names.items()}


def write_mixtral(model: Model) -> dict[str, Any]:
    experts = max(1, model.num_experts)
    chosen = min(model.experts_per_token, experts)
    return write_mistral(model) | {"num_local_experts": experts, "num_experts_per_tok": chosen}


def read_qwen3_moe(theirs: Theirs) -> dict[str, Any]:
    theirs.only(attention_bias=False, mlp_bias=False, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[])
    names = [name for name in ("num_experts", "num_local_experts") if name in theirs] or ["num_local_experts"]
    numbers = [theirs.size(name, largest=LARGEST) for name in names]
    if len(set(numbers)) > 1:
        raise UserError(f"{theirs.where}: {names[0]} = {numbers[0]}, {names[1]} = {numbers[1]}; leave one of them")
    window = theirs.size("sliding_window", 0) if theirs("use_sliding_window", bool) else 0
    return (
        read_shared(theirs, "moe_intermediate_size")
        | read_rotary(theirs)
        | {
            **{"num_experts": numbers[0], "experts_per_token": theirs.size("num_experts_per_tok", largest=LARGEST)},
            **{"qk_norm": True, "window": (window,)},
        }
    )


def write_qwen3_moe(model: Model) -> dict[str, Any]:
    experts, window = max(1, model.num_experts), model.window[0]
    return write_shared(model) | {
        **{"num_experts": experts, "num_experts_per_tok": min(model.experts_per_token, experts)},
        **{"moe_intermediate_size": model.mlp_dim, "norm_topk_prob": True, "decoder_sparse_step": 1},
        **{"mlp_only_layers": [], "use_sliding_window": window > 0, "sliding_window": window or None},
    }


def read_phi3(theirs: Theirs) -> dict[str, Any]:
    theirs.only(attention_bias=False, mlp_bias=False)
    window = theirs.size("sliding_window", 0)
    return read_shared(theirs) | read_rotary(theirs, known=("default",), partial=True) | {"window": (window,)}


def write_phi3(model: Model) -> dict[str, Any]:
    share = {"partial_rotary_factor": model.rotary_share[0] or 1.0}
    rope = {"rope_type": "default", "rope_theta": model.rotary_base} | share
    return write_mistral(model) | share | {"rope_parameters": rope, "rope_scaling": None}


def read_olmo2(theirs: Theirs) -> dict[str, Any]:
    theirs.only(attention_bias=False, mlp_bias=False)
    more = {"norm_place": "branch", "qk_norm": True, "qk_norm_whole": True}
    return read_shared(theirs) | read_rotary(theirs) | more


def read_smollm3(theirs: Theirs) -> dict[str, Any]:
    """Layers of `no_rope_layers` 0 have no positions, and a window where there is one."""
    num, every = theirs.size("num_hidden_layers", largest=LARGEST), theirs.size("no_rope_layer_interval")
    turned = theirs("no_rope_layers", list, [int((layer + 1) % every != 0) for layer in range(num)])
    if len(turned) != num or not all(type(x) is int and x in (0, 1) for x in turned):
        raise UserError(f"{theirs.where}: no_rope_layers are not 0 or 1 of {num} layers")
    window = theirs.size("sliding_window", 0) if theirs("use_sliding_window", bool) else 0
    found = read_windows(theirs, window, lambda layer: window > 0 and not turned[layer])
    pattern, share = zip(*repeating(list(zip(found, map(float, turned), strict=True))), strict=True)
    share = share if len(set(share)) > 1 else share[:1]
    return read_biased(theirs) | read_rotary(theirs) | {"window": pattern, "rotary_share": share}


def write_smollm3(model: Model) -> dict[str, Any]:
    window = max(model.window)
    turned = [int(share > 0) for share in shares(model)]
    used = {"use_sliding_window": window > 0, "sliding_window": window or None, "layer_types": layer_types(model)}
    return write_llama(model) | used | {"no_rope_layers": turned}


MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")


def read_granite(theirs: Theirs) -> dict[str, Any]:
    found = read_biased(theirs) | read_rotary(theirs)
    embedding, branch, attention, output = (theirs.positive(name) for name in MULTIPLIERS)
    head_dim = found["head_dim"] or found["model_dim"] // found["num_heads"]
    usual = head_dim > 0 and attention == head_dim**-0.5
    return found | {"multipliers": (embedding, branch, 0.0 if usual else attention, output)}


def write_granite(model: Model) -> dict[str, Any]:
    embedding, branch, attention, output = model.multipliers
    values = embedding, branch, attention or model.head_dim**-0.5, output
    return write_llama(model) | dict(zip(MULTIPLIERS, values, strict=True))


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
    *norm("block/attention/query_norm", "layers.{layer}.self_attn.q_norm", "one_more"),
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
QWEN3_EXPERTS: tuple[Row, ...] = (
    *dense("block/mlp/router", "layers.{layer}.mlp.gate"),
    ("block/mlp/gate", "layers.{layer}.mlp.experts.{expert}.gate_proj.weight", "linear"),
    ("block/mlp/up", "layers.{layer}.mlp.experts.{expert}.up_proj.weight", "linear"),
    ("block/mlp/down", "layers.{layer}.mlp.experts.{expert}.down_proj.weight", "linear"),
)
PHI3: tuple[Row, ...] = (
    *dense("block/attention/query", "layers.{layer}.self_attn.qkv_proj"),
    *dense("block/attention/key", "layers.{layer}.self_attn.qkv_proj"),
    *dense("block/attention/value", "layers.{layer}.self_attn.qkv_proj"),
    *dense("block/attention/output", "layers.{layer}.self_attn.o_proj"),
    *dense("block/mlp/gate", "layers.{layer}.mlp.gate_up_proj"),
    *dense("block/mlp/up", "layers.{layer}.mlp.gate_up_proj"),
    *dense("block/mlp/down", "layers.{layer}.mlp.down_proj"),
)
OLMO2_NORMS: tuple[Row, ...] = (
    *norm("block/attention/query_norm", "layers.{layer}.self_attn.q_norm"),
    *norm("block/attention/key_norm", "layers.{layer}.self_attn.k_norm"),
    *norm("block/attention_post_norm", "layers.{layer}.post_attention_layernorm"),
    *norm("block/mlp_post_norm", "layers.{layer}.post_feedforward_layernorm"),
    *norm("norm", "norm"),
)
LLAMA = TABLES + ATTENTION + MLP + NORMS
GEMMA = TABLES + ATTENTION + MLP + GEMMA_NORMS
MIXTRAL = TABLES + ATTENTION + NORMS + EXPERTS
QWEN3_MOE = TABLES + ATTENTION + NORMS + QWEN3_EXPERTS
OLMO2 = TABLES + ATTENTION + MLP + OLMO2_NORMS

# In the order in which an export looks for a family that can say all that a model is.
FAMILIES: dict[str, Family] = {
    "gpt2": Family("GPT2LMHeadModel", "transformer.", GPT2, read_gpt2, write_gpt2, "n_positions"),
    "llama": Family("LlamaForCausalLM", "model.", LLAMA, read_llama, write_llama),
    "mistral": Family("MistralForCausalLM", "model.", LLAMA, read_mistral, write_mistral),
    "qwen2": Family("Qwen2ForCausalLM", "model.", LLAMA, read_qwen, write_qwen),
    "qwen3": Family("Qwen3ForCausalLM", "model.", LLAMA, read_qwen, write_qwen),
    "gemma2": Family("Gemma2ForCausalLM", "model.", GEMMA, read_gemma2, write_gemma2),
    "gemma3_text": Family("Gemma3ForCausalLM", "model.", GEMMA, read_gemma3, write_gemma3),
    "mixtral": Family("MixtralForCausalLM", "model.", MIXTRAL, read_mixtral, write_mixtral),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", "model.", QWEN3_MOE, read_qwen3_moe, write_qwen3_moe),
    "phi3": Family("Phi3ForCausalLM", "model.", TABLES + PHI3 + NORMS, read_phi3, write_phi3),
    "olmo2": Family("Olmo2ForCausalLM", "model.", OLMO2, read_olmo2, write_shared),
    "smollm3": Family("SmolLM3ForCausalLM", "model.", LLAMA, read_smollm3, write_smollm3),
    "granite": Family("GraniteForCausalLM", "model.", LLAMA, read_granite, write_granite),
}
