"""A run whose length is a time (`train.num_steps = "5 min"`): how much of it is spent, and how far along it the next step ends.

What counts goes from the first step of a process to its last, with the evaluations and saves between them: not the start, not
the compiler, not the last evaluation. What earlier processes of the run spent until they saved is in the data state. The clock
is that of process 0: what it says is agreed on before anything follows from it.
"""

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from lm_jax.batch_ramp import TICKS
from lm_jax.distributed import agree, in_flight


class Next(NamedTuple):
    """What the clock says before a step."""

    ticks: int  # where the step will end, in parts of the whole time
    is_last: bool  # whether no step is to follow it


class TimeBudget:
    """The clock of a run that may take `seconds` in all, of which `spent` are over when its first step here begins."""

    def __init__(self, seconds: float, spent: float):
        self.seconds, self.before = seconds, spent
        self.since = self.step_began = time.monotonic()
        self.of_row = 0.0  # seconds of a row, of the newest step that is done
        self.dispatched: deque[Any] = deque()  # results of the steps that may not be done yet
        self.longest_pause = 0.0  # seconds of an evaluation, or a sample

    def spent(self) -> float:
        """Seconds of the run so far."""
        return self.before + time.monotonic() - self.since

    def left(self) -> float:
        """Seconds that are left."""
        return self.seconds - self.spent()

    def before_step(self, rows: int) -> Next | None:
        """What a step of `rows` rows is, on all processes alike; None where not even half of it is left.

        It is the last one where half of another would not be left.
        """
        self.step_began = time.monotonic()
        step = rows * self.of_row
        left = self.left() - len(self.dispatched) * step
        is_last = left <= 1.5 * step
        share = 1.0 if is_last else min(1.0, 1 - (left - step) / self.seconds)
        ticks, is_last, is_over = agree([round(TICKS * share), is_last, left <= 0.5 * step], "time")
        return None if is_over else Next(ticks, is_last)

    def dispatched_step(self, rows: int, result: Any) -> None:
        """A step of `rows` rows is dispatched; returns once no more steps run than may while the next one is dispatched."""
        self.dispatched.append(result)
        if len(self.dispatched) > in_flight():
            jax.block_until_ready(self.dispatched.popleft())
        self.of_row = (time.monotonic() - self.step_began) / rows

    def has_time_to_look(self) -> bool:
        """Whether the longest evaluation or sample so far would be over before the time is."""
        return bool(agree(self.left() >= self.longest_pause, "time to look"))

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        """Around an evaluation or a sample."""
        start = time.monotonic()
        yield
        self.longest_pause = max(self.longest_pause, time.monotonic() - start)
