"""Counted, not measured: parameters, FLOPs, bytes by class, time on a device: for the header, MFU and microbatches."""

import dataclasses
import math
import os
import time

import jax
import jax.numpy as jnp

from lm_jax.batch_ramp import Ramp, seconds_of
from lm_jax.chunked_cross_entropy import chunk_size
from lm_jax.config import Config, Model
from lm_jax.loss import is_chunked
from lm_jax.mesh import batch_shards
from lm_jax.model import attention
from lm_jax.model.layers import Declaration
from lm_jax.model.moe import share_at_work
from lm_jax.model.recurrent import CELLS
from lm_jax.model_config import plain
from lm_jax.plan.devices import DEVICES, device_name, has_bfloat16
from lm_jax.plan.layer_memory import AttentionBytes, attention_bytes, layer_bytes, mlp_bytes, weight_bytes
from lm_jax.sharding import device, platform
from lm_jax.trainable import depth, trained_paths
from lm_jax.update_rules import ELEMENTWISE

# Copies of the parameters that an update rule keeps: Muon two of tables, as Adam, Adafactor rows and columns.
MOMENTS = {"adamw": 2, "adam": 2, "muon": 1, "lion": 1, "sgd": 1, "adafactor": 0}
TYPICAL_MFU = 0.4  # of a recipe like this on an accelerator, for the times in the header


@dataclasses.dataclass(frozen=True)
class Costs:
    """The costs of one model and its rows.

    Matrix parameters are those inside a token's products: no lookups, no norms, biases or experts that it did not
    choose.
    """

    parameters: int
    trained: int  # of these parameters
    matrix_parameters: int
    padded_vocab_size: int  # padded
    flops_per_token: float  # forward and backward, strict: causal half of attention, no recomputation
    backward: bool  # through the layers, for what is trained in them or below


def count(config: Config, declarations: dict[tuple[str, ...], Declaration]) -> Costs:
    """6 FLOPs a matrix parameter and token, and attention's 12 * head width a pair of tokens that see each other.

    The strict count of docs/benchmarks.md: no embedding lookup, softmax, norm, optimizer or recomputed FLOPs. Documents
    packed in a row make less; the count takes rows as whole. A recurrent model sees no pairs. Of the 6 FLOPs two are
    the gradient of the parameter itself, where it is trained, and two the way back to what is trained below it.
    """
    model, length = config.model, config.data.sequence_length
    trained = trained_paths(config, declarations)
    total, num_trained = (
        sum(math.prod(declarations[path].shape) for path in paths) for paths in (declarations.keys(), trained)
    )
    is_lookup = lambda path, axes: (
        axes[0] in ("positions", "segments", "buckets")
        or (path[0] == "embedding" and (not model.tie_embedding or bool(model.head)))
    )
    at_work = {
        path: round(math.prod(d.shape) * share_at_work(model, d))
        for path, d in declarations.items()
        if d.inputs and d.outputs and not is_lookup(path, d.axes)
    }
    matrix, of_trained = sum(at_work.values()), sum(num for path, num in at_work.items() if path in trained)
    backward = any(depth(path, declarations[path], model).max() > 0 for path in trained)
    both = 1 if model.kind == "encoder" else 2  # sides
    per_window = {w: w * length - w * (w - 1) / 2 if 0 < w < length else length**2 / both for w in set(model.window)}
    pairs = sum(per_window[w] for w in model.window) * model.num_layers / len(model.window)
    pairs *= 5 if model.kind == "encoder_decoder" else 1  # source to source and target to source have no half
    attention = 0 if model.kind in CELLS else 12 * model.num_heads * model.head_dim * pairs / length
    is_head = lambda path: path[0] in ("embedding", "unembedding") or not depth(path, declarations[path], model).any()
    way_back = matrix if backward else sum(num for path, num in at_work.items() if is_head(path))
    flops = 2 * (matrix + way_back + of_trained) + attention * (1 if backward else 1 / 3)
    return Costs(total, num_trained, matrix, declarations["embedding", "table"].shape[0], flops, backward)


def parameter_shards(sizes: dict[str, int]) -> int:
    """How many ways the parameters are split between steps."""
    return math.prod(size for axis, size in sizes.items() if axis != "data")


