"""Training: a run is opened, then comes the loop: its steps, what is due between them, and what happens at the end.

What a run will be is decided in `run_plan.py`; how one is opened stands in `start.py`, what is seen of its model in
`samples.py`, what it says at its end in `closing.py`. What leads to a collective is agreed on by all processes first.
"""

import contextlib
import itertools
import time
from collections.abc import Iterator
from typing import Any

import jax

from lm_jax import checkpoint, cli, fault_points, metrics, spikes, start, terminal
from lm_jax.batch_ramp import DataState
from lm_jax.closing import already_done, compare_with_compressors, give_up, next_commands
from lm_jax.config import Config, flatten
from lm_jax.data import loader, mixture
from lm_jax.distributed import agree, everyone, is_main_process, workdir_lock
from lm_jax.experiment import as_given, run_name
from lm_jax.goodput import traced
from lm_jax.knob import parse_length
from lm_jax.multihost import peers
from lm_jax.rewind import go_back
from lm_jax.run import Run
from lm_jax.samples import Evaluation, answer_now, evaluate_now, is_evaluated, make_evaluation, show_sample
from lm_jax.step_log import MOST_IN_A_ROW, StepLog
from lm_jax.stop import EXIT_PREEMPTED, Stopped, StopSignal
from lm_jax.train_step import CompiledStep, compile_step


def run(config: Config, experiment: str, place: str, origins: dict[str, dict[str, Any]], dry_run: bool = False) -> int:
    """Trains to the end, from wherever the workdir is. Returns the exit code. Raises UserError before it writes there.

    `experiment` is what `--config` named, `place` the workdir ("": runs/<experiment>[-<variant>]). A `dry_run` ends
    where it is known what the run will be.
    """
    opening = start.look(config, experiment, place, dry_run)
    workdir, plan, say = opening.workdir, opening.plan, opening.say
    say(terminal.header(plan, run_name(experiment), opening.mixed, opening.device, opening.peak_flops))
    if dry_run:
        return 0
    opening.check_room()
    with workdir_lock(workdir, say), contextlib.closing(say), jax.set_mesh(plan.mesh), StopSignal() as stop:
        this = start.begin(opening, origins, stop)
        return train(this, as_given(experiment, config, origins)) if this else already_done(opening.desk, say)


def train(this: Run, given: str) -> int:
    """Trains from where `this` is; `given` is the command that does it. Returns the exit code.

    What is trained is saved before it is evaluated; what a run that is gone on with had not evaluated, it does first.
    """
    say = this.say
    with this.goodput("compile"):
        one_step = compiled(this) if this.data.step < this.num_steps else None
    say(this.goodput.start_up())
    with checkpoint.Saver(this.workdir, this.config, this.facts, this.stop) as saver:
        evaluation = make_evaluation(this)
        log, trouble = stretch(this, one_step, evaluation, saver)
        while log.spike and not trouble:
            trouble = go_back(this, log, saver)
            if trouble or this.is_asked_to_stop():
                break
            log.writer.close()
            log, trouble = stretch(this, one_step, evaluation, saver, log.watch)
        saver.close()
    finished = this.data.step == this.num_steps and not trouble and not this.is_asked_to_stop()
    if finished:
        finish(this, evaluation, log.writer)
    log.writer.close()
    if not trouble:
        say(this.goodput.table())
    if finished:
        say(next_commands(this, given))
    elif not trouble:
        say(f"saved at step {this.data.step:,} of {this.num_steps:,}; the same command goes on from there")
    else:
        give_up(this, trouble)
    this.desk.send()
    return cli.EXIT_FAULT if trouble else 0 if finished else EXIT_PREEMPTED


def compiled(this: Run) -> CompiledStep:
    this.say.progress("compiling the step")
    fault_points.reach("compile")
    one_microbatch = all(rows == this.plan.microbatch for _, _, rows in this.plan.ramp.stages)
    return compile_step(this.plan.program, this.plan.mesh, one_microbatch)


def stretch(
    this: Run, one_step: CompiledStep | None, evaluation: Evaluation | None, saver: checkpoint.Saver, watch=None
) -> tuple[StepLog, str]:
    """From where `this` is to the end, to a signal, or to where it is no good to go on -> (its log, the trouble or "").

    What was trained is saved, unless there is trouble or a spike (`log.spike`).
    """
    writer = metrics.Writer(this.desk.folder, this.data.step, this.say) if is_main_process() else metrics.NullWriter()
    kept = checkpoint.saved_beside(this.workdir, this.data.step) if is_main_process() else {}  # whose spikes count
    log = StepLog(this, writer, watch or spikes.Watch(kept))
    try:
        try:
            if this.data.step == 0:
                writer.hyper_parameters(flatten(this.config))
                show_sample(this, writer)
            elif one_step:
                look(this, None if is_evaluated(this) else evaluation, writer)
            if one_step:
                steps(this, one_step, log, evaluation, saver)
        except Stopped:
            pass  # after a whole step
        log.flush()
        log.agree_on_spike()
        if agree(log.hopeless, "hopeless"):
            return log, f"{MOST_IN_A_ROW} updates in a row were not finite (inf or NaN); none of them was applied"
        if not log.spike:
            save(this, saver, log)
            saver.wait()
    except checkpoint.NotFinite as error:
        return log, str(error)
    return log, ""


