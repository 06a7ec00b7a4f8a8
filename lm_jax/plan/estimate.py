"""A config on devices that are not here, counted: bytes, seconds at best, hours, energy, and what makes it fit."""

import dataclasses
import itertools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from lm_jax.batch_ramp import Ramp, make_ramp, with_steps
from lm_jax.config import Config
from lm_jax.data import tokenizer_files
from lm_jax.data.objectives import EXTRA
from lm_jax.errors import UserError
from lm_jax.knob import parse_length
from lm_jax.mesh import legal_meshes, mesh_shape, preflight
from lm_jax.model import attention, build
from lm_jax.model.language_model import padded
from lm_jax.model.recurrent import CELLS
from lm_jax.plan import counts
from lm_jax.plan.devices import DEVICES, Device, Topology
from lm_jax.run_plan import with_microbatch
from lm_jax.sharding import AXES

NEAR = 0.95  # counts and compiler may disagree by so much: a change that is proposed fits in this share of the memory
REMATS = ("none", "dots", "names", "full")  # from most to least memory


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What is counted of a config on a topology."""

    config: Config  # its lengths in steps, the rows of a microbatch as a number
    topology: Topology
    device: Device
    ramp: Ramp
    sizes: dict[str, int]
    costs: counts.Costs
    memory: dict[str, float]  # {class: bytes on one device} at the largest batch
    has_end: bool  # False: its length is in epochs of data that nobody has opened

    @property
    def rows(self) -> int:
        """Rows of a microbatch, over all devices."""
        return int(self.config.train.microbatch_rows)

    @property
    def num_microbatches(self) -> int:
        """Of one step at the largest batch."""
        return self.ramp.largest // self.rows

    @property
    def needed(self) -> float:
        """Bytes on one device."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether that is at most what a program may take."""
        return self.needed <= self.device.memory

    @property
    def largest(self) -> str:
        """The class that takes most."""
        return max(self.memory, key=lambda name: self.memory[name])

    @property
    def tokens(self) -> int:
        """Of one step at the largest batch."""
        return self.ramp.largest * self.config.data.sequence_length


def vocab_size(config: Config) -> int:
    """Tokens of the config's tokenizer, with those that its objective adds. Raises UserError where a file is not there."""
    setting = config.data.tokenizer
    return (tokenizer_files.vocab_size(setting) or tokenizer_files.load(setting).vocab_size) + EXTRA[
        config.data.objective
    ]


def estimate(config: Config, topology: Topology) -> Estimate:
    """Counts a config as it is written; where the rows of a microbatch are "auto", those of `counts.most_rows`.

    Raises UserError where the devices do not form the mesh, a dim does not divide over it, or a device does not
    multiply in the compute dtype.
    """
    device, dtype = described(topology), config.model.compute_dtype
    if dtype not in device.peak:
        able = [name for name in ("bfloat16", "float16", "float32") if name in device.peak]
        raise UserError(
            f"config.model.compute_dtype = {dtype}: products of a {topology.kind} are in {' or '.join(able)}\n"
            f"say --config.model.compute_dtype={able[0]}"
            + " --config.optimizer.loss_scale=1024"
            * (able[0] == "float16")
        )
    has_end = parse_length(config.train.num_steps)[1] != "epochs"
    slices = {"tpu": topology.islands, "gpu": 1}.get(topology.platform, config.mesh.slices)
    if config.mesh.slices not in (-1, slices):
        raise UserError(
            f"config.mesh.slices = {config.mesh.slices}: {topology.text} is {slices}; say --config.mesh.slices={slices}"
        )
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, slices=slices))
    sizes = mesh_shape(config.mesh, topology.size)
    if math.prod(sizes.values()) != topology.size:
        unused = topology.size - math.prod(sizes.values())
        raise UserError(f"config.mesh leaves {unused} of {topology.size} devices without work; -1 takes the rest")
    attention.preflight(config.model, config.data.sequence_length, topology.platform)
    num_tokens, ramp = vocab_size(config), make_ramp(config)
    preflight(config, padded(num_tokens), sizes)
    model = build.build(config.model, num_tokens, config.data.sequence_length)
    costs = counts.count(config, model.declarations)
    return counted(with_steps(config, ramp, 1.0), topology, device, ramp, sizes, costs, has_end)


