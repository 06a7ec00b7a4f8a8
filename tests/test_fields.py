"""What a config.json says: a family's defaults are that family's, and no field is passed over in silence."""

import dataclasses
import json

import pytest
from helpers import ROOT
from peers import families as parity

from lm_jax.convert import description
from lm_jax.errors import UserError

PUBLISHED = json.loads((ROOT / "tests" / "fixtures" / "published_configs.json").read_text())
DEFAULTS = json.loads(parity.DEFAULTS.read_text())
# Where a family's default is not supported, or null, what is read beside the other defaults.
SUPPORTED = {
    "t5": {"feed_forward_proj": "gated-gelu", "scale_decoder_outputs": False},
    "qwen3_moe": {"norm_topk_prob": True},
    "roberta": {"type_vocab_size": 1},
}


def described(content: dict) -> tuple:
    """All that a config.json means here."""
    found = description.describe(content, "config.json", "bytes")
    return dataclasses.asdict(found.config.model), found.vocab_size, found.config.data.sequence_length


@pytest.mark.parametrize("kind", description.FAMILIES)
def test_a_familys_defaults_are_its_own(kind):
    """Whatever field of `transformers`' default config is not in the file, the model is the same; sizes alone must be there."""
    whole = DEFAULTS[kind] | SUPPORTED.get(kind, {})
    expected, optional = described(whole), []
    for name in whole.keys() - SUPPORTED.get(kind, {}).keys():
        left = {key: value for key, value in whole.items() if key != name}
        if name == "model_type" or description.FAMILIES[kind].defaults.get(name) is ...:
            with pytest.raises(UserError):
                described(left)
            continue
        optional.append(name)
        assert described(left) == expected, name
    least = {key: value for key, value in whole.items() if key not in optional}
    assert described(least) == expected, "all at once"


@pytest.mark.proof
def test_the_recorded_defaults_are_those_of_transformers():
    assert parity.defaults() == DEFAULTS


