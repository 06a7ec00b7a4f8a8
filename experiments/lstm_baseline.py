"""An LSTM language model, what the Transformer replaced: the quickstart's corpus, tokens, batch and number of parameters.

    python -m lm_jax.main --config experiments/lstm_baseline.py

Two layers of 200 cells and a tied table (the form of arXiv:1409.2329): 1.05M parameters, as many as experiments/quickstart.py.
Expected: EXPECTED
"""

import quickstart


def get_config():
    config = quickstart.get_config()
    config.model.kind, config.model.num_layers, config.model.model_dim = "lstm", 2, 200
    config.model.positions, config.model.unroll = "none", False
    config.model.init_scale, config.optimizer.learning_rate = 0.15, 1e-2
    return config
