"""Spikes of the loss: which step is one, and which rows a run leaves out when it goes back behind it.

A spike is a step whose loss and whose gradient norm are both far above what they were in the steps before. The cure is that of
PaLM (arXiv:2204.02311, section 5.1): go on from a saved step before it, without the rows around it.
"""

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from lm_jax.batch_ramp import DataState, Ramp

WINDOW = 128  # steps that the next one is held against
FEWEST = 32  # of them; before there are so many nothing is a spike
SIGMAS = 5.0  # robust standard deviations above the median
SMALLEST_SIGMA = 0.01  # as a share of the median: a loss that stands still has no spikes of nothing
MARGIN = 64  # steps between a spike and the saved step before it from which the run goes on
AROUND = 32  # steps before a spike, and after it, whose rows are left out; at most MARGIN
MOST = 3  # times that a run goes back to one saved step


def limit(values) -> float:
    """Of numbers that one is far above: their median and SIGMAS robust standard deviations (1.4826 median deviations)."""
    median = np.median(values)
    sigma = 1.4826 * np.median(np.abs(np.asarray(values) - median))
    return float(median + SIGMAS * max(sigma, SMALLEST_SIGMA * abs(median)))


class Watch:
    """Judges one step after another by those before it. Its state is saved with every step: `kept`."""

    def __init__(self, kept: dict[str, Any]):
        self.recent: deque[tuple[float, float]] = deque(map(tuple, kept.get("recent", ())), maxlen=WINDOW)
        self.inside = kept.get("inside", False)  # of a spike: the last step was one

    def kept(self) -> dict[str, Any]:
        """What must be known to go on judging after a restart, for the manifest of a step."""
        return {"recent": list(self.recent), "inside": self.inside}

    def __call__(self, loss: float, norm: float) -> str:
        """What is wrong with a step, "" where nothing is, or where it is one more of the same spike.

        A step whose update was not made, as its gradient is not finite, is none.
        """
        if not np.isfinite(loss) or not np.isfinite(norm):
            return ""
        highest = tuple(map(limit, zip(*self.recent, strict=True))) if len(self.recent) >= FEWEST else (np.inf, np.inf)
        is_spike = loss > highest[0] and norm > highest[1]
        begins, self.inside = is_spike and not self.inside, is_spike
        self.recent.append((loss, norm))
        return f"loss {loss:.4f}, grad norm {norm:.4g} where {highest[0]:.4f} and {highest[1]:.4g} are far" * begins


def times_gone_back(good: DataState, row_at: Callable[[int], int]) -> int:
    """How often a run has gone on from a saved step without rows that came after it."""
    last_row = row_at(good.cursor - 1) if good.cursor else -1
    return sum(first > last_row for first, _ in good.skipped)


def without_rows_around(spike: int, good: DataState, ramp: Ramp, row_at: Callable[[int], int]) -> DataState:
    """The data state of a saved step, with the rows of the steps around the spike left out from there on.

    They are one more range: it starts after the last one that was left out before the spike.
    """
    start = max(ramp.cursor(spike - 1 - AROUND), good.cursor)
    first, last = row_at(start), row_at(ramp.cursor(spike + AROUND) - 1) + 1
    first = max([first, *(end for _, end in good.skipped if end <= row_at(ramp.cursor(spike - 1)))])
    apart = [(a, b) for a, b in good.skipped if b <= first or a >= last]
    return good._replace(skipped=tuple(sorted([*apart, (first, last)])))
