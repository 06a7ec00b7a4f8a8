"""The families as tables: our parameters, their tensors in a Hugging Face folder, and what lies between; and the two configs.

A row is (our path, their name, kind). A row whose path a model does not have (no bias, no norm of heads) does not count. Kinds:
    linear    [outputs, inputs], as torch.nn.Linear has it
    conv      [inputs, outputs], as GPT-2's Conv1D has it
    vector    as it is, flat
    table     [tokens, dim]; ours is padded to a multiple of 128 tokens
    one_more  a scale w of which 1 + w is used (Gemma)
Rows that share a name are parts of one tensor, side by side: Phi-3's queries, keys and values.
"""

from typing import Any, NamedTuple

from lm_jax.config import Model
from lm_jax.convert import config_fields as fields
from lm_jax.convert.config_fields import Part, Settings, always, field, must_say, only, only_written, written
from lm_jax.convert.config_reader import FIXED, IDLE, HFConfigReader

Row = tuple[str, str, str]
LAYER, EXPERT = "{layer}", "{expert}"


class Head(NamedTuple):
    """A class of `transformers` with the head of a task, which takes the place of the output table."""

    architecture: str
    rows: tuple[Row, ...]  # of the head, and in place of those of the family for the same parameter
    lacks: tuple[str, ...] = ()  # names, or starts of names, of tensors that it does not have: nought here


class Family(NamedTuple):
    """What `transformers` calls an architecture: its tensors, and the fields of its config.json."""

    architecture: str
    prefix: str  # of their names, but for the output table's
    rows: tuple[Row, ...]
    parts: tuple[Part, ...]  # of its config.json; where two are about one thing the later counts
    other_defaults: Settings = {}  # than the parts have
    idle: str = ""  # its fields that change nothing: parts that are not read, and what the others say once more
    length: str = "max_position_embeddings"  # where the longest text is said
    kind: str = "transformer"  # `model.kind` of its models
    optional: tuple[str, ...] = ()  # their names start so where a folder may lack them: nought, then
    heads: dict[str, Head] = {}  # by our `model.head`; "" is a class without heads that the family's own has
    first_position: int = 0  # rows of the table of positions before that of a text's first token
    is_written: bool = True  # whether a model leaves in it; else it is only read

    @property
    def defaults(self) -> Settings:
        """Of every field that is read; `...`: it must be there."""
        return {name: x for part in self.parts for name, x in part.defaults.items()} | self.other_defaults

    def reader(self, name: str, content: dict[str, Any], where: str) -> HFConfigReader:
        """Raises UserError for what a config.json says that nobody here knows."""
        reader, fixed = HFConfigReader(content, where, FIXED | self.defaults), FIXED.keys() - self.defaults.keys()
        reader.only(**{field: FIXED[field] for field in FIXED if field in fixed})
        reader.nothing_else(f"a model of type {name}", IDLE | {*self.idle.split()})
        return reader

    def read(self, reader: HFConfigReader) -> Settings:
        """Settings of `config.Model`. Raises UserError."""
        return {name: x for part in self.parts for name, x in part.read(reader).items()}

    def write(self, model: Model) -> dict[str, Any]:
        """The fields that `read` makes this model of, where the family can say it."""
        return {name: x for part in self.parts for name, x in part.write(model).items()}


def dense(ours: str, theirs: str, kind: str = "linear", weight: str = "kernel", **names: str) -> tuple[Row, ...]:
    """The kernels and biases whose names are {ours: theirs}, below two paths, which may be ""."""
    rows: list[Row] = []
    for own, its in names.items():
        path, name = f"{ours}/{own}".lstrip("/"), f"{theirs}.{its}".lstrip(".")
        rows += [(f"{path}/{weight}", f"{name}.weight", kind), (f"{path}/bias", f"{name}.bias", "vector")]
    return tuple(rows)


