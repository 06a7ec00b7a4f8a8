"""What other libraries call a setting, and the key that means it here, with the value put in: `lr`, `n_embd`, `bf16`.

The words are those of transformers, nanoGPT and nanochat, MaxText, and the papers. A word is looked up only after it was found to
be no setting of ours.
"""

import ast
import shlex
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lm_jax.config import FIRST_LOSS_SCALE, leaves
from lm_jax.errors import shown

# {key: words that mean the same, with the same value}
SAME = {
    "optimizer.learning_rate": "lr max_lr peak_lr peak_learning_rate base_lr base_learning_rate",
    "optimizer.warmup": "warmup_steps warmup_iters num_warmup_steps lr_warmup_steps",
    "optimizer.decay_over": "lr_decay_iters lr_decay_steps learning_rate_schedule_steps",
    "optimizer.decay_to": "cosine_learning_rate_final_fraction min_lr_rate min_lr_ratio final_lr_frac",
    "optimizer.schedule": "lr_scheduler_type lr_scheduler lr_schedule scheduler learning_rate_schedule lr_schedule_type",
    "optimizer.beta1": "adam_beta1 adam_b1 momentum",
    "optimizer.beta2": "adam_beta2 adam_b2",
    "optimizer.epsilon": "adam_epsilon adam_eps",
    "optimizer.weight_decay": "wd adam_weight_decay",
    "optimizer.clip_norm": "grad_clip max_grad_norm gradient_clipping_threshold gradient_clip_val clip_grad gradient_clip clip",
    "optimizer.name": "optim opt_type optimizer_type optimizer_name optimizer",
    "optimizer.ema": "ema_decay",
    "train.num_steps": "max_steps max_iters steps total_steps train_steps num_iterations num_iters iters iterations "
    "num_train_steps max_train_steps num_training_steps",
    "train.microbatch_rows": "micro_batch_size microbatch_size",
    "train.seed": "seed init_weights_seed random_seed",
    "train.init_from": "model_name_or_path load_parameters_path pretrained pretrained_model finetune_from",
    "data.seed": "data_seed data_shuffle_seed",
    "data.sources": "dataset dataset_name dataset_path train_file data_dir data_path",
    "data.tokenizer": "tokenizer_path tokenizer_name tokenizer_name_or_path",
    "data.sequence_length": "block_size seq_len seq_length sequence_len max_seq_len max_seq_length context_length context_size "
    "context_window n_ctx n_positions max_position_embeddings max_target_length max_length",
    "data.num_workers": "dataloader_num_workers grain_worker_count",
    "data.validation_fraction": "val_fraction validation_split val_split validation_split_percentage",
    "model.num_layers": "n_layer n_layers num_layer num_hidden_layers num_decoder_layers base_num_decoder_layers layers depth",
    "model.model_dim": "n_embd d_model hidden_size emb_dim base_emb_dim embed_dim embedding_dim hidden_dim dim dmodel",
    "model.num_heads": "n_head n_heads num_head num_attention_heads num_query_heads base_num_query_heads nhead",
    "model.num_kv_heads": "n_kv_head n_kv_heads num_key_value_heads base_num_kv_heads",
    "model.mlp_dim": "d_ff intermediate_size n_inner ffn_dim dim_feedforward ffn_hidden_size base_mlp_dim ff_dim",
    "model.dropout": "dropout_rate dropout_prob resid_pdrop attn_pdrop embd_pdrop hidden_dropout_prob attention_dropout "
    "attention_probs_dropout_prob hidden_dropout",
    "model.activation": "hidden_act activation_function act act_fn",
    "model.rotary_base": "rope_theta rope_base rope_max_timescale",
    "model.norm_epsilon": "layer_norm_eps layer_norm_epsilon rms_norm_eps normalization_layer_epsilon norm_eps",
    "model.tie_embedding": "tie_word_embeddings tie_weights logits_via_embedding tie_embeddings",
    "model.init_scale": "initializer_range init_std",
    "model.num_experts": "num_local_experts n_experts n_routed_experts",
    "model.experts_per_token": "num_experts_per_tok top_k_experts",
    "model.remat": "remat_policy",
    "model.attention": "attn_implementation attention_type attn_impl",
    "model.lora_rank": "lora_r",
    "checkpoint.every": "save_steps save_interval save_every checkpoint_period checkpoint_every checkpoint_interval",
    "checkpoint.keep_last": "save_total_limit max_to_keep",
    "checkpoint.keep_best": "metric_for_best_model",
    "evaluate.patience": "early_stopping_patience early_stop_patience",
    "evaluate.every": "eval_steps eval_interval eval_every val_interval val_every",
    "log.every": "logging_steps log_interval log_period log_every",
    "mesh.data": "ici_data_parallelism data_parallel_size num_replicas",
    "mesh.fsdp": "ici_fsdp_parallelism",
    "mesh.tensor": "ici_tensor_parallelism tensor_parallel_size tensor_parallel",
    "mesh.context": "ici_context_parallelism ici_sequence_parallelism context_parallel_size",
    "mesh.expert": "ici_expert_parallelism expert_parallel_size",
}  # fmt: skip
VALUES = {  # of words in SAME, as others spell them -> as here
    "inverse_sqrt": "inverse_square_root", "wsd": "warmup_stable_decay", "adamw_torch": "adamw", "adamw_torch_fused": "adamw",
    "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "swish": "silu", "sdpa": "auto", "flash_attention_2": "auto", "eager": "xla",
    "dot_product": "xla",
}  # fmt: skip
NO_STAGES = (
    "there are no stages of layers, every device works on each of them\n"
    "to split parameters say mesh.fsdp, each layer mesh.tensor, long rows mesh.context, experts mesh.expert"
)
OTHER_AXES = {  # as others call them -> what to say here
    **dict.fromkeys(("stage", "stages", "pipeline", "pipe", "pp"), NO_STAGES),
    **dict.fromkeys(("sequence", "seq", "sp", "cp"), "for the tokens of a row say mesh.context"),
    **dict.fromkeys(("ep", "experts"), "for experts say mesh.expert"),
    **dict.fromkeys(("tp", "model"), "for heads, MLP and vocabulary say mesh.tensor"),
    **dict.fromkeys(("dp", "replica"), "for copies of the parameters say mesh.data"),
}
Flat = Mapping[str, Any]  # what is known of the config beside the word, by key


