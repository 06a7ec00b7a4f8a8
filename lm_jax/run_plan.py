"""The plan of a run, made before any array exists: config -> mesh -> model -> microbatch -> program.

`train`, `verify` and `plan` call it. A plan depends on its arguments alone: a run whose newest step turns out
to be broken makes it again, from the data state of the step before.
"""

import dataclasses
import errno
from collections.abc import Callable
from typing import Any

import jax

from lm_jax.batch_ramp import START, DataState, Ramp, clocks, make_ramp, with_steps
from lm_jax.config import Config
from lm_jax.data.mixture import pieces_expected
from lm_jax.data.objectives import EXTRA
from lm_jax.distributed import everyone
from lm_jax.mesh import batch_shards, capability_of, make_mesh, mesh_shape, preflight
from lm_jax.model import attention, build
from lm_jax.model.language_model import padded
from lm_jax.plan import counts
from lm_jax.train_state import TrainSetup, program_of

ChooseRows = Callable[[Config, counts.Costs, dict[str, int], Ramp], int]  # -> rows of a microbatch


@dataclasses.dataclass(frozen=True)
class Plan:
    """What does not change from the first step of a process to its last."""

    config: Config  # its lengths in steps, the rows of a microbatch as a number
    ramp: Ramp
    sizes: dict[str, int]  # of the mesh axes
    mesh: jax.sharding.Mesh
    counted: counts.Costs
    program: TrainSetup

    @property
    def num_steps(self) -> int:
        """Steps from the start of the run to its end."""
        return int(self.config.train.num_steps)

    @property
    def microbatch(self) -> int:
        """Rows of a microbatch, over all devices."""
        return int(self.config.train.microbatch_rows)

    @property
    def memory(self) -> dict[str, float]:
        """{what: bytes on one device} at the largest batch."""
        accumulates = self.ramp.largest > self.microbatch
        return counts.bytes_by_class(self.config, self.counted, self.microbatch, self.sizes, accumulates)

    @property
    def checkpoint_bytes(self) -> float:
        """Bytes of the parameters and the optimizer's state, of all devices together."""
        whole = counts.bytes_by_class(self.config, self.counted, 1, dict.fromkeys(self.sizes, 1), accumulates=False)
        return whole["parameters"] + whole["optimizer"]


def check(config: Config, devices: list[jax.Device]) -> None:
    """Raises UserError for what is known to be wrong before any data are opened.

    That is: the devices do not form the mesh, the attention backend cannot train the model on them, or a dim does not divide
    over the mesh. The last is not known yet where the tokenizer is a file, which must be opened for its vocabulary.
    """
    sizes = mesh_shape(config.mesh, len(devices))
    attention.preflight(config.model, config.data.sequence_length, devices[0].platform, capability_of(devices[0]))
    if pieces := pieces_expected(config.data):
        preflight(config, padded(pieces + EXTRA[config.data.objective]), sizes)


def make_plan(
    config: Config,
    vocab_size: int,
    devices: list[jax.Device],
    rows_per_epoch: float = 1.0,
    data: DataState = START,
    choose_rows: ChooseRows | None = None,
) -> Plan:
    """The plan of a config as it is written, for a tokenizer of `vocab_size` and the devices of all processes.

    `rows_per_epoch` turns lengths in epochs into rows; `data` is the data state. `choose_rows` decides the rows of a
    microbatch where the config says "auto" (None: the whole batch). Raises UserError where a dim does not divide over the mesh.
    """
    ramp = make_ramp(config).through(data.step, data.cursor)
    in_steps = with_steps(config, ramp, rows_per_epoch)
    sizes = mesh_shape(config.mesh, len(devices))
    preflight(config, padded(vocab_size), sizes)
    mesh = make_mesh(config.mesh, devices)
    model = build.build(config.model, vocab_size, config.data.sequence_length)
    counted = counts.count(in_steps, model.declarations)
    rows = config.train.microbatch_rows
    if rows == "auto":
        rows = choose_rows(in_steps, counted, sizes, ramp) if choose_rows else config.data.global_batch_size
    planned = with_microbatch(in_steps, rows)
    return Plan(planned, ramp, sizes, mesh, counted, program_of(planned, model, clocks(config, ramp)))


def with_microbatch(config: Config, rows: int | str) -> Config:
    """The config with so many rows in a microbatch."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, microbatch_rows=rows))


def rows_of_microbatch(saved: dict[str, Any], device: jax.Device) -> ChooseRows:
    """A function that decides the rows of a microbatch, for all processes alike.

    A resumed run (`saved`: its config.json, {} of a new run) keeps its rows if they fit the mesh. Otherwise each process
    chooses for its own `device`, and the smallest choice counts.
    """

    def choose(config: Config, counted: counts.Costs, sizes: dict[str, int], ramp: Ramp) -> int:
        chosen: list[int] = everyone(counts.choose_microbatch(config, counted, sizes, ramp, device), "microbatch")
        before = saved.get("config", {}).get("train.microbatch_rows", 0)
        smallest = config.data.batch_ramp[0] or config.data.global_batch_size
        if isinstance(before, int) and before and smallest % before == 0 and before % batch_shards(sizes) == 0:
            return before
        return min(chosen)

    return choose


def check_memory(plan: Plan, device: jax.Device) -> None:
    """Raises OSError where a run needs more memory than this CPU has, which would swap until a process is killed.

    An accelerator's compiler reports it itself, more exactly.
    """
    needed, memory = sum(plan.memory.values()), counts.device_memory(device)
    if device.platform == "cpu" and needed > memory:
        raise OSError(
            errno.ENOMEM,
            f"this does not fit: {needed / 2**30:,.3g} GiB are needed, {memory / 2**30:,.3g} are here",
        )
