"""BERT base (arXiv:1810.04805, section 3 and appendix A.2): 110M parameters, 1M steps of 256 rows of 512 tokens.

    python -m lm_jax.main --config experiments/bert_base.py --config.data.sources=/path/to/folder/of/text

Adam with betas 0.9 and 0.999, decay 0.01 on matrices, warm-up over 10,000 steps to 1e-4, linear to 0; dropout 0.1; exact
GELU; 15% of the tokens masked, next sentences in the same batch. Not as in the paper: rows are 512 tokens from the first step
on (there 128 for the first 90%), and a row is cut into its two texts anywhere in its middle half (there between sentences).
The label of the next sentence weighs as much as one masked token.
Expected: the paper reports no loss of its pretraining. On two CPU cores a step takes minutes: try experiments/bert_small.py.
"""

from lm_jax.config import default_config


def get_config():
    config = default_config()
    model = config.model
    model.kind, model.num_layers, model.model_dim, model.num_heads = "encoder", 12, 768, 12
    model.norm_place, model.norm_epsilon, model.activation, model.dropout = "post", 1e-12, "gelu_exact", 0.1
    config.data.objective, config.data.tokenizer = "masked", "sentencepiece:30521"  # and [MASK]: the paper's 30,522
    config.data.sequence_length, config.data.global_batch_size = 512, 256
    config.optimizer.learning_rate, config.optimizer.beta2, config.optimizer.weight_decay = 1e-4, 0.999, 0.01
    config.optimizer.warmup, config.optimizer.schedule, config.optimizer.decay_to = 10_000, "linear", 0.0
    config.optimizer.epsilon = 1e-6
    config.train.num_steps = 1_000_000
    config.checkpoint.every, config.evaluate.every = "30 min", 5_000
    return config
