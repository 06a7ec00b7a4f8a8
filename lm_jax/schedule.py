"""The learning rate of each update: a rise, then as `optimizer.schedule` names it; its lengths are counted by `Clocks`."""

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from lm_jax.batch_ramp import TICKS, UPDATES, Clocks
from lm_jax.config import FALLING, Optimizer

STABLE_SHARE = 0.8  # of the whole length, before warmup_stable_decay decays (arXiv:2405.18392: the last fifth)


def schedule(config: Optimizer, clocks: Clocks = UPDATES) -> optax.Schedule:
    """Learning rate of update number n = 0, 1, ...: it rises linearly to the peak (update 0 has 1 / warmup of it), then as named.

    `warmup` and `decay_over` are in steps here; the clock of each counts n plus an offset (`clocks`). Cosine: arXiv:1608.03983
    without restarts, down to `decay_to`; linear: to the same end; inverse square root: peak * sqrt(warmup / n)
    (arXiv:1706.03762); warm-up, stable, decay: the peak, then linear in the last fifth (arXiv:2404.06395). A decay by time goes
    from the start of the run to its end, and the rate is the lower one of the rise and the decay.
    """
    peak, warmup = config.learning_rate, int(config.warmup)
    by_time = clocks.ticks is not None and config.schedule in FALLING["optimizer.schedule"]
    start, end = (0, TICKS) if by_time else (warmup, int(config.decay_over))
    after_warmup = max(1, end - start)
    if config.schedule == "constant":
        after = optax.constant_schedule(peak)
    elif config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, after_warmup, config.decay_to)
    elif config.schedule == "linear":
        after = optax.linear_schedule(peak, config.decay_to * peak, after_warmup)
    elif config.schedule == "inverse_square_root":
        start = max(1, warmup)
        after = lambda count: peak * jnp.sqrt(start / jnp.maximum(start, count + warmup))
    else:
        assert config.schedule == "warmup_stable_decay", config.schedule
        begin = max(0, round(STABLE_SHARE * end) - start)
        after = optax.linear_schedule(peak, config.decay_to * peak, max(1, after_warmup - begin), begin)
    rise = optax.linear_schedule(0.0, peak, max(1, warmup))
    falls_from = clocks.warmup if config.schedule == "inverse_square_root" else clocks.decay

    def rate(count: ArrayLike) -> jax.Array:
        rising, falling = count + 1 + clocks.warmup, count + 1 + falls_from
        if by_time:
            return jnp.minimum(rise(rising), after(clocks.ticks))
        return jnp.where(jnp.less(rising, warmup), rise(rising), after(jnp.maximum(falling - warmup, 0)))

    return rate
