"""The decoder families in the quickstart's size, on the interpreter's own library: minutes on two CPU cores.

    python -m lm_jax.main --config experiments/small_decoders.py:gemma3

Variants: llama, mistral, qwen2, qwen3, gemma3, mixtral. Rates and rows are the quickstart's. Expected: losses from ln 2048 = 7.6
nats downwards; no run to the end is written down yet.
"""

from lm_jax.config import default_config

LLAMA = dict(positions="rotary", norm="rmsnorm", activation="silu", gated=True, bias=False, num_kv_heads=1, mlp_dim=384)
FAMILIES = {
    "llama": LLAMA,
    "mistral": LLAMA | dict(window=(128,)),
    "qwen2": LLAMA | dict(qkv_bias=True),
    "qwen3": LLAMA | dict(qk_norm=True),
    "gemma3": LLAMA
    | dict(activation="gelu", qk_norm=True, norm_place="both", scale_embedding=True)
    | dict(window=(128, 0), rotary_base=1e6, rotary_local_base=1e4),
    "mixtral": LLAMA | dict(num_experts=4, mlp_dim=192),
}
VARIANTS = tuple(FAMILIES)


def get_config(variant: str = ""):
    config = default_config()
    config.model.num_layers, config.model.model_dim, config.model.num_heads = 4, 128, 2
    config.model.init_scale = 0.06
    config.model.update(FAMILIES[variant or "llama"])
    config.data.tokenizer = "sentencepiece:2048"
    config.data.sequence_length, config.data.global_batch_size = 512, 2
    config.optimizer.learning_rate, config.optimizer.warmup = 1.5e-3, 50
    config.train.num_steps = 750
    config.checkpoint.every, config.evaluate.every, config.log.every = 150, 250, 25
    config.evaluate.num_rows = 0
    return config
