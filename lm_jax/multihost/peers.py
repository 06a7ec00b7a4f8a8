"""The processes of a run hold a line to each other: one decides for all, and who ends takes the others along.

Every process has a connection to process 0 (`connection.py`). Over it go what process 0 decides (`agree`), what the
others say (`everyone`), the wish to stop, the end of a process with its reason, and twice a second a sign of life. A
connection that closes without an end, or is silent for SILENCE seconds after a first step, is a death: all leave
with 70.

No device has a part in it: it works before there is a mesh, while a process compiles, where a collective is stuck.
"""

import contextlib
import ctypes
import glob
import json
import os
import queue
import selectors
import signal
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from etils import epath

from lm_jax import stop
from lm_jax.errors import UserError
from lm_jax.faults import EXIT_MACHINE
from lm_jax.files import file_hash
from lm_jax.multihost.connection import SILENCE, Connection, connect, gather_connections
from lm_jax.multihost.watchdog import StepWatchdog
from lm_jax.stop import EXIT_FAULT

BEAT = 0.5  # seconds between two signs of life
BLAME = 1.0  # seconds that an exception waits for news of a death which may be what it comes from
GOODBYE = 0.5  # seconds that who ends waits for the others to hear it


class End(NamedTuple):
    """How a process ended: the exit code and the words for the others."""

    process: int
    host: str
    code: int
    words: str

    def told(self) -> str:
        """The line in which the other processes tell of it."""
        return f"lm_jax: process {self.process} (host {self.host}) {self.words}"


class Line(stop.Alone):
    """The line of one process to the others: `agree`, `everyone`, `ask`, `end`, `part`. A thread reads and beats.

    `on_end` is called with how another process ended, `on_wish` (process 0) with the number of another one's signal.
    """

    def __init__(
        self,
        process: int,
        host: str,
        connections: dict[int, Connection],
        on_end: Callable[[End], None],
        on_wish: Callable[[int], None] = lambda number: None,
    ):
        self.process, self.host, self.connections = process, host, connections
        self.on_end, self.on_wish = on_end, on_wish
        self.watchdog = StepWatchdog(logs)
        self._step, self._over, self._ending = 0, False, False  # the step, and whether all, or one, came to the end
        self._lock = threading.Lock()
        self._decided: queue.SimpleQueue = queue.SimpleQueue()
        self._said: dict[int, queue.SimpleQueue] = {other: queue.SimpleQueue() for other in connections}
        self._thread = threading.Thread(target=self._live, daemon=True)
        self._thread.start()

    @property
    def is_main_process(self) -> bool:
        """Whether this is process 0."""
        return self.process == 0

    def send(self, **message) -> None:
        """Sends a message to all processes that this one is connected with."""
        with self._lock:
            for connection in self.connections.values():
                connection.send(**message)

    def agree(self, value, about: str = ""):
        """Process 0's value (plain JSON) on every process; process 0 waits for nobody.

        Raises RuntimeError where process 0 is at another decision.
        """
        if self.is_main_process:
            self.send(decided=value, about=about)
            return value
        found, of = self._decided.get()
        if of != about:
            raise RuntimeError(f"process {self.process} is at {about!r} where process 0 is at {of!r}")
        return found

    def everyone(self, value, about: str = "") -> list:
        """[the value of process 0, of process 1, ...] on every process; all wait for all."""
        if self.is_main_process:
            return self.agree([value, *(self._said[other].get() for other in sorted(self._said))], about)
        self.send(said=value)
        return self.agree(None, about)

    def ask(self, number: int) -> bool:
        """Passes a signal on to process 0. Returns whether that is another process than this one."""
        if not self.is_main_process:
            self.send(wish=number)
        return not self.is_main_process

    def end(self, code: int, words: str) -> None:
        """This process ends, and the others with it: returns once they have heard it, or do not answer."""
        if code in (EXIT_FAULT, EXIT_MACHINE):  # which may come from a death that is told in a moment
            time.sleep(BLAME)
        if not self._over:
            self._tell(End(self.process, self.host, code, f"stopped: {words}"))

    def part(self, code: int) -> None:
        """Ends together with all others: returns once all are here. Raises RuntimeError where their codes differ.

        Until JAX has let go of the others too a connection that closes is a death.
        """
        codes = self.everyone(code, "end")
        if len({*codes}) > 1:
            raise RuntimeError(f"the processes end differently: {codes}")
        jax.distributed.shutdown()
        stop.others = stop.ALONE
        self.send(parted=True)
        self._over = True
        self._thread.join()

    def stepped(self, step: int) -> None:
        """A step is done. From the first one on silence is a death: nothing long is compiled any more."""
        is_first, self._step = not self._step, step
        if is_first:
            self.send(beat=step)

    def _tell(self, end: End) -> bool:
        """Tells the others of an end, once, and waits until they are gone. Returns whether it was the first end."""
        with self._lock:
            if self._ending:
                return False
            self._ending = True
        self.send(end=end)
        until = time.monotonic() + GOODBYE
        while time.monotonic() < until and any(other.is_open for other in self.connections.values()):
            if threading.current_thread() is self._thread:
                self._read(0.05)
            else:
                time.sleep(0.01)
        return True

    def _live(self) -> None:
        try:
            self._selector = selectors.DefaultSelector()
            for connection in self.connections.values():
                self._selector.register(connection.socket, selectors.EVENT_READ, connection)
            beat, awake = 0.0, time.monotonic()
            while not self._over:
                now = time.monotonic()
                if now - awake > 4 * BEAT:  # this process itself was away: it cannot judge
                    for connection in self.connections.values():
                        connection.heard = now
                awake = now
                if now > beat + BEAT:
                    beat = now
                    self.send(beat=self._step)
                self._read(BEAT / 2)
                self._judge()
                if words := self.watchdog.late():
                    self._gone(End(self.process, self.host, EXIT_FAULT, words))
        except Exception:  # without this thread nobody would notice anything
            traceback.print_exc()
            self.on_end(End(self.process, self.host, EXIT_FAULT, "does not hear the others any more"))

    def _read(self, seconds: float) -> None:
        for key, _ in self._selector.select(seconds):
            connection = key.data
            if not connection.is_open:
                continue
            for message in connection.messages():
                self._take(connection, message)
            if not connection.is_open:
                self._selector.unregister(connection.socket)
                connection.socket.close()
                if not connection.parted:
                    self._gone(End(connection.process, connection.host, EXIT_FAULT, "is gone without a word"))

    def _take(self, connection: Connection, message: dict[str, Any]) -> None:
        if "beat" in message:
            connection.step = message["beat"]
        elif "decided" in message:
            self._decided.put((message["decided"], message["about"]))
        elif "said" in message:
            self._said[connection.process].put(message["said"])
        elif "wish" in message:
            self.on_wish(message["wish"])
        elif "parted" in message:
            connection.parted = True
        elif "end" in message:
            self._gone(End(*message["end"]))

    def _judge(self) -> None:
        now = time.monotonic()
        for connection in self.connections.values():
            silent = now - connection.heard
            if not connection.is_open or connection.parted:
                continue
            if not connection.takes or connection.step and silent > SILENCE:
                words = f"is silent for {silent:.1f} s: stopped, or lost"
                self._gone(End(connection.process, connection.host, EXIT_FAULT, words))

    def _gone(self, end: End) -> None:
        if self._tell(end):
            self.on_end(end)


