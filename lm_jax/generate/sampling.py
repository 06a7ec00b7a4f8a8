"""Which token comes next: pure functions of logits, each request with settings of its own.

Shape suffixes: B requests, V vocabulary. The order is that of the field: repetition penalty, temperature, then the cuts.
"""

from collections.abc import Callable
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

    Each cut weighs what the one before has left; the best token always stays, and whatever equals the last that stays.
    """
    best_B1 = logits_BV.max(-1, keepdims=True)
    num_B1 = jnp.asarray(sampling.top_k, jnp.int32)[:, None]
    enough = lambda kept_BV: (kept_BV.sum(-1, keepdims=True) < num_B1) | (num_B1 == 0)
    logits_BV = jnp.where(logits_BV >= lowest(logits_BV, enough), logits_BV, -jnp.inf)
    weights_BV = jnp.exp(logits_BV - best_B1)
    top_p_B1, total = jnp.asarray(sampling.top_p)[:, None], lambda kept_BV: jnp.where(kept_BV, weights_BV, 0).sum(-1)
    share_B1 = top_p_B1 * weights_BV.sum(-1, keepdims=True)
    inside = lambda kept_BV: (total(kept_BV)[:, None] < share_B1) | (top_p_B1 >= 1)
    kept_BV = (logits_BV >= lowest(logits_BV, inside)) & (weights_BV >= jnp.asarray(sampling.min_p)[:, None])
    return jnp.where(kept_BV | (logits_BV == best_B1), logits_BV, -jnp.inf)


def lowest(logits_BV: jax.Array, more: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The lowest logit [B, 1] that a cut keeps: `more` says of the logits above one, bool [B, V], whether it is kept, too.

    By bisection of float32's bits, which are in the order of the numbers once those of negative ones are turned round: 32 passes
    over the vocabulary, where sorting it takes as long as hundreds.
    """
    ordered = lambda x: jnp.where(x < 0, jnp.int32(-(2**31)) - x, x)  # of bits, and back
    bits_BV = ordered(jax.lax.bitcast_convert_type(logits_BV, jnp.int32))
    low_B1 = jnp.full((len(bits_BV), 1), -0x7F800000, jnp.int32)  # of -inf
    high_B1 = bits_BV.max(-1, keepdims=True)  # kept whatever the cut

    def halve(_, bounds):
        low_B1, high_B1 = bounds
        middle_B1 = (low_B1 & high_B1) + ((low_B1 ^ high_B1) >> 1)
        above_B1 = more(bits_BV > middle_B1)
        return jnp.where(above_B1, low_B1, middle_B1 + 1), jnp.where(above_B1, middle_B1, high_B1)

    _, high_B1 = jax.lax.fori_loop(0, 32, halve, (low_B1, high_B1))
    return jax.lax.bitcast_convert_type(ordered(high_B1), jnp.float32)