class Meaning(NamedTuple):
    """What a word means here: values by key, and in words what is not the same."""

    values: dict[str, Any]
    note: str = ""


def _share(key: str, of: str, words: str, share: Callable[[float, float], float]) -> Callable[[Any, Flat], Meaning]:
    """A number for `key` that needs the value of the setting `of`; where that is not known, `words` stand for the number."""

    def meaning(value: Any, flat: Flat) -> Meaning:
        number, base, told = _number(value), flat.get(of), words.format(value)
        if number is None or not isinstance(base, (int, float)) or not base:
            return Meaning({key: f"<{told}>"})
        return Meaning({key: share(number, base)}, told)

    return meaning


def _batch(value: Any, flat: Flat) -> Meaning:
    return Meaning(
        {"data.global_batch_size": value},
        "rows of a step over all devices and passes: of one device, times their number",
    )


def _precision(value: Any, flat: Flat) -> Meaning:
    name = str(value).lower().rpartition(".")[2]
    short = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "no": "float32"}.get(
        name, name
    )
    scale = {"optimizer.loss_scale": FIRST_LOSS_SCALE} if short == "float16" else {}
    return Meaning({"model.compute_dtype": short} | scale, "parameters stay float32")


def _switch(value: Any, on: str, off: str) -> str:
    return off if str(value).lower() in ("false", "0", "no", "none") else on


