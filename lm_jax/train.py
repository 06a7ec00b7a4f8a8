"""Training: a run is opened, then comes the loop: its steps, what is due between them, and what happens at the end.

`run_plan.py` decides what a run will be, `start.py` opens it, `samples.py` evaluates and shows its model, `closing.py` has what
it says at its end. Before anything that leads to a collective all processes agree.
"""

import contextlib
import itertools
import time
from collections.abc import Iterator

import jax

from lm_jax import checkpoint, cli, fault_points, metrics, metrics_file, spikes, start, step_folders, terminal
from lm_jax.batch_ramp import DataState
from lm_jax.closing import already_done, compare_with_compressors, give_up, next_commands
from lm_jax.config import Config
from lm_jax.data import loader, mixed_rows
from lm_jax.distributed import agree, everyone, is_main_process
from lm_jax.experiment import as_given, run_name
from lm_jax.goodput import traced
from lm_jax.inherited import told
from lm_jax.knob import parse_length
from lm_jax.multihost import peers
from lm_jax.open_run import Run
from lm_jax.rewind import go_back
from lm_jax.samples import Evaluation, answer_now, evaluate_now, is_evaluated, make_evaluation, show_sample
from lm_jax.step_checks import MOST_IN_A_ROW
from lm_jax.step_log import StepLog
from lm_jax.stop import EXIT_PREEMPTED, Listen, Stopped, StopSignal
from lm_jax.train_step import CompiledStep, compile_step
from lm_jax.workdir_lock import workdir_lock


def run(
    config: Config, experiment: str, path: str, origins: dict, dry_run: bool = False, listen: Listen = StopSignal
) -> int:
    """Trains to the end, from the newest step in the workdir. Returns the exit code. Raises UserError before it writes there.

    `experiment` is the value of `--config` ("": no file), `path` the workdir ("": runs/<experiment>[-<variant>]). A `dry_run`
    ends once it is known what the run will be. `listen` gives the context in which signals ask the run to stop.
    """
    opening = start.look(config, experiment, path, dry_run)
    workdir, plan, log = opening.workdir, opening.plan, opening.log
    header = terminal.header(plan, run_name(experiment), opening.mixed, opening.device, opening.peak_flops)
    log(header + told(config, origins))
    if dry_run:
        return 0
    opening.check_room()
    with workdir_lock(workdir, log), contextlib.closing(log), jax.set_mesh(plan.mesh), listen() as stop:
        run = start.begin(opening, origins, stop)
        return train(run, as_given(experiment, config, origins)) if run else already_done(opening.mirror, log)


def train(run: Run, given: str) -> int:
    """Trains from where the run is; `given` is the command that does it. Returns the exit code.

    The last step is saved before it is evaluated. A resumed run first does the evaluation that it was stopped before.
    """
    log = run.log
    with run.goodput("compile"):
        one_step = compiled(run) if run.data.step < run.num_steps else None
    log(run.goodput.start_up())
    with checkpoint.Saver(run.workdir, run.config, run.facts, run.stop) as saver:
        evaluation = make_evaluation(run)
        step_log, trouble = stretch(run, one_step, evaluation, saver)
        while step_log.checks.spike and not trouble:
            trouble = go_back(run, step_log, saver)
            if trouble or run.is_asked_to_stop():
                break
            step_log.writer.close()
            step_log, trouble = stretch(run, one_step, evaluation, saver, step_log.checks.watch)
        saver.close()
    finished = run.data.step == run.num_steps and not trouble and not run.is_asked_to_stop()
    if finished:
        finish(run, evaluation, step_log.writer)
    step_log.writer.close()
    if not trouble:
        log(run.goodput.table())
    if finished:
        log(next_commands(run, given))
    elif not trouble:
        log(f"saved at step {run.data.step:,} of {run.num_steps:,}; the same command goes on from there")
    else:
        give_up(run, trouble)
    run.mirror.send()
    return cli.EXIT_FAULT if trouble else 0 if finished else EXIT_PREEMPTED


def compiled(run: Run) -> CompiledStep:
    """The compiled step of a run."""
    run.log.progress("compiling the step")
    fault_points.reach("compile")
    one_microbatch = all(rows == run.plan.microbatch for _, _, rows in run.plan.ramp.stages)
    return compile_step(run.plan.program, run.plan.mesh, one_microbatch)


def stretch(
    run: Run,
    one_step: CompiledStep | None,
    evaluation: Evaluation | None,
    saver: checkpoint.Saver,
    watch: spikes.Watch | None = None,
) -> tuple[StepLog, str]:
    """Trains from where the run is to its end, a signal, a spike or trouble -> (the log of the steps, the trouble or "").

    The last step is saved, unless there is trouble or a spike (`step_log.checks.spike`).
    """
    writer = run.open_writer()
    kept = step_folders.saved_beside(run.workdir, run.data.step) if is_main_process() else {}  # whose spikes count
    step_log = StepLog(run, writer, watch or spikes.Watch(kept))
    try:
        try:
            if run.data.step == 0:
                writer.hyper_parameters()
                show_sample(run, writer)
            elif one_step:
                look(run, None if is_evaluated(run) else evaluation, writer)
            if one_step:
                steps(run, one_step, step_log, evaluation, saver)
        except Stopped:
            pass  # between two steps
        step_log.flush()
        step_log.checks.agree_on_spike()
        if agree(step_log.checks.hopeless, "hopeless"):
            return step_log, f"{MOST_IN_A_ROW} updates in a row were not finite (inf or NaN); none of them was applied"
        if not step_log.checks.spike:
            save(run, saver, step_log)
            saver.wait()
    except checkpoint.NotFinite as error:
        return step_log, str(error)
    return step_log, ""