def described(topology: Topology) -> Device:
    """The device of a topology; of CPUs what is measured here, shared by all."""
    if topology.kind in DEVICES:
        return DEVICES[topology.kind]
    peak = counts.measured_peak() / topology.size
    return Device("cpu", counts.device_memory(jax.devices("cpu")[0]), {"float32": peak, "bfloat16": peak})


def counted(
    config: Config,
    topology: Topology,
    device: Device,
    ramp: Ramp,
    sizes: dict[str, int],
    costs: counts.Costs,
    has_end: bool,
) -> Estimate:
    """The estimate of a config that divides over a mesh of these sizes."""
    kinds = AbstractDevice(topology.kind, None, topology.platform)
    mesh = AbstractMesh(tuple(sizes.values()), AXES, (AxisType.Explicit,) * len(AXES), abstract_device=kinds)
    with jax.sharding.use_abstract_mesh(mesh):  # counts ask it for the platform
        rows = config.train.microbatch_rows
        if rows == "auto":
            rows = counts.most_rows(config, costs, sizes, ramp.smallest, device.memory, topology.platform)
        config = with_microbatch(config, rows)
        memory = counts.bytes_by_class(config, costs, int(rows), sizes, accumulates=ramp.largest > int(rows))
    return Estimate(config, topology, device, ramp, sizes, costs, memory, has_end)


def seconds(found: Estimate) -> dict[str, float]:
    """{what: seconds} of a step at the largest batch, a device at the peak of each: no step is faster than the largest.

    compute: flops_per_token * tokens, and what is recomputed (remat full: a third of it; names: two FLOPs a matrix
    parameter), over the devices' peak.
    memory: each microbatch reads the weights in the compute dtype two or (recomputed) three times, writes and reads the
    activations and logits; a step reads and writes state and gradients. Left out where the bandwidth is not known.
    links, by mesh axis of n devices, (n - 1) / n of: `fsdp` each microbatch gathers weights twice and scatters their
    gradients, in the compute dtype; `data` each microbatch sums a device's gradients, float32, twice over the wire (scatter
    and gather); `tensor` in each layer 4 (recomputed: 6) sums of the stream. Over the bandwidth of `ring`.
    """
    config, sizes, costs, device = found.config, found.sizes, found.costs, found.device
    act = jnp.dtype(config.model.compute_dtype).itemsize
    remat = config.model.remat if costs.backward else "none"
    again = {"full": costs.flops_per_token / 3, "names": 2 * costs.matrix_parameters}.get(remat, 0.0)
    flops = found.tokens * (costs.flops_per_token + again)
    times = {"compute": flops / (found.topology.size * device.peak[config.model.compute_dtype])}
    weights, k = costs.parameters * act / sizes["tensor"], found.num_microbatches
    if device.bandwidth:
        passes = weights * (2 if remat == "none" else 3) + 2 * (found.memory["activations"] + found.memory["logits"])
        state = 2 * sum(found.memory[name] for name in ("parameters", "optimizer", "gradients"))
        times["memory"] = (k * passes + state) / device.bandwidth
    stream = found.tokens / (sizes["data"] * sizes["fsdp"]) * config.model.model_dim * act
    layers = 0 if config.model.kind in CELLS else config.model.num_layers
    moved = {
        "data": k * 2 * 4 * costs.trained / (sizes["fsdp"] * sizes["tensor"]),
        "fsdp": k * 3 * weights,
        "tensor": layers * (4 if remat == "none" else 6) * 2 * stream,
    }
    for axis in AXES:
        if sizes[axis] > 1 and (speed := ring(found, axis)):
            times[f"links {axis}"] = moved[axis] * (sizes[axis] - 1) / sizes[axis] / speed
    return times


