"""What is due between two steps: a save, an evaluation, a sample; and what an evaluation leads to.

All processes do the same: what a clock or a file says of it is agreed on.
"""

import contextlib
import time

from lm_jax import best, checkpoint, metrics, step_folders, update_histograms
from lm_jax.closing import why_over
from lm_jax.distributed import agree, is_main_process
from lm_jax.knob import parse_length
from lm_jax.open_run import Run
from lm_jax.samples import Evaluation, ask_benchmarks, evaluate_now, show_sample
from lm_jax.step_log import StepLog


def do_what_is_due(run: Run, step_log: StepLog, evaluation: Evaluation | None, saver: checkpoint.Saver) -> None:
    """What is due after a step other than the last: a checkpoint, an evaluation or a sample, then the best is saved."""
    update_histograms.look(run, step_log.writer)
    number, unit = parse_length(run.config.checkpoint.every)
    in_time = lambda: agree(time.monotonic() - saver.saved_at >= 60 * number, "time to save")
    saves = in_time() if unit == "min" else run.is_due(run.config.checkpoint.every, run.data.step)
    asked = run.is_asked_to_look()
    if saves or asked or is_evaluation_due(run) or is_half_way(run):
        step_log.flush()
        step_log.checks.agree_on_spike()
    if step_log.checks.spike:
        return
    if saves or asked:
        save(run, saver, step_log)
    if asked:
        run.log(f"asked by SIGUSR1: step {run.data.step:,} is saved, the next steps are traced")
        run.trace_from = run.data.step + 1
        show_sample(run, step_log.writer)
    if run.clock and not run.clock.has_time_to_look():
        return
    with run.clock.looking() if run.clock else contextlib.nullcontext():
        look(run, evaluation, step_log.writer)
    if not evaluation or not is_evaluation_due(run):
        return
    if is_best(run):
        save(run, saver, step_log)
    if run.config.evaluate.patience:
        why = why_over(run.mirror, run.plan, run.data) if is_main_process() else ""
        run.ended = agree(why, "is over")


def is_evaluation_due(run: Run) -> bool:
    """Whether an evaluation is due after the step at hand."""
    return run.is_due(run.config.evaluate.every, run.data.step)


def are_tasks_due(run: Run) -> bool:
    """Whether this evaluation, the n-th of the run, is one that asks the tasks of lm-eval too."""
    tasks_every, number = run.config.evaluate.tasks_every, run.times_due(run.config.evaluate.every, run.data.step)
    return bool(tasks_every) and number % tasks_every == 0


def is_half_way(run: Run) -> bool:
    """Whether half of the steps are done, where a sample is shown."""
    return run.data.step == run.num_steps // 2


def look(run: Run, evaluation: Evaluation | None, writer: metrics.Writer | metrics.NullWriter) -> None:
    """The evaluation that is due after a step, and half-way a sample."""
    if evaluation and is_evaluation_due(run):
        values = evaluate_now(run, evaluation, run.config.evaluate.num_rows, "eval")
        writer.scalars(run.data.step, values | (ask_benchmarks(run) if are_tasks_due(run) else {}))
    if is_half_way(run):
        show_sample(run, writer)


def is_best(run: Run) -> bool:
    """Whether the step at hand, which is evaluated, is better than all that are saved, where the best is kept."""
    return bool(run.config.checkpoint.keep_best) and agree(run.data.step in steps_to_keep(run), "is the best")


def steps_to_keep(run: Run) -> set[int]:
    """Of the saved steps and that at hand the best one, where one is kept; on the main process."""
    saved = step_folders.complete_steps(step_folders.steps_folder(run.workdir)) if is_main_process() else []
    return best.steps_to_keep(run.mirror.folder, run.config, {*saved, run.data.step}) if is_main_process() else set()


def save(run: Run, saver: checkpoint.Saver, step_log: StepLog) -> None:
    """Saves the step at hand, whose metrics are read; while updates are skipped no older step is removed."""
    step_log.writer.flush()
    with run.goodput("checkpoint"):
        saver.wait()
        if run.plan.seconds:
            run.data = run.data._replace(seconds=agree(run.seconds, "seconds"))
        run.mirror.send()
        watched = step_log.checks.watch.kept() if step_log.checks.watch and run.config.train.on_spike != "off" else {}
        saver.save(run.state, run.data, watched, None if step_log.checks.skipping else steps_to_keep(run))
