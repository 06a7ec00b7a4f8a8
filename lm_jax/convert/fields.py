"""How a config.json is read: by name and type, with the defaults of its family, and nothing left that was not understood.

`DEFAULTS` says for each family which fields are read, and what `transformers` takes where the file does not have one (`...`:
it must). `IDLE` are fields that change nothing of what a model computes: a name, a precision of storage, dropout, generation,
how its first weights were drawn. Whatever else a file says is refused by name.
"""

import math
from typing import Any

from lm_jax.errors import UserError, nearest

LARGEST = 100_000  # layers, or experts, that a config may ask for

IDLE = frozenset(
    # names, versions, storage
    "model_type architectures transformers_version _name_or_path name_or_path _commit_hash auto_map dtype torch_dtype "
    "torchscript use_bfloat16 tf_legacy_loss transformers.js_config unsloth_fixed unsloth_version is_llama_config "
    # how it is trained or run, and what it gives beside its logits
    "initializer_range initializer_factor use_cache gradient_checkpointing pretraining_tp chunk_size_feed_forward output_past "
    "output_attentions output_hidden_states output_router_logits router_aux_loss_coef router_jitter_noise return_dict "
    "attn_implementation _attn_implementation _attn_implementation_autoset experts_implementation cache_implementation "
    "attention_dropout hidden_dropout_prob attention_probs_dropout_prob classifier_dropout dropout_rate "
    "resid_pdrop embd_pdrop attn_pdrop reorder_and_upcast_attn is_decoder "
    # heads of tasks, which have tensors of their own
    "id2label label2id num_labels _num_labels problem_type finetuning_task task_specific_params "
    # tokens and generation
    "tokenizer_class prefix bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id mask_token_id unk_token_id "
    "decoder_start_token_id forced_bos_token_id forced_eos_token_id bad_words_ids suppress_tokens begin_suppress_tokens "
    "max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature "
    "top_k top_p typical_p repetition_penalty encoder_repetition_penalty length_penalty no_repeat_ngram_size "
    "encoder_no_repeat_ngram_size num_return_sequences output_scores return_dict_in_generate remove_invalid_values "
    "exponential_decay_length_penalty epsilon_cutoff eta_cutoff".split()
)
# The same for every family: a model of another making.
FIXED = {"add_cross_attention": False, "tie_encoder_decoder": False, "is_encoder_decoder": False, "pruned_heads": {}}

