"""A step compiled for devices that are not here: by libtpu for TPUs, by the CUDA plugin for GPUs, both on any machine."""

import dataclasses
import importlib.util
import os
import pathlib
import re
import time
from typing import Any

import jax
from jax.experimental import topologies

from lm_jax.chunked_cross_entropy import num_chunks
from lm_jax.errors import UserError, needs
from lm_jax.meanwhile import elapsed
from lm_jax.mesh import batch_shards
from lm_jax.plan.devices import Topology, closed_sides
from lm_jax.plan.estimate import Estimate, peak, ring, vocab_size
from lm_jax.plan.program_text import Reading, read
from lm_jax.run_plan import Plan, make_plan
from lm_jax.train_step import compile_step

TARGETS = pathlib.Path(__file__).parent / "targets"
# What libtpu would look for on a TPU's host, and complain of elsewhere; and it is loaded beside another process that has it.
NOBODY_IS_ASKED = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of a step. Bytes are of one device; a misfit has nothing but its two numbers."""

    seconds: float  # of compiling
    peak: float
    limit: float
    arguments: float = 0.0
    temporaries: float = 0.0
    reading: Reading = dataclasses.field(default_factory=Reading)  # of a whole step
    unread: str = ""  # why there is nothing in it

    @property
    def fits(self) -> bool:
        """Whether the peak is at most what a program may take."""
        return bool(self.arguments) and self.peak <= self.limit


def target(kind: str) -> pathlib.Path | None:
    """The file with a GPU's figures for the compiler, None where there is none."""
    file = TARGETS / f"{kind.lower()}.txtpb"
    return file if file.exists() else None


def installed(*modules: str) -> bool:
    """Whether these modules can be imported, each in the one before."""
    return all(importlib.util.find_spec(module) for module in modules)


def absent_devices(topology: Topology) -> list[jax.Device]:
    """Devices to compile for. Raises UserError where the compiler is not installed, or refuses the topology."""
    if topology.platform == "cpu":
        return jax.devices("cpu")[: topology.size]
    try:
        if topology.platform == "tpu":
            if not installed("libtpu"):
                raise needs("without --counted, compiling for a TPU", "libtpu", "tpu")
            os.environ |= NOBODY_IS_ASKED
            more: dict[str, Any] = {}
            if topology.kind == "v4":
                more |= {"chip_config_name": "megacore"}  # one device a chip, as on a v4 itself
            if topology.size == 1:
                more |= {"chips_per_host_bounds": (1, 1, 1)}  # a host of one chip, where others have four
            asked, slices = f"{topology.kind}:{'x'.join(map(str, topology.shape))}", topology.islands
            described = topologies.get_topology_desc(
                asked, "tpu", num_slices=slices, wrap=closed_sides(topology), **more
            )
            return described.devices
        if not installed("jax_plugins", "jax_plugins.xla_cuda12"):
            raise needs("without --counted, compiling for a GPU", "jax-cuda12-plugin", "cuda12")
        jax.devices("cpu")  # JAX looks for its plugins
        config, shape = target(topology.kind), f"1x{topology.islands}x{topology.island}"
        if config is None:
            raise UserError(f"--topology {topology.text}: no target of a {topology.kind} to compile for; add --counted")
        described = topologies.get_topology_desc(platform="cuda", target_config=config.read_text(), topology=shape)
        return described.devices
    except (RuntimeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"--topology {topology.text}: {str(error).splitlines()[0][:200]}") from error


