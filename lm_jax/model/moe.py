"""Mixture of experts: each token goes through the few MLPs that the router ranks highest; no token is left out.

Shape suffixes: B batch, T length, N tokens of one device, D model, F mlp, E experts, C chosen experts of a token.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from lm_jax.collectives import sum_over
from lm_jax.config import Model
from lm_jax.model.expert_parallel import of_own_experts
from lm_jax.model.layers import Declaration, Dense, declare, normal
from lm_jax.sharding import computed, constrain, on_each_device, precision, ways


def routing_loss(losses: list[jax.Array], mask_BT: jax.Array, weights: tuple[float, float]) -> jax.Array:
    """The weighted sum of the experts' (balance, z) losses over layers and rows, each row counted once for every masked token.

    `losses`: for each block of the layer pattern, [L / period, B, 2].
    """
    of_row_B = sum(weight * x_LB2[..., i].sum(0) for x_LB2 in losses for i, weight in enumerate(weights))
    return (of_row_B * mask_BT.sum(1)).sum()


class Experts(nnx.Module):
    """Gated MLPs, `experts_per_token` of `num_experts` for each token, summed with the router's weights (arXiv:2401.04088)."""

    def __init__(self, config: Model, output_stddev: float, activation: Callable):
        self.config, self.activation = config, activation
        self.router = Dense({"model": config.model_dim}, {"choices": config.num_experts}, config.init_scale, False)
        sizes = {"experts": config.num_experts, "model": config.model_dim, "mlp": config.mlp_dim}

        def one_matrix_each(stddev: float, *axes: str) -> nnx.Param:
            return declare([sizes[axis] for axis in axes], axes, normal(stddev), (1,), (2,), layers=(0,))

        self.gate = one_matrix_each(config.init_scale, "experts", "model", "mlp")
        self.up = one_matrix_each(config.init_scale, "experts", "model", "mlp")
        self.down = one_matrix_each(output_stddev, "experts", "mlp", "model")

    def __call__(self, x_BTD: jax.Array, segment_ids_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """-> [B, T, D], and the (balance, z) losses of each row (`routing_losses`), float32 [B, 2]."""
        logits_BTE = self.router(x_BTD.astype(jnp.float32))  # float32: small differences decide (arXiv:2101.03961)
        weights_BTC, chosen_BTC = jax.lax.top_k(jax.nn.softmax(logits_BTE), self.config.experts_per_token)
        weights_BTC = weights_BTC / weights_BTC.sum(-1, keepdims=True)
        tokens = computed(("batch", "length", None))
        kernels = ("experts", "model", "mlp"), ("experts", "model", "mlp"), ("experts", "mlp", "model")
        body = functools.partial(_on_a_device, self.activation)
        apply = on_each_device(body, (tokens, tokens, tokens, *map(computed, kernels)), tokens)
        parameters = (self.gate, self.up, self.down)
        gathered = [constrain(p[...].astype(x_BTD.dtype), *axes) for p, axes in zip(parameters, kernels, strict=True)]
        y_BTD = apply(x_BTD, weights_BTC, chosen_BTC, *gathered)
        return y_BTD, routing_losses(logits_BTE, chosen_BTC, segment_ids_BT)


def _on_a_device(activation, x_BTD, weights_BTC, chosen_BTC, *kernels) -> jax.Array:
    """[B, T, D] of this device. Tokens are sorted by expert, so that each expert has one product; F may be split over devices.

    Sums over experts are in float32, and so are those over the width for the gradient of a weight.
    """
    mlps = functools.partial(_mlps, activation)
    if ways("experts") > 1:
        return sum_over(of_own_experts(mlps, x_BTD, weights_BTC, chosen_BTC, kernels), "mlp").astype(x_BTD.dtype)
    batch, length, dim = x_BTD.shape
    num_chosen, num_experts = chosen_BTC.shape[-1], len(kernels[0])
    expert = chosen_BTC.reshape(-1)  # [N * C]
    order = jnp.argsort(expert, stable=True)
    sizes_E = jnp.bincount(expert, length=num_experts).astype(jnp.int32)
    x = x_BTD.reshape(-1, dim).astype(jnp.float32)[order // num_chosen].astype(x_BTD.dtype)
    y = mlps(x, sizes_E, *kernels).astype(jnp.float32) * weights_BTC.reshape(-1)[order][:, None]
    y_NCD = jnp.zeros_like(y).at[order].set(y, unique_indices=True).reshape(-1, num_chosen, dim)
    return sum_over(y_NCD.sum(1).reshape(batch, length, dim), "mlp").astype(x_BTD.dtype)


def _mlps(activation, x, sizes_E, gate_EDF, up_EDF, down_EFD) -> jax.Array:
    """Rows sorted by expert, `sizes_E` of each, through their expert's MLP."""
    product = functools.partial(jax.lax.ragged_dot, group_sizes=sizes_E, precision=precision(x.dtype))
    return product(activation(product(x, gate_EDF)) * product(x, up_EDF), down_EFD)


def routing_losses(logits_BTE: jax.Array, chosen_BTC: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
    """(balance, z) of each row over its tokens without padding, float32 [B, 2]. They depend on the row alone.

    balance: E * sum_e (share of the choices for e) * (mean probability of e), 1 where all are alike (arXiv:2101.03961, eq. 4);
    z: the mean of log(sum of exponentials)^2, which keeps logits near 0 (arXiv:2202.08906, eq. 5).
    """
    num_experts = logits_BTE.shape[-1]
    real_BT = (segment_ids_BT != 0).astype(jnp.float32)
    num_B = jnp.maximum(real_BT.sum(1), 1)
    is_chosen_BTE = (chosen_BTC[..., None] == jnp.arange(num_experts)[None, None, None]).mean(2)
    mean = lambda x: (x * real_BT[:, :, None]).sum(1) / num_B[:, None]
    balance_B = num_experts * (mean(is_chosen_BTE.astype(jnp.float32)) * mean(jax.nn.softmax(logits_BTE))).sum(-1)
    z_B = (jnp.square(jax.nn.logsumexp(logits_BTE, axis=-1)) * real_BT).sum(1) / num_B
    return jnp.stack([balance_B, z_B], axis=-1)


def share_at_work(config: Model, declared: Declaration) -> float:
    """The share of a parameter that the products of one token use: 1, of experts those that it chooses."""
    return config.experts_per_token / config.num_experts if "experts" in declared.axes else 1.0