line: Line | None = None  # of this process, None where it has no others
logs: list[int] = [2]  # descriptors of what the last words are written to


def agree(value, about: str = ""):
    """Process 0's value (plain JSON: a tuple comes as a list) on every process.

    Every decision before a collective goes through here, since a clock, a signal, a file or an exception is of one
    process alone. `about` names it: processes at different decisions end with an error, and do not wait for ever.
    """
    return line.agree(value, about) if line else value


def everyone(value, about: str = "") -> list:
    """[the value of process 0, of process 1, ...] on every process."""
    return line.everyone(value, about) if line else [value]


def stepped(step: int) -> None:
    """A step is done: from now on the others miss this process soon."""
    if line:
        line.stepped(step)


def pace(rows: int) -> contextlib.AbstractContextManager:
    """A context around a step of `rows` rows: with other processes, a step that is stuck ends them all."""
    return line.watchdog(rows) if line else contextlib.nullcontext()


def log_to(path: epath.Path) -> None:
    """Sets the log of the run, to which last words are written too."""
    if line:
        logs.append(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666))


def hold_up_aborts() -> None:
    """Makes SIGABRT wait six seconds before it ends the process.

    Where process 0 is gone JAX's client calls `abort`, in a race with the thread that knows who is gone and leaves with
    70. As the handler, `sleep` gets the number of the signal, 6, as its seconds; it is one of the few functions that a
    handler may call, and an abort of another cause goes on after it.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


def join(process: int, hosts: list[str], address: str, client) -> None:
    """Connects the processes that JAX has joined; `client` is that of its coordination service, at `address`.

    Raises PeerError where one cannot reach process 0.
    """
    global line
    host, _, port = address.rpartition(":")
    if process == 0:
        connections = gather_connections(hosts, int(port) + 1, client)
    else:
        connections = {0: connect(host.strip("[]"), process, hosts[0], client)}
    hold_up_aborts()
    line = Line(process, hosts[process], connections, leave, lambda number: stop.listening[-1].wish(number))
    stop.others = line


def leave(end: End) -> None:
    """Ends this process after another one did, whether or not its words can be written."""
    force = threading.Timer(GOODBYE, stop.end_process, (end.code,))
    force.daemon = True
    force.start()
    stop.tell(end.told())
    for descriptor in logs[1:]:
        with contextlib.suppress(OSError):  # what cannot be written is no reason to stay
            os.write(descriptor, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {end.told()}\n".encode())
    stop.end_process(end.code)


def compare(facts: dict[str, Any]) -> None:
    """Raises UserError on all processes where a fact of one is not as process 0 has it, with the first that differs."""
    if line is None:
        return
    shown = {name: json.dumps(value, sort_keys=True) for name, value in facts.items()}
    theirs = line.agree(shown, "facts")
    names = [name for name in {**theirs, **shown} if theirs.get(name) != shown.get(name)]
    mine = [f"{name} {shown.get(name, 'none')} there, {theirs.get(name, 'none')} on process 0" for name in names[:1]]
    found = line.everyone([line.host, *mine], "what differs")
    told = [f"process {k} (host {host}): {differs}" for k, (host, *rest) in enumerate(found) for differs in rest]
    if told:
        more = f"\n(+{len(told) - 3} more)" * (len(told) > 3)
        raise UserError("\n".join(told[:3]) + more + "\nall processes of a run need the same")


def own_code() -> dict[str, str]:
    """{file: hash} of lm_jax as it is installed here."""
    folder = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    paths = sorted(glob.glob("**/*.py", root_dir=folder, recursive=True))
    return {f"lm_jax/{path}": str(file_hash(os.path.join(folder, path))["sha256"])[:12] for path in paths}
