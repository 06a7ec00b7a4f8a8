"""What "auto" is: settings that the counts decide, for the devices at hand or for those that a topology describes.

A decision depends on its arguments alone. What the processes of a run may see differently, the memory and the kind of
their devices, is in a `Site`, which they agree on first: the least of all counts. What was given is never changed.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from lm_jax.batch_ramp import Ramp
from lm_jax.config import FIRST_LOSS_SCALE, Config
from lm_jax.distributed import everyone
from lm_jax.mesh import batch_shards, by_slice, legal_meshes, mesh_shape, preflight
from lm_jax.model import attention, build
from lm_jax.model.language_model import padded
from lm_jax.model_config import ATTENDING, MOST_UNROLLED, plain
from lm_jax.parts import ORDINARY, Parts
from lm_jax.plan import counts
from lm_jax.plan.devices import has_bfloat16
from lm_jax.sharding import AXES

REMATS = ("none", "dots", "names", "full")  # from least recomputation and most memory to most recomputation
STATE = ("parameters", "optimizer", "gradients")
# Shares of a device's memory: that the state may have where it is not split, and that all may have with the least
# recomputation. On CPUs devices share one memory, and of unrolled layers XLA keeps what was to be computed again.
OF_STATE, OF_ALL = 0.5, 0.8
ENOUGH = 8192  # tokens of a device in a microbatch (docs/notebook.md)


class Site(NamedTuple):
    """The devices of a run, as far as they decide anything."""

    platform: str  # cpu, gpu or tpu
    bfloat16: bool  # whether all of them multiply in it
    memory: float  # bytes that a program may take of one device, of the smallest
    size: int  # devices
    island: int  # devices that links connect: of a slice of TPUs, of a host of GPUs
    slices: int  # as `mesh.by_slice` finds them


class Decision(NamedTuple):
    """A config with nothing "auto" but its attention, and what follows from it."""

    config: Config
    values: dict[str, Any]  # {path: value} of what was decided
    model: build.ModelDef
    counted: counts.Costs
    sizes: dict[str, int]  # of the mesh axes


def at_hand(here: list[jax.Device], device: jax.Device) -> Site:
    """The devices of all processes; `device` is one of this process. All processes call it together."""
    facts = everyone([has_bfloat16(device), counts.device_memory(device)], "devices")
    able, memory = zip(*facts, strict=True)
    slices = len(by_slice(here, -1))
    return Site(device.platform, all(able), min(memory), len(here), len(here) // slices, slices)


def by_devices(config: Config, site: Site, saved: Mapping[str, Any]) -> dict[str, Any]:
    """{path: value} of what needs no counts: compute dtype, loss scale, unroll, slices.

    `saved` is the flat config of a run that is gone on with, {} of a new one. It keeps its dtype, which decides its
    numbers.
    """
    values: dict[str, Any] = {}
    if config.model.compute_dtype == "auto":
        best = "bfloat16" if site.bfloat16 else "float16"
        values["model.compute_dtype"] = saved.get("model.compute_dtype", "float32" if site.platform == "cpu" else best)
        if values["model.compute_dtype"] == "float16" and not config.optimizer.loss_scale:
            values["optimizer.loss_scale"] = saved.get("optimizer.loss_scale") or FIRST_LOSS_SCALE
    if config.model.unroll == "auto":
        one_host = site.platform != "tpu" and site.size <= site.island
        values["model.unroll"] = one_host and config.model.num_layers <= MOST_UNROLLED
    if config.mesh.slices == -1:
        values["mesh.slices"] = site.slices
    return values


def decide(
    config: Config,
    vocab_size: int,
    ramp: Ramp,
    site: Site | None,
    saved: Mapping[str, Any],
    num_devices: int,
    parts: Parts = ORDINARY,
) -> Decision:
    """Decides all that is "auto" in a config, for a tokenizer of `vocab_size`; its lengths stay as they are given.

    `site` None: nothing is decided, the rows of a microbatch are the whole batch, and the rest is as `plain`. `saved`
    as in `by_devices`. Raises UserError where a dim does not divide over the mesh.
    """
    values = by_devices(config, site, saved) if site else {}
    given, config = config, replaced(config, values)
    config = dataclasses.replace(config, model=plain(config.model))
    sizes = mesh_shape(config.mesh, num_devices)
    preflight(config, padded(vocab_size), sizes)
    built = lambda config: build.build(config.model, vocab_size, config.data.sequence_length, parts.block)
    model = built(config)
    counted = counts.count(config, model.declarations)
    if site:
        values |= by_counts(given, config, counted, ramp, site, saved)
        config = replaced(config, values)
        sizes = mesh_shape(config.mesh, num_devices)
        preflight(config, padded(vocab_size), sizes)
        if model.config != config.model:
            model = built(config)
    elif config.train.microbatch_rows == "auto":
        config = replaced(config, {"train.microbatch_rows": config.data.global_batch_size})
    return Decision(config, values, model, counted, sizes)


def by_counts(
    given: Config, config: Config, counted: counts.Costs, ramp: Ramp, site: Site, saved: Mapping[str, Any]
) -> dict[str, Any]:
    """{path: value} of what is "auto" in `given` and needs counts: fsdp, then recomputation, then rows of a microbatch.

    `config` is the same with values in place of these. The rows of a run that is gone on with are kept where they fit.
    """
    values: dict[str, Any] = {}
    if given.mesh.fsdp == "auto":
        values["mesh.fsdp"] = best_fsdp(config, counted, ramp, site)
    sizes = mesh_shape(replaced(config, values).mesh, site.size)
    rows, shards = given.train.microbatch_rows, batch_shards(sizes)
    if rows == "auto":
        before = rows_before(config, shards, saved)
        most = "full" if given.model.remat == "auto" else config.model.remat
        rows = before if before and fits(config, counted, sizes, ramp, site, before, most) else rows
    if given.model.remat == "auto":
        least = enough_rows(config, ramp, sizes) if rows == "auto" else int(rows)
        values["model.remat"] = least_remat(config, counted, sizes, ramp, site, least)
    if rows == "auto":
        tried = replaced(config, values)
        rows = counts.most_rows(tried, counted, sizes, ramp.smallest, site.memory, site.platform)
    if given.train.microbatch_rows == "auto":
        values["train.microbatch_rows"] = rows
    return values


def least_remat(config: Config, counted: counts.Costs, sizes: dict[str, int], ramp: Ramp, site: Site, rows: int) -> str:
    """The least recomputation with which so many rows of a microbatch fit, or all of it."""
    return next((remat for remat in REMATS if fits(config, counted, sizes, ramp, site, rows, remat)), REMATS[-1])


def enough_rows(config: Config, ramp: Ramp, sizes: dict[str, int]) -> int:
    """The rows of a microbatch, over all devices, for which layers are rather recomputed: one a shard of the batch.

    Where parameters are split, `ENOUGH` tokens a device: with fewer, they take longer to gather than to multiply.
    """
    shards = batch_shards(sizes)
    if counts.parameter_shards(sizes) == sizes["tensor"]:
        return shards
    wanted = shards * math.ceil(ENOUGH * sizes["context"] / config.data.sequence_length)
    return next((rows for rows in range(min(wanted, ramp.smallest), shards, -1) if ramp.smallest % rows == 0), shards)


def fits(
    config: Config, counted: counts.Costs, sizes: dict[str, int], ramp: Ramp, site: Site, rows: int, remat: str
) -> bool:
    """Whether a microbatch of so many rows fits with this recomputation."""
    tried = replaced(config, {"model.remat": remat})
    needed = sum(counts.bytes_by_class(tried, counted, rows, sizes, accumulates=ramp.largest > rows).values())
    return site.platform == "cpu" or needed <= OF_ALL * site.memory


def rows_before(config: Config, shards: int, saved: Mapping[str, Any]) -> int:
    """The rows of a microbatch that a run had; 0 where it is new, or they do not divide the batch over these shards."""
    before = saved.get("train.microbatch_rows", 0)
    if not isinstance(before, int) or not before:
        return 0
    smallest = config.data.batch_ramp[0] or config.data.global_batch_size
    return before if smallest % before == 0 and before % shards == 0 else 0


def best_fsdp(config: Config, counted: counts.Costs, ramp: Ramp, site: Site) -> int:
    """Devices that split the parameters: one where the state fits on a device, else as many of an island as can be.

    Or of all devices, where a share of an island's state is still too large. What divides, and what else is given,
    decides which can be.
    """
    room = math.inf if site.platform == "cpu" else OF_STATE * site.memory

    def state_fits(sizes: dict[str, int]) -> bool:
        shards = batch_shards(sizes)
        classes = counts.bytes_by_class(config, counted, shards, sizes, accumulates=ramp.largest > shards)
        return sum(classes[name] for name in STATE) <= room

    if state_fits(mesh_shape(config.mesh, site.size)):
        return 1
    given = {axis: size for axis in AXES if (size := getattr(config.mesh, axis)) not in (-1, "auto")}
    legal = [
        sizes
        for sizes in legal_meshes(config, counted.padded_vocab_size, site.size)
        if all(sizes[axis] == size for axis, size in given.items()) and sizes["data"] % max(1, config.mesh.slices) == 0
    ]
    legal.sort(key=lambda sizes: -sizes["fsdp"])
    inside = [sizes for sizes in legal if site.size // sizes["data"] <= site.island]
    best = inside[0] if inside and state_fits(inside[0]) else next(iter(legal), {"fsdp": 1})
    return best["fsdp"]


def replaced(config: Config, values: Mapping[str, Any]) -> Config:
    """The config with other values at some paths: {"model.remat": "full"}."""
    for path, value in values.items():
        section, name = path.split(".")
        changed = dataclasses.replace(getattr(config, section), **{name: value})
        config = dataclasses.replace(config, **{section: changed})
    return config


def told(config: Config, values: Mapping[str, Any], platform: str, bfloat16: bool, parts: int) -> str:
    """A line of what was decided, "" where nothing was; with the attention of a training row, which each call decides.

    The rows of a microbatch are told elsewhere. `config` is the decided one, `values` as in a `Decision`; `parts`: over how
    many devices a row is split.
    """
    shown = {path: value for path, value in values.items() if path != "train.microbatch_rows"}
    if config.model.attention == "auto" and config.model.kind in ATTENDING["model.kind"]:
        length = config.data.sequence_length
        shown["model.attention"] = attention.preflight(config.model, length, platform, parts, bfloat16)
    return "auto: " + ", ".join(f"{path.split('.')[1]} {value}" for path, value in shown.items()) if shown else ""
