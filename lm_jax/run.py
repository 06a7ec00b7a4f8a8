"""A run that is open: what the loop holds on to, what is due after a step, and the one question whether to stop."""

import dataclasses
from typing import Any

from etils import epath

from lm_jax import terminal
from lm_jax.batch_ramp import DataState, every
from lm_jax.config import Config, Length
from lm_jax.data import mixture
from lm_jax.distributed import agree
from lm_jax.goodput import Goodput
from lm_jax.parameter_average import averaged
from lm_jax.remote import LocalMirror
from lm_jax.run_plan import Plan
from lm_jax.stop import Stopped, StopSignal
from lm_jax.train_state import TrainState


@dataclasses.dataclass
class Run:
    """Nothing here changes but `state`, `data` and the marks of time."""

    plan: Plan
    workdir: epath.Path
    log: terminal.Terminal
    desk: LocalMirror  # where metrics and log grow
    mixed: mixture.Mixture
    stream: mixture.MixedRows
    peak_flops: float  # FLOP/s of all devices, 0 where it is not known
    state: TrainState
    data: DataState
    goodput: Goodput
    facts: dict[str, Any]  # what a run must find again
    stop: StopSignal

    @property
    def config(self) -> Config:
        return self.plan.config

    @property
    def num_steps(self) -> int:
        return self.plan.num_steps

    @property
    def parameters(self) -> dict:
        """What is evaluated and sampled from."""
        return averaged(self.state.parameters, self.state.optimizer_state)

    def is_due(self, length: Length, step: int) -> bool:
        """Whether what is due again after every such length (steps, tokens, epochs) is due after `step` steps."""
        return every(length, self.config, self.stream.rows_per_epoch).due(self.plan.ramp, step)

    def is_asked_to_stop(self) -> bool:
        return bool(agree(self.stop.requested, "stop"))

    def progress(self, text: str) -> None:
        """Says where something long between two steps is. Raises Stopped where the run is asked to stop."""
        if self.is_asked_to_stop():
            raise Stopped
        self.log.progress(text)