SMALL = dict(
    vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=8,
    max_position_embeddings=128,
)  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "given", "key", "value"),
    [
        ("mixtral", {}, "norm_epsilon", 1e-5),
        ("mixtral", {}, "rotary_base", 1e6),
        ("mixtral", {}, "window", (0,)),
        ("mixtral", {}, "num_experts", 8),
        ("mistral", {}, "window", (4096,)),
        ("mistral", {"sliding_window": None}, "window", (0,)),
        ("mistral", {}, "norm_epsilon", 1e-6),
        ("mistral", {}, "num_kv_heads", 8),
        ("llama", {}, "num_kv_heads", 8),
        ("llama", {"num_key_value_heads": None}, "num_kv_heads", 8),
        ("qwen2", {"num_attention_heads": 32}, "num_kv_heads", 32),
        ("qwen2", {"num_attention_heads": 32, "use_sliding_window": True, "max_window_layers": 2}, "window", (0, 0, 4096, 4096)),
        ("qwen3", {"num_attention_heads": 32}, "head_dim", 128),
        ("gemma3_text", {}, "window", (4096,)),
        ("gemma3_text", {"num_hidden_layers": 6}, "window", (4096,) * 5 + (0,)),
        ("gemma3_text", {}, "head_dim", 256),
        ("gemma3_text", {}, "rotary_local_base", 1e4),
        ("gemma3_text", {"rope_theta": 5.0}, "rotary_base", 5.0),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2}}, "rotary_scaling", (2.0, 1.0, 4.0, 0.0)),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rotary_scaling", (2.0, 1.0, 4.0, 0.0)),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rotary_scaling", (2.0, 1.0, 32.0, 128.0)),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rotary_scaling_kind", "yarn"),
        ("gemma2", {}, "window", (4096, 0)),
        ("gemma2", {}, "logit_softcap", (50.0, 30.0)),
        ("gemma2", {"attn_logit_softcapping": None}, "logit_softcap", (0.0, 30.0)),
        ("gemma2", {"head_dim": 64}, "multipliers", (1.0, 1.0, 1 / 16, 1.0)),
        ("gemma3_text", {"head_dim": 64}, "multipliers", (1.0, 1.0, 1 / 16, 1.0)),
        ("granite", {}, "multipliers", (1.0, 1.0, 1.0, 1.0)),
        ("granite", {"attention_multiplier": 8**-0.5}, "multipliers", (1.0, 1.0, 0.0, 1.0)),
        ("smollm3", {}, "rotary_share", (1.0, 1.0, 1.0, 0.0)),
        ("smollm3", {}, "window", (0, 0, 0, 0)),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 9}, "window", (0, 0, 0, 9)),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 0]}, "rotary_share", (1.0, 0.0)),
        ("smollm3", {}, "rotary_base", 2e6),
        ("phi3", {"partial_rotary_factor": 0.5}, "rotary_share", (0.5,)),
        ("phi3", {}, "norm_epsilon", 1e-5),
        ("qwen3_moe", {"norm_topk_prob": True, "num_experts": 6, "num_experts_per_tok": 3}, "num_experts", 6),
        ("qwen3_moe", {"norm_topk_prob": True}, "num_experts", 128),
        ("qwen3_moe", {"norm_topk_prob": True}, "mlp_dim", 768),
        ("olmo2", {}, "norm_epsilon", 1e-5),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, "rotary_base", 7.0),
        (
            "llama",
            {"rope_scaling": {"rope_type": "llama3", "factor": 2, "low_freq_factor": 1, "high_freq_factor": 4}},
            "rotary_scaling",
            (2.0, 1.0, 4.0, 128.0),
        ),
    ],
)  # fmt: skip
def test_a_default_is_said_by_nobody_else(kind, given, key, value):
    assert described(SMALL | {"model_type": kind} | given)[0][key] == value


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read(name):
    """Their sizes and fields as the models were published; nothing of them is refused."""
    content = PUBLISHED[name]
    model, vocab_size, _ = described(content)
    said = lambda *names, default: next((content[name] for name in names if name in content), default)
    assert vocab_size == content.get("vocab_size", vocab_size)
    assert model["num_layers"] == content.get("num_hidden_layers", content.get("n_layer", content.get("num_layers")))
    assert model["rotary_base"] == said("rope_theta", default=1e6 if "gemma" in name else 1e4)
    assert model["norm_epsilon"] == said("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", default=1e-6)
    window = content.get("sliding_window") if content.get("use_sliding_window", True) else None
    assert max(model["window"]) == (window or 0)
    assert (0.0 in model["rotary_share"]) == ("no_rope_layers" in content)
    scaling = content.get("rope_scaling") or {"factor": 1.0}
    assert model["rotary_scaling"][0] == scaling["factor"]
    kind = scaling.get("rope_type", scaling.get("type"))
    assert (model["rotary_scaling"][3] == 0.0) == (kind == "linear")
    assert (model["rotary_scaling_kind"] == "yarn") == (kind == "yarn")
    assert model["multipliers"][:2] == (
        content.get("embedding_multiplier", 1.0),
        content.get("residual_multiplier", 1.0),
    )
    assert model["logit_softcap"][1] == (content.get("final_logit_softcapping") or 0.0)


STRANGE = {
    "logit_scale": 0.0625, "attn_logit_softcapping": 50.0, "embedding_multiplier": 12.0, "partial_rotary_factor": 0.5,
    "clip_qkv": 8.0, "use_parallel_residual": True, "alibi": True, "no_rope_layers": [1, 0], "per_layer_config": {},
}  # fmt: skip
READ = {
    ("gemma2", "attn_logit_softcapping"), ("granite", "embedding_multiplier"), ("phi3", "partial_rotary_factor"),
    ("smollm3", "no_rope_layers"),
}  # fmt: skip


@pytest.mark.parametrize("kind", description.FAMILIES)
def test_no_field_is_passed_over_in_silence(kind):
    """Of every family: fields that other models compute with, refused with file, field and value; null says nothing."""
    whole = DEFAULTS[kind] | SUPPORTED.get(kind, {})
    for name, value in STRANGE.items():
        if (kind, name) in READ:
            continue
        assert described(
            whole | {name: None} if name not in description.FAMILIES[kind].defaults else whole
        ) == described(whole)
        with pytest.raises(UserError) as error:
            described(whole | {name: value})
        assert f"config.json: {name} = {value}" in str(error.value), error.value
        assert len(str(error.value).splitlines()) <= 5


