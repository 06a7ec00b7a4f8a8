"""Schedules and update rules from Optax, by name; which parameters decay is read from their declarations."""

import optax

from lm_jax.config import Optimizer
from lm_jax.model.layers import Declaration


def schedule(config: Optimizer) -> optax.Schedule:
    """Learning rate of update number n = 0, 1, ...: linear from 0 (not reached: n + 1), then cosine or constant.

    `warmup` and `decay_over` are steps by now. Cosine as in arXiv:1608.03983 without restarts, down to `decay_to`.
    """
    peak, warmup = config.learning_rate, int(config.warmup)
    if config.schedule == "constant":
        after = optax.constant_schedule(peak)
    else:
        after = optax.cosine_decay_schedule(peak, max(1, int(config.decay_over) - warmup), config.decay_to)
    rise = optax.linear_schedule(0.0, peak, max(1, warmup))
    joined = optax.join_schedules([rise, after], [warmup])
    return lambda count: joined(count + 1)


def decays(declared: Declaration) -> bool:
    """Weight decay is for what stands inside a product: matrices and tables, not norms and biases."""
    return bool(declared.inputs and declared.outputs)


def make_optimizer(config: Optimizer, decay_mask: dict) -> optax.GradientTransformation:
    """Clip by global norm, update rule, decoupled decay (arXiv:1711.05101), schedule; on mean gradients."""
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    if config.name == "adamw":
        rule = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)
    else:
        assert config.name == "sgd", config.name
        rule = optax.trace(config.beta1)
    decay = optax.add_decayed_weights(config.weight_decay, mask=decay_mask)
    return optax.chain(clip, rule, decay, optax.scale_by_learning_rate(schedule(config)))
