"""The roll is called before processes join: who is here, who waits for whom, and, after the limit, who never came.

Process 0 listens where JAX's coordinator will; every other calls there, says who it is, and is told how the roll
stands. Once it is complete the port is left to JAX. Messages are lines of JSON; whoever else calls is not listened to.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from typing import Any

from lm_jax.errors import PeerError, UserError
from lm_jax.multihost.cluster import Cluster
from lm_jax.stop import tell

LIMIT = "LM_JAX_JOIN_SECONDS"  # in the environment: how long processes wait for one another
SAY_SECONDS = 10  # between lines that say who is waited for
FORMAT = 1


def limit() -> float:
    """How many seconds processes wait for one another. Raises UserError where the environment says no number."""
    text = os.environ.get(LIMIT, "300")
    if not text.isdecimal() or int(text) == 0:
        raise UserError(f"{LIMIT}={text!r} is no number of seconds; give one, such as {LIMIT}=300")
    return float(text)


def call(found: Cluster) -> list[str]:
    """The hosts of all processes, by number, once all are here. Raises PeerError; UserError where two contradict."""
    wait = Wait(found, limit())
    return lead(found, wait) if found.process == 0 else answer(found, wait)


class Wait:
    """Counts how long this process has waited, and logs now and then for whom."""

    def __init__(self, found: Cluster, seconds: float):
        self.found, self.seconds = found, seconds
        self.start = self.said = self.heard = time.monotonic()

    def __call__(self, what: str) -> None:
        """Raises PeerError where it was too long. `what` this process waits for."""
        now = time.monotonic()
        if now - self.heard > self.seconds:
            raise PeerError(self.verdict(what))
        if now - self.said > SAY_SECONDS:
            self.said = now
            me = f"{self.found.name(self.found.process)} of {self.found.num_processes}"
            tell(f"{me} waits for {what} ({now - self.start:.0f} s of {self.seconds:.0f})")

    def verdict(self, what: str) -> str:
        """The message of the PeerError: what never came, and how to wait longer or without it."""
        return (
            f"{what}: never came within {self.seconds:.0f} s ({self.found.where}; process 0 at {self.found.address})\n"
            f"see what its host says, and start all {self.found.num_processes} again; {LIMIT}=600 waits longer, "
            "JAX_NUM_PROCESSES=1 is one process without the others"
        )


def lead(found: Cluster, wait: Wait) -> list[str]:
    """Process 0: waits until every process has called. Returns all hosts by process. Raises PeerError, UserError."""
    hosts: dict[int, str] = {0: socket.gethostname()}
    connections: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as stack, listening(found, wait) as server:
        while missing := [k for k in range(found.num_processes) if k not in hosts]:
            what = ", ".join(map(found.name, missing[:8])) + f" and {len(missing) - 8} more" * (len(missing) > 8)
            for line in arrivals(server, stack):
                process, error = line["process"], contradiction(line, hosts, found)
                if error:
                    send(connections.values(), {"error": error})
                    send([line["connection"]], {"error": error})
                    raise UserError(error)
                hosts[process], connections[process] = line["host"], line["connection"]
            for process in [k for k, connection in connections.items() if is_gone(connection)]:
                del hosts[process], connections[process]
            send(connections.values(), {"waits": what})
            try:
                wait(what)
            except PeerError as error:
                send(connections.values(), {"never": str(error)})
                raise
        roll = [hosts[k] for k in range(found.num_processes)]
        send(connections.values(), {"roll": roll})
        for connection in connections.values():  # who was called closes first, so that the port is free
            with contextlib.suppress(OSError):
                connection.settimeout(2)
                connection.recv(1)
    return roll


def listen(port: int) -> socket.socket:
    """A socket at a port of this host, 0 = any that is free; for IPv4 and IPv6. Raises OSError where it is taken."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(("", port), family=family, backlog=4096, dualstack_ipv6=both)


def free_port() -> int:
    """A port of this host that nobody has now."""
    with listen(0) as found:
        return found.getsockname()[1]


@contextlib.contextmanager
def listening(found: Cluster, wait: Wait) -> Iterator[socket.socket]:
    """The socket of the coordinator's port, on all addresses of this host, once nobody else has it."""
    port = int(found.address.rpartition(":")[2])
    while True:
        try:
            server = listen(port)
            break
        except OSError:
            try:
                wait(f"port {port} of this host, which another run has")
            except PeerError:
                raise UserError(
                    f"port {port} of this host is taken, by another run that leads here or one that does not end; "
                    "end it, or give all processes another: JAX_COORDINATOR_PORT=8477"
                ) from None
            time.sleep(0.5)
    server.settimeout(0.5)
    with server:
        yield server


def arrivals(server: socket.socket, stack: contextlib.ExitStack) -> list[dict[str, Any]]:
    """Who has called since: [{process, of, host, connection}], at most one."""
    try:
        connection = stack.enter_context(server.accept()[0])
    except TimeoutError:
        return []
    connection.settimeout(2)
    try:
        line = json.loads(connection.makefile("rb").readline(1000))
        process, of, host = int(line["process"]), int(line["of"]), str(line["host"])
        known = line["lm_jax"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):  # a stranger, or a process that is gone
        connection.close()
        return []
    return [{"process": process, "of": of, "host": host, "connection": connection}] if known else []


def contradiction(line: dict[str, Any], hosts: dict[int, str], found: Cluster) -> str:
    """What contradicts in the words of a process, "" where nothing does."""
    process, of, host = line["process"], line["of"], line["host"]
    if of != found.num_processes:
        here = f"process 0 on {hosts[0]} is one of {found.num_processes}"
        return f"process {process} on {host} is one of {of}, {here}: start all with the same number"
    if process in hosts:
        return f"{hosts[process]} and {host} both say that they are process {process} of {of}: give each its own number"
    return ""


def is_gone(connection: socket.socket) -> bool:
    """Whether the other side has closed it; a process that waits says nothing."""
    connection.setblocking(False)
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def send(connections, message: dict[str, Any]) -> None:
    """Sends a message to each connection; one that is gone is passed over."""
    for connection in connections:
        with contextlib.suppress(OSError):  # it is gone: the next round of the roll sees it
            connection.sendall(json.dumps(message).encode() + b"\n")


def answer(found: Cluster, wait: Wait) -> list[str]:
    """Every other process: calls process 0 until it is told the whole roll."""
    host, _, port = found.address.rpartition(":")
    mine = {"lm_jax": FORMAT, "process": found.process, "of": found.num_processes, "host": socket.gethostname()}
    while True:
        reason = "which answers, but not to this run: it may be in an earlier one"
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=2) as connection:
                connection.settimeout(5)
                send([connection], mine)
                for told in messages(connection):
                    if "roll" in told:
                        return told["roll"]
                    if "error" in told:
                        raise UserError(told["error"])
                    if "never" in told:
                        raise PeerError(told["never"])
                    wait.heard = time.monotonic()
                    wait(told["waits"])
        except socket.gaierror:
            reason = "whose name is not known (yet)"
        except ConnectionRefusedError:
            reason = "where nobody listens (yet)"
        except OSError:
            reason = "which does not answer"
        wait(f"{found.name(0)} at {found.address}, {reason}")
        time.sleep(0.5)


def messages(connection: socket.socket) -> Iterator[dict[str, Any]]:
    """The messages of process 0, until something else is received."""
    for line in connection.makefile("rb"):
        try:
            told = json.loads(line)
        except ValueError:
            return
        if not isinstance(told, dict) or not told.keys() & {"roll", "error", "never", "waits"}:
            return
        yield told