# What must be said, as every published file does.
SIZES = dict.fromkeys(
    ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"], ...
)
ROTARY = {"rope_theta": 10_000.0, "rope_scaling": None, "rope_parameters": None, "partial_rotary_factor": 1.0}
SHARED: dict[str, Any] = {
    **SIZES,
    **ROTARY,
    **{"max_position_embeddings": ..., "num_key_value_heads": None, "head_dim": None, "hidden_act": "silu"},
    **{"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False},
}
SLIDING = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None}
DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt2": {
        **dict.fromkeys(["vocab_size", "n_embd", "n_layer", "n_head", "n_positions"], ...),
        **{"n_inner": None, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new", "tie_word_embeddings": True},
        **{"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
    },
    "llama": SHARED | {"rope_interleaved": False},
    "mistral": SHARED | {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": SHARED | SLIDING | {"num_key_value_heads": 32, "use_mrope": False},
    "qwen3": SHARED | SLIDING | {"num_key_value_heads": 32, "head_dim": 128},
    "gemma2": SIZES
    | ROTARY
    | {
        "max_position_embeddings": ...,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
    }
    | {"rms_norm_eps": 1e-6, "tie_word_embeddings": True, "query_pre_attn_scalar": 256.0, "sliding_window": 4096}
    | {"layer_types": None, "attention_bias": False, "mlp_bias": False, "use_bidirectional_attention": None}
    | {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
    # The published files with images leave to the defaults of their text part whatever has not changed.
    "gemma3_text": {
        **{"vocab_size": 262_208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26},
        **{"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 131_072},
        **{"hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "tie_word_embeddings": True},
        **{"sliding_window": 4096, "sliding_window_pattern": 6, "layer_types": None, "query_pre_attn_scalar": 256.0},
        **ROTARY,
        **{"rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0},
        **{"attention_bias": False, "mlp_bias": False, "use_bidirectional_attention": False},
        **{"final_logit_softcapping": None, "attn_logit_softcapping": None},
    },
    "mixtral": SHARED
    | {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1_000_000.0, "sliding_window": None}
    | {"num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3_moe": {name: default for name, default in SHARED.items() if name != "intermediate_size"}
    | {"num_key_value_heads": 4, "moe_intermediate_size": 768, "num_experts": None, "num_local_experts": 128}
    | {"num_experts_per_tok": 8, "norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": None}
    | {"use_sliding_window": False, "sliding_window": 4096},
    "phi3": SHARED | {"rms_norm_eps": 1e-5, "sliding_window": None},
    "olmo2": SHARED | {"rms_norm_eps": 1e-5},
    "smollm3": SHARED
    | {"num_key_value_heads": 4, "rope_theta": 2_000_000.0, "tie_word_embeddings": True, "use_sliding_window": False}
    | {"sliding_window": None, "layer_types": None, "no_rope_layers": None, "no_rope_layer_interval": 4},
    "granite": SHARED
    | dict.fromkeys(["embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"], 1.0),
    "bert": {
        **SIZES,
        **{"max_position_embeddings": ..., "hidden_act": "gelu", "layer_norm_eps": 1e-12, "type_vocab_size": 2},
        **{"tie_word_embeddings": True, "position_embedding_type": "absolute", "is_decoder": False},
    },
    "t5": {
        **dict.fromkeys(["vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads"], ...),
        **{"num_decoder_layers": None, "layer_norm_epsilon": 1e-6, "feed_forward_proj": "relu", "n_positions": 512},
        **{"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "is_encoder_decoder": True},
        **{"tie_word_embeddings": True, "scale_decoder_outputs": None, "is_decoder": False},
    },
}
# Fields of one family that change nothing: parts that are not read, and what the fields above say once more.
IDLE_OF = {
    "gpt2": "n_ctx summary_type summary_use_proj summary_activation summary_first_dropout summary_proj_to_labels",
    "gemma2": "hidden_act",
    "gemma3_text": "hidden_act _sliding_window_pattern",
    "qwen3_moe": "intermediate_size max_window_layers",
    "phi3": "original_max_position_embeddings",  # of longrope, which is refused
    "smollm3": "max_window_layers",
    "bert": "directionality pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type",
    "t5": "dense_act_fn is_gated_act",
}


class Theirs:
    """A config.json, read by name and type. Raises UserError for what is missing, of another type, or not supported.

    `defaults` are the fields that may be asked for; a field that is null is like none, unless null means something there.
    """

    def __init__(self, content: dict[str, Any], where: str, defaults: dict[str, Any]):
        self.content, self.where, self.defaults = content, where, defaults

    def __contains__(self, name: str) -> bool:
        """Whether the file says something about a field."""
        return self.content.get(name) is not None

    def __call__(self, name: str, kind: type, null: Any = ...) -> Any:
        """A field, or its default; `null` is what it means where it says or defaults to nothing."""
        value = self.content.get(name, self.defaults[name])
        if value is ... or (value is None and null is ...):
            raise UserError(f"{self.where} has no {name}")
        if value is None:
            return null
        if kind is float and type(value) is int:
            return float(value) if abs(value) < 1e300 else math.inf
        if type(value) is not kind:
            raise UserError(f"{self.where}: {name} = {str(value)[:40]!r}: expected {kind.__name__}")
        return value

    def size(self, name: str, null: int | Any = ..., largest: int = 2**40) -> int:
        """A number of something; `null` may be 0: derived, or none."""
        value = self(name, int, null)
        if value != null and not 0 < value <= largest:
            raise UserError(f"{self.where}: {name} = {value}: expected 1 to {largest:,}")
        return value

    def positive(self, name: str, null: float | Any = ...) -> float:
        value = self(name, float, null)
        if self.content.get(name, self.defaults[name]) is not None and not value > 0:
            raise UserError(f"{self.where}: {name} = {value}: expected more than 0")
        return value

    def only(self, **expected: Any) -> None:
        """Refuses fields that have, also by default, another value than the one that is computed here."""
        for name, value in expected.items():
            found = self.content.get(name)
            found = self.defaults[name] if found is None else found
            if found != value and found is not None:
                said = "" if name in self else ", its default,"
                raise UserError(f"{self.where}: {name} = {found!r}{said} is not supported, only {value!r}")

    def inside(self, name: str, defaults: dict[str, Any], kind: str = "") -> "Theirs":
        """An object in it ({} where there is none), and in that the one of a kind of layer where there are several."""
        value = self(name, dict, {})
        where = f"{self.where} {name}"
        if kind and isinstance(value.get(kind), dict):
            value, where = value[kind], f"{where} {kind}"
        return Theirs(value, where, defaults)

    def choice(self, name: str, choices: dict[str, str]) -> str:
        value = self(name, str)
        if value not in choices:
            raise UserError(f"{self.where}: {name} = {value!r} is not supported; known are {', '.join(choices)}")
        return choices[value]

    def nothing_else(self, what: str, idle: frozenset[str] = frozenset()) -> None:
        """Refuses by name the fields that say something, and of which nobody here knows what."""
        left = [name for name in self.content if name in self and name not in self.defaults.keys() | idle]
        if left:
            shown = ", ".join(f"{name} = {str(self.content[name])[:40]}" for name in left[:8])
            more = f" and {len(left) - 8} more" if len(left) > 8 else ""
            raise UserError(
                f"{self.where}: {shown}{more}: not supported in {what}{nearest(left[0], self.defaults)}\n"
                "a field that changes nothing of what the model computes can be taken out of the file"
            )


def theirs_of(kind: str, content: dict[str, Any], where: str) -> Theirs:
    """A config.json of a family, after a look at what it says that is not read. Raises UserError."""
    theirs = Theirs(content, where, FIXED | DEFAULTS[kind])
    theirs.only(**{name: value for name, value in FIXED.items() if name not in DEFAULTS[kind]})
    theirs.nothing_else(f"a model of type {kind}", IDLE | frozenset(IDLE_OF.get(kind, "").split()))
    return theirs
