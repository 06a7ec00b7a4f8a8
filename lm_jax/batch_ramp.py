"""What was consumed, and what each step takes: the data state, the batch ramp as a short table, lengths of time through it.

Where a run stands is its data state. The ramp is laid through it (`Ramp.through`), so that whatever batches a run took before,
a step takes what the config gives at the rows that are consumed, and a length in tokens or epochs ends where they do.
"""

import dataclasses
import math
from fractions import Fraction
from typing import NamedTuple

from jax.typing import ArrayLike

from lm_jax.config import Config
from lm_jax.errors import UserError
from lm_jax.knob import Length, parse_length


class DataState(NamedTuple):
    """Where the training stream is: after `step` updates the next row is `cursor`; `skipped` row ranges were dropped.

    Of a run whose length is a time, `seconds` of it are over.
    """

    step: int
    cursor: int
    skipped: tuple[tuple[int, int], ...] = ()
    seconds: float = 0.0

    @classmethod
    def of_lists(cls, found) -> "DataState":
        """From what JSON makes of it: lists for tuples."""
        step, cursor, skipped, *seconds = found
        return cls(step, cursor, tuple((first, last) for first, last in skipped), *seconds)


TICKS = 2**20  # of the time of a run whose length is one
START = DataState(0, 0)  # of a run that has consumed nothing


@dataclasses.dataclass(frozen=True)
class Ramp:
    """Stages of constant batch size: from step `first_step`, whose first row is `first_row`, `rows` a step; never fewer later."""

    stages: tuple[tuple[int, int, int], ...]  # (first_step, first_row, rows)
    ahead: int = 0  # the step at which a run that always had this config would take these rows, less the step at hand

    def _stage(self, step: int) -> tuple[int, int, int]:
        return next((stage for stage in reversed(self.stages) if step >= stage[0]), self.stages[0])

    def _stage_of_row(self, row: int) -> tuple[int, int, int]:
        return next((stage for stage in reversed(self.stages) if row >= stage[1]), self.stages[0])

    @property
    def smallest(self) -> int:
        """Rows of the first batches."""
        return self.stages[0][2]

    @property
    def largest(self) -> int:
        """Rows of the last batches."""
        return self.stages[-1][2]

    def rows(self, step: int) -> int:
        """Rows that step number `step` (the first is 0) consumes."""
        return self._stage(step)[2]

    def cursor(self, step: int) -> int:
        """Rows consumed before step number `step`."""
        first, start, rows = self._stage(step)
        return start + (step - first) * rows

    def step_at(self, row: int) -> int:
        """The smallest number of steps that consume at least `row` rows."""
        first, start, rows = self._stage_of_row(row)
        return first + math.ceil((row - start) / rows)

    def through(self, step: int, row: int) -> "Ramp":
        """The ramp with the same sizes at the same rows, moved so that `row` rows are consumed before `step`.

        It is moved in steps, and by the rows by which `row` is beyond a step of this ramp. From any later point of the moved
        ramp it would be moved by as much, so that it does not matter how often a run is resumed.
        """
        first, start, rows = self._stage_of_row(row)
        own = first + (row - start) // rows
        beyond = row - self.cursor(own)
        moved = tuple((first - own + step, start + beyond, rows) for first, start, rows in self.stages)
        return Ramp(moved, self.ahead + own - step)


def make_ramp(config: Config) -> Ramp:
    """The batch grows linearly in the rows consumed, in multiples of its first size (GPT-3, arXiv:2005.14165, appendix B)."""
    full, (start, length) = config.data.global_batch_size, config.data.batch_ramp
    if not start or start == full:
        return Ramp(((0, 0, full),))
    number, unit = parse_length(length)
    if unit == "epochs":
        raise UserError(
            f"config.data.batch_ramp = ({start}, {length!r}): give the length of the ramp in tokens or steps"
        )
    mean = (start + full) / 2
    total_rows = number * mean if unit == "steps" else number / config.data.sequence_length
    stages, step, row, sizes = [], 0, 0, full // start
    for size in range(1, sizes + 1):
        stages.append((step, row, size * start))
        num_steps = max(0, math.ceil((total_rows * size / (sizes - 1) - row) / (size * start)))
        step, row = step + num_steps, row + num_steps * size * start
    return Ramp(tuple(stage for i, stage in enumerate(stages) if i + 1 == len(stages) or stages[i + 1][0] > stage[0]))


