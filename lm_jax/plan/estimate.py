"""A config on devices that are not here, counted: bytes, seconds at best, hours, energy, and what makes it fit."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from lm_jax import decide
from lm_jax.batch_ramp import Ramp, make_ramp, with_steps
from lm_jax.config import FIRST_LOSS_SCALE, Config
from lm_jax.data import tokenizer_files
from lm_jax.data.objectives import EXTRA
from lm_jax.decide import REMATS
from lm_jax.errors import UserError
from lm_jax.knob import parse_length
from lm_jax.mesh import batch_shards, legal_meshes, mesh_shape
from lm_jax.model.recurrent import CELLS
from lm_jax.parts import ORDINARY, Parts
from lm_jax.plan import counts
from lm_jax.plan.devices import DEVICES, Device, Topology
from lm_jax.run_plan import NEW, check, with_microbatch
from lm_jax.sharding import AXES

NEAR = 0.95  # counts and compiler may disagree by so much: a change that is proposed fits in this share of the memory
SHORTEST = 4096  # tokens of a part of a row that is proposed: so few queries do not hide that all keys are gathered


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
    has_end: bool  # False: its length is in epochs of data that nobody has opened, or a time
    decided: dict[str, Any] = dataclasses.field(default_factory=dict)  # {path: value} of what was "auto"
    parts: Parts = ORDINARY

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


def estimate(config: Config, topology: Topology, parts: Parts = ORDINARY) -> Estimate:
    """Counts a config as it is written; what is "auto" is decided as a run on these devices decides it.

    Raises UserError where the devices do not form the mesh, a dim does not divide over it, or a device does not
    multiply in the compute dtype.
    """
    device, dtype = described(topology), config.model.compute_dtype
    if dtype not in (*device.peak, "auto"):
        able = [name for name in ("bfloat16", "float16", "float32") if name in device.peak]
        raise UserError(
            f"config.model.compute_dtype = {dtype}: products of a {topology.kind} are in {' or '.join(able)}\n"
            f"say --config.model.compute_dtype={able[0]}"
            + f" --config.optimizer.loss_scale={FIRST_LOSS_SCALE}"
            * (able[0] == "float16")
        )
    has_end = parse_length(config.train.num_steps)[1] not in ("epochs", "min")
    slices = {"tpu": topology.islands, "gpu": 1}.get(topology.platform, max(1, config.mesh.slices))
    if config.mesh.slices not in (-1, slices):
        raise UserError(
            f"config.mesh.slices = {config.mesh.slices}: {topology.text} is {slices}; say --config.mesh.slices={slices}"
        )
    sizes = mesh_shape(config.mesh, topology.size)
    if math.prod(sizes.values()) != topology.size:
        unused = topology.size - math.prod(sizes.values())
        raise UserError(f"config.mesh leaves {unused} of {topology.size} devices without work; -1 takes the rest")
    site = site_of(topology, device, slices)
    check(config, site)
    num_tokens, ramp = vocab_size(config), make_ramp(config)
    with jax.sharding.use_abstract_mesh(mesh_of(topology, sizes)):
        found = decide.decide(config, num_tokens, ramp, site, NEW, topology.size, parts)
    in_steps = with_steps(found.config, ramp, 1.0)
    made = counted(in_steps, topology, device, ramp, found.sizes, found.counted, has_end)
    return dataclasses.replace(made, decided=found.values, parts=parts)


def site_of(topology: Topology, device: Device, slices: int) -> decide.Site:
    """The devices of a topology as a run on them would find them."""
    able = "bfloat16" in device.peak
    return decide.Site(topology.platform, able, device.memory, topology.size, topology.island, slices)


def mesh_of(topology: Topology, sizes: dict[str, int]) -> AbstractMesh:
    """A mesh of devices that are not here: counts ask it what they are."""
    kinds = AbstractDevice(topology.kind, None, topology.platform)
    return AbstractMesh(tuple(sizes.values()), AXES, (AxisType.Explicit,) * len(AXES), abstract_device=kinds)


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
    with jax.sharding.use_abstract_mesh(mesh_of(topology, sizes)):
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
    gradients, in the compute dtype (`expert`, of what is no expert, and `context` their shares of it); `data` each
    step scatters a device's gradients and gathers its updates, float32; `expert` in each layer gathers
    the stream of its devices once (recomputed: twice) and that of the gradients, and scatters both in float32; `context` in
    each layer gathers keys and values once (recomputed: twice) and scatters their gradients; `tensor` in each layer 4
    (recomputed: 6) sums of the stream. Over the bandwidth of `ring`.
    """
    config, sizes, costs, device = found.config, found.sizes, found.costs, found.device
    act = jnp.dtype(config.model.compute_dtype).itemsize
    remat = config.model.remat if costs.backward else "none"
    again = {"full": costs.flops_per_token / 3, "names": 2 * costs.matrix_parameters}.get(remat, 0.0)
    experts = counts.expert_parameters(config.model) * act / sizes["tensor"]
    flops = found.tokens * (costs.flops_per_token + again)
    times = {"compute": flops / (found.topology.size * device.peak[config.model.compute_dtype])}
    others, k = costs.parameters * act / sizes["tensor"] - experts, found.num_microbatches
    weights = others + experts / sizes["expert"]  # that a device computes with
    if device.bandwidth:
        passes = weights * (2 if remat == "none" else 3) + 2 * (found.memory["activations"] + found.memory["logits"])
        state = 2 * sum(found.memory[name] for name in ("parameters", "optimizer", "gradients"))
        times["memory"] = (k * passes + state) / device.bandwidth
    rows = found.tokens / batch_shards(sizes)  # the tokens of a device's rows
    stream = rows / sizes["context"] * config.model.model_dim * act
    keys_and_values = rows * 2 * config.model.num_kv_heads * config.model.head_dim / sizes["tensor"] * act
    layers = 0 if config.model.kind in CELLS else config.model.num_layers
    shards = counts.parameter_shards(sizes)
    gathered = k * 3 / sizes["fsdp"]  # by the axes one after the other, the outermost at the end
    tokens_of_group = sizes["expert"] * stream * ((2 if remat == "none" else 3) + 2 * 4 / act)
    moved = {
        "data": 2 * 4 * costs.trained / shards,
        "fsdp": k * 3 * weights,
        "expert": gathered * others + layers * tokens_of_group,
        "context": gathered * (others + experts) / sizes["expert"]
        + layers * (2 if remat == "none" else 3) * keys_and_values,
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

    Those that need less memory, where what is "auto" in `asked` is decided anew for each; or `everything` that is legal.
    """
    sizes = found.sizes
    config = with_microbatch(found.config, "auto") if everything else found.config
    legal = legal_meshes(config, found.costs.padded_vocab_size, found.topology.size)
    legal = (mesh for mesh in legal if mesh["data"] % found.config.mesh.slices == 0 and mesh != sizes)
    parts = {1, sizes["context"], *range(1, found.config.data.sequence_length // SHORTEST + 1)}  # of a row
    for mesh in [sizes, *(mesh for mesh in legal if mesh["context"] in parts)]:
        named = {f"mesh.{axis}": mesh[axis] for axis in AXES if mesh[axis] != sizes[axis]}
        if named and asked.mesh.fsdp == "auto":
            named["mesh.fsdp"] = mesh["fsdp"]
        for rows, remat, change in _smaller(asked, found, mesh, everything):
            if change or named or everything:
                values = {"model.remat": remat, "train.microbatch_rows": rows}
                other = decide.replaced(found.config, values | {f"mesh.{axis}": size for axis, size in mesh.items()})
                made = counted(other, found.topology, found.device, found.ramp, mesh, found.costs, found.has_end)
                yield change | named, dataclasses.replace(made, parts=found.parts)


def _smaller(
    asked: Config, found: Estimate, mesh: dict[str, int], everything: bool
) -> Iterator[tuple[int | str, str, dict[str, object]]]:
    """(rows of a microbatch, recomputation, what of both must be named) on a mesh, as `candidates` wants them."""
    batch, shards, before = found.ramp.smallest, batch_shards(mesh), found.config.model.remat
    fewer = [n for n in range(shards, found.rows, shards) if batch % n == 0 and found.rows % n == 0]
    tried: list[int | str] = [found.rows, *fewer]
    if everything:
        tried = [n for n in range(shards, batch + 1, shards) if batch % n == 0]
    elif asked.train.microbatch_rows == "auto":
        tried = ["auto"]
    site = site_of(found.topology, found.device, found.config.mesh.slices)
    for rows in tried:
        if rows != "auto" and int(rows) % shards:
            continue
        remats: tuple[str, ...] = REMATS if everything else REMATS[REMATS.index(before) :]
        unnamed = asked.model.remat
        if unnamed == "auto" and not everything:
            least = decide.enough_rows(found.config, found.ramp, mesh) if rows == "auto" else int(rows)
            with jax.sharding.use_abstract_mesh(mesh_of(found.topology, mesh)):
                unnamed = decide.least_remat(found.config, found.costs, mesh, found.ramp, site, least)
            remats = (unnamed,)
        same = (asked.train.microbatch_rows,) if everything else ("auto", found.rows)
        for remat in remats:
            change: dict[str, object] = {"model.remat": remat} if remat != unnamed else {}
            yield rows, remat, change | ({"train.microbatch_rows": rows} if rows not in same else {})
