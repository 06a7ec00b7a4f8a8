"""What is wrong with steps: updates that were skipped because they were not finite, and spikes of the loss."""

import itertools

import numpy as np

from lm_jax import metrics, spikes
from lm_jax.data import mixed_rows
from lm_jax.distributed import agree
from lm_jax.open_run import Run

MOST_IN_A_ROW = 10  # updates that are not finite, before the run stops
NAMES = ("train/skipped", "train/skipped_in_a_row", "train/loss", "train/grad_norm")


class StepChecks:
    """Reads the metrics of every step, and logs which rows were skipped and where the loss jumped."""

    def __init__(self, run: Run, watch: spikes.Watch):
        self.run = run
        self.watch: spikes.Watch | None = watch
        self.spike = 0  # the step before which all processes are to go back, once they have agreed on it
        self._spike = 0  # the same, as soon as this process has read it
        self.skipped = float(run.state.optimizer_state.skipped)  # updates so far; read once, before the loop
        self.skipping, self.hopeless = False, False  # whether the last update was skipped; whether too many were
        self.row_at = mixed_rows.SkippingRows(run.stream, run.data.skipped).row_at

    def read(self, steps: list[tuple[int, dict]]) -> None:
        """Checks steps that follow on those before: [(step, device metrics), ...]."""
        found = [(step, *self._values(device_metrics)) for step, device_metrics in steps]
        for problem, group in itertools.groupby(found, lambda values: values[1]):
            together = list(group)
            self.skipping = bool(problem)
            if problem:
                first, last = together[0][0], together[-1][0]
                name = f"step {first:,}" if first == last else f"steps {first:,} to {last:,}"
                self.run.log(f"{name} skipped: the {problem} of {self._rows(first, last)} is not finite")
            for step, _, loss, norm in () if problem else together:
                self._judge(step, loss, norm)

    def _values(self, device_metrics: dict) -> tuple[str, float, float]:
        """(what was not finite, "" = nothing; loss; gradient norm) of the next step."""
        skipped, in_a_row, loss, norm = metrics.to_host({name: device_metrics[name] for name in NAMES}).values()
        problem = "" if skipped == self.skipped else "update" if np.isfinite(norm) else "gradient"
        self.skipped, self.hopeless = skipped, self.hopeless or in_a_row >= MOST_IN_A_ROW
        return problem, loss, norm

    def _judge(self, step: int, loss: float, norm: float) -> None:
        """Compares a step with those before it, and logs a spike."""
        if self.run.config.train.on_spike == "off" or self.watch is None:
            return
        if jump := self.watch(loss, norm):
            self.run.log(f"step {step:,}, {self._rows(step, step)}: {jump}")
            self._spike = self._spike or step

    def _rows(self, first: int, last: int) -> str:
        """The rows of the stream that steps `first` to `last` (counted from 1) took, in words."""
        cursor = self.run.plan.ramp.cursor
        return f"rows {self.row_at(cursor(first - 1)):,} to {self.row_at(cursor(last) - 1):,}"

    def agree_on_spike(self) -> None:
        """Called at a step at which all processes have read the same metrics; what the main process found counts."""
        if self.run.config.train.on_spike == "rewind":
            self.spike = agree(self._spike, "spike")