def compiled(found: Estimate) -> Compiled:
    """The step of an estimate, compiled as a run compiles it: whole, or its microbatch and its update.

    The peak is the larger of the two; the rest is summed over the step. Raises UserError.
    """
    plan = make_plan(found.config, vocab_size(found.config), absent_devices(found.topology), parts=found.parts)
    jax.config.update("jax_enable_compilation_cache", False)  # written for absent devices, but never read
    start, k = time.monotonic(), found.num_microbatches
    try:
        with jax.set_mesh(plan.mesh), elapsed(f"compiling for {found.topology.text}"):
            step = compile_step(plan.program, plan.mesh, one_microbatch=k == 1)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        if not (said := misfit(str(error))):
            raise UserError(f"the compiler refuses this step: {str(error).splitlines()[0][:300]}") from error
        return Compiled(time.monotonic() - start, *said)
    programs = [(step.whole, 1)] if step.whole else [(step.accumulate, k), (step.update, 1)]
    reading, memories, unread = Reading(), [], ""
    for program, times in programs:
        memories.append(program.memory_analysis())  # type: ignore[union-attr]
        try:
            reading.add(_read(plan, found, program.as_text()), times)  # type: ignore[union-attr]
        except jax.errors.JaxRuntimeError as error:  # a libtpu that is newer than jaxlib writes what that cannot read
            unread = str(error).splitlines()[0][:200]
    peaks = [peak_bytes(memory, found.topology.platform) for memory in memories]
    most = memories[peaks.index(max(peaks))]
    sizes = most.argument_size_in_bytes, most.temp_size_in_bytes
    return Compiled(time.monotonic() - start, max(peaks), found.device.memory, *sizes, reading, unread)


def peak_bytes(memory, platform: str) -> int:
    """What `memory_analysis()` calls the peak; on a CPU, where that has no temporaries in it, arguments and temporaries."""
    together: int = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return together if platform == "cpu" else memory.peak_memory_in_bytes


def widths(found: Estimate) -> set[int]:
    """Sizes of the model that a dim of a buffer may be by chance."""
    model = found.config.model
    return {model.model_dim, model.mlp_dim, model.num_heads * model.head_dim, found.costs.padded_vocab_size}


def misfit(message: str) -> tuple[float, float] | None:
    """(bytes needed, bytes there are) where a compiler says that a device's memory cannot hold a program, else None."""
    pairs = re.search(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm", message) or re.search(
        r"\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)", message
    )
    scale = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    return (float(pairs[1]) * scale[pairs[2]], float(pairs[3]) * scale[pairs[4]]) if pairs else None


def _read(plan: Plan, found: Estimate, text: str) -> Reading:
    model, length, sizes = plan.config.model, plan.config.data.sequence_length, plan.sizes
    tokens = found.rows // batch_shards(sizes) * length // sizes["context"]
    layers, vocab = max(1, model.num_layers // len(model.window)), found.costs.padded_vocab_size // sizes["tensor"]
    with jax.set_mesh(plan.mesh):  # whose platform decides how large a chunk is
        chunks = num_chunks(tokens, vocab)

    def rounds(name: str) -> int:
        if "experts" in name.rpartition("shard_map")[2]:
            return 1  # chunks that a balanced router fills
        return chunks if "shard_map/while" in name else layers if "while" in name else 1

    reading = read(text, rounds, length, tokens, vocab, widths(found))
    if model.compute_dtype == "float32":
        reading.float32_products.clear()  # they are meant
    return reading


def step_seconds(found: Estimate, reading: Reading) -> dict[str, float]:
    """{what: seconds} of a step on a TPU by the compiler's own cycles; {} where it gives none, or the clock is not known.

    Neither collectives nor Pallas kernels are in the cycles. Collectives are added by their bytes (of a sum twice) over the
    links of the largest mesh axis, as if nothing hid them; attention in kernels by its FLOPs over the peak.
    """
    if not reading.cycles or not found.device.clock:
        return {}
    times = {"cycles": sum(reading.cycles.values()) / found.device.clock}
    axis = max(found.sizes, key=lambda name: found.sizes[name])
    if found.sizes[axis] > 1 and (speed := ring(found, axis)):
        moved = sum(size * (2 if kind == "all-reduce" else 1) for kind, (_, size) in reading.collectives.items())
        times["collectives"] = moved / speed
    if any("splash" in name for name in reading.kernels):
        pairs = max(0.0, found.costs.flops_per_token - 6 * found.costs.matrix_parameters)
        times["kernels"] = found.tokens * pairs / (found.topology.size * peak(found))
    return times
