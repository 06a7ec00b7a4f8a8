"""What is done every few seconds while something else runs: a word of how long it takes, a lease renewed."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def every(seconds: float, call: Callable[[], None]) -> Iterator[None]:
    """Calls from a thread, for the first time after `seconds`, until the block ends. After it no call runs any more."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(seconds):
            call()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextlib.contextmanager
def elapsed(what: str) -> Iterator[None]:
    """Says on stderr, while something runs, for how long: each second on a terminal, elsewhere every ten."""
    start, live = time.monotonic(), sys.stderr.isatty()

    def tell() -> None:
        text = f"{what}: {time.monotonic() - start:.0f} s"
        print(f"\r{text}\x1b[K" if live else text, end="" if live else "\n", file=sys.stderr, flush=True)

    try:
        with every(1 if live else 10, tell):
            yield
    finally:
        print("\r\x1b[K" * live, end="", file=sys.stderr, flush=True)
