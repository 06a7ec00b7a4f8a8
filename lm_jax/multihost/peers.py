"""The processes of a run hold a line to each other: one decides for all, and who ends takes the others along.

Process 0 listens, every other one keeps a connection to it. On it go, as lines of JSON, what process 0 decides (`agree`), what
the others say (`everyone`), the wish to stop, the end of a process with its reason, and twice a second a sign of life. A
connection that closes without an end, or is silent for SILENCE seconds once its process has done a step, is a death: all leave
with 70.

No device has a part in it: it works before there is a mesh, while another program compiles, and where a collective is stuck.
"""

import contextlib
import ctypes
import faulthandler
import hashlib
import json
import os
import queue
import secrets
import selectors
import signal
import socket
import statistics
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from etils import epath

from lm_jax import stop
from lm_jax.errors import PeerError, UserError
from lm_jax.faults import EXIT_MACHINE
from lm_jax.multihost.roll_call import listen
from lm_jax.stop import EXIT_FAULT

BEAT = 0.5  # seconds between two signs of life
SILENCE = 3.5  # seconds without one after which a process counts as dead
ARRIVAL = 60.0  # seconds in which all processes are to have reached process 0, once JAX has joined them
BLAME = 1.0  # seconds that an exception waits for news of a death which may be what it comes from
GOODBYE = 0.5  # seconds that who ends waits for the others to hear it
KEY = "lm_jax/peers"  # of the coordination service: where process 0 listens, and the word that opens


class End(NamedTuple):
    """How a process ended: what the others leave with, and say."""

    process: int
    host: str
    code: int
    words: str

    def told(self) -> str:
        return f"lm_jax: process {self.process} (host {self.host}) {self.words}"


class Connection:
    """The end of the line to one other process."""

    def __init__(self, to: socket.socket, process: int, host: str, rest: bytes = b""):
        self.socket, self.process, self.host, self.rest = to, process, host, rest
        self.heard, self.step = time.monotonic(), 0
        self.is_open, self.takes, self.parted = True, True, False
        to.settimeout(SILENCE)  # what is not taken for so long is as if it were not heard
        to.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, **message) -> None:
        """A connection that is closed is found by who reads, one that takes nothing any more by `takes`."""
        try:
            self.socket.sendall(json.dumps(message).encode() + b"\n")
        except TimeoutError:
            self.takes = False
        except OSError:
            pass

    def messages(self) -> list[dict[str, Any]]:
        """What has come since the last time; `is_open` is False once nothing more will."""
        try:
            found = self.socket.recv(2**16)
        except OSError:
            found = b""
        self.is_open, self.heard = bool(found), time.monotonic()
        *lines, self.rest = (self.rest + found).split(b"\n")
        return [json.loads(line) for line in lines]


class Line(stop.Alone):
    """What a process holds in its hand: `agree`, `everyone`, `ask`, `end`, `part`. A thread of its own reads, and beats.

    `on_end` is told how another process ended, `on_wish` (process 0) the number of a signal that another one got.
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
        self.pace = Pace()
        self._step, self._over, self._ending = 0, False, False  # the step, and whether all, or one, came to the end
        self._lock = threading.Lock()
        self._decided: queue.SimpleQueue = queue.SimpleQueue()
        self._said: dict[int, queue.SimpleQueue] = {other: queue.SimpleQueue() for other in connections}
        self._thread = threading.Thread(target=self._live, daemon=True)
        self._thread.start()

    @property
    def leads(self) -> bool:
        return self.process == 0

    def send(self, **message) -> None:
        """To all that this process is connected with."""
        with self._lock:
            for connection in self.connections.values():
                connection.send(**message)

    def agree(self, value, about: str = ""):
        """Process 0's value, which is plain JSON, on every process; process 0 waits for nobody."""
        if self.leads:
            self.send(decided=value, about=about)
            return value
        found, of = self._decided.get()
        if of != about:
            raise RuntimeError(f"process {self.process} is at {about!r} where process 0 is at {of!r}")
        return found

    def everyone(self, value, about: str = "") -> list:
        """[the value of process 0, of process 1, ...] on every process; all wait for all."""
        if self.leads:
            return self.agree([value, *(self._said[other].get() for other in sorted(self._said))], about)
        self.send(said=value)
        return self.agree(None, about)

    def ask(self, number: int) -> bool:
        """Whether it is process 0 that answers a signal: it is told."""
        if not self.leads:
            self.send(wish=number)
        return not self.leads

    def end(self, code: int, words: str) -> None:
        """This process ends, and the others with it: returns once they have heard it, or do not answer."""
        if code in (EXIT_FAULT, EXIT_MACHINE):  # which may come from a death that is told in a moment
            time.sleep(BLAME)
        if not self._over:
            self._tell(End(self.process, self.host, code, f"stopped: {words}"))

    def part(self, code: int) -> None:
        """The end that all have come to: returns once all are there. Raises RuntimeError where they end differently.

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
        """From its first step on a process that is silent counts as dead: what it compiles is compiled."""
        is_first, self._step = not self._step, step
        if is_first:
            self.send(beat=step)

    def _tell(self, end: End) -> bool:
        """Tells the others, once; waits until they are gone. Returns whether this was the first end."""
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
                if words := self.pace.late():
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


class Pace:
    """How long a step may take: what is far beyond the last ones is stuck. `with pace(rows)` stands around a step.

    Once a step takes SHORTEST seconds and TIMES what the last ones took for as many rows, the stacks of all threads are written
    to `logs`; after as long again it is given up.
    """

    SHORTEST, TIMES, FEWEST = 60.0, 10, 3

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=20)  # seconds a row
        self._since, self._limit, self._told = 0.0, 0.0, False

    @contextlib.contextmanager
    def __call__(self, rows: int) -> Iterator[None]:
        enough = len(self._last) >= self.FEWEST  # the first steps wait for whatever is first
        limit = max(self.SHORTEST, self.TIMES * statistics.median(self._last) * rows) if enough else 0.0
        self._since, self._told, self._limit = time.monotonic(), False, limit
        yield
        self._last.append((time.monotonic() - self._since) / rows)
        self._limit = 0.0

    def late(self) -> str:
        """What is to be said of a step that is given up, "" as long as there is none."""
        since, limit = self._since, self._limit
        seconds = time.monotonic() - since
        if not limit or seconds < limit:
            return ""
        if not self._told:
            self._told = True
            line = f"\na step takes {seconds:,.0f} s, far longer than the last ones; where every thread is:\n"
            for descriptor in logs:
                os.write(descriptor, line.encode())
                faulthandler.dump_traceback(descriptor)
        return f"has been in one step for {seconds:,.0f} s: stuck" if seconds > 2 * limit else ""


line: Line | None = None  # of this process, None where it has no others
logs: list[int] = [2]  # descriptors of what the last words are written to


def agree(value, about: str = ""):
    """The leading process' value (plain JSON: a tuple comes as a list) on every process. Every decision that leads to a
    collective goes through here: a clock, a signal, a file or an exception is of one process alone.

    `about` names the decision: processes that are at different ones are told, and do not wait for each other.
    """
    return line.agree(value, about) if line else value


def everyone(value, about: str = "") -> list:
    """What every process says, in their order, on every process."""
    return line.everyone(value, about) if line else [value]


def stepped(step: int) -> None:
    """A step is done: from now on the others miss this process soon."""
    if line:
        line.stepped(step)


def pace(rows: int) -> contextlib.AbstractContextManager:
    """Around a step of so many rows: with others, one that is stuck ends."""
    return line.pace(rows) if line else contextlib.nullcontext()


def log_to(path: epath.Path) -> None:
    """The log of the run, which has the last words too."""
    if line:
        logs.append(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666))


def hold_up_aborts() -> None:
    """Where process 0 is gone JAX's client ends this process by `abort`, in a race with the thread that knows who is gone and
    leaves with 70. `sleep`, called with the number of the signal, 6, gives that thread the seconds; it is one of the few
    functions that the handler of a signal may call, and an abort of another cause goes on after it."""
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


def join(process: int, hosts: list[str], address: str, client) -> None:
    """Connects the processes that JAX has joined, on these hosts: `client` is that of its coordination service, at `address`.

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


