"""From a spike of the loss (`spikes.py`) back to a saved step before it, and on without the rows around it."""

import jax

from lm_jax import checkpoint, manifest, spikes
from lm_jax.batch_ramp import DataState
from lm_jax.data import mixture
from lm_jax.distributed import agree, is_main_process
from lm_jax.run import Run
from lm_jax.step_log import StepLog
from lm_jax.stop import NEVER


def go_back(this: Run, log: StepLog, saver: checkpoint.Saver) -> str:
    """Goes back behind `log.spike`. Returns why not, where that was done often enough.

    Nothing but the workdir says that it was done, and `checkpoint.go_back` says it before anything goes on: a run that
    is killed goes back once more, or has gone back.
    """
    saver.wait()
    good, say = good_step(this, log.spike), this.say
    if good == NEVER:
        say(f"no saved step is {spikes.MARGIN} steps before it, with the same batches since: the run goes on")
        return ""
    found = DataState.of_lists(
        agree(checkpoint.read_data_state(this.workdir, good) if is_main_process() else None, "data state")
    )
    row_at = mixture.SkippingRows(this.stream, found.skipped).row_at
    if spikes.times_gone_back(found, row_at) >= spikes.MOST:
        return f"the loss jumps again, after rows were left out {spikes.MOST} times from step {good:,} on"
    data = spikes.without_rows_around(log.spike, found, this.plan.ramp, row_at)
    (first, last), *_ = set(data.skipped) - set(found.skipped)
    if is_main_process():
        checkpoint.go_back(this.workdir, data)
    agree(good, "went back")  # all wait until that is done
    jax.tree.map(lambda x: x.delete(), this.state)  # there may be no room for two
    this.state, this.data = checkpoint.restore(this.workdir, good, this.plan.program)[0], data
    this.stop.done = this.stop.saved = good
    log.watch = None
    say(f"went back to step {good:,}: from there on rows {first:,} to {last - 1:,} are left out")
    return ""


def good_step(this: Run, spike: int) -> int:
    """The newest saved step that is whole and MARGIN steps before a spike, NEVER where there is none.

    One from which other batches were taken than now would need another schedule, so another program.
    """
    folder = checkpoint.steps_folder(this.workdir)
    is_good = lambda step: (
        step <= spike - spikes.MARGIN
        and not manifest.invalid_reason(folder / str(step))
        and checkpoint.read_data_state(this.workdir, step).cursor == this.plan.ramp.cursor(step)
    )
    return next(filter(is_good, checkpoint.newest_first(folder)), NEVER)