def together(batches: Iterator[dict]) -> Iterator[dict]:
    """`batches`, once all processes have their first: the first collective on CPUs waits 30 s for the others, then fails."""
    first = next(batches)
    everyone(True, "first batch")
    return itertools.chain([first], batches)


def steps(
    this: Run, one_step: CompiledStep, log: StepLog, evaluation: Evaluation | None, saver: checkpoint.Saver
) -> None:
    """From where `this` is to the last step, or to a signal. Raises Stopped where that came between two steps.

    The order: dispatch step n, then write the metrics of step n - 1, so that the device never waits for the host. What
    follows a step (checkpoint, evaluation) sees the state after it, and the lines before it are written.
    """
    plan, config, stop = this.plan, this.config, this.stop
    num = (plan.ramp.cursor(this.num_steps) - plan.ramp.cursor(this.data.step)) // plan.microbatch
    rows_left = mixture.SkippingRows(this.stream, this.data.skipped)
    batches = loader.batches(rows_left, plan.mesh, this.data.cursor, num, plan.microbatch, config.data.num_workers)
    batches = this.goodput.waiting(batches, "data wait")
    numbers = range(this.data.step, this.num_steps)
    for step in traced(numbers, config.log.profile, this.desk.folder / "profile", this.say):
        rows = plan.ramp.rows(step)
        fault_points.reach("step")
        if step == numbers.start:
            batches = together(batches)

        def watch(done: int, step: int = step, rows: int = rows) -> bool:
            log.inside(step, done * plan.microbatch, rows)
            fault_points.reach("microbatch")
            return this.is_asked_to_stop()

        with peers.pace(rows):
            with jax.transfer_guard("disallow"):  # the host neither feeds nor reads the device unasked while it works
                outcome = one_step(this.state, rows // plan.microbatch, batches, watch)
            if outcome is None:
                return
            this.state = outcome[0]
            this.data = DataState(step + 1, this.data.cursor + rows, this.data.skipped)
            assert this.data.cursor == plan.ramp.cursor(this.data.step), this.data
            stop.done = step + 1
            log.done(step + 1, rows, outcome[1])
        saver.poll()
        peers.stepped(step + 1)
        if this.is_asked_to_stop() or log.spike:
            return
        if step + 1 < this.num_steps:
            with log.paused():
                between_steps(this, log, evaluation, saver)
        if log.spike or agree(log.hopeless, "hopeless"):
            return


def between_steps(this: Run, log: StepLog, evaluation: Evaluation | None, saver: checkpoint.Saver) -> None:
    """What is due after a step but the last, on all processes alike: a checkpoint, then what looks at the model."""
    number, unit = parse_length(this.config.checkpoint.every)
    in_time = lambda: agree(time.monotonic() - saver.saved_at >= 60 * number, "time to save")
    saves = in_time() if unit == "min" else this.is_due(this.config.checkpoint.every, this.data.step)
    if saves or is_evaluation_due(this) or is_half_way(this):
        log.flush()
        log.agree_on_spike()
    if log.spike:
        return
    if saves:
        save(this, saver, log)
    look(this, evaluation, log.writer)


def is_evaluation_due(this: Run) -> bool:
    return this.is_due(this.config.evaluate.every, this.data.step)


def is_half_way(this: Run) -> bool:
    """Where a sample is shown."""
    return this.data.step == this.num_steps // 2


def look(this: Run, evaluation: Evaluation | None, writer: metrics.Writer | metrics.NullWriter) -> None:
    """The evaluation that is due after a step, and half-way a sample."""
    if evaluation and is_evaluation_due(this):
        writer.scalars(this.data.step, evaluate_now(this, evaluation, this.config.evaluate.num_rows, "eval"))
    if is_half_way(this):
        show_sample(this, writer)


def save(this: Run, saver: checkpoint.Saver, log: StepLog) -> None:
    """Every step is read by now. While updates are skipped no older step is removed: it may be the last good one."""
    log.writer.flush()
    with this.goodput("checkpoint"):
        this.desk.send()
        watched = log.watch.kept() if log.watch and this.config.train.on_spike != "off" else {}
        saver.save(this.state, this.data, watched, retain=not log.skipping)


def finish(this: Run, evaluation: Evaluation | None, writer: metrics.Writer | metrics.NullWriter) -> None:
    """The last sample, the curve, the last evaluation (`eval` as those before, `final` on all rows), the compressors.

    The line that has `final/loss` is the last that a run writes: without it the run is not over.
    """
    fault_points.reach("end")
    show_sample(this, writer)
    lines = metrics.read(this.desk.folder)
    this.say(terminal.curve(metrics.series(lines, "train/loss"), "training loss, nats per token"))
    if evaluation is None:
        return
    num_rows = this.config.evaluate.num_rows
    limited = 0 < num_rows < max(held.num_rows for held in evaluation[1].values())
    if limited and not is_evaluated(this):
        writer.scalars(this.data.step, evaluate_now(this, evaluation, num_rows, "eval"))
    values = evaluate_now(this, evaluation, 0, *["eval"] * (not limited), "final")
    if this.config.evaluate.metrics:
        values |= answer_now(this)
    writer.scalars(this.data.step, values)
    if "final/bits_per_byte" in values and not this.config.train.task:
        this.say(compare_with_compressors(this.mixed, values["final/bits_per_byte"]))
