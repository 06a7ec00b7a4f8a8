"""GPT-3 in all eight sizes (arXiv:2005.14165, table 2.1 and appendix B): 300B tokens each.

    python -m lm_jax.main --config experiments/gpt3.py:1.3b --config.data.sources=/path/to/folder/of/text

AdamW with betas 0.9 and 0.95, epsilon 1e-8, decay 0.1, clipped at 1.0; warm-up over 375M tokens, cosine to 10% at 260B; rows
of 2,048 tokens; the batch grows from 32k tokens; dense and banded attention alternate. Where the paper is silent or at odds
with itself:
  1.3b   24 heads of 128 are not 2,048 wide and would make 1.52B parameters: 16 heads of 128, 1.32B.
  13b    5,140 is not 40 heads of 128, which are 5,120, 12.9B.
  175b   3.2M tokens are 1,562.5 rows: 1,536, which divide over pods.
  ramp   "4-12 billion tokens, depending on the model size": the steps between the ends are ours.
  band   no width is given: 256 is ours.
Expected: the paper's fit through its best runs, 2.57 * (PF-days)^-0.048 nats a token on its own corpus, gives for the rows
2.45, 2.33, 2.25, 2.19, 2.12, 2.03, 1.97 and 1.73. A pod needs a first batch that divides over it, such as
--config.data.batch_ramp="(128, '12B tokens')".
"""

from typing import NamedTuple

from lm_jax.config import default_config


class Row(NamedTuple):
    num_layers: int
    model_dim: int
    num_heads: int
    batch_rows: int  # of 2,048 tokens
    learning_rate: float
    ramp: str


ROWS = {
    "125m": Row(12, 768, 12, 256, 6e-4, "4B tokens"),
    "350m": Row(24, 1024, 16, 256, 3e-4, "4B tokens"),
    "760m": Row(24, 1536, 16, 256, 2.5e-4, "4B tokens"),
    "1.3b": Row(24, 2048, 16, 512, 2e-4, "6B tokens"),
    "2.7b": Row(32, 2560, 32, 512, 1.6e-4, "6B tokens"),
    "6.7b": Row(32, 4096, 32, 1024, 1.2e-4, "8B tokens"),
    "13b": Row(40, 5120, 40, 1024, 1e-4, "8B tokens"),
    "175b": Row(96, 12288, 96, 1536, 6e-5, "12B tokens"),
}
VARIANTS = tuple(ROWS)


def get_config(variant: str = ""):
    row, config = ROWS[variant or "125m"], default_config()
    config.model.num_layers, config.model.model_dim, config.model.num_heads = row[:3]
    config.model.window = (0, 256)
    config.data.tokenizer = "sentencepiece:50257"
    config.data.sequence_length, config.data.global_batch_size = 2048, row.batch_rows
    config.data.batch_ramp = (16, row.ramp)
    config.optimizer.learning_rate = row.learning_rate
    config.optimizer.warmup, config.optimizer.decay_over = "375M tokens", "260B tokens"
    config.train.num_steps = "300B tokens"
    config.checkpoint.every, config.train.on_spike = "30 min", "rewind"
    config.evaluate.every, config.log.every = 1000, 1
    return config
