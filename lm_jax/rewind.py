"""From a spike of the loss (`spikes.py`) back to a saved step before it, and on without the rows around it."""

import jax

from lm_jax import checkpoint, manifest, spikes, step_folders
from lm_jax.batch_ramp import DataState
from lm_jax.data import mixed_rows
from lm_jax.distributed import agree, is_main_process
from lm_jax.open_run import Run
from lm_jax.step_log import StepLog
from lm_jax.stop import NEVER


def go_back(run: Run, step_log: StepLog, saver: checkpoint.Saver) -> str:
    """Goes back to a step before `step_log.checks.spike`. Returns why not, where that was done often enough.

    The workdir alone records it, and `step_folders.go_back` does so before anything goes on: a run that is killed meanwhile
    goes back once more, or has gone back already.
    """
    saver.wait()
    good, log = good_step(run, step_log.checks.spike), run.log
    if good == NEVER:
        log(f"no saved step is {spikes.MARGIN} steps before it, with the same batches since: the run goes on")
        return ""
    found = DataState.of_lists(
        agree(step_folders.read_data_state(run.workdir, good) if is_main_process() else None, "data state")
    )
    row_at = mixed_rows.SkippingRows(run.stream, found.skipped).row_at
    if spikes.times_gone_back(found, row_at) >= spikes.MOST:
        return f"the loss jumps again, after rows were left out {spikes.MOST} times from step {good:,} on"
    data = spikes.without_rows_around(step_log.checks.spike, found, run.plan.ramp, row_at)
    (first, last), *_ = set(data.skipped) - set(found.skipped)
    if is_main_process():
        step_folders.go_back(run.workdir, data)
    agree(good, "went back")  # all wait until that is done
    jax.tree.map(lambda x: x.delete(), run.state)  # there may be no room for two
    run.state, run.data = checkpoint.restore(run.workdir, good, run.plan.program)[0], data._replace(seconds=run.seconds)
    run.stop.done = run.stop.saved = good
    run.ended = ""
    step_log.checks.watch = None
    log(f"went back to step {good:,}: from there on rows {first:,} to {last - 1:,} are left out")
    return ""


def good_step(run: Run, spike: int) -> int:
    """The newest saved step that is whole and MARGIN steps before a spike, NEVER where there is none.

    One from which other batches were taken than now would need another schedule, so another program.
    """
    folder = step_folders.steps_folder(run.workdir)
    is_good = lambda step: (
        step <= spike - spikes.MARGIN
        and not manifest.invalid_reason(folder / str(step))
        and step_folders.read_data_state(run.workdir, step).cursor == run.plan.ramp.cursor(step)
    )
    return next(filter(is_good, step_folders.newest_first(folder)), NEVER)