def together(batches: Iterator[dict]) -> Iterator[dict]:
    """`batches`, once all processes have their first one: on CPUs the first collective fails after 30 s of waiting."""
    first = next(batches)
    everyone(True, "first batch")
    return itertools.chain([first], batches)


def steps(
    run: Run, one_step: CompiledStep, step_log: StepLog, evaluation: Evaluation | None, saver: checkpoint.Saver
) -> None:
    """Steps from where the run is to its last one, or to a signal. Raises Stopped where that came between two steps.

    The order: dispatch step n, then write the metrics of step n - 1, so that the device never waits for the host. What
    follows a step (checkpoint, evaluation) has the state after it, and all lines up to it are written by then.
    """
    plan, config, stop = run.plan, run.config, run.stop
    num = (plan.ramp.cursor(run.num_steps) - plan.ramp.cursor(run.data.step)) // plan.microbatch
    rows_left = mixed_rows.SkippingRows(run.stream, run.data.skipped)
    batches = loader.batches(rows_left, plan.mesh, run.data.cursor, num, plan.microbatch, config.data.num_workers)
    batches = run.goodput.waiting(batches, "data wait")
    numbers = range(run.data.step, run.num_steps)
    for step in traced(numbers, config.log.profile, run.mirror.folder / "profile", run.log):
        rows = plan.ramp.rows(step)
        fault_points.reach("step")
        if step == numbers.start:
            batches = together(batches)

        def watch(done: int, step: int = step, rows: int = rows) -> bool:
            step_log.inside(step, done * plan.microbatch, rows)
            fault_points.reach("microbatch")
            return run.is_asked_to_stop()

        with peers.pace(rows):
            with jax.transfer_guard("disallow"):  # the host neither feeds nor reads the device unasked while it works
                outcome = one_step(run.state, rows // plan.microbatch, batches, watch)
            if outcome is None:
                return
            run.state = outcome[0]
            run.data = DataState(step + 1, run.data.cursor + rows, run.data.skipped)
            assert run.data.cursor == plan.ramp.cursor(run.data.step), run.data
            stop.done = step + 1
            step_log.done(step + 1, rows, outcome[1])
        saver.poll()
        peers.stepped(step + 1)
        if run.is_asked_to_stop() or step_log.checks.spike:
            return
        if step + 1 < run.num_steps:
            with step_log.paused():
                between_steps(run, step_log, evaluation, saver)
        if step_log.checks.spike or agree(step_log.checks.hopeless, "hopeless"):
            return


def between_steps(run: Run, step_log: StepLog, evaluation: Evaluation | None, saver: checkpoint.Saver) -> None:
    """What is due after a step other than the last, on all processes alike: a checkpoint, then an evaluation or a sample."""
    number, unit = parse_length(run.config.checkpoint.every)
    in_time = lambda: agree(time.monotonic() - saver.saved_at >= 60 * number, "time to save")
    saves = in_time() if unit == "min" else run.is_due(run.config.checkpoint.every, run.data.step)
    if saves or is_evaluation_due(run) or is_half_way(run):
        step_log.flush()
        step_log.checks.agree_on_spike()
    if step_log.checks.spike:
        return
    if saves:
        save(run, saver, step_log)
    look(run, evaluation, step_log.writer)


def is_evaluation_due(run: Run) -> bool:
    """Whether an evaluation is due after the step at hand."""
    return run.is_due(run.config.evaluate.every, run.data.step)


def is_half_way(run: Run) -> bool:
    """Whether half of the steps are done, where a sample is shown."""
    return run.data.step == run.num_steps // 2


def look(run: Run, evaluation: Evaluation | None, writer: metrics.Writer | metrics.NullWriter) -> None:
    """The evaluation that is due after a step, and half-way a sample."""
    if evaluation and is_evaluation_due(run):
        writer.scalars(run.data.step, evaluate_now(run, evaluation, run.config.evaluate.num_rows, "eval"))
    if is_half_way(run):
        show_sample(run, writer)


def save(run: Run, saver: checkpoint.Saver, step_log: StepLog) -> None:
    """Saves the step at hand, whose metrics are read; while updates are skipped no older step is removed."""
    step_log.writer.flush()
    with run.goodput("checkpoint"):
        run.mirror.send()
        watched = step_log.checks.watch.kept() if step_log.checks.watch and run.config.train.on_spike != "off" else {}
        saver.save(run.state, run.data, watched, retain=not step_log.checks.skipping)


def finish(run: Run, evaluation: Evaluation | None, writer: metrics.Writer | metrics.NullWriter) -> None:
    """The last sample, the curve, the last evaluation (`eval` as those before, `final` on all rows), the compressors.

    The line with `final/loss` is the last one that a run writes: without it the run is not over.
    """
    fault_points.reach("end")
    show_sample(run, writer)
    lines = metrics_file.read(run.mirror.folder)
    run.log(terminal.curve(metrics_file.series(lines, "train/loss"), "training loss, nats per token"))
    if evaluation is None:
        return
    num_rows = run.config.evaluate.num_rows
    limited = 0 < num_rows < max(held.num_rows for held in evaluation[1].values())
    if limited and not is_evaluated(run):
        writer.scalars(run.data.step, evaluate_now(run, evaluation, num_rows, "eval"))
    values = evaluate_now(run, evaluation, 0, *["eval"] * (not limited), "final")
    if run.config.evaluate.metrics:
        values |= answer_now(run)
    writer.scalars(run.data.step, values)
    if "final/bits_per_byte" in values and not run.config.train.task:
        run.log(compare_with_compressors(run.mixed, values["final/bits_per_byte"]))