def gather_connections(hosts: list[str], near: int, client) -> dict[int, Connection]:
    """Process 0: waits for the others at a port that it tells them, `near` where that is free. A stranger is sent away."""
    word = secrets.token_hex(16)
    found: dict[int, Connection] = {}
    with listener(near) as listening:
        client.key_value_set(KEY, json.dumps([listening.getsockname()[1], word]))
        until = time.monotonic() + ARRIVAL
        while missing := [str(k) for k in range(1, len(hosts)) if k not in found]:
            listening.settimeout(max(0.01, until - time.monotonic()))
            try:
                to, _ = listening.accept()
            except TimeoutError:
                raise PeerError(unreached(", ".join(missing), hosts[0], listening.getsockname()[1])) from None
            to.settimeout(SILENCE)
            try:
                hello, _, rest = to.recv(2**12).partition(b"\n")
                said, process = json.loads(hello)
            except (OSError, ValueError, TypeError):
                said, process, rest = "", 0, b""
            if said == word:
                found[process] = Connection(to, process, hosts[process], rest)
                found[process].send(welcome=True)
            else:
                to.close()
    return found


def listener(near: int) -> socket.socket:
    """At the port `near`, else at any that is free."""
    try:
        return listen(near)
    except (OSError, OverflowError):
        return listen(0)


def connect(address: str, process: int, host: str, client) -> Connection:
    """Another process: to process 0, which is on `host`."""
    port, word = json.loads(client.blocking_key_value_get(KEY, int(1000 * ARRIVAL)))
    try:
        to = socket.create_connection((address, port), timeout=ARRIVAL)
        to.sendall(json.dumps([word, process]).encode() + b"\n")
        to.settimeout(ARRIVAL)
        welcome, _, rest = to.recv(2**12).partition(b"\n")
        json.loads(welcome)
        return Connection(to, 0, host, rest)
    except (OSError, ValueError):
        raise PeerError(unreached(str(process), address, port)) from None


def unreached(who: str, host: str, port: int) -> str:
    return f"process {who} cannot reach process 0 at {host}:{port}\nlet the processes of a run connect to each other's ports"


def leave(end: End) -> None:
    """In the thread of the line: a process ended, and this one does, whether or not its words can be written."""
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
    mine = (
        [f"{names[0]} {shown.get(names[0], 'none')} there, {theirs.get(names[0], 'none')} on process 0"]
        if names
        else []
    )
    found = line.everyone([line.host, *mine], "what differs")
    told = [f"process {k} (host {host}): {differs}" for k, (host, *rest) in enumerate(found) for differs in rest]
    if told:
        more = f"\n(+{len(told) - 3} more)" * (len(told) > 3)
        raise UserError("\n".join(told[:3]) + more + "\nall processes of a run need the same")


def own_code() -> dict[str, str]:
    """{file: hash} of lm_jax as it is installed here."""
    folder, found = os.path.dirname(os.path.dirname(os.path.abspath(__file__))), {}
    for place, _, names in sorted(os.walk(folder)):
        for name in sorted(name for name in names if name.endswith(".py")):
            path = os.path.join(place, name)
            with open(path, "rb") as file:
                found[f"lm_jax/{os.path.relpath(path, folder)}"] = hashlib.sha256(file.read()).hexdigest()[:12]
    return found