def norms(ours: str, theirs: str, kind: str = "vector", **names: str) -> tuple[Row, ...]:
    """The same of scales and biases."""
    return dense(ours, theirs, kind, "scale", **names)


def experts(theirs: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
    """A router and its experts' kernels."""
    names = {"gate": gate, "up": up, "down": down}
    rows = tuple(
        (f"block/mlp/{own}", f"{theirs}.experts.{EXPERT}.{its}.weight", "linear") for own, its in names.items()
    )
    return dense("block/mlp", theirs, router="gate") + rows


def classifies(name: str) -> dict[str, Head]:
    """The heads of a decoder: a label or a number of the last token, without a bias."""
    head = Head(f"{name}ForSequenceClassification", dense("", "", labels="score"), ("score.bias",))
    return {"labels": head, "value": head}


TABLES: tuple[Row, ...] = (
    ("embedding/table", "embed_tokens.weight", "table"),
    ("unembedding/table", "lm_head.weight", "table"),
)
LAYER_I, ATTENTION_I, MLP_I = "layers.{layer}", "layers.{layer}.self_attn", "layers.{layer}.mlp"
ATTENTION = dense("block/attention", ATTENTION_I, query="q_proj", key="k_proj", value="v_proj", output="o_proj")
MLP = dense("block/mlp", MLP_I, gate="gate_proj", up="up_proj", down="down_proj")
NORM, HEAD_NORMS = norms("", "", norm="norm"), dict(query_norm="q_norm", key_norm="k_norm")
NORMS = (
    *norms("block", LAYER_I, attention_norm="input_layernorm"),
    *norms("block/attention", ATTENTION_I, **HEAD_NORMS),
    *norms("block", LAYER_I, mlp_norm="post_attention_layernorm"),
    *NORM,
)
GEMMA_NORMS = (
    *norms("block", LAYER_I, "one_more", attention_norm="input_layernorm"),
    *norms("block/attention", ATTENTION_I, "one_more", **HEAD_NORMS),
    *norms("block", LAYER_I, "one_more", attention_post_norm="post_attention_layernorm"),
    *norms(
        "block", LAYER_I, "one_more", mlp_norm="pre_feedforward_layernorm", mlp_post_norm="post_feedforward_layernorm"
    ),
    *norms("", "", "one_more", norm="norm"),
)
OLMO2_NORMS = (
    *norms("block/attention", ATTENTION_I, **HEAD_NORMS),
    *norms(
        "block", LAYER_I, attention_post_norm="post_attention_layernorm", mlp_post_norm="post_feedforward_layernorm"
    ),
    *NORM,
)
GPT2: tuple[Row, ...] = (
    ("embedding/table", "wte.weight", "table"),
    ("unembedding/table", "lm_head.weight", "table"),
    ("positions/table", "wpe.weight", "conv"),
    *norms("block", "h.{layer}", attention_norm="ln_1"),
    *dense("block/attention", "h.{layer}.attn", "conv", query="c_attn", key="c_attn", value="c_attn", output="c_proj"),
    *norms("block", "h.{layer}", mlp_norm="ln_2"),
    *dense("block/mlp", "h.{layer}.mlp", "conv", up="c_fc", down="c_proj"),
    *norms("", "", norm="ln_f"),
)
PHI3 = (
    *dense("block/attention", ATTENTION_I, query="qkv_proj", key="qkv_proj", value="qkv_proj", output="o_proj"),
    *dense("block/mlp", MLP_I, gate="gate_up_proj", up="gate_up_proj", down="down_proj"),
)
LLAMA = TABLES + ATTENTION + MLP + NORMS
GEMMA_ROWS = TABLES + ATTENTION + MLP + GEMMA_NORMS
MIXTRAL = TABLES + ATTENTION + NORMS + experts("layers.{layer}.block_sparse_moe", gate="w1", up="w3", down="w2")
QWEN3_MOE = TABLES + ATTENTION + NORMS + experts(MLP_I, gate="gate_proj", up="up_proj", down="down_proj")
OLMO2 = TABLES + ATTENTION + MLP + OLMO2_NORMS

ATTENTION_SIZES = (
    must_say("vocab_size", "max_position_embeddings"),
    field("num_hidden_layers", "num_layers", fields.COUNT),
    field("hidden_size", "model_dim"),
    field("num_attention_heads", "num_heads"),
    field("num_key_value_heads", "num_kv_heads", fields.DERIVED, None),
    field("head_dim", "head_dim", fields.DERIVED, None),
)
MLP_SIZE = field("intermediate_size", "mlp_dim")
EPSILON = field("rms_norm_eps", "norm_epsilon", fields.NUMBER, 1e-6)
ACTIVATION = field("hidden_act", "activation", fields.ACTIVATION, "silu")
TIED = field("tie_word_embeddings", "tie_embedding", fields.FLAG, False)
AS_LLAMA = always(bias=False, gated=True, norm="rmsnorm", positions="rotary")
BEFORE_ROPE = (AS_LLAMA, *ATTENTION_SIZES, MLP_SIZE, EPSILON, ACTIVATION, TIED)
SHARED = (*BEFORE_ROPE, fields.ROPE)  # Llama, and all that came after it
UNBIASED = (*SHARED, fields.NO_BIASES)
LLAMA_FIELDS = (only(rope_interleaved=False), *SHARED, fields.BIASES)
QWEN3_FIELDS = (*UNBIASED, always(qkv_bias=False, qk_norm=True), fields.QWEN_WINDOWS)
QWEN2_FIELDS = (*UNBIASED, only(use_mrope=False), always(qkv_bias=True, qk_norm=False), fields.QWEN_WINDOWS)
BEFORE_GEMMA_ROPE = (
    always(norm_place="both", scale_embedding=True),
    *(only(use_bidirectional_attention=False), fields.NO_BIASES),
    *(AS_LLAMA, *ATTENTION_SIZES, MLP_SIZE, EPSILON, TIED),
)
GEMMA_ACTIVATION = field("hidden_activation", "activation", fields.GEMMA_ACTIVATION, "gelu_pytorch_tanh")
GEMMA2_SCALES = fields.gemma_scales(50.0, 30.0)
GEMMA2_FIELDS = (*BEFORE_GEMMA_ROPE, fields.ROPE, GEMMA_ACTIVATION, fields.GEMMA2_WINDOWS, GEMMA2_SCALES)
GEMMA3_FIELDS = (
    # `transformers` 5 keeps the field and computes nothing of it: nobody knows what it means.
    only(attn_logit_softcapping=None),
    always(qk_norm=True),
    *(*BEFORE_GEMMA_ROPE, fields.GEMMA3_ROPE, GEMMA_ACTIVATION, fields.GEMMA3_WINDOWS),
    *(fields.gemma_scales(None, None), fields.GEMMA3_LOCAL_ROPE),
)
GEMMA = {"num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True}
# The published files with images leave to the defaults of their text part whatever has not changed.
GEMMA3 = GEMMA | {
    **{"vocab_size": 262_208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26},
    **{"num_attention_heads": 8, "max_position_embeddings": 131_072},
}
MIXTRAL_FIELDS = (*UNBIASED, fields.WINDOW, fields.experts("num_local_experts", num=8, chosen=2))
QWEN3_MOE_FIELDS = (
    *(AS_LLAMA, *ATTENTION_SIZES, Part({}, write=MLP_SIZE.write), EPSILON, ACTIVATION, TIED, fields.ROPE),
    *(fields.NO_BIASES, always(qk_norm=True)),
    fields.experts("num_experts", "num_local_experts", num=128, chosen=8),
    field("moe_intermediate_size", "mlp_dim", default=768),
    only_written(norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[]),
    fields.SWITCHED_WINDOW,
)
PHI3_FIELDS = (*BEFORE_ROPE, fields.PHI3_ROPE, fields.NO_BIASES, fields.WINDOW, fields.PHI3_ROPE_SHARE)
OLMO2_FIELDS = (*UNBIASED, always(norm_place="branch", qk_norm=True, qk_norm_whole=True))
GPT2_FIELDS = (
    must_say("vocab_size", "n_positions"),
    only(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False),
    written(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    field("n_layer", "num_layers", fields.COUNT),
    field("n_embd", "model_dim"),
    field("n_head", "num_heads"),
    field("n_inner", "mlp_dim", fields.DERIVED, None),
    field("layer_norm_epsilon", "norm_epsilon", fields.NUMBER, 1e-5),
    field("activation_function", "activation", fields.ACTIVATION, "gelu_new"),
    field("tie_word_embeddings", "tie_embedding", fields.FLAG, True),
)

# In the order in which an export looks for a family that can say all that a model is.
FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        *("GPT2LMHeadModel", "transformer.", GPT2, GPT2_FIELDS),
        idle="n_ctx summary_type summary_use_proj summary_activation summary_first_dropout summary_proj_to_labels",
        length="n_positions",
        heads=classifies("GPT2"),
    ),
    "llama": Family("LlamaForCausalLM", "model.", LLAMA, LLAMA_FIELDS, heads=classifies("Llama")),
    "mistral": Family(
        *("MistralForCausalLM", "model.", LLAMA, (*UNBIASED, fields.WINDOW)),
        {"num_key_value_heads": 8, "sliding_window": 4096},
        heads=classifies("Mistral"),
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM", "model.", LLAMA, QWEN2_FIELDS, {"num_key_value_heads": 32}, heads=classifies("Qwen2")
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        "model.",
        LLAMA,
        QWEN3_FIELDS,
        {"num_key_value_heads": 32, "head_dim": 128},
        heads=classifies("Qwen3"),
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM", "model.", GEMMA_ROWS, GEMMA2_FIELDS, GEMMA, "hidden_act", heads=classifies("Gemma2")
    ),
    "gemma3_text": Family(
        *("Gemma3ForCausalLM", "model.", GEMMA_ROWS, GEMMA3_FIELDS, GEMMA3, "hidden_act _sliding_window_pattern"),
        heads=classifies("Gemma3Text"),
    ),
    "mixtral": Family(
        *("MixtralForCausalLM", "model.", MIXTRAL, MIXTRAL_FIELDS),
        {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1_000_000.0},
        heads=classifies("Mixtral"),
    ),
    "qwen3_moe": Family(
        *("Qwen3MoeForCausalLM", "model.", QWEN3_MOE, QWEN3_MOE_FIELDS),
        *({"num_key_value_heads": 4, "norm_topk_prob": False}, "intermediate_size max_window_layers"),
        heads=classifies("Qwen3Moe"),
    ),
    "phi3": Family(
        *("Phi3ForCausalLM", "model.", TABLES + PHI3 + NORMS, PHI3_FIELDS, {"rms_norm_eps": 1e-5}),
        idle="original_max_position_embeddings",  # of longrope, which is refused
        heads=classifies("Phi3"),
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM", "model.", OLMO2, OLMO2_FIELDS, {"rms_norm_eps": 1e-5}, heads=classifies("Olmo2")
    ),
    "smollm3": Family(
        *("SmolLM3ForCausalLM", "model.", LLAMA, (*SHARED, fields.BIASES, fields.SMOLLM3_WINDOWS)),
        {"num_key_value_heads": 4, "rope_theta": 2_000_000.0, "tie_word_embeddings": True},
        "max_window_layers",
        heads=classifies("SmolLM3"),
    ),
    "granite": Family("GraniteForCausalLM", "model.", LLAMA, (*SHARED, fields.BIASES, fields.GRANITE_MULTIPLIERS)),
}
