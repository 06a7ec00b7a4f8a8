"""Which token comes next: pure functions of logits, each request with settings of its own.

Shape suffixes: B requests, V vocabulary. The order is that of the field: repetition penalty, temperature, then the cuts.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax.model.dropout import row_keys
from lm_jax.sharding import computed, on_each_device


class Sampling(NamedTuple):
    """Numbers, or arrays [B]. Temperature 0 is greedy; top_k 0, top_p 1, min_p 0 and repetition_penalty 1 are off."""

    temperature: Any = 0.8
    top_k: Any = 50
    top_p: Any = 0.95
    min_p: Any = 0.0
    repetition_penalty: Any = 1.0
    seed: Any = 0  # uint32

    def of_each(self, seed_by: np.ndarray) -> "Sampling":
        """The settings as arrays [B]; each request has its own seed, the given one plus `seed_by`."""
        num = len(seed_by)
        kinds = (np.float32, np.int32, np.float32, np.float32, np.float32, np.uint32)
        spread = [np.broadcast_to(np.asarray(x, kind), num) for x, kind in zip(self, kinds, strict=True)]
        return Sampling._make(spread)._replace(seed=spread[-1] + seed_by.astype(np.uint32))


GREEDY = Sampling(temperature=0.0)


def keys(seed_B: jax.Array, step: jax.Array) -> jax.Array:
    """One key for each request, from its seed and the index of the token, int32 [] or [B]; neighbours do not enter."""
    one = lambda seed, step: row_keys(jax.random.key(seed), "generate", step, 0, jnp.zeros(1, jnp.uint32))[0]
    return jax.vmap(one)(seed_B, jnp.broadcast_to(step, seed_B.shape))


def draw(logits_BV: jax.Array, step: jax.Array, sampling: Sampling, used_BV: jax.Array | None) -> jax.Array:
    """`sample` on a mesh: every device draws for its own requests, by their seeds."""
    row, matrix = computed(("batch",)), computed(("batch", None))
    layouts = matrix, computed(()), jax.tree.map(lambda _: row, sampling), None if used_BV is None else matrix
    one = lambda logits_BV, step, sampling, used_BV: sample(logits_BV, keys(sampling.seed, step), sampling, used_BV)
    return on_each_device(one, layouts, row)(logits_BV, step, sampling, used_BV)


def sample(logits_BV: jax.Array, keys_B: jax.Array, sampling: Sampling, used_BV: jax.Array | None = None) -> jax.Array:
    """int32 [B] drawn from softmax(logits / temperature) after the cuts; `used_BV` are the tokens that are penalised."""
    logits_BV = penalised(logits_BV.astype(jnp.float32), sampling, used_BV)
    greedy_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    def drawn():
        cut_BV = cut(logits_BV / jnp.maximum(sampling.temperature, 1e-6)[:, None], sampling)
        chosen_B = jax.vmap(jax.random.categorical)(keys_B, cut_BV).astype(jnp.int32)
        return jnp.where(sampling.temperature > 0, chosen_B, greedy_B)

    return jax.lax.cond(jnp.any(sampling.temperature > 0), drawn, lambda: greedy_B)


def penalised(logits_BV: jax.Array, sampling: Sampling, used_BV: jax.Array | None) -> jax.Array:
    """Logits of tokens that were read or written divided by the penalty, negative ones multiplied (arXiv:1909.05858, 4.1)."""
    if used_BV is None:
        return logits_BV
    penalty_B1 = jnp.asarray(sampling.repetition_penalty)[:, None]
    return jnp.where(used_BV, jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1), logits_BV)


def cut(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits of -inf outside of the top_k, the nucleus top_p (arXiv:1904.09751), and below min_p of the best (arXiv:2407.01082).

    Each cut weighs what the one before has left; the best token always stays.
    """
    top_k_B1, top_p_B1 = jnp.asarray(sampling.top_k)[:, None], jnp.asarray(sampling.top_p)[:, None]
    ordered_BV = -jnp.sort(-logits_BV, axis=-1)
    rank_BV = jnp.broadcast_to(jnp.arange(logits_BV.shape[-1])[None], logits_BV.shape)
    ordered_BV = jnp.where((rank_BV < top_k_B1) | (top_k_B1 == 0), ordered_BV, -jnp.inf)
    weights_BV = jax.nn.softmax(ordered_BV, axis=-1)
    kept_BV = (jnp.cumsum(weights_BV, axis=-1) - weights_BV < top_p_B1) & (ordered_BV > -jnp.inf)
    kept_BV &= weights_BV >= jnp.asarray(sampling.min_p)[:, None] * weights_BV[:, :1]
    threshold_B = jnp.where(kept_BV | (rank_BV == 0), ordered_BV, jnp.inf).min(-1)
    return jnp.where(logits_BV >= threshold_B[:, None], logits_BV, -jnp.inf)
