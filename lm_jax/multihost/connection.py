"""The connection from process 0 of a run to each other process: how it is made, and messages as lines of JSON.

Process 0 listens at a port, and writes it with a secret word into JAX's coordination service; the others read both
there and call. Who does not know the word is sent away.
"""

import json
import secrets
import socket
import time
from typing import Any

from lm_jax.errors import PeerError
from lm_jax.multihost.roll_call import listen

SILENCE = 3.5  # seconds without a sign of life after which a process counts as dead
ARRIVAL = 60.0  # seconds in which all processes are to have reached process 0, once JAX has joined them
KEY = "lm_jax/peers"  # of the coordination service: [port of process 0, word]


class Connection:
    """This process' end of the connection to another one, `process` on `host`. `rest`: bytes that were read already."""

    def __init__(self, to: socket.socket, process: int, host: str, rest: bytes = b""):
        self.socket, self.process, self.host, self.rest = to, process, host, rest
        self.heard, self.step = time.monotonic(), 0
        self.is_open, self.takes, self.parted = True, True, False
        to.settimeout(SILENCE)  # what is not taken for so long is as if it were not heard
        to.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, **message) -> None:
        """Sends a JSON object; `takes` is False once nothing is taken. `messages` notices a closed connection."""
        try:
            self.socket.sendall(json.dumps(message).encode() + b"\n")
        except TimeoutError:
            self.takes = False
        except OSError:
            pass

    def messages(self) -> list[dict[str, Any]]:
        """The JSON objects that have come since the last call; sets `is_open` False where the other side has closed."""
        try:
            found = self.socket.recv(2**16)
        except OSError:
            found = b""
        self.is_open, self.heard = bool(found), time.monotonic()
        *lines, self.rest = (self.rest + found).split(b"\n")
        return [json.loads(line) for line in lines]


def gather_connections(hosts: list[str], near: int, client) -> dict[int, Connection]:
    """Process 0: {process: connection} to all others, at the port `near` if that is free.

    Raises PeerError where one of them does not come.
    """
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
    """A socket at the port `near`, else at any that is free."""
    try:
        return listen(near)
    except (OSError, OverflowError):
        return listen(0)


def connect(address: str, process: int, host: str, client) -> Connection:
    """Another process: the connection to process 0, which is on `host`. Raises PeerError where it is not reached."""
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
    """The message of a PeerError."""
    mend = "let the processes of a run connect to each other's ports"
    return f"process {who} cannot reach process 0 at {host}:{port}\n{mend}"
