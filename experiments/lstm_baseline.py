"""An LSTM language model, what the Transformer replaced: the quickstart's corpus, tokens, batch and number of parameters.

    python -m lm_jax.main --config experiments/lstm_baseline.py

Two layers of 200 cells and a tied table (the form of arXiv:1409.2329): 1.05M parameters, as many as
experiments/quickstart.py, whose variant gpt3 gives the recipe.
Expected: 2.36 validation bits per byte where the Transformer has 2.34 in it; it is behind all the way (docs/transformer_lstm.png)
and takes a token at a time: 3,200 tokens/s on the two CPU cores that do 5,800 there.
"""

import quickstart

from lm_jax.config import default_config


def get_config():
    config = quickstart.get_config("gpt3")
    config.model.kind, config.model.num_layers, config.model.model_dim = "lstm", 2, 200
    config.model.positions, config.model.num_heads = "none", default_config().model.num_heads  # it has neither
    config.model.unroll = False
    config.model.init_scale, config.optimizer.learning_rate = 0.15, 1e-2
    return config
