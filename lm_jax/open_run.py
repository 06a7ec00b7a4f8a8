"""A run that is open: what the loop holds on to, what is due after a step, and the one question whether to stop."""

import contextlib
import dataclasses
from typing import Any

from etils import epath

from lm_jax import metrics, terminal
from lm_jax.batch_ramp import DataState, Every, every
from lm_jax.config import Config, Length, flatten
from lm_jax.data import mixed_rows, mixture
from lm_jax.distributed import agree, is_main_process
from lm_jax.goodput import Goodput
from lm_jax.parameter_average import averaged
from lm_jax.remote import LocalMirror
from lm_jax.run_plan import Plan
from lm_jax.stop import Stopped, StopSignal
from lm_jax.time_budget import TimeBudget
from lm_jax.train_state import TrainState


@dataclasses.dataclass
class Run:
    """What the loop holds on to; of it only `state`, `data`, the last fields and times change."""

    plan: Plan
    workdir: epath.Path
    log: terminal.Terminal
    mirror: LocalMirror  # where metrics and log grow
    mixed: mixture.Mixture
    stream: mixed_rows.MixedRows
    peak_flops: float  # FLOP/s of all devices, 0 where it is not known
    state: TrainState
    data: DataState
    goodput: Goodput
    facts: dict[str, Any]  # by which a resumed run checks that its data and tokenizer are the same
    stop: StopSignal
    benchmarks: Any = None  # the tasks that are asked with evaluations (`samples.open_benchmarks`)
    clock: TimeBudget | None = None  # while there are steps, where the length of the run is a time
    trace_from: int = 0  # the step from which some are traced, counted from 1
    before: tuple[int, dict] | None = None  # a step and the parameters after it, where histograms of the next are due
    # Closes the writer that is open, however the run ends.
    writing: contextlib.ExitStack = dataclasses.field(default_factory=contextlib.ExitStack)
    ended: str = ""  # why no step is to follow, as all processes know (`closing.why_over`)
    _every: dict[Length, Every] = dataclasses.field(default_factory=dict, init=False)

    @property
    def config(self) -> Config:
        """The config with lengths in steps, and the rows of a microbatch as a number."""
        return self.plan.config

    @property
    def num_steps(self) -> int:
        """Steps from the start of the run to its end."""
        return self.plan.num_steps

    @property
    def seconds(self) -> float:
        """Of a run whose length is a time, what of it is over; where it ends for that, all of it."""
        spent = self.clock.spent() if self.clock else self.data.seconds
        return max(spent, self.plan.seconds) if self.ended == "time" else spent

    @property
    def parameters(self) -> dict:
        """What is evaluated and sampled from."""
        return averaged(self.state.parameters, self.state.optimizer_state)

    def is_due(self, length: Length, step: int) -> bool:
        """Whether what is due again after every such length (steps, tokens, epochs) is due after `step` steps."""
        return self._every_(length).due(self.plan.ramp, step)

    def times_due(self, length: Length, step: int) -> int:
        """How often it was due up to `step` steps."""
        return self._every_(length).times(self.plan.ramp, step)

    def _every_(self, length: Length) -> Every:
        if length not in self._every:
            self._every[length] = every(length, self.config, self.stream.rows_per_epoch)
        return self._every[length]

    def is_asked_to_stop(self) -> bool:
        """Whether a signal has asked the main process to stop; all processes ask together."""
        return bool(agree(self.stop.requested, "stop"))

    def open_writer(self) -> metrics.Writer | metrics.NullWriter:
        """What writes the lines of the run from the step at hand on: on the main process alone. The one before is closed."""
        self.writing.close()
        if not is_main_process():
            return metrics.NullWriter()
        shown = self.config.log.trackers, self.workdir.name, flatten(self.config)
        writer = metrics.Writer(self.mirror.folder, self.data.step, self.log, *shown)
        return self.writing.enter_context(contextlib.closing(writer))

    def is_asked_to_look(self) -> bool:
        """Whether a signal has asked the main process to save, to show a sample and to profile; it is answered once."""
        asked, self.stop.look = self.stop.look, False
        return bool(agree(asked, "look"))

    def progress(self, text: str) -> None:
        """Says where something long between two steps is. Raises Stopped where the run is asked to stop."""
        if self.is_asked_to_stop():
            raise Stopped
        self.log.progress(text)
