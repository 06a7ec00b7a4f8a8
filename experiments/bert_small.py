"""A small BERT on the interpreter's own library and manual: masked tokens and next sentences, minutes on two CPU cores.

    python -m lm_jax.main --config experiments/bert_small.py

The quickstart's size and corpus, 1.1M parameters. Expected: loss 7.4 at the start, 5.6 a hidden token after 350 steps (0.36M
tokens), 2,500 to 3,500 tokens/s on two CPU cores.
"""

import bert_base


def get_config():
    config = bert_base.get_config()
    config.model.num_layers, config.model.model_dim, config.model.num_heads = 4, 128, 2
    config.model.init_scale, config.model.dropout = 0.06, 0.0
    config.data.tokenizer = "sentencepiece:2048"
    config.data.sequence_length, config.data.global_batch_size = 128, 8
    config.optimizer.learning_rate, config.optimizer.warmup = 2e-3, 100
    config.train.num_steps = 750
    config.checkpoint.every, config.evaluate.every, config.log.every = 500, 250, 50
    config.evaluate.num_rows = 0
    return config
