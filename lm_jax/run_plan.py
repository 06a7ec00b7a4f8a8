"""The plan of a run, made before any array exists: config -> mesh -> model -> microbatch -> program.

`train`, `verify` and `plan` call it. A plan depends on its arguments alone: a run whose newest step turns out
to be broken makes it again, from the data state of the step before.
"""

import dataclasses
import errno
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax

from lm_jax import decide
from lm_jax.batch_ramp import START, DataState, Ramp, clocks, make_ramp, seconds_of, with_steps
from lm_jax.config import Config
from lm_jax.data.mixture import pieces_expected
from lm_jax.data.objectives import EXTRA
from lm_jax.knob import MOST_STEPS
from lm_jax.mesh import make_mesh, mesh_shape, preflight
from lm_jax.model import attention
from lm_jax.model.language_model import padded
from lm_jax.parts import ORDINARY, Parts
from lm_jax.plan import counts
from lm_jax.train_state import TrainSetup, program_of

NEW: Mapping[str, Any] = MappingProxyType({})  # what a new run has saved


@dataclasses.dataclass(frozen=True)
class Plan:
    """What does not change from the first step of a process to its last."""

    config: Config  # its lengths in steps, nothing "auto" but its attention
    decided: dict[str, Any]  # {path: value} of what was "auto" (lm_jax/decide.py)
    ramp: Ramp
    sizes: dict[str, int]  # of the mesh axes
    mesh: jax.sharding.Mesh
    counted: counts.Costs
    program: TrainSetup

    @property
    def num_steps(self) -> int:
        """Steps from the start of the run to its end; where that is a time, more than there will be."""
        return MOST_STEPS if self.seconds else int(self.config.train.num_steps)

    @property
    def seconds(self) -> float:
        """From the first step of the run to its end, where its length is a time; else 0."""
        return seconds_of(self.config.train.num_steps)

    @property
    def length(self) -> str:
        """The length of the run in words: "1,000" steps, or "5 min"."""
        return str(self.config.train.num_steps) if self.seconds else f"{self.num_steps:,}"

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


def check(config: Config, site: decide.Site) -> None:
    """Raises UserError for what is known to be wrong before any data are opened.

    That is: the devices do not form the mesh, the attention backend cannot train the model on them, or a dim does not divide
    over the mesh. The last is not known yet where the tokenizer is a file, which must be opened for its vocabulary.
    """
    sizes = mesh_shape(config.mesh, site.size)
    config = decide.replaced(config, decide.by_devices(config, site, NEW))
    attention.preflight(config.model, config.data.sequence_length, site.platform, sizes["context"], site.bfloat16)
    if pieces := pieces_expected(config.data):
        preflight(config, padded(pieces + EXTRA[config.data.objective]), sizes)


def make_plan(
    config: Config,
    vocab_size: int,
    devices: list[jax.Device],
    rows_per_epoch: float = 1.0,
    data: DataState = START,
    site: decide.Site | None = None,
    saved: Mapping[str, Any] = NEW,
    parts: Parts = ORDINARY,
) -> Plan:
    """The plan of a config as it is written, for a tokenizer of `vocab_size` and the devices of all processes.

    `rows_per_epoch` turns lengths in epochs into rows; `data` is the data state. What is "auto" is decided for `site`, which
    describes the devices (None: the whole batch in a microbatch, and the rest as it is on a CPU); `saved` is the flat config
    of a run that is gone on with. Raises UserError where a dim does not divide over the mesh.
    """
    ramp = make_ramp(config).through(data.step, data.cursor)
    found = decide.decide(config, vocab_size, ramp, site, saved, len(devices), parts)
    planned = with_steps(found.config, ramp, rows_per_epoch)
    mesh = make_mesh(planned.mesh, devices)
    program = program_of(planned, found.model, clocks(config, ramp), parts)
    return Plan(planned, found.values, ramp, found.sizes, mesh, found.counted, program)


def with_microbatch(config: Config, rows: int | str) -> Config:
    """The config with so many rows in a microbatch."""
    return decide.replaced(config, {"train.microbatch_rows": rows})


def check_memory(plan: Plan, device: jax.Device) -> None:
    """Raises OSError where a run needs more memory than this CPU has, which would swap until a process is killed.

    An accelerator's compiler reports it itself, more exactly.
    """
    needed, memory = sum(plan.memory.values()), counts.device_memory(device)
    if device.platform == "cpu" and needed > memory:
        raise OSError(
            errno.ENOMEM, f"this does not fit: {needed / 2**30:,.3g} GiB are needed, {memory / 2**30:,.3g} are here"
        )
