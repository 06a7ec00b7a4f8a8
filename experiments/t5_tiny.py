"""A tiny T5 on the interpreter's own library and manual: hidden spans, minutes on two CPU cores.

    python -m lm_jax.main --config experiments/t5_tiny.py

The quickstart's corpus and width.
Expected: loss 7.7 at the start (log of 2,148 pieces); a few minutes on two CPU cores.
"""

import t5_small


def get_config():
    config = t5_small.get_config()
    model = config.model
    model.num_layers, model.model_dim, model.mlp_dim, model.init_scale = 2, 128, 256, 0.06
    model.num_heads, model.head_dim = 2, 0
    config.data.tokenizer = "sentencepiece:2048"
    config.data.sequence_length, config.data.global_batch_size = 128, 8
    config.optimizer.name, config.optimizer.learning_rate, config.optimizer.warmup = "adamw", 2e-3, 100
    config.optimizer.schedule = "cosine"
    config.train.num_steps = 750
    config.checkpoint.every, config.evaluate.every, config.log.every = 500, 250, 50
    config.evaluate.num_rows = 0
    return config
