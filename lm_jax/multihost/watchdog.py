"""The watchdog of a run of several processes: a step that takes far longer than the last ones is stuck, and says where.

A collective that waits for a process which does something else never returns, and no exception is raised.
"""

import contextlib
import faulthandler
import os
import statistics
import time
from collections import deque
from collections.abc import Iterator


class StepWatchdog:
    """`with watchdog(rows)` stands around a step of so many rows; another thread asks `late` now and then.

    Once a step takes SHORTEST seconds, and TIMES what the last ones took for as many rows, the stacks of all threads
    are written to the file descriptors `logs`; after as long again it is given up. The first FEWEST steps may take any
    time: they compile.
    """

    SHORTEST, TIMES, FEWEST = 60.0, 10, 3

    def __init__(self, logs: list[int]) -> None:
        self.logs = logs
        self._last: deque[float] = deque(maxlen=20)  # seconds a row
        self._since, self._limit, self._told = 0.0, 0.0, False

    @contextlib.contextmanager
    def __call__(self, rows: int) -> Iterator[None]:
        """The time of a step of `rows` rows."""
        enough = len(self._last) >= self.FEWEST
        limit = max(self.SHORTEST, self.TIMES * statistics.median(self._last) * rows) if enough else 0.0
        self._since, self._told, self._limit = time.monotonic(), False, limit
        yield
        self._last.append((time.monotonic() - self._since) / rows)
        self._limit = 0.0

    def late(self) -> str:
        """Why the step is given up, "" while it is not."""
        since, limit = self._since, self._limit
        seconds = time.monotonic() - since
        if not limit or seconds < limit:
            return ""
        if not self._told:
            self._told = True
            line = f"\na step takes {seconds:,.0f} s, far longer than the last ones; where every thread is:\n"
            for descriptor in self.logs:
                os.write(descriptor, line.encode())
                faulthandler.dump_traceback(descriptor)
        return f"has been in one step for {seconds:,.0f} s: stuck" if seconds > 2 * limit else ""