def is_in_rows(length: Length) -> bool:
    """Whether a length is counted by what is consumed, not by steps or minutes."""
    return parse_length(length)[1] in ("tokens", "epochs")


def seconds_of(length: Length) -> float:
    """A length in minutes as seconds, 0 where it is counted otherwise."""
    number, unit = parse_length(length)
    return 60 * number if unit == "min" else 0.0


def in_rows(length: Length, config: Config, rows_per_epoch: float) -> Fraction:
    """A length in tokens or epochs as rows, exactly."""
    number, unit = parse_length(length)
    of_one = Fraction(1, config.data.sequence_length) if unit == "tokens" else Fraction(rows_per_epoch)
    return Fraction(str(number)) * of_one


def to_steps(length: Length, config: Config, ramp: Ramp, rows_per_epoch: float, ahead: int = 0) -> int:
    """A length of time as the number of steps after which it is over, on a clock that is `ahead`; at least 1 of what is consumed.

    Not for lengths in minutes.
    """
    if not is_in_rows(length):
        return int(parse_length(length)[0])
    return max(1, ramp.step_at(math.ceil(in_rows(length, config, rows_per_epoch))) + ahead)


class Clocks(NamedTuple):
    """By how many steps the clocks of the schedule are ahead of the number of updates.

    `Ramp.ahead` where a length is in tokens or epochs: its clock is what was consumed, in steps of the config at hand. Where the
    decay is as long as a run whose length is a time, its clock is that of the time: the step at hand ends at `ticks` of TICKS.
    """

    warmup: int = 0
    decay: int = 0
    ticks: ArrayLike | None = None


UPDATES = Clocks()  # lengths in steps


def clocks(config: Config, ramp: Ramp) -> Clocks:
    """Of a config whose lengths are as they were given."""
    ahead = lambda length: ramp.ahead if is_in_rows(length) else 0
    decay = config.optimizer.decay_over or config.train.num_steps
    return Clocks(ahead(config.optimizer.warmup), ahead(decay), 0 if seconds_of(decay) else None)


def with_steps(config: Config, ramp: Ramp, rows_per_epoch: float) -> Config:
    """The config with `num_steps`, `warmup` and `decay_over` in steps; times and the intervals of `Every` stay as given.

    `num_steps` is counted from the start of the run, the other two on their own `clocks`.
    """
    steps = lambda length, ahead: to_steps(length, config, ramp, rows_per_epoch, ahead)
    ahead, num_steps = clocks(config, ramp), config.train.num_steps
    is_time = seconds_of(num_steps) > 0
    optimizer = dataclasses.replace(
        config.optimizer,
        warmup=steps(config.optimizer.warmup, ahead.warmup),
        decay_over=steps(config.optimizer.decay_over or (0 if is_time else num_steps), ahead.decay),
    )
    train = dataclasses.replace(config.train, num_steps=num_steps if is_time else steps(num_steps, 0))
    return dataclasses.replace(config, optimizer=optimizer, train=train)


class Every(NamedTuple):
    """What is due again and again: after so many steps, or whenever so many rows more are consumed; 0 = never."""

    number: Fraction
    of_rows: bool

    def times(self, ramp: Ramp, step: int) -> int:
        """How often it was due up to `step` steps."""
        consumed = ramp.cursor(step) if self.of_rows else step
        return int(consumed // self.number) if self.number else 0

    def due(self, ramp: Ramp, step: int) -> bool:
        """Whether it is due after `step` steps."""
        return self.times(ramp, step) > self.times(ramp, step - 1)


def every(length: Length, config: Config, rows_per_epoch: float) -> Every:
    """Of a length in steps, tokens or epochs."""
    if is_in_rows(length):
        return Every(in_rows(length, config, rows_per_epoch), True)
    return Every(Fraction(int(parse_length(length)[0])), False)
