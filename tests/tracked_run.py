"""The lines of a run as its loop writes them, for trackers: `python tests/tracked_run.py FOLDER FIRST LAST [kill]`."""

import os
import sys
import time

from etils import epath

from lm_jax import metrics

FLAT = {"model.kind": "transformer", "optimizer.learning_rate": 1e-3}


def train(folder, first: int, last: int, closes: bool, log=print, names=("recorder",)) -> None:
    """The lines of the steps after `first` up to `last`; without `closes` as a kill leaves them."""
    writer = metrics.Writer(epath.Path(folder), first, log, names, "mine", FLAT)
    for step in range(first + 1, last + 1):
        writer.scalars(step, {"train/loss": 5 / step, "train/grad_norm": float("nan")})
        if step % 2 == 0:
            writer.scalars(step, {"eval/loss": 4 / step})
            writer.text(step, "sample", f"of step {step}")
    if closes:
        writer.close()
    else:
        writer._file.close(), writer._sums.close()


if __name__ == "__main__":
    folder, first, last, *kill = sys.argv[1:]
    train(folder, int(first), int(last), not kill, names=("wandb", "trackio", "mlflow"))
    if kill:
        time.sleep(3)  # trackio writes from a thread
        os._exit(9)
