"""Bytes of a model's layers on one device: what each keeps for its backward pass, what one needs beside it, their weights.

A scan stacks what JAX saves of a layer, array by array (tests/test_plan_memory.py holds the two equal). Of layers as straight
code XLA computes elementwise work again inside what reads it, and keeps what products and kernels read; in the one layer at a
time that is computed again it does so too. Not on a CPU: there straight code keeps all, also what was to be computed again.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp

from lm_jax.config import Model
from lm_jax.model.attention import CHUNK
from lm_jax.model.recurrent import CELLS
from lm_jax.sharding import platform

LANES = 128  # of a TPU's tiles: the heads that its attention kernel reads and writes are padded to it
# Arrays [tokens, mlp] in the compute dtype that an activation keeps: its result and factors of its slope (relu: a mask).
SAVED = {"gelu": 6, "gelu_exact": 4, "silu": 4, "relu": 1.5}
GATED = 2  # and what a gate adds: the other factor, and its product with the activation


class LayerBytes(NamedTuple):
    """Bytes of one token on one device."""

    kept: float  # by each layer
    working: float  # beside that by one layer at a time, on its way back
    of_mlp: float = 0.0  # of that, what must be gone when its attention's turn comes, which waits for it


class AttentionBytes(NamedTuple):
    """Bytes of all tokens of a device in attention itself."""

    kept: float = 0.0  # by each layer
    working: float = 0.0  # by one layer at a time
    mask: float = 0.0  # of all layers


def layer_bytes(model: Model, sizes: dict[str, int], backend: str) -> LayerBytes:
    """Bytes of one token in one layer, by `model.remat`; attention runs in `backend`.

    full keeps the layer's input; names also attention's branch, queries, keys, values and result; dots also the products of
    the MLP; none what is read again: the inputs of products (twice D, the MLP's), three float32 arrays of each norm, heads.
    """
    act, tensor = jnp.dtype(model.compute_dtype).itemsize, sizes["tensor"]
    if model.kind in CELLS:  # for every token its gates twice, their activations, its states before and after
        cell = CELLS[model.kind]
        floats = 4 * (3 * cell.num_gates + 2 * cell.num_states + 1) * model.model_dim
        return LayerBytes(act * model.model_dim if model.remat == "full" else floats, 0.0)
    width, mlp, of_mlp = act * model.model_dim, hidden_bytes(model, sizes), mlp_bytes(model, sizes)
    stream, gated, scanned = width / tensor, model.gated or model.num_experts > 0, model.unroll is not True
    on_cpu = platform() == "cpu"
    result = act * model.num_heads * model.head_dim / tensor
    heads = 2 * result * (1 + model.num_kv_heads / model.num_heads)  # queries and result, keys and values
    lanes = math.ceil(model.head_dim / LANES) * LANES / model.head_dim if backend == "splash" else 1.0
    outside = 0.0 if sizes["expert"] > 1 else of_mlp  # experts over devices are always computed again
    in_turn = _in_turn(model, sizes, of_mlp)
    working = 2 * width + heads + in_turn
    if model.remat == "none" or (on_cpu and not scanned):
        gradients = 2 * width + (2 + gated) * mlp + of_mlp - outside
        if scanned or on_cpu:
            return LayerBytes(2 * width + lanes * heads + _norm_bytes(model, tensor) + outside, gradients)
        read = (3 + gated) * mlp if outside else 0.0  # the products, their result and one factor of the slope
        return LayerBytes(2 * stream + 2 * width + lanes * heads + read, gradients)
    if model.remat == "full":
        return LayerBytes(stream, working, in_turn)
    if model.remat == "names":
        return LayerBytes(2 * stream + lanes * heads, working - heads)
    products = 0.0 if model.num_experts else (1 + gated) * mlp  # experts' are no dots
    branches = 2 if model.norm_place == "pre" else 3  # the input, attention's, and the MLP's where a norm reads it
    apart = scanned and model.positions == "rotary"  # what the kernel reads is not what the products made
    of_heads = heads + (lanes - 1) * (result if apart else heads)
    return LayerBytes(branches * stream + of_heads + products, working - heads - products)


def _in_turn(model: Model, sizes: dict[str, int], of_mlp: float) -> float:
    """Bytes of one token of the MLP on the way back of one layer: `of_mlp` but for what its compiler makes of it.

    A TPU's computes slopes inside products, a GPU's where all is computed again: left are products, their result, and the
    gradients of all. In straight code a GPU's leaves products, result and one factor. Without a kernel for groups of rows, not
    on a TPU, each expert is multiplied with all rows, masked: rows, hidden and two of its gradients for each.
    """
    gated, mlp = model.gated or model.num_experts > 0, hidden_bytes(model, sizes)
    if platform() == "tpu" or (model.remat == "full" and not model.num_experts):
        return of_mlp - max(0.0, SAVED[model.activation] + GATED * gated - 2 * (2 + gated)) * mlp
    if not model.num_experts:
        straight = platform() == "gpu" and model.unroll is True
        return min(of_mlp, (3 + gated) * mlp) if straight else of_mlp
    rows = model.experts_per_token * model.model_dim * jnp.dtype(model.compute_dtype).itemsize
    return of_mlp + model.num_experts / sizes["expert"] * (3 * mlp + rows)


def _norm_bytes(model: Model, tensor: int) -> float:
    """Three float32 arrays of each norm: what it read, normalised, and scaled."""
    dims = (4 if model.norm_place == "both" else 2) * model.model_dim
    return 3 * 4 * (dims + model.qk_norm * (model.num_heads + model.num_kv_heads) * model.head_dim) / tensor


def hidden_bytes(model: Model, sizes: dict[str, int]) -> float:
    """Bytes of one token's array [mlp] on one device, of all the experts that it chooses."""
    chosen = model.experts_per_token if model.num_experts else 1
    return jnp.dtype(model.compute_dtype).itemsize * model.mlp_dim * chosen / sizes["tensor"]


def mlp_bytes(model: Model, sizes: dict[str, int]) -> float:
    """Bytes of one token that the way back through an MLP reads; of experts also sorted rows, and float32 ones.

    Those are a device's own tokens: where experts are split over devices, `counts.experts_in_use` has the group's.
    """
    act, gated = jnp.dtype(model.compute_dtype).itemsize, model.gated or model.num_experts > 0
    saved = (SAVED[model.activation] + GATED * gated) * hidden_bytes(model, sizes)
    if not model.num_experts or sizes["expert"] > 1:
        return saved
    return saved + model.model_dim * (model.experts_per_token * (act + 4) + 4 - act)  # and what the router reads


def attention_bytes(model: Model, backend: str, tokens: int, length: int, sizes: dict[str, int]) -> AttentionBytes:
    """Bytes of all `tokens` of a device in attention itself: the logits and copies that a backend makes, rows whole.

    xla has the square of logits, in float32 and the compute dtype, kept by every layer where nothing is computed again;
    chunked copies of the keys that each chunk of `CHUNK` queries may see, and its logits with their gradients, where chunks wait
    for one another (full), else the weights of all: none waits. cuDNN has a mask of two bytes a pair, which all layers share.
    Other kernels have neither. Where rows are split over devices, each has keys and values of whole rows, and their gradients.
    """
    act, tensor = jnp.dtype(model.compute_dtype).itemsize, sizes["tensor"]
    keys = 2 * tokens * model.num_kv_heads * model.head_dim / tensor * act  # and values
    whole = 2 * keys * sizes["context"] if sizes["context"] > 1 else 0.0
    logits = lambda num_keys: tokens * num_keys * model.num_heads / tensor * (act + 4)
    if backend == "xla":
        kept = logits(length) if model.remat == "none" else 0.0
        return AttentionBytes(kept, whole + logits(length) - kept)
    if backend == "chunked":
        copies = (math.ceil(length / CHUNK) - 1) / 2 * keys
        kept = copies if model.remat == "none" else 0.0
        num_chunks = math.ceil(length / CHUNK)
        seen = 3 / 4 if sizes["context"] > 1 else (num_chunks + 1) / 2 / num_chunks  # of the keys, by a chunk
        weights = logits(length) * seen * act / (act + 4)
        together = 2 * logits(CHUNK * sizes["context"]) if model.remat == "full" else weights
        return AttentionBytes(kept, whole + together + copies - kept)
    return AttentionBytes(0.0, whole, tokens * length * act if backend == "cudnn" else 0.0)


def weight_bytes(model: Model, of_layers: float, state: float, sizes: dict[str, int]) -> float:
    """Bytes of the layers' `of_layers` parameters (no experts) on one device, beside their `state`.

    Where they are split, and on a TPU, they are cast to the compute dtype all at once, before the loop over layers, as they are
    stored; gathered, one kernel and its gradient at a time. Where nothing is computed again JAX keeps every layer's as it was
    multiplied, gathered. As straight code a TPU's compiler lays kernels out as their products read them, and holds the state in
    both layouts (not with full).
    """
    act = jnp.dtype(model.compute_dtype).itemsize
    split, whole = sizes["fsdp"] * sizes["expert"] * sizes["context"], of_layers / sizes["tensor"]
    both = model.unroll is True and platform() == "tpu" and model.remat != "full"
    laid_out = state if both else 0.0
    if model.remat == "none":
        return laid_out + (act * whole if split > 1 or act < 4 else 0.0)
    cast = act * whole / split if act < 4 and (split > 1 or platform() == "tpu") else 0.0
    widest = max(model.num_heads * model.head_dim, 0 if model.num_experts else model.mlp_dim)
    gathered = 2 * act * model.model_dim * widest / sizes["tensor"] if split > 1 else 0.0
    return laid_out + cast + min(gathered, 2 * act * whole)
