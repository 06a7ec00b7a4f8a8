"""The first program of every tutorial: d_model=512, nhead=8, num_layers=6, dim_feedforward=2048, dropout=0.1, a language model.

    python -m lm_jax.main --config experiments/simple_transformer.py

That is the base size of arXiv:1706.03762, one stack: norms after the branches, ReLU, sinusoidal positions, the embedding scaled
by the root of its width. Adam with betas 0.9 and 0.98, epsilon 1e-9, warm-up over 4,000 steps, then the inverse square root
(section 5.3). The weights of a `torch.nn.TransformerEncoder` of this size give the same outputs here (tests/test_peers.py). 20M
parameters.
Expected: little before the warm-up is over; a step of 16 rows takes seconds on two CPU cores.
"""

from lm_jax.config import default_config


def get_config():
    config = default_config()
    model = config.model
    model.model_dim, model.num_heads, model.num_layers, model.mlp_dim, model.dropout = 512, 8, 6, 2048, 0.1
    model.norm_place, model.activation, model.positions = "post", "relu", "sinusoidal"
    model.scale_embedding = True
    config.optimizer.name, config.optimizer.beta2, config.optimizer.epsilon = "adam", 0.98, 1e-9
    config.optimizer.schedule, config.optimizer.warmup = "inverse_square_root", 4000
    config.optimizer.learning_rate = 512**-0.5 * 4000**-0.5  # 7e-4
    config.train.num_steps = 100_000
    return config
