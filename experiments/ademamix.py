"""An optimizer of Optax: AdEMAMix (Pagliardini et al., arXiv:2409.03137), Adam with a second, slow average of gradients.

    python -m lm_jax.main --config experiments/ademamix.py
    python -m lm_jax.evaluate --model runs/ademamix --parts experiments/ademamix.py

The quickstart's variant gpt3 with another update rule. Clipping before it, weight decay and the schedule after it stay those of
`config.optimizer`; its betas and epsilon are read from there, too. Elementwise rules like this one take stacked and sharded
parameters as they are; one that reads a whole matrix is wrapped in `lm_jax.update_rules.per_layer`.
Expected: 2.76 validation bits per byte with --config.train.num_steps=250, where quickstart.py:gpt3 has 2.74.
"""

import optax
import quickstart

from lm_jax.parts import Parts

# Beta of the slow average, and its weight; the paper's beta of 0.9999 is meant for runs of 100,000 steps.
SLOW, MIX = 0.999, 5.0


def get_config():
    config = quickstart.get_config("gpt3")
    # The name is the default, said here because another one would not be read.
    config.optimizer.name, config.optimizer.learning_rate = "adamw", 1.5e-3
    return config


def ademamix(config, declared):
    """The rule of `config.optimizer`, for parameters that are declared so."""
    return optax.contrib.scale_by_ademamix(config.beta1, config.beta2, SLOW, MIX, config.epsilon)


def get_parts():
    return Parts(optimizer=ademamix)
