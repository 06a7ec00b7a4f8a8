"""What is written of the steps: metrics, speed, the time that is left; `step_checks.py` says what is wrong with them."""

import contextlib
import time
from collections.abc import Iterator

from lm_jax import metrics, spikes
from lm_jax.open_run import Run
from lm_jax.plan import counts
from lm_jax.step_checks import StepChecks


class StepLog:
    """Metrics of a step written one step later, speed since the last line, progress with the time that is left.

    The device counts skipped updates. The counts of all steps are read with the next line, which waits for its step anyway.
    """

    def __init__(self, run: Run, writer: metrics.Writer | metrics.NullWriter, watch: spikes.Watch):
        self.run, self.writer, self.checks = run, writer, StepChecks(run, watch)
        self.waiting: tuple[int, dict] | None = None  # the step of the next line, and its metrics
        self.unread: list[tuple[int, dict]] = []  # the steps since the last line
        self.latest: tuple[int, dict] | None = None  # the newest step
        self.first = run.data.step
        self.mark, self.mark_tokens, self.mark_step = time.monotonic(), 0.0, run.data.step  # of the last line
        self.tokens = 0.0  # since this process started
        self.since = time.monotonic()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, time does not count as time of steps: evaluations and saves."""
        start = time.monotonic()
        yield
        end = time.monotonic()
        self.mark += end - max(start, self.mark)
        self.since += end - start

    def inside(self, step: int, done: int, rows: int) -> None:
        """Shows progress inside the step that follows `step` steps: `done` of its rows are read."""
        length = self.run.config.data.sequence_length
        tokens = self.tokens + done * length
        rate = tokens / (time.monotonic() - self.since)
        self.run.log.progress(
            f"step {step + 1:,} of {self.run.plan.length}: row {done} of {rows}, {rate:,.0f} tokens/s, "
            f"step done in {counts.duration((rows - done) * length / rate)}, "
            f"all in {counts.duration(self._left(tokens, rate))}"
        )

    def _left(self, tokens: float, rate: float) -> float:
        """Seconds that are left, where this process has read `tokens` at `rate` a second."""
        if self.run.clock:
            return max(0.0, self.run.clock.left())
        cursor = self.run.plan.ramp.cursor
        num_rows = cursor(self.run.num_steps) - cursor(self.first)
        return max(0.0, num_rows * self.run.config.data.sequence_length - tokens) / rate

    def done(self, step: int, rows: int, device_metrics: dict) -> None:
        """Takes the metrics of the step with which `step` updates are done (dispatched, on an accelerator)."""
        every = self.run.config.log.every
        if self.waiting:
            self.flush()
        if self.run.is_due(every, step - 1):
            self.checks.agree_on_spike()
        self.latest = (step, device_metrics)
        self.unread.append(self.latest)
        self.tokens += rows * self.run.config.data.sequence_length
        if self.run.is_due(every, step) or step == 1 or self.run.ended:
            self.waiting = (step, device_metrics)
            if all(value.is_ready() for value in device_metrics.values()):  # on a CPU: nothing would wait
                self.flush()
        else:
            self.inside(step, 0, rows)

    def end(self) -> None:
        """No step is to follow, which was not known before the last one: it has a line all the same."""
        if self.latest and self.latest[0] > self.mark_step:
            self.waiting = self.latest

    def flush(self) -> None:
        """Reads the steps since the last line, and writes the line that waits."""
        self.checks.read(self.unread)
        self.unread = []
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
        if run.clock:
            values["train/seconds"] = run.clock.spent()
        self.mark, self.mark_tokens, self.mark_step = now, self.tokens, step
        self.writer.scalars(step, values)
        run.log(
            f"step {step:>6,} of {run.plan.length}  train/loss {values['train/loss']:.4f}"
            f"  train/grad_norm {values['train/grad_norm']:.2f}  {rate:,.0f} tokens/s"
            f"  {counts.duration(self._left(self.tokens, rate))} left"
        )
