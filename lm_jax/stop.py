"""What SIGINT and SIGTERM do: they end the process at once while nothing would be lost, else they ask it to save and leave.

A thread takes them: a handler in Python waits until C++ (a compiler, the training of a tokenizer) gives the main thread back.
Nothing heavy is imported here: `lm_jax/__init__.py` listens before anything else is imported.
"""

import os
import signal
import sys
import threading
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)
EXIT_PREEMPTED = 75
NEVER = -1  # in the place of a step: there is none


class Stopped(Exception):
    """The process was asked to stop, in the middle of what can be done again."""


class Stop:
    """`with Stop() as stop`: signals end the process, or set `requested` where a step is done that is not saved yet.

    SIGINT is taken also where it was ignored when the process started, as a shell starts what stands before an `&`: who sends
    it means it. A second signal ends the process at once, whatever is lost.
    """

    def __init__(self) -> None:
        self.requested = False
        self.done = NEVER  # the newest step in memory
        self.saved = NEVER  # the newest step on disk, whole

    def __enter__(self) -> "Stop":
        self._before = {number: signal.signal(number, lambda number, frame: None) for number in SIGNALS}
        read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._fd_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(read,), daemon=True).start()
        os.register_at_fork(after_in_child=self._forget)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # what came while this process replaced itself comes now
        return self

    def __exit__(self, *error) -> None:
        signal.set_wakeup_fd(self._fd_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        write, self._write = self._write, NEVER
        os.close(write)

    def _forget(self) -> None:
        """In a forked child: signals do what they do everywhere; not one of them is told to the parent's thread."""
        if self._write != NEVER:
            signal.set_wakeup_fd(-1)
            for number in SIGNALS:
                signal.signal(number, signal.SIG_DFL)

    def _listen(self, read: int) -> None:
        while taken := os.read(read, 1):  # the number of a signal; nothing once `__exit__` has closed the other end
            if taken[0] in SIGNALS:
                self._take(taken[0])
        os.close(read)

    def _take(self, number: int) -> None:
        if self.done <= max(self.saved, 0) or self.requested:
            leave(number, self.saved)
        self.requested = True
        tell("stopping: this pass is finished and the run is saved; once more to leave at once")

    def check(self) -> None:
        """Raises Stopped where the process was asked to stop."""
        if self.requested:
            raise Stopped


def leave(number: int, saved: int = NEVER) -> NoReturn:
    """Ends the process with 128 + the signal, or, where a run is saved, with 75. Its threads and workers end with it."""
    goes_on = f"; saved at step {saved:,}, the same command goes on from there" * (saved > NEVER)
    tell(f"lm_jax: stopped{goes_on}")
    os._exit(128 + number if saved == NEVER else EXIT_PREEMPTED)


def tell(line: str) -> None:
    """On stderr, below the line of progress that may stand open on a terminal."""
    os.write(2, ("\n" * os.isatty(2) + line + "\n").encode())


def replace_process(program: str, arguments: list[str]) -> NoReturn:
    """`os.execv`; a signal meanwhile waits until the new program listens."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    os.execv(program, arguments)


def is_command() -> bool:
    """Whether this process was started as one of our commands: `python -m lm_jax.x`, which is being looked up, or a tool."""
    tools = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "tools")
    looked_up = sys.argv[:1] == ["-m"] and any(word.startswith("lm_jax.") for word in sys.orig_argv)
    return looked_up or os.path.dirname(os.path.abspath(sys.argv[0] if sys.argv else "")) == tools
