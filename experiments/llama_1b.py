"""A Llama of 1.1B parameters on 3T tokens (TinyLlama, arXiv:2401.02385, table 2 and section 2.2).

    python -m lm_jax.main --config experiments/llama_1b.py --config.data.sources=/path/to/folder/of/text

Batch 2M tokens = 1,024 rows of 2,048; AdamW with betas 0.9 and 0.95, decay 0.1, clipped at 1.0; 4e-4, warm-up 2,000 steps, cosine
to a tenth. Expected: the paper gives no loss in numbers; the embedded corpus is for trying the recipe, not for training it.
"""

from lm_jax.config import default_config


def get_config():
    config = default_config()
    config.model.num_layers, config.model.model_dim, config.model.mlp_dim = 22, 2048, 5632
    config.model.num_heads, config.model.num_kv_heads = 32, 4
    config.model.positions, config.model.norm, config.model.bias = "rotary", "rmsnorm", False
    config.model.activation, config.model.gated, config.model.tie_embedding = "silu", True, False
    config.data.tokenizer = "sentencepiece:32000"
    config.data.sequence_length, config.data.global_batch_size = 2048, 1024
    config.optimizer.learning_rate, config.optimizer.warmup = 4e-4, 2000
    config.train.num_steps = "3T tokens"
    config.checkpoint.every, config.train.on_spike = "30 min", "rewind"
    config.evaluate.every, config.log.every = 1000, 1
    return config
