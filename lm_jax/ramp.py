"""How many rows each step takes: the batch ramp as a short table, and lengths of time resolved through it."""

import dataclasses
import math

from lm_jax.config import Config, Length, UserError, parse_length


@dataclasses.dataclass(frozen=True)
class Ramp:
    """Stages of constant batch size: from step `first_step`, whose first row is `first_row`, `rows` a step."""

    stages: tuple[tuple[int, int, int], ...]  # (first_step, first_row, rows)

    def rows(self, step: int) -> int:
        """Rows that step number `step` (the first is 0) consumes."""
        return next(rows for first, _, rows in reversed(self.stages) if step >= first)

    def cursor(self, step: int) -> int:
        """Rows consumed before step number `step`."""
        return next(row + (step - first) * rows for first, row, rows in reversed(self.stages) if step >= first)

    def step_at(self, row: int) -> int:
        """The smallest number of steps that consume at least `row` rows."""
        return next(
            first + math.ceil((row - start) / rows) for first, start, rows in reversed(self.stages) if row >= start
        )


def make_ramp(config: Config) -> Ramp:
    """The batch grows linearly in rows seen, in multiples of its first size (GPT-3, arXiv:2005.14165, appendix B)."""
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


def to_steps(length: Length, config: Config, ramp: Ramp, rows_per_epoch: float) -> int:
    """A length of time in steps. Lengths in minutes belong to checkpoints alone and are not for this function."""
    number, unit = parse_length(length)
    if unit == "steps":
        return int(number)
    rows = number / config.data.sequence_length if unit == "tokens" else number * rows_per_epoch
    return max(1, ramp.step_at(math.ceil(rows)))


def with_steps(config: Config, ramp: Ramp, rows_per_epoch: float) -> Config:
    """The same config with every length of time in steps ("30 min" of checkpoints stays)."""
    steps = lambda length: to_steps(length, config, ramp, rows_per_epoch)
    num_steps = steps(config.train.num_steps)
    optimizer = dataclasses.replace(
        config.optimizer,
        warmup=steps(config.optimizer.warmup),
        decay_over=steps(config.optimizer.decay_over) or num_steps,
    )
    in_minutes = parse_length(config.checkpoint.every)[1] == "min"
    return dataclasses.replace(
        config,
        optimizer=optimizer,
        train=dataclasses.replace(config.train, num_steps=num_steps),
        checkpoint=config.checkpoint
        if in_minutes
        else dataclasses.replace(config.checkpoint, every=steps(config.checkpoint.every)),
        evaluate=dataclasses.replace(config.evaluate, every=steps(config.evaluate.every)),
        log=dataclasses.replace(config.log, every=steps(config.log.every)),
    )
