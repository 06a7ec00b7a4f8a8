"""How a config.json is read: by name and type, with the defaults of its family, and nothing left that was not understood.

`IDLE` are fields that change nothing of what a model computes: a name, a precision of storage, dropout, generation, how its first
weights were drawn. A field that is neither idle nor read (`Family.defaults`) is refused by name.
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


class HFConfigReader:
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
        """An integer from 1 to `largest`; `null` is what it means where the field is missing. Raises UserError."""
        value = self(name, int, null)
        if value != null and not 0 < value <= largest:
            raise UserError(f"{self.where}: {name} = {value}: expected 1 to {largest:,}")
        return value

    def positive(self, name: str, null: float | Any = ...) -> float:
        """A number above 0; `null` is what it means where the field is missing. Raises UserError."""
        value = self(name, float, null)
        if self.content.get(name, self.defaults[name]) is not None and not value > 0:
            raise UserError(f"{self.where}: {name} = {value}: expected more than 0")
        return value

    def only(self, **expected: Any) -> None:
        """Raises UserError for a field whose value, also by default, is another than the one that is computed here."""
        for name, value in expected.items():
            found = self.content.get(name)
            found = self.defaults[name] if found is None else found
            if found != value and found is not None:
                said = "" if name in self else ", its default,"
                raise UserError(f"{self.where}: {name} = {found!r}{said} is not supported, only {value!r}")

    def inside(self, name: str, defaults: dict[str, Any], kind: str = "") -> "HFConfigReader":
        """The reader of an object in it ({} where there is none), or of its entry `kind` where it has such entries."""
        value = self(name, dict, {})
        where = f"{self.where} {name}"
        if kind and isinstance(value.get(kind), dict):
            value, where = value[kind], f"{where} {kind}"
        return HFConfigReader(value, where, defaults)

    def choice(self, name: str, choices: dict[str, str]) -> str:
        """Our word for the field's value, which must be one of `choices` {theirs: ours}. Raises UserError."""
        value = self(name, str)
        if value not in choices:
            raise UserError(f"{self.where}: {name} = {value!r} is not supported; known are {', '.join(choices)}")
        return choices[value]

    def nothing_else(self, what: str, idle: frozenset[str] = frozenset()) -> None:
        """Raises UserError that names the fields which nobody here reads."""
        unknown = [name for name in self.content if name in self and name not in self.defaults.keys() | idle]
        if unknown:
            shown = ", ".join(f"{name} = {str(self.content[name])[:40]}" for name in unknown[:8])
            more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
            raise UserError(
                f"{self.where}: {shown}{more}: not supported in {what}{nearest(unknown[0], self.defaults)}\n"
                "a field that changes nothing of what the model computes can be taken out of the file"
            )