def ring(found: Estimate, axis: str) -> float:
    """Bytes/s that a device sends to the others of a mesh axis; 0 where it is not known.

    In an island a TPU has the links of as many dims of the torus as the axis needs, a GPU its switch. Over islands, the
    network of the devices that the axis has in one of them together, if that is less.
    """
    device, topology = found.device, found.topology
    inside = math.prod(found.sizes[name] for name in AXES[AXES.index(axis) + 1 :])
    here = max(1, min(found.sizes[axis], topology.island // inside))  # of the axis, in an island
    sides = sorted(topology.shape, reverse=True)
    dims = next((n for n in range(1, device.torus) if math.prod(sides[:n]) * device.per_chip >= here), device.torus)
    links = device.links * dims / device.torus
    if here == found.sizes[axis]:
        return links
    return min(links, device.network * here) if here > 1 else device.network


def step_seconds(found: Estimate) -> tuple[float, float]:
    """(at best, expected) seconds of a step: the roofline, and no more than a typical MFU."""
    best = max(seconds(found).values())
    strict = found.tokens * found.costs.flops_per_token / (found.topology.size * peak(found))
    return best, max(best, strict / counts.TYPICAL_MFU)


def peak(found: Estimate) -> float:
    """FLOP/s of one device in the compute dtype."""
    return found.device.peak[found.config.model.compute_dtype]


def changes(asked: Config, found: Estimate) -> list[tuple[dict[str, object], Estimate]]:
    """Up to three sets of settings {"model.remat": "full"} that fit in `NEAR` of the memory, the cheapest first.

    `asked` is the config as given. First those that change least, of these the fastest at best; one for each set of
    sections that change: remat, rows of a microbatch, the mesh.
    """
    fitting: dict[tuple[str, ...], tuple[tuple[float, float], dict[str, object], Estimate]] = {}
    for change, other in candidates(asked, found):
        kind, times = tuple(sorted({name.split(".")[0] for name in change})), seconds(other).values()
        order = max(times), sum(times)
        if other.needed <= NEAR * other.device.memory and (kind not in fitting or order < fitting[kind][0]):
            fitting[kind] = order, change, other
    ranked = sorted(fitting.items(), key=lambda item: (len(item[0]), item[1][0]))
    return [(change, other) for _, (_, change, other) in ranked[:3]]


def least(asked: Config, found: Estimate) -> tuple[dict[str, object], Estimate]:
    """The settings that need least memory: {} where those at hand do."""
    return min([({}, found), *candidates(asked, found)], key=lambda item: item[1].needed)


def candidates(
    asked: Config, found: Estimate, everything: bool = False
) -> Iterator[tuple[dict[str, object], Estimate]]:
    """({setting: value} beside `asked`, Estimate) of other meshes, recomputations and rows of a microbatch.

    Those that need less memory, or `everything` that is legal.
    """
    model, batch, sizes = found.config.model, found.ramp.smallest, found.sizes
    free = asked.train.microbatch_rows == "auto"
    config = with_microbatch(found.config, "auto") if everything else found.config
    legal = legal_meshes(config, found.costs.padded_vocab_size, found.topology.size)
    meshes = [sizes, *(m for m in legal if m["data"] % found.config.mesh.slices == 0 and m != sizes)]
    remats = REMATS if everything else REMATS[REMATS.index(model.remat) :]
    for mesh, remat in itertools.product(meshes, remats):
        if remat != "none" and model.model_dim % mesh["tensor"]:
            continue
        shards = mesh["data"] * mesh["fsdp"]
        fewer = [n for n in range(shards, found.rows, shards) if batch % n == 0 and found.rows % n == 0]
        dividing = [n for n in range(shards, batch + 1, shards) if batch % n == 0]
        for rows in dividing if everything else ["auto"] if free else [found.rows, *fewer]:
            if rows != "auto" and int(rows) % shards:
                continue
            change: dict[str, object] = {"model.remat": remat} if remat != model.remat else {}
            same = (asked.train.microbatch_rows,) if everything else ("auto", found.rows)
            change |= {"train.microbatch_rows": rows} if rows not in same else {}
            change |= {f"mesh.{axis}": mesh[axis] for axis in AXES if mesh[axis] != sizes[axis]}
            if change or everything:
                changed = dataclasses.replace(found.config, model=dataclasses.replace(model, remat=remat))
                changed = dataclasses.replace(changed, mesh=dataclasses.replace(changed.mesh, **mesh))
                other = with_microbatch(changed, rows)
                yield change, counted(other, found.topology, found.device, found.ramp, mesh, found.costs, found.has_end)
