"""GPT-3 Small (arXiv:2005.14165, table 2.1 and appendix B): 125M parameters, 300B tokens.

    python -m lm_jax.main --config experiments/gpt_125m.py
    python -m lm_jax.main --config experiments/gpt_125m.py --config.data.sources=/path/to/folder/of/text

Batch 0.5M tokens = 256 rows of 2,048, from 32k tokens = 16 rows over the first 4B tokens; warm-up over 375M tokens, cosine
to 10% of the rate at 260B. Dense and banded attention alternate; the paper does not give the band's width, 256 is ours.
Expected: the paper's validation loss at 300B tokens is about 2.6 nats a token on its own corpus; the embedded corpus is for
trying the recipe, not for training it. On two CPU cores the first step (16 rows) takes about a quarter of an hour.
"""

from lm_jax.config import default_config


def get_config():
    config = default_config()
    config.model.num_layers, config.model.model_dim, config.model.num_heads = 12, 768, 12
    config.model.window = (0, 256)
    config.data.tokenizer = "sentencepiece:50257"
    config.data.sequence_length, config.data.global_batch_size = 2048, 256
    config.data.batch_ramp = (16, "4B tokens")
    config.optimizer.learning_rate = 6e-4
    config.optimizer.warmup, config.optimizer.decay_over = "375M tokens", "260B tokens"
    config.train.num_steps = "300B tokens"
    config.checkpoint.every, config.train.on_spike = "30 min", "rewind"
    config.evaluate.every, config.log.every = 1000, 1
    return config