# {word: (value, what is known) -> its meaning}: other units, or several settings.
OTHERWISE: dict[str, Callable[[Any, Flat], Meaning]] = {
    **dict.fromkeys(
        ("epochs", "num_epochs", "num_train_epochs", "max_epochs", "n_epochs"),
        lambda value, flat: Meaning({"train.num_steps": f"{value} epochs"}),
    ),
    **dict.fromkeys(
        ("max_tokens", "num_tokens", "train_tokens", "total_tokens"),
        lambda value, flat: Meaning({"train.num_steps": f"{value} tokens"}),
    ),
    **dict.fromkeys(
        (
            "batch_size",
            "train_batch_size",
            "per_device_batch_size",
            "per_device_train_batch_size",
            "device_batch_size",
            "batch",
        ),
        _batch,
    ),
    **dict.fromkeys(
        (
            "gradient_accumulation_steps",
            "accumulate_grad_batches",
            "grad_accum_steps",
            "gradient_accumulation",
            "grad_accum",
        ),
        _share(
            "train.microbatch_rows",
            "data.global_batch_size",
            "data.global_batch_size / {}",
            lambda passes, rows: max(1, int(rows // max(1, passes))),
        ),
    ),
    "min_lr": _share(
        "optimizer.decay_to",
        "optimizer.learning_rate",
        "{} / optimizer.learning_rate",
        lambda low, peak: float(f"{low / peak:.6g}"),
    ),
    **dict.fromkeys(
        ("warmup_ratio", "warmup_steps_fraction", "warmup_fraction"),
        _share("optimizer.warmup", "train.num_steps", "{} * train.num_steps", lambda share, num: round(share * num)),
    ),
    **dict.fromkeys(("dtype", "torch_dtype", "precision", "mixed_precision", "compute_type"), _precision),
    "bf16": lambda value, flat: _precision(_switch(value, "bfloat16", "float32"), flat),
    "fp16": lambda value, flat: _precision(_switch(value, "float16", "float32"), flat),
    **dict.fromkeys(
        ("gradient_checkpointing", "activation_checkpointing"),
        lambda value, flat: Meaning({"model.remat": _switch(value, "full", "none")}),
    ),
    "vocab_size": lambda value, flat: Meaning({"data.tokenizer": f"sentencepiece:{value}"}, "a tokenizer decides it"),
    **dict.fromkeys(
        ("sliding_window", "sliding_window_size"), lambda value, flat: Meaning({"model.window": f"({value},)"})
    ),
    **dict.fromkeys(
        ("output_dir", "out_dir", "base_output_directory"), lambda value, flat: Meaning({"--workdir": value})
    ),
}
WORDS = {word: key for key, words in SAME.items() for word in words.split()}


def meaning(path: str, value: Any, flat: Flat) -> Meaning | None:
    """What a word (`lr`, `optimizer.lr`) with a value means; None where it is not known, or is the name of several settings."""
    path = path.lower().replace("-", "_")
    word = path.rpartition(".")[2]
    if word in OTHERWISE:
        return OTHERWISE[word](value, flat)
    own = [key for key in leaves() if path in (key, key.split(".")[1])]
    key = path if path in own else WORDS.get(word) or (own[0] if len(own) == 1 else "")
    return Meaning({key: VALUES.get(str(value).lower(), value)}) if key else None


def answer(path: str, value: Any, flat: Flat, typed: bool) -> str:
    """`: here that is --config.optimizer.learning_rate=3e-4`, or as an experiment file says it; "" where nothing is known.

    `typed`: on a command line. `value` None: it was only read. `flat` is what is known of the config.
    """
    if not (found := meaning(path, value, flat)):
        return ""
    flag = lambda key: key if key.startswith("--") else f"--config.{key}"
    if value is None:
        keys = ", ".join(f"config.{key}" for key in found.values)
    elif typed:
        keys = " ".join(f"{flag(key)}={shlex.quote(str(value)[:200])}" for key, value in found.values.items())
    else:
        keys = "; ".join(
            key if key.startswith("--") else f"config.{key} = {shown(value)}" for key, value in found.values.items()
        )
    return f": here that is {keys}" + f" ({found.note})" * bool(found.note)


def _number(value: Any) -> float | None:
    try:
        found = ast.literal_eval(str(value))
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None
    return found if type(found) in (int, float) else None
