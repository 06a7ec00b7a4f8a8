"""T5 1.1 small (arXiv:1910.10683, arXiv:2002.05202): 8 layers that read and 8 that write, 512 wide, 77M parameters; span
corruption.

    python -m lm_jax.main --config experiments/t5_small.py --config.data.sources=/path/to/folder/of/text

Relative positions shared over layers, RMSNorm before the branches, gated GELU, no biases, an output table of its own, no
dropout in pretraining; 15% of the tokens in spans of three; Adafactor, 10,000 steps at 0.01, then the inverse square root, 1M
steps of 128 rows of 512 tokens (2,048 rows in the later report). Not as there: sentinels stand after the tokenizer's pieces,
and initial weights have one deviation.
Expected: the report gives no loss of this size. On two CPU cores a step takes minutes: try experiments/t5_tiny.py.
"""

from lm_jax.config import default_config


def get_config():
    config = default_config()
    model = config.model
    model.kind, model.num_layers, model.model_dim, model.mlp_dim = "encoder_decoder", 8, 512, 1024
    model.num_heads, model.head_dim = 6, 64
    model.positions, model.norm, model.norm_epsilon, model.bias = "relative", "rmsnorm", 1e-6, False
    model.gated, model.tie_embedding = True, False
    config.data.objective, config.data.tokenizer = "span_corruption", "sentencepiece:32000"
    config.data.sequence_length, config.data.global_batch_size = 512, 128
    config.optimizer.name, config.optimizer.learning_rate, config.optimizer.weight_decay = "adafactor", 0.01, 0.0
    config.optimizer.schedule, config.optimizer.warmup = "inverse_square_root", 10_000
    config.train.num_steps = 1_000_000
    config.checkpoint.every, config.evaluate.every = "30 min", 5_000
    return config
