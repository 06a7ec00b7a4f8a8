"""How a model knows positions (`config.positions`): learned, sinusoidal, rotary (RoPE) or relative.

Shape suffixes: B batch, T query length, S key length, D model, H heads, K head, R rotated pairs of a head, N buckets.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lm_jax.config import Model
from lm_jax.model.embedding import Embedding
from lm_jax.model.layers import declare, normal
from lm_jax.sharding import computed, constrain, on_mesh

BUCKETS, FARTHEST = 32, 128  # of relative positions, and the distance from which on all share a bucket


def learned_positions(config: Model, sequence_length: int) -> Embedding | None:
    """A table with a vector for every position, where the config asks for one."""
    if config.positions != "learned":
        return None
    return Embedding(sequence_length, config.model_dim, "positions", config.init_scale / 2)


def add_positions(x_BTD: jax.Array, positions_BT: jax.Array, config: Model, learned: Embedding | None) -> jax.Array:
    """Embedded tokens plus the learned or sinusoidal vectors of their positions; unchanged for the other kinds."""
    if learned is not None:
        x_BTD = x_BTD + learned(positions_BT, x_BTD.dtype)
    if config.positions == "sinusoidal":
        x_BTD = x_BTD + sinusoids(positions_BT, config.model_dim).astype(x_BTD.dtype)
    return x_BTD


def sinusoids(positions_BT: jax.Array, dim: int) -> jax.Array:
    """Fixed positions (arXiv:1706.03762, section 3.5), sines then cosines -> float32 [B, T, D]."""
    frequency = 10_000.0 ** (-jnp.arange(dim // 2, dtype=jnp.float32) / (dim // 2))
    angle = positions_BT[:, :, None].astype(jnp.float32) * frequency[None, None]
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


class RopeAngles(NamedTuple):
    """Cosines and sines of rotary positions, float32 [B, T, 1, R]: computed once, used by every layer."""

    cos: jax.Array
    sin: jax.Array


def rope_angles(
    positions_BT: jax.Array, width: int, base: float, scaling: tuple = (1.0, 1.0, 4.0, 0.0), kind: str = "llama3"
) -> RopeAngles:
    """Angles of rotary positions (arXiv:2104.09864): position * base^(-2k / width) for pair k of `width` / 2.

    `scaling` is (factor, low, high, length): with a factor other than 1 the frequencies are scaled by `llama3_scaled`, or
    by `yarn_scaled` where `kind` is "yarn".
    """
    half = width // 2
    frequency_R = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    size = 1.0
    if scaling[0] != 1:
        scale = functools.partial(yarn_scaled, base=base) if kind == "yarn" else llama3_scaled
        frequency_R = scale(frequency_R, *scaling)
        size = 0.1 * math.log(scaling[0]) + 1 if kind == "yarn" else 1.0  # arXiv:2309.00071, section 3.4
    angle_BT1R = positions_BT[:, :, None, None].astype(jnp.float32) * frequency_R[None, None, None]
    both = jnp.cos(angle_BT1R), jnp.sin(angle_BT1R)
    both = both if size == 1 else (size * both[0], size * both[1])
    return RopeAngles(*jax.lax.optimization_barrier(both))


def rope_of_blocks(config: Model, positions_BT: jax.Array) -> list[RopeAngles | None]:
    """The rope angles of each block of the layer pattern (`config.window`); blocks with the same angles share the arrays.

    Blocks with a window may have another base, without scaling (Gemma 3); each rotates its share of a head's width (0: none).
    """
    made: dict[tuple[int, tuple], RopeAngles] = {}

    def of_block(window: int, share: float) -> RopeAngles | None:
        width = int(config.head_dim * share)
        if config.positions != "rotary" or not width:
            return None
        settings: tuple = (config.rotary_base, config.rotary_scaling, config.rotary_scaling_kind)
        settings = (config.rotary_local_base,) if window and config.rotary_local_base else settings
        if (width, settings) not in made:
            made[width, settings] = rope_angles(positions_BT, width, *settings)
        return made[width, settings]

    shares = config.rotary_share * (len(config.window) // len(config.rotary_share))
    return [of_block(*each) for each in zip(config.window, shares, strict=True)]


def llama3_scaled(frequency_R: jax.Array, factor: float, low: float, high: float, length: float) -> jax.Array:
    """Frequencies for longer texts (Llama 3, arXiv:2407.21783, section 3.2): low ones divided by `factor`, high ones kept.

    Low is a frequency of less than `low` rotations over `length` tokens, high one of more than `high`; between them the
    factor changes linearly. `length` 0: all are low.
    """
    rotations_R = length * frequency_R / (2 * jnp.pi)
    share_R = jnp.clip((rotations_R - low) / (high - low), 0, 1)
    return frequency_R * (share_R + (1 - share_R) / factor)


def yarn_scaled(frequency_R, factor: float, low: float, high: float, length: float, base: float) -> jax.Array:
    """As `llama3_scaled`, but the factor changes linearly in the index of the pair (YaRN, arXiv:2309.00071, section 3.2)."""
    half = len(frequency_R)
    index = lambda rotations: half * math.log(length / (rotations * 2 * math.pi)) / math.log(base)  # of the pair
    first, last = max(math.floor(index(high)), 0), min(math.ceil(index(low)), 2 * half - 1)
    share_R = 1 - jnp.clip((jnp.arange(half, dtype=jnp.float32) - first) / (max(last - first, 0) or 0.001), 0, 1)
    return frequency_R * (share_R + (1 - share_R) / factor)


def apply_rope(x_BTHK: jax.Array, angles: RopeAngles) -> jax.Array:
    """Queries or keys with each pair (k, k + R) of the first 2R values rotated by its angle, in float32; the rest is kept."""
    width = 2 * angles.cos.shape[-1]
    if width < x_BTHK.shape[-1]:
        return jnp.concatenate([apply_rope(x_BTHK[..., :width], angles), x_BTHK[..., width:]], axis=-1)
    return _rotated(x_BTHK, *(jnp.concatenate([x, x], axis=-1) for x in angles))


@jax.custom_vjp
def _rotated(x_BTHK: jax.Array, cos_BT1K: jax.Array, sin_BT1K: jax.Array) -> jax.Array:
    """The gradient is the rotation by the negative angle, rounded once too."""
    first, second = x_BTHK.astype(jnp.float32), _turned(x_BTHK).astype(jnp.float32)
    return (first * cos_BT1K + second * sin_BT1K).astype(x_BTHK.dtype)


def _turned(x_BTHK: jax.Array) -> jax.Array:
    """Each pair (a, b) as (-b, a): by a right angle.

    Below float32 as a product, which is exact and in which an accelerator has no half of a head apart.
    """
    if x_BTHK.dtype == jnp.float32:
        first, second = jnp.split(x_BTHK, 2, axis=-1)
        return jnp.concatenate([-second, first], axis=-1)
    half = x_BTHK.shape[-1] // 2
    turn_KJ = np.eye(2 * half, k=half) - np.eye(2 * half, k=-half)
    return jnp.einsum("BTHK,KJ->BTHJ", x_BTHK, turn_KJ.astype(x_BTHK.dtype))


def _rotated_forward(x_BTHK, cos_BT1K, sin_BT1K):
    return _rotated(x_BTHK, cos_BT1K, sin_BT1K), (cos_BT1K, sin_BT1K)


def _rotated_backward(angles, of_x_BTHK):
    cos_BT1K, sin_BT1K = angles
    return _rotated(of_x_BTHK, cos_BT1K, -sin_BT1K), None, None


_rotated.defvjp(_rotated_forward, _rotated_backward)


def bucket(ahead_BTS: jax.Array, causal: bool) -> jax.Array:
    """The bucket of a key that stands `ahead` positions after its query, int32 [B, T, S] (arXiv:1910.10683, section 2.1).

    Causal: all buckets are of keys before the query; else half of them are of keys after it. The first half of those of one
    side are the distances 0, 1, 2 ...; the others begin at distances that grow by a constant factor up to `FARTHEST`.
    """
    num = BUCKETS if causal else BUCKETS // 2
    exact = num // 2
    distance_BTS = jnp.maximum(-ahead_BTS, 0) if causal else jnp.abs(ahead_BTS)
    bucket_BTS = jnp.minimum(distance_BTS, exact)
    steps = np.arange(1, num - exact) / (num - exact)
    begins = np.ceil(np.round(exact * (FARTHEST / exact) ** steps, 9)).astype(
        np.int32
    )  # no float error decides a border
    for begin in begins:
        bucket_BTS = bucket_BTS + (distance_BTS >= begin)
    return bucket_BTS if causal else bucket_BTS + num * (ahead_BTS > 0)


class RelativeBias(nnx.Module):
    """What is added to the attention logits of every layer, by relative position and head."""

    def __init__(self, config: Model, causal: bool):
        self.causal = causal
        shape = BUCKETS, config.num_heads
        self.table = declare(shape, ("buckets", "heads"), normal(config.init_scale), (0,), (1,))

    def __call__(self, query_positions_BT: jax.Array, key_positions_BS: jax.Array) -> jax.Array:
        """-> float32 [B, H, T, S]."""
        bucket_BTS = bucket(key_positions_BS[:, None, :] - query_positions_BT[:, :, None], self.causal)
        table_NH = constrain(self.table[...], "buckets", "heads")
        layout = computed(("batch", "length", None, "heads")) if on_mesh() else None
        return table_NH.at[bucket_BTS].get(out_sharding=layout).transpose(0, 3, 1, 2)
