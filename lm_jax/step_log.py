"""What is written of the steps: metrics, speed, the time that is left, what was skipped, where the loss jumped."""

import contextlib
import time

import numpy as np

from lm_jax import metrics, spikes
from lm_jax.data import mixed_rows
from lm_jax.distributed import agree
from lm_jax.plan import counts
from lm_jax.run import Run

MOST_IN_A_ROW = 10  # updates that are not finite, before the run stops


class StepLog:
    """Metrics of a step written one step later, speeds over the time since the last line, progress with what remains.

    The device counts the steps whose gradient was not finite; the counts of all steps are read with the metrics of the
    next line, which waits for them anyway.
    """

    def __init__(self, run: Run, writer: metrics.Writer | metrics.NullWriter, watch: spikes.Watch):
        self.run, self.writer = run, writer
        self.watch: spikes.Watch | None = watch
        self.spike = 0  # the step from behind which all processes are to go back, once they know of it
        self._spike = 0  # the same, as soon as this process has read it
        self.waiting: tuple[int, dict] | None = None  # the step of the next line
        self.unread: list[tuple[int, dict]] = []  # the steps since the last line
        self.skipped = float(run.state.optimizer_state.skipped)  # read once, before the loop
        self.skipping, self.hopeless = False, False
        self.row_at = mixed_rows.SkippingRows(run.stream, run.data.skipped).row_at
        self.wrong, self.wrong_from, self.wrong_to = "", 0, 0  # what of which steps is not finite
        self.first = run.data.step
        self.mark, self.mark_tokens, self.mark_step = time.monotonic(), 0.0, run.data.step
        self.tokens = 0.0  # since this process started
        self.since = time.monotonic()

    @contextlib.contextmanager
    def paused(self):
        """Evaluations and saves do not count as time of steps."""
        start = time.monotonic()
        yield
        end = time.monotonic()
        self.mark += end - max(start, self.mark)
        self.since += end - start

    def inside(self, step: int, done: int, rows: int) -> None:
        """Shows where the step after `step` steps is: `done` of its rows are read."""
        length = self.run.config.data.sequence_length
        tokens = self.tokens + done * length
        rate = tokens / (time.monotonic() - self.since)
        self.run.log.progress(
            f"step {step + 1:,} of {self.run.num_steps:,}: row {done} of {rows}, {rate:,.0f} tokens/s, "
            f"step done in {counts.duration((rows - done) * length / rate)}, "
            f"all in {counts.duration(self._left(tokens) / rate)}"
        )

    def _left(self, tokens: float) -> float:
        """Tokens that are left to the last step, `tokens` after the first step of this process."""
        cursor = self.run.plan.ramp.cursor
        num_rows = cursor(self.run.num_steps) - cursor(self.first)
        return max(0.0, num_rows * self.run.config.data.sequence_length - tokens)

    def done(self, step: int, rows: int, device_metrics: dict) -> None:
        """`step` updates are done (dispatched, on an accelerator)."""
        every = self.run.config.log.every
        if self.waiting:
            self.flush()
        if self.run.is_due(every, step - 1):
            self.agree_on_spike()
        self.unread.append((step, device_metrics))
        self.tokens += rows * self.run.config.data.sequence_length
        if self.run.is_due(every, step) or step in (1, self.run.num_steps):
            self.waiting = (step, device_metrics)
            if all(value.is_ready() for value in device_metrics.values()):  # on a CPU: nothing would wait
                self.flush()
        else:
            self.inside(step, 0, rows)

    def agree_on_spike(self) -> None:
        """At a step at which all processes have read the same metrics; the leading one's history counts."""
        if self.run.config.train.on_spike == "rewind":
            self.spike = agree(self._spike, "spike")

    def read_steps(self) -> None:
        """Says what was wrong with the steps since the last line: which rows were skipped, where the loss jumped."""
        for step, device_metrics in self.unread:
            names = ("train/skipped", "train/skipped_in_a_row", "train/loss", "train/grad_norm")
            skipped, in_a_row, loss, norm = metrics.to_host({name: device_metrics[name] for name in names}).values()
            what = "" if skipped == self.skipped else "update" if np.isfinite(norm) else "gradient"
            if what != self.wrong:
                self.tell_skipped()
                self.wrong, self.wrong_from = what, step
            self.wrong_to, self.skipped, self.skipping = step, skipped, bool(what)
            self.hopeless |= in_a_row >= MOST_IN_A_ROW
            if not what:
                self.judge(step, loss, norm)
        self.tell_skipped()
        self.wrong, self.unread = "", []

    def tell_skipped(self) -> None:
        if not self.wrong:
            return
        first, last = self.wrong_from, self.wrong_to
        steps = f"step {first:,}" if first == last else f"steps {first:,} to {last:,}"
        self.run.log(f"{steps} skipped: the {self.wrong} of {self.rows(first, last)} is not finite")

    def rows(self, first: int, last: int) -> str:
        """The rows of the stream that steps `first` to `last` (counted from 1) took, in words."""
        cursor = self.run.plan.ramp.cursor
        return f"rows {self.row_at(cursor(first - 1)):,} to {self.row_at(cursor(last) - 1):,}"

    def judge(self, step: int, loss: float, norm: float) -> None:
        """Holds a step against those before it, and says a spike."""
        if self.run.config.train.on_spike == "off" or self.watch is None:
            return
        if jump := self.watch(loss, norm):
            self.run.log(f"step {step:,}, {self.rows(step, step)}: {jump}")
            self._spike = self._spike or step

    def flush(self) -> None:
        """Reads the steps since the last line, and writes the line that waits."""
        self.read_steps()
        if self.waiting is None:
            return
        (step, device_metrics), self.waiting = self.waiting, None
        run, length = self.run, self.run.config.data.sequence_length
        values = metrics.to_host(device_metrics)  # waits for the step, on an accelerator
        now = time.monotonic()
        values["train/tokens"] = float(run.plan.ramp.cursor(step) * length)
        seconds = max(now - self.mark, 1e-9)
        rate = (self.tokens - self.mark_tokens) / seconds
        values |= {"perf/tokens_per_second": rate, "perf/step_seconds": seconds / max(1, step - self.mark_step)}
        if run.peak_flops:
            values["perf/mfu"] = rate * run.plan.counted.flops_per_token / run.peak_flops
        self.mark, self.mark_tokens, self.mark_step = now, self.tokens, step
        self.writer.scalars(step, values)
        run.log(
            f"step {step:>6,} of {run.num_steps:,}  loss {values['train/loss']:.4f}"
            f"  grad norm {values['train/grad_norm']:.2f}  {rate:,.0f} tokens/s"
            f"  {counts.duration(self._left(self.tokens) / rate)} left"
        )