@pytest.mark.parametrize(
    ("kind", "given", "words"),
    [
        ("llama", {"logit_scale": 0.0625, "residual_multiplier": 0.2}, "logit_scale = 0.0625, residual_multiplier = 0.2"),
        ("llama", {"rms_norm_epsilon": 1e-5}, "did you mean rms_norm_eps?"),
        ("llama", {"rope_interleaved": True}, "rope_interleaved = True is not supported, only False"),
        ("llama", {"add_cross_attention": True}, "add_cross_attention = True is not supported"),
        ("llama", {"is_encoder_decoder": True}, "is_encoder_decoder = True is not supported"),
        ("llama", {"pruned_heads": {"0": [1]}}, "pruned_heads = {'0': [1]} is not supported"),
        ("llama", {"hidden_act": "relu2"}, "hidden_act = 'relu2' is not supported; known are silu"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type = 'dynamic' is not supported"),
        ("llama", {"rope_scaling": {"type": "mrope", "mrope_section": [1]}}, "rope_type = 'mrope' is not supported"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 3}}, "beta_fast = 3: not supported"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "config.json rope_scaling has no factor"),
        ("llama", {"rope_parameters": {"rope_type": "default", "factor": 2.0}}, "factor = 2.0: not supported"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5 is not supported"),
        ("llama", {"rope_parameters": {"rope_theta": 5.0}, "rope_theta": 6.0}, "rope_theta is 5.0 and 6.0"),
        ("llama", {"rope_parameters": {"rope_theta": 5.0}, "rope_scaling": {"type": "linear", "factor": 2}}, "scaling is ("),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, "full_attention = {'rope_theta': 5.0}"),
        ("llama", {"rope_theta": 10**400}, "finite"),
        ("llama", {"rms_norm_eps": None}, "config.json has no rms_norm_eps"),
        ("llama", {"num_hidden_layers": None}, "config.json has no num_hidden_layers"),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": 4.0, "attention_factor": 1.5}}, "attention_factor = 1.5 is not"),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": 4.0, "mscale": 0.7}}, "mscale = 0.7 is not supported"),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": 4.0, "truncate": False}}, "truncate = False is not supported"),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": 0.5}}, "expected a factor from 1 on"),
        ("phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "rope_type = 'longrope' is not supported"),
        ("phi3", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type = 'yarn' is not supported; known are default"),
        ("phi3", {"partial_rotary_factor": 0.4}, "0.4 of head_dim = 8 is no even number; the nearest that is one is 0.5"),
        ("phi3", {"partial_rotary_factor": 0}, "partial_rotary_factor = 0.0: expected more than 0"),
        ("phi3", {"partial_rotary_factor": 1.5}, "must be at most 1.0"),
        ("gemma2", {"attn_logit_softcapping": 0.0}, "attn_logit_softcapping = 0.0: expected more than 0"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True is not supported"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0 is not supported"),
        ("qwen3_moe", {}, "norm_topk_prob = False, its default, is not supported, only True"),
        ("qwen3_moe", {"norm_topk_prob": True, "mlp_only_layers": [0]}, "mlp_only_layers = [0] is not supported"),
        ("qwen3_moe", {"norm_topk_prob": True, "decoder_sparse_step": 2}, "decoder_sparse_step = 2 is not supported"),
        ("qwen3_moe", {"norm_topk_prob": True, "num_experts": 8, "num_local_experts": 9}, "leave one of them"),
        ("qwen2", {"num_attention_heads": 32, "layer_types": ["sliding_attention"] * 4}, "without a sliding_window"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers are not 0 or 1 of 4 layers"),
        ("granite", {"residual_multiplier": -1.0}, "residual_multiplier = -1.0: expected more than 0"),
        ("mistral", {"layer_types": ["full_attention"] * 4}, "layer_types = ['full_attention', "),
        ("mistral", {"attention_bias": True}, "attention_bias = True is not supported"),
        ("qwen2", {"num_attention_heads": 32, "use_mrope": True}, "use_mrope = True is not supported"),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 5.0}}, "rope_theta = 5.0: not supported"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True is not supported"),
        ("gemma3_text", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar = 0.0: expected more than 0"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True is not supported"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type = 'relative_key' is not supported"),
        ("bert", {"is_decoder": True}, "is_decoder = True is not supported"),
        ("t5", {"relative_attention_num_buckets": 16}, "relative_attention_num_buckets = 16 is not supported"),
    ],
)  # fmt: skip
def test_what_is_not_computed_is_refused_by_name(kind, given, words):
    small = SMALL if kind not in ("gpt2", "t5") else DEFAULTS[kind] | SUPPORTED.get(kind, {})
    with pytest.raises(UserError) as error:
        described(small | {"model_type": kind} | given)
    assert words in str(error.value), error.value
    assert len(str(error.value).splitlines()) <= 5
