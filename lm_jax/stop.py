"""What SIGINT and SIGTERM do: they end the process at once where nothing is lost, else ask it to save and leave. And SIGUSR1.

A thread takes them, because a handler in Python has to wait until C++ (a compiler, the training of a tokenizer) returns
to the main thread. Nothing heavy is imported here: `lm_jax/__init__.py` listens before anything else is imported.
"""

import contextlib
import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)
LOOK = signal.SIGUSR1  # asks a run to save, to show a sample and to profile, and to go on
TAKEN = (*SIGNALS, LOOK)
EXIT_FAULT, EXIT_PREEMPTED = 70, 75
NEVER = -1  # in the place of a step: there is none
WORKERS = ("multiprocessing", "multiprocess")  # what starts Grain's workers, and datatrove's
LAST = b"\0"  # in the place of a signal's number


Listen = Callable[[], contextlib.AbstractContextManager["StopSignal"]]  # `StopSignal`, or what stands in for it
listening: list["StopSignal"] = []  # the last one takes what comes; a command of ours has its first from its start on


class Alone:
    """The interface of `peers.Line`, for a process without others: it tells nobody."""

    def ask(self, number: int) -> bool:
        """Whether another process answers a signal."""
        return False

    def end(self, code: int, words: str) -> None:
        """Called before this process ends alone: the others hear why, and end with it."""

    def part(self, code: int) -> None:
        """Called before this process ends as all do."""


ALONE = Alone()
others: Alone = ALONE  # or the line to the other processes, while they are joined
farewells: list[Callable[[int], None]] = []  # called with the exit code before a signal ends the process at once


class Stopped(Exception):  # noqa: N818  (it is no error)
    """The process was asked to stop, in the middle of something that can be done again."""


class StopSignal:
    """`with StopSignal() as stop`: signals end the process, or set `requested` where a step is done that is not saved yet.

    SIGINT is taken also where it was ignored when the process started, as a shell starts what stands before an `&`: who
    sends it means it. A second signal ends the process at once, whatever is lost.
    """

    def __init__(self) -> None:
        self.requested, self.taken = False, False  # to stop; and whether a signal came here
        self.look = False  # asked to save, to show a sample and to profile
        self.done = NEVER  # the newest step in memory
        self.saved = NEVER  # the newest step on disk, whole

    def __enter__(self) -> "StopSignal":
        read, self._write = os.pipe()  # what may be refused comes first: then signals do what they did before
        os.set_blocking(self._write, False)
        self._thread = threading.Thread(target=self._listen, args=(read,), daemon=True)
        self._thread.start()
        self._before = {number: signal.signal(number, lambda number, frame: None) for number in TAKEN}
        self._fd_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=self._forget)
        listening.append(self)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, TAKEN)  # what came while this process replaced itself comes now
        return self

    def __exit__(self, *error) -> None:
        listening.remove(self)
        for below in listening[-1:]:
            below.done, below.saved = self.done, self.saved
        signal.set_wakeup_fd(self._fd_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        write, self._write = self._write, NEVER
        os.close(write)

    def _forget(self) -> None:
        """In a forked child: signals have their default effect, and the parent's thread hears nothing of them."""
        if self._write != NEVER:
            signal.set_wakeup_fd(-1)
            for number in TAKEN:
                signal.signal(number, signal.SIG_DFL if number != LOOK else signal.SIG_IGN)

    def _listen(self, read: int) -> None:
        while taken := os.read(read, 1):  # the number of a signal; nothing once `__exit__` has closed the other end
            if taken[0] in TAKEN:
                self._take(taken[0])
            elif taken == LAST:
                signal.pthread_sigmask(signal.SIG_BLOCK, TAKEN)  # what comes now waits
                os.close(self._write)  # what came before is answered
        os.close(read)

    def hand_over(self) -> None:
        """Ends listening so that no signal is lost: those that are not answered here stay with the process."""
        signal.pthread_sigmask(signal.SIG_BLOCK, TAKEN)
        os.write(self._write, LAST)
        self._thread.join()

    def _take(self, number: int) -> None:
        if number == LOOK:
            if not others.ask(number):
                self.wish(number)
            return
        if self.taken:
            leave(number, self.saved)
        self.taken = True
        if others.ask(number):
            tell("stopping: process 0 is told; once more to leave at once, and all with it")
        else:
            self.wish(number)

    def wish(self, number: int) -> None:
        """A signal that came here, or to another process of this run: leaves where nothing is lost, else stops soon.

        LOOK is noted, and has no effect on a command that trains nothing.
        """
        if number == LOOK:
            self.look = True
        if self.requested or number == LOOK:
            return
        if self.done <= max(self.saved, 0):
            leave(number, self.saved)
        self.requested = True
        tell("stopping: this pass is finished and the run is saved; once more to leave at once")


def leave(number: int, saved: int = NEVER) -> NoReturn:
    """Ends the process with 128 + the signal, or with 75 where a run is saved; threads and workers end with it."""
    goes_on = f"; saved at step {saved:,}, the same command goes on from there" * (saved > NEVER)
    code = 128 + number if saved == NEVER else EXIT_PREEMPTED
    for say in farewells:
        say(code)
    others.end(code, f"{signal.Signals(number).name}{goes_on}")
    tell(f"lm_jax: stopped{goes_on}")
    end_process(code)


def end_process(code: int) -> NoReturn:
    """Ends this process and its workers now, whatever its threads do; a worker alone would complain of its queue."""
    for name in WORKERS:
        workers = sys.modules[name].active_children() if name in sys.modules else []
        for worker in workers:
            worker.kill()
    os._exit(code)


def work_is_done() -> None:
    """From here on a signal changes nothing: while the interpreter ends it would replace the exit code."""
    for number in TAKEN if listening else ():
        signal.signal(number, signal.SIG_IGN)


def tell(line: str) -> None:
    """On stderr, below the line of progress that may stand open on a terminal."""
    with contextlib.suppress(OSError):  # nobody listens: it is done all the same
        os.write(2, ("\n" * os.isatty(2) + line + "\n").encode())


@contextlib.contextmanager
def children_deaf_to_ctrl_c() -> Iterator[None]:
    """Processes that start meanwhile never see Ctrl-C, which a terminal sends to all: the parent decides."""
    for name in WORKERS:  # whose first worker starts a process that cleans up, and unblocks signals when it does
        if name in sys.modules:
            sys.warnoptions.append("ignore:resource_tracker")  # that it cleans up after workers is no news
            importlib.import_module(f"{name}.resource_tracker").ensure_running()
            sys.warnoptions.pop()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # inherited; here other threads still take it
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def replace_process(program: str, arguments: list[str]) -> NoReturn:
    """`os.execv`; a signal meanwhile waits until the new program listens."""
    for one in listening:
        one.hand_over()
    os.execv(program, arguments)


def is_command() -> bool:
    """Whether this process is one of our commands (`python -m lm_jax.x`, or a script of `tools`), and no worker."""
    tools = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "tools")
    script = (sys.argv or [""])[0]
    if script == "-m":  # while Python looks the module up
        return any(word.startswith("lm_jax.") for word in sys.orig_argv)
    return script in sys.orig_argv and os.path.dirname(os.path.abspath(script)) == tools
