"""Training: a run is opened, then comes the loop over its steps, and what happens at the end.

`run_plan.py` decides what a run will be, `start.py` opens it, `between_steps.py` has what is due between two steps, `closing.py`
the end. Before anything that leads to a collective all processes agree.
"""

import contextlib
import itertools
from collections.abc import Iterator

import jax

from lm_jax import checkpoint, cli, closing, fault_points, spikes, start, step_folders, terminal
from lm_jax.between_steps import do_what_is_due, look, save
from lm_jax.config import Config
from lm_jax.data import loader, mixed_rows
from lm_jax.distributed import agree, everyone, is_main_process
from lm_jax.experiment import as_given, run_name
from lm_jax.goodput import traced
from lm_jax.inherited import told
from lm_jax.multihost import peers
from lm_jax.open_run import Run
from lm_jax.rewind import go_back
from lm_jax.samples import Evaluation, is_evaluated, make_evaluation, show_sample
from lm_jax.step_checks import MOST_IN_A_ROW
from lm_jax.step_log import StepLog
from lm_jax.stop import EXIT_PREEMPTED, Listen, Stopped, StopSignal
from lm_jax.summary import Summary
from lm_jax.time_budget import TimeBudget
from lm_jax.train_step import CompiledStep, compile_step
from lm_jax.workdir_lock import workdir_lock


def run(
    config: Config,
    experiment: str,
    path: str,
    origins: dict,
    dry_run: bool = False,
    listen: Listen = StopSignal,
    summary: Summary | None = None,
) -> int:
    """Trains to the end, from the newest step in the workdir. Returns the exit code. Raises UserError before it writes there.

    `experiment` is the value of `--config` ("": no file), `path` the workdir ("": runs/<experiment>[-<variant>]). A `dry_run`
    ends once it is known what the run will be. `listen` gives the context in which signals ask the run to stop; `summary` is
    told what comes out.
    """
    summary = summary or Summary()
    opening = start.look(config, experiment, path, dry_run)
    summary.opening = opening
    workdir, plan, log = opening.workdir, opening.plan, opening.log
    header = terminal.header(plan, run_name(experiment), opening.mixed, opening.device, opening.peak_flops)
    log(header + told(config, origins))
    if dry_run:
        return 0
    opening.check_room()
    with workdir_lock(workdir, log), contextlib.closing(log), jax.set_mesh(plan.mesh), listen() as stop:
        run = summary.run = start.begin(opening, origins, stop)
        return train(run, as_given(experiment, config, origins), summary) if run else 0


def train(run: Run, given: str, summary: Summary) -> int:
    """Trains from where the run is; `given` is the command that does it. Returns the exit code.

    The last step is saved before it is evaluated. A resumed run first does the evaluation that it was stopped before.
    """
    log = run.log
    with run.goodput("compile"):
        one_step = None if run.ended else compiled(run)
    log(run.goodput.start_up())
    with checkpoint.Saver(run.workdir, run.config, run.facts, run.stop) as saver, run.writing:
        evaluation = make_evaluation(run)
        step_log, trouble = stretch(run, one_step, evaluation, saver)
        while step_log.checks.spike and not trouble:
            trouble = go_back(run, step_log, saver)
            if trouble or run.is_asked_to_stop():
                break
            step_log, trouble = stretch(run, one_step, evaluation, saver, step_log.checks.watch)
        saver.close()
        summary.trouble = trouble
        finished = bool(run.ended) and not trouble and not run.is_asked_to_stop()
        if finished:
            closing.finish(run, evaluation, step_log.writer)
    if not trouble:
        log(run.goodput.table())
    if finished:
        log(closing.next_commands(run, given))
    elif not trouble:
        log(f"saved at step {run.data.step:,} of {run.plan.length}; the same command goes on from there")
    else:
        closing.give_up(run, trouble)
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
    run.clock = TimeBudget(plan.seconds, run.data.seconds) if plan.seconds else None
    numbers = range(run.data.step, run.num_steps)
    for step in traced(numbers, lambda: run.trace_from, run.mirror.folder / "profile", run.log):
        rows = plan.ramp.rows(step)
        fault_points.reach("step")
        if step == numbers.start:
            batches = together(batches)

        def watch(done: int, step: int = step, rows: int = rows) -> bool:
            step_log.inside(step, done * plan.microbatch, rows)
            fault_points.reach("microbatch")
            return run.is_asked_to_stop()

        planned = run.clock.before_step(rows) if run.clock else None
        if run.clock and not planned:
            run.ended = "time"
            step_log.end()
            return
        with peers.pace(rows):
            with jax.transfer_guard("disallow"):  # the host neither feeds nor reads the device unasked while it works
                outcome = one_step(run.state, rows // plan.microbatch, batches, watch, planned.ticks if planned else 0)
            if outcome is None:
                return
            run.state = outcome[0]
            run.data = run.data._replace(step=step + 1, cursor=run.data.cursor + rows)
            assert run.data.cursor == plan.ramp.cursor(run.data.step), run.data
            run.ended = "steps" if run.data.step == run.num_steps else "time" if planned and planned.is_last else ""
            if run.clock:
                run.clock.dispatched_step(rows, outcome[1])
            stop.done = step + 1
            step_log.done(step + 1, rows, outcome[1])
        saver.poll()
        peers.stepped(step + 1)
        if run.is_asked_to_stop() or step_log.checks.spike:
            return
        if not run.ended:
            with step_log.paused():
                do_what_is_due(run, step_log, evaluation, saver)
        if step_log.checks.spike or run.ended or agree(step_log.checks.hopeless, "hopeless"):
            return
