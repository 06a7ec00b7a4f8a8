"""Processes wait for one another in words: who for whom, and who never came."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from helpers import LIMIT, ROOT, free_port

from lm_jax.errors import PeerError, UserError
from lm_jax.multihost import roll_call
from lm_jax.multihost.cluster import Cluster


@pytest.fixture
def quick(monkeypatch):
    """A limit of a second, words at once. Returns the words."""
    said: list[str] = []
    monkeypatch.setenv(roll_call.LIMIT, "1")
    monkeypatch.setattr(roll_call, "SAY_SECONDS", 0.3)
    monkeypatch.setattr(roll_call, "tell", said.append)
    return said


def member(port: int, process: int, of: int = 3) -> Cluster:
    return Cluster("a test", f"127.0.0.1:{port}", of, process, tuple(f"host-{k}" for k in range(of)))


def called(members: list[Cluster], delays: dict[int, float] | None = None) -> list:
    """What `call` returns or raises for each member, all at once, each in a thread; `delays` in seconds by position."""
    found: list = [None] * len(members)

    def one(k: int) -> None:
        time.sleep((delays or {}).get(k, 0))
        try:
            found[k] = roll_call.call(members[k])
        except (PeerError, UserError) as error:
            found[k] = error

    threads = [threading.Thread(target=one, args=(k,)) for k in range(len(members))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    return found


ORDERS = {"at once": {}, "process 0 last": {0: 0.6}, "process 0 first": {1: 0.6, 2: 0.3}}


@pytest.fixture
def patient(quick, monkeypatch):
    """As `quick`, where nobody is missing and nothing has to be waited for."""
    monkeypatch.setenv(roll_call.LIMIT, str(LIMIT))
    return quick


@pytest.mark.parametrize("order", ORDERS)
def test_all_are_told_the_hosts_of_all(order, patient):
    port = free_port()
    found = called([member(port, k) for k in range(3)], ORDERS[order])
    assert found == [[socket.gethostname()] * 3] * 3
    with socket.create_server(("127.0.0.1", port)):  # left to JAX
        pass


def test_who_never_comes_is_named_on_all(quick, monkeypatch):
    monkeypatch.setenv(roll_call.LIMIT, "2")
    port = free_port()
    found = called([member(port, k) for k in (0, 2)])
    assert all(isinstance(error, PeerError) for error in found)
    assert all(
        f"process 1 (host-1): never came within 2 s (a test; process 0 at 127.0.0.1:{port})" in str(x) for x in found
    )
    assert any(line.startswith("process 0 (host-0) of 3 waits for process 1 (host-1) (") for line in quick)
    assert any(line.startswith("process 2 (host-2) of 3 waits for process 1 (host-1) (") for line in quick)


def test_the_first_that_never_comes_is_named_too(quick):
    (found,) = called([member(free_port(), 2)])
    assert (
        isinstance(found, PeerError)
        and "process 0 (host-0) at 127.0.0.1" in str(found)
        and "nobody listens" in str(found)
    )


def test_many_that_never_come_are_counted(quick):
    (found,) = called([member(free_port(), 0, of=20)])
    assert "process 8 (host-8) and 11 more: never came" in str(found)


NAMES = {"no such name": ("no-such-name.invalid:1", "name is not known"), "no port": ("127.0.0.1:1", "nobody listens")}


@pytest.mark.parametrize("case", NAMES)
def test_an_address_that_is_none_is_said(case, quick):
    address, words = NAMES[case]
    with pytest.raises(PeerError, match=words):
        roll_call.call(Cluster("a test", address, 2, 1))


def test_two_with_one_number_are_told_apart(patient):
    port = free_port()
    found = called([member(port, 0), member(port, 1), member(port, 1)], {2: 0.3})
    assert all(
        isinstance(error, UserError) and "both say that they are process 1 of 3" in str(error) for error in found
    )


def test_two_counts_of_processes_are_told_apart(patient):
    found = called([member(port := free_port(), 0, 3), member(port, 1, 4)])
    assert all(isinstance(error, UserError) and "one of 4, process 0 on" in str(error) for error in found)


STRANGERS = {
    "says nothing": b"",
    "no JSON": b"GET / HTTP/1.1\r\n\r\n",
    "a later run's coordinator is called": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "JSON of another kind": b"[1]\n",
    "no number": b'{"lm_jax": 1, "process": "x", "of": 3, "host": "h"}\n',
    "of another format": b'{"lm_jax": 99, "process": 1, "of": 3, "host": "h"}\n',
    "long": b"x" * 5000,
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_strangers_are_not_listened_to(stranger, patient):
    port = free_port()

    def disturb():
        for _ in range(40):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
                connection.sendall(STRANGERS[stranger])
                return
            time.sleep(0.05)

    thread = threading.Thread(target=disturb)
    thread.start()
    assert called([member(port, k) for k in range(3)], {1: 0.5}) == [[socket.gethostname()] * 3] * 3
    thread.join()


def test_one_that_called_and_went_is_waited_for_again(patient):
    """A process that is started again while the others still wait is the same process."""
    port = free_port()

    def come_and_go():
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(json.dumps({"lm_jax": 1, "process": 2, "of": 3, "host": "gone"}).encode() + b"\n")
                return connection.recv(1)
            time.sleep(0.05)

    thread = threading.Thread(target=come_and_go)
    thread.start()
    found = called([member(port, k) for k in range(3)], {1: 1.0, 2: 1.5})
    thread.join()
    assert found == [[socket.gethostname()] * 3] * 3


def test_a_port_that_another_run_has_is_a_mistake_said_after_the_limit(quick):
    with socket.create_server(("", port := free_port()), family=socket.AF_INET6, dualstack_ipv6=True):
        (found,) = called([member(port, 0)])
    assert isinstance(found, UserError) and f"port {port} of this host is taken" in str(found)
    assert any("which another run has" in line for line in quick)


@pytest.mark.parametrize("text", ["0", "-1", "soon", "1.5"])
def test_a_limit_that_is_none_is_a_mistake(text, monkeypatch):
    monkeypatch.setenv(roll_call.LIMIT, text)
    with pytest.raises(UserError, match=roll_call.LIMIT):
        roll_call.limit()


def without_peer(seconds: str, port: int) -> subprocess.Popen:
    """Process 0 of two, the other of which is never started."""
    environment = os.environ | {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0",
        "PYTHONPATH": str(ROOT), roll_call.LIMIT: seconds,
    }  # fmt: skip
    line = [sys.executable, "-m", "lm_jax.main", "--config", "experiments/quickstart.py:smoke", "--dry_run"]
    return subprocess.Popen(
        line, env=environment, text=True, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def test_a_command_whose_peers_never_come_leaves_with_70_in_plain_lines():
    process = without_peer("1", free_port())
    output = process.communicate(timeout=LIMIT)[0]
    assert process.returncode == 70 and "Traceback" not in output
    assert "lm_jax: process 1: never came within 1 s" in output and len(output.strip().split("\n")) <= 5


def test_a_command_that_waits_for_its_peers_can_be_stopped():
    process = without_peer(str(LIMIT), port := free_port())
    with socket.socket() as tried:
        while tried.connect_ex(("127.0.0.1", port)) != 0:
            assert process.poll() is None
            time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=LIMIT)[0]
    assert process.returncode == 143 and "Traceback" not in output