def expert_parameters(model: Model) -> int:
    """Parameters of the experts of all layers; 0 without experts."""
    return 3 * model.num_layers * model.num_experts * model.model_dim * model.mlp_dim


def experts_in_use(model: Model, tokens: float, sizes: dict[str, int]) -> float:
    """Bytes on one device, with so many tokens, of the experts of one layer while it is computed, backward.

    The kernels of its own experts and their gradients in the compute dtype. Where experts are split over devices the
    gradients in float32, and tokens of the whole group (`model/expert_parallel.py`): of the rows that may be its own what
    goes in, and the gradients of what goes in and comes out; before and after the MLPs, two of all tokens in float32.
    """
    act, expert = jnp.dtype(model.compute_dtype).itemsize, sizes["expert"]
    kernels = expert_parameters(model) / model.num_layers / expert / sizes["tensor"]
    if expert == 1:
        return kernels * 2 * act
    rows, group = min(model.experts_per_token, model.num_experts // expert), expert * tokens * model.model_dim
    return kernels * (act + 4) + group * 3 * rows * act + max(0.0, group * 2 * 4 - tokens * mlp_bytes(model, sizes))


def bytes_by_class(
    config: Config, costs: Costs, rows: int, sizes: dict[str, int], accumulates: bool
) -> dict[str, float]:
    """{what: bytes} on one device: state, gradients, what the backward pass reads again, logits, experts in use.

    An estimate, counted as XLA compiles it (docs/notebook.md). `rows` is one microbatch over all devices, `sizes` are
    those of the mesh axes. State (its moments as named), gradients and logits are float32, two copies of the gradients
    where a step `accumulates` over several microbatches. What is not trained has neither gradient nor moments; where nothing is
    trained in the layers or below them, only one layer at a time keeps what it reads.

    Activations are what every layer keeps, what one layer at a time needs beside that (`layer_memory.py`), and the layers'
    weights in the compute dtype. The input table's gradient comes after all of them, where the output has a table of its own;
    the logits are gone before the first gradient of a layer is there: both count for what they need beyond the others.
    """
    model, length, rule = plain(config.model), config.data.sequence_length, config.optimizer
    shards, tensor = parameter_shards(sizes), sizes["tensor"]
    tokens = math.ceil(rows / batch_shards(sizes)) * length // sizes["context"]
    backend = attention.preflight(model, length, platform(), sizes["context"], has_bfloat16(device()))
    layer, inside = layer_bytes(model, sizes, backend), attention_bytes(model, backend, tokens, length, sizes)
    if model.kind in CELLS:
        inside = AttentionBytes()
    sides, period = (
        2.5 if model.kind == "encoder_decoder" else 1,
        len(model.window),
    )  # attention to the source is half a layer
    num_layers = sides * (model.num_layers if costs.backward else 1)  # else nothing waits for a way back
    num_layers /= period if model.remat == "full" else 1  # the layers of a period are computed again together
    in_attention = inside.working * (3 if sides > 1 else 1)
    one_layer = max(0.0, in_attention - tokens * layer.of_mlp) + inside.mask
    one_layer += tokens * layer.working * (1 if model.remat == "none" else period)
    table = costs.padded_vocab_size * model.model_dim
    tables = table * (1 if model.tie_embedding else 2)
    of_layers = max(0, costs.parameters - tables - expert_parameters(model))
    copies = MOMENTS[rule.name] * costs.trained + (min(tables, costs.trained) if rule.name == "muon" else 0)
    moments = copies * jnp.dtype(rule.moment_dtype).itemsize + 4 * (rule.ema > 0) * costs.trained
    optimizer = moments / shards / (sizes["data"] if rule.name in ELEMENTWISE else 1)
    parameters = 4 * costs.parameters / shards
    state = (parameters + optimizer) * of_layers / costs.parameters
    kept = num_layers * (tokens * layer.kept + inside.kept) + weight_bytes(model, of_layers, state, sizes)
    gradients, logits = 4 * costs.trained / shards, _logits(model, costs, tokens, tensor)
    last = 0.0 if model.tie_embedding else min(gradients, 4 * table / shards)
    return {
        "parameters": parameters,
        "optimizer": optimizer,
        "gradients": gradients * (2 if accumulates else 1),
        "activations": max(0.0, kept + one_layer - last),
        "logits": max(0.0, logits - one_layer - (gradients - last)),
        **({"experts": experts_in_use(model, tokens, sizes)} if model.num_experts else {}),
    }


def _logits(model: Model, costs: Costs, tokens: int, tensor: int) -> float:
    """Bytes of the loss on one device: logits of all tokens, or of a chunk in float32, with their gradient in the compute dtype.

    Then also the output table and its gradient.
    """
    width, act = costs.padded_vocab_size / tensor, jnp.dtype(model.compute_dtype).itemsize
    if not is_chunked(tokens * width, model.compute_dtype):
        return 4 * 3 * tokens * width
    return (4 + act) * (min(tokens, chunk_size(int(width))) + model.model_dim) * width


def measured_peak() -> float:
    """FLOP/s of a large float32 product on this machine, for all devices of the process together."""
    n = 1024
    a = jax.device_put(jnp.ones((n, n), jnp.float32), jax.local_devices()[0])
    product = jax.jit(lambda a: a @ a)
    product(a).block_until_ready()
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        product(a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def peak_flops(mesh: jax.sharding.Mesh, dtype: str) -> float:
    """Peak FLOP/s of all devices of the mesh, 0 where the device is unknown. Fake CPU devices share one machine."""
    device = mesh.devices.flat[0]
    if device.platform == "cpu":
        return measured_peak() * jax.process_count()
    known = DEVICES.get(device_name(device))
    return known.peak.get(dtype, 0.0) * mesh.size if known else 0.0


def device_memory(device: jax.Device) -> float:
    """Bytes that one device of this process offers.

    On a CPU the machine's memory over the devices that share it, else what the device says, 16 GiB where it says
    nothing.
    """
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / jax.local_device_count()
    return float((device.memory_stats() or {}).get("bytes_limit", 16 * 2**30))


def most_rows(config: Config, costs: Costs, sizes: dict[str, int], batch: int, memory: float, platform: str) -> int:
    """Rows of a microbatch, over all devices, each with so many bytes of memory.

    The most that divide the first batch, split evenly over the mesh and fit in 80% of a device's memory (a CPU: in 40%,
    and at most 2,048 tokens); one row a shard where none fits.
    """
    share, most_tokens = (0.4, 2048) if platform == "cpu" else (0.8, math.inf)
    shards = batch_shards(sizes)
    fitting = [
        rows
        for rows in range(shards, batch + 1, shards)
        if batch % rows == 0
        and sum(bytes_by_class(config, costs, rows, sizes, accumulates=rows < batch).values()) <= share * memory
        and rows * config.data.sequence_length <= most_tokens
    ]
    return max(fitting, default=shards)


def total_flops(config: Config, costs: Costs, ramp: Ramp) -> tuple[float, float]:
    """(tokens, FLOPs) from the first step of a run to its last; 0 where its length is a time."""
    if seconds_of(config.train.num_steps):
        return 0.0, 0.0
    tokens = float(ramp.cursor(int(config.train.num_steps))) * config.data.sequence_length
    return tokens, tokens * costs.flops_per_token


def duration(seconds: float) -> str:
    """Seconds in words: "43 s", "3 min", "4.7 days", "54 years"."""
    for limit, unit, name in ((90, 1, "s"), (5400, 60, "min"), (129600, 3600, "hours"), (3e7, 86400, "days")):
        if seconds < limit:
            value = seconds / unit
            return f"{value:.0f} {name}" if value >= 10 or unit == 1 else f"{value:.1f} {name}"
    return f"{seconds / 31557600:,.1f} years" if seconds < 3e8 else f"{seconds / 31557600:,.0f} years"


def short(number: float) -> str:
    """A number in about three characters: "97", "124M", "1.3B", "2.6e20"."""
    for scale, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if 1 <= number / scale < 1000:
            value = number / scale
            return f"{value:.0f}{letter}" if value >= 100 else f"{value:.1f}".removesuffix(".0") + letter
    return f"{number:.2g}".replace("e+", "e") if number >= 1e15 else f"{number:.0f}"


def brief(seconds: float) -> str:
    """Seconds of a step: "1,404 s", "4.58 s", "361 ms"."""
    if seconds >= 1000:
        return f"{seconds:,.0f} s"
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
