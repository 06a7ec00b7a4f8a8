"""How a worker process of the loader ends: never later than the process that started it."""

import os
import signal
import threading
import time

SOON = 10.0  # seconds after SIGTERM that a worker is over


def leave_soon(*_) -> None:
    """What SIGTERM does to a worker."""
    timer = threading.Timer(SOON, os._exit, (1,))
    timer.daemon = True  # a worker that has nothing more to do does not wait for it
    timer.start()


def end_with_parent(index: int, count: int) -> None:
    """In a worker: leaves within a second of the process that started it, however that ended.

    Ctrl-C is for the parent to answer. SIGTERM goes to all processes of a job, and the rows that are on their way are needed
    until the run is saved.
    """
    parent = os.getppid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, leave_soon)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
