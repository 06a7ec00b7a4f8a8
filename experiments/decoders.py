"""Llama and its relatives as their papers have them; each differs from the one before by a few settings.

    python -m lm_jax.main --config experiments/decoders.py:qwen3_0_6b --config.data.sources=/path/to/folder/of/text

llama_7b      arXiv:2302.13971, tables 2 and section 2.3: 1T tokens, 4M a batch, 3e-4, warm-up 2,000 steps, cosine to 10%
mistral_7b    arXiv:2310.06825, table 1: heads in groups, a window of 4,096
qwen2_0_5b    arXiv:2407.10671, table 1: biases of queries, keys and values, one table
qwen3_0_6b    arXiv:2505.09388, table 1: heads normalised, no biases, heads of 128
gemma3_270m   arXiv:2503.19786: norms before and after, five windows of 512 and one of all, embedding scaled
mixtral_8x7b  arXiv:2401.04088, table 1: two of eight experts a token

Only Llama's paper gives its rates and batch: the others are trained by Llama's. Expected: Llama's training loss at 1T tokens is
about 1.8 nats a token on its own corpus (figure 1); the embedded corpus is for trying the recipe, not for training it.
"""

from lm_jax.config import default_config

LLAMA = dict(
    num_layers=32, model_dim=4096, num_heads=32, mlp_dim=11008, positions="rotary", norm="rmsnorm", norm_epsilon=1e-6,
    activation="silu", gated=True, bias=False, tie_embedding=False,
)  # fmt: skip
MISTRAL = LLAMA | dict(num_kv_heads=8, mlp_dim=14336, norm_epsilon=1e-5, window=(4096,))
QWEN2 = LLAMA | dict(
    num_layers=24, model_dim=896, num_heads=14, num_kv_heads=2, mlp_dim=4864, rotary_base=1e6, qkv_bias=True, tie_embedding=True,
)  # fmt: skip
QWEN3 = QWEN2 | dict(
    num_layers=28, model_dim=1024, num_heads=16, num_kv_heads=8, head_dim=128, mlp_dim=3072, qkv_bias=False, qk_norm=True,
)  # fmt: skip
GEMMA3 = QWEN3 | dict(
    num_layers=18, model_dim=640, num_heads=4, num_kv_heads=1, head_dim=256, mlp_dim=2048, activation="gelu",
    norm_place="both", window=(512,) * 5 + (0,), rotary_local_base=1e4, scale_embedding=True,
)  # fmt: skip
MIXTRAL = MISTRAL | dict(window=(0,), rotary_base=1e6, num_experts=8, experts_per_token=2)
# (settings of the model, pieces, tokens in a row)
ROWS = {
    "llama_7b": (LLAMA, 32000, 2048),
    "mistral_7b": (MISTRAL, 32000, 8192),
    "qwen2_0_5b": (QWEN2, 151936, 4096),
    "qwen3_0_6b": (QWEN3, 151936, 4096),
    "gemma3_270m": (GEMMA3, 262144, 4096),
    "mixtral_8x7b": (MIXTRAL, 32000, 4096),
}
VARIANTS = tuple(ROWS)
BATCH_TOKENS = 2048 * 2048


def get_config(variant: str = ""):
    (model, pieces, length), config = ROWS[variant or "llama_7b"], default_config()
    config.model.update(model)
    config.data.tokenizer = f"sentencepiece:{pieces}"
    config.data.sequence_length, config.data.global_batch_size = length, BATCH_TOKENS // length
    config.optimizer.learning_rate, config.optimizer.warmup = 3e-4, 2000
    config.train.num_steps = "1T tokens"
    if model.get("num_experts"):
        config.train.balance_loss = 0.02
    config.checkpoint.every = "30 min"
    config.evaluate.every, config.log.every = 1000, 1
    return config
