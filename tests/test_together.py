"""The processes of a run decide as one and die as one: the line between them, and every decision that goes over it."""

import ast
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import pytest
from helpers import LIMIT, ROOT

from lm_jax import (
    between_steps,
    checkpoint,
    closing,
    distributed,
    experiment,
    metrics_file,
    open_run,
    rewind,
    run_folder,
    samples,
    start,
    step_folders,
    stop,
    train,
    workdir_lock,
)
from lm_jax.errors import PeerError, UserError
from lm_jax.multihost import connection, peers, watchdog

# Every decision that leads to a collective, as the line calls it: what it is taken from, which is of one process alone.
DECISIONS = {
    "facts": "config, code, versions and data of process 0 (of a model the step), for the others to compare theirs with",
    "what differs": "what each finds",
    "a word": "a random number",
    "the word is written": "a file of the workdir, and when it is there",
    "the word is found": "the workdir as each sees it",
    "config.json": "a file of the workdir: whether the run has begun, and with what",
    "data": "the newest step of the workdir, which may be finished meanwhile",
    "devices": "the memory and the kind of a local device",
    "a step": "which steps are there",
    "step N is whole": "the files of a step, of which each process reads its share",
    "room for a step": "the disk of each host",
    "data state": "the manifest of a step, which going back writes anew",
    "is over": "the metrics of the workdir",
    "is finished": "the metrics of the workdir",
    "is the best": "the metrics and the steps of the workdir",
    "is evaluated": "the metrics of the workdir",
    "is final": "the metrics of the workdir, at the end",
    "export": "a child of process 0, and the folder that it writes",
    "reference": "a file of the workdir",
    "is saved": "whether a manifest is there",
    "stop": "a signal: after a step, a microbatch, a batch of an evaluation, and at the end",
    "look": "a signal (SIGUSR1), after a step",
    "time to save": "a clock",
    "time": "a clock: how much of a run in minutes is left before a step",
    "time to look": "a clock, and how long evaluations took",
    "seconds": "a clock: what a saved step says of the time spent",
    "hopeless": "what was read of the device so far",
    "spike": "what was read of the device so far, and the history of the losses",
    "went back": "that process 0 has removed what came later",
    "first batch": "how long each takes to have it",
    "end": "the exit code",
}


def calls(tree: ast.AST, *names: str):
    """Calls of functions and methods that are called so."""
    named = lambda function: getattr(function, "id", "") or getattr(function, "attr", "")
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call) and named(node.func) in names]


def test_every_decision_is_in_the_table_and_no_signal_is_read_past_it():
    found, reads = set(), []
    for path in sorted((ROOT / "lm_jax").rglob("*.py")):
        tree = ast.parse(path.read_text())
        for call in calls(tree, "agree", "everyone", "first_answer"):
            about = call.args[1] if len(call.args) > 1 else None
            if isinstance(about, ast.JoinedStr):
                found.add(
                    "".join(
                        getattr(part, "value", "") if isinstance(part, ast.Constant) else "N" for part in about.values
                    )
                )
            elif isinstance(about, ast.Constant):
                found.add(about.value)
            else:  # what passes a name on
                passes_on = path.name == "peers.py" or ast.unparse(call) == "everyone(answer, about)"
                assert passes_on, f"{path.name} line {call.lineno}: a decision without a name"
        if (
            path.name not in ("stop.py", "peers.py", "from_python.py") and path.parent.name != "serve"
        ):  # whose handlers set it
            nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "requested"]
            reads += [(path.name, node.lineno) for node in nodes]
    assert found == {*DECISIONS}
    assert len(reads) == 1, f"whoever asks whether to stop asks `Run.is_asked_to_stop`, but for {reads}"


@pytest.fixture
def quick(monkeypatch):
    """Signs of life ten times as often; silence is a death sooner than in a run, and not so soon that threads which wait for
    a busy processor count as dead."""
    for name, seconds in (("BEAT", 0.05), ("SILENCE", 2.0), ("BLAME", 0.1), ("GOODBYE", 0.05)):
        monkeypatch.setattr(peers, name, seconds)
    yield
    for star in stars:
        for line in star.lines.values():
            line._over = True
    stars.clear()


stars: list["Star"] = []


def pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of one connection."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        there = socket.create_connection(listening.getsockname())
        return listening.accept()[0], there


class Star:
    """Several ends of a line in this process: `lines[k]` is that of process k, `ends[k]` what it was told of another's end.

    Those in `mute` hold a socket and say nothing.
    """

    def __init__(self, num: int, mute=()):
        pairs = {k: pair() for k in range(1, num)}
        leader = {k: connection.Connection(pairs[k][0], k, f"host{k}") for k in pairs}
        held = {0: leader} | {k: {0: connection.Connection(pairs[k][1], 0, "host0")} for k in pairs}
        self.sockets, self.ends, self.wishes = pairs, {k: [] for k in held}, []
        stars.append(self)
        self.lines = {
            k: peers.Line(k, f"host{k}", connections, self.ends[k].append, self.wishes.append)
            for k, connections in held.items()
            if k not in mute
        }

    def each(self, does) -> dict:
        """{process: what `does(line)` gave or raised}, all at once."""
        found: dict = {}

        def one(k: int, line: peers.Line) -> None:
            try:
                found[k] = does(line)
            except Exception as error:
                found[k] = error

        threads = [threading.Thread(target=one, args=each) for each in self.lines.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LIMIT)
        return found

    def wait(self, num: int) -> dict[int, peers.End]:
        """{process: the end that it was told}, once so many were told."""
        until = time.monotonic() + LIMIT
        while sum(map(bool, self.ends.values())) < num and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.1)
        assert all(len(ends) <= 1 for ends in self.ends.values()), self.ends
        return {k: ends[0] for k, ends in self.ends.items() if ends}


def test_all_have_what_process_0_has_and_hear_each_other(quick):
    star = Star(4)
    assert star.each(lambda line: line.agree({"of": line.process}, "x")) == dict.fromkeys(range(4), {"of": 0})
    assert star.each(lambda line: line.everyone(line.process**2, "y")) == dict.fromkeys(range(4), [0, 1, 4, 9])
    at = star.each(lambda line: line.agree(1, "save" if line.process == 2 else "stop"))
    assert at[1] == at[3] == 1 and "process 2 is at 'save' where process 0 is at 'stop'" in str(at[2])


CODES = {"a mistake of the user's": 2, "a fault": 70, "a full disk": 74, "a signal, saved": 75, "a signal": 143}


@pytest.mark.parametrize("who", [0, 1, 3])
@pytest.mark.parametrize("code", CODES.values(), ids=CODES)
def test_who_says_why_it_ends_takes_the_others_along_with_its_code(quick, who, code):
    star = Star(4)
    star.lines[who].end(code, "the reason")
    ends = star.wait(3)
    assert {k: end.code for k, end in ends.items()} == {k: code for k in range(4) if k != who}
    assert {(end.process, end.words) for end in ends.values()} == {(who, "stopped: the reason")}


DEATHS = ["closes", "is silent", "is silent before its first step", "does not take what it is told"]


@pytest.mark.parametrize(
    ("death", "who"), [(death, who) for death in DEATHS for who in (2, 0)][:-1]
)  # 0 is told little
def test_who_ends_without_a_word_is_found_and_named(quick, who, death):
    star = Star(4, mute=(who,))
    mine = [star.sockets[k][k == who] for k in star.sockets if who in (0, k)]
    if death == "closes":
        for one in mine:
            one.close()
    elif death == "does not take what it is told":
        star.each(lambda line: line.agree("x" * 2**22, "x") if line.is_main_process else None)
    else:
        for one in mine:
            one.sendall(json.dumps({"beat": int(death == "is silent")}).encode() + b"\n")
    if death == "is silent before its first step":
        time.sleep(2 * peers.SILENCE)
        assert not any(star.ends.values())
        return
    ends = star.wait(3)
    words = "gone without a word" if death == "closes" else "silent for"
    for k in set(range(4)) - {who}:
        assert ends[k].code == 70 and words in ends[k].words, ends
        assert ends[k].told().startswith(f"lm_jax: process {who} (host host{who}) is"), ends


def test_a_signal_to_any_process_is_answered_by_process_0(quick):
    star = Star(3)
    assert star.each(lambda line: line.ask(15)) == {0: False, 1: True, 2: True}
    until = time.monotonic() + LIMIT
    while len(star.wishes) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    assert star.wishes == [15, 15]


def test_the_end_that_all_come_to_is_no_death_and_another_one_is_told(quick):
    star = Star(3)
    assert star.each(lambda line: line.part(0)) == dict.fromkeys(range(3))
    for to in star.sockets.values():
        to[0].close()
    time.sleep(0.2)
    assert not any(star.ends.values())
    star = Star(3)
    found = star.each(lambda line: line.part(75 if line.process == 1 else 0))
    assert all("the processes end differently: [0, 75, 0]" in str(error) for error in found.values())


def test_a_signal_at_many_processes_asks_once_and_two_at_one_end_all(monkeypatch):
    """Schedulers signal every process of a job: what the others pass on is not a second signal of process 0's own."""
    left = []
    monkeypatch.setattr(stop, "leave", lambda number, saved: left.append(number))
    one = stop.StopSignal()
    one.done, one.saved = 7, 4
    one.wish(15)
    one._take(15)
    one.wish(15)
    assert one.requested and not left
    one._take(15)
    assert left == [15]


def facts(**changes) -> dict:
    return {"config.optimizer.learning_rate": 3e-4, "jax": "1", "lm_jax/train.py": "ab"} | changes


DIFFERENCES = {
    "a learning rate": (
        {"config.optimizer.learning_rate": 0.001},
        "config.optimizer.learning_rate 0.001 there, 0.0003",
    ),
    "a version": ({"jax": "2"}, 'jax "2" there, "1" on process 0'),
    "code": ({"lm_jax/train.py": "cd"}, 'lm_jax/train.py "cd" there, "ab"'),
    "a file more": ({"lm_jax/x.py": "cd"}, 'lm_jax/x.py "cd" there, none'),
    "two things": ({"config.optimizer.learning_rate": 1, "jax": "2"}, "config.optimizer.learning_rate 1 there"),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_who_differs_is_named_to_all_with_the_first_difference(quick, name, monkeypatch):
    changes, words = DIFFERENCES[name]
    star, mine = Star(4), threading.local()
    monkeypatch.setattr(peers, "line", type("", (), {"__getattr__": lambda _, what: getattr(mine.line, what)})())

    def compare(line: peers.Line) -> None:
        mine.line = line
        peers.compare(facts(**changes) if line.process == 2 else facts())

    found = star.each(compare)
    assert all(isinstance(error, UserError) for error in found.values()), found
    assert len({str(error) for error in found.values()}) == 1
    assert str(found[0]).startswith("process 2 (host host2)") and words in str(found[0]), found[0]
    changes.clear()
    assert star.each(compare) == dict.fromkeys(range(4))


class Store(dict):
    """JAX's coordination service."""

    key_value_set = dict.__setitem__

    def blocking_key_value_get(self, key: str, milliseconds: int) -> str:
        until = time.monotonic() + milliseconds / 1000
        while key not in self and time.monotonic() < until:
            time.sleep(0.01)
        return self[key]


def test_a_stranger_at_the_door_is_sent_away_and_who_never_comes_is_named(monkeypatch):
    store, found = Store(), {}
    wait = threading.Thread(target=lambda: found.update(connection.gather_connections(["a", "b"], 1, store)))
    wait.start()
    store.blocking_key_value_get(connection.KEY, 1000 * LIMIT)
    port, word = json.loads(store[connection.KEY])
    for hello in (b"GET / HTTP/1.1\n", b'["guess", 1]\n', b"[1]\n", b"7\n"):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(hello)
            with contextlib.suppress(ConnectionResetError):
                assert stranger.recv(1) == b""
    arrived = connection.connect("127.0.0.1", 1, "a", store)
    wait.join(LIMIT)
    assert sorted(found) == [1] and (found[1].host, arrived.host) == ("b", "a")
    monkeypatch.setattr(connection, "ARRIVAL", 0.1)
    with pytest.raises(PeerError, match="process 1, 2 cannot reach process 0 at a:"):
        connection.gather_connections([*"abc"], 1, Store())
    with pytest.raises(PeerError, match="process 1 cannot reach process 0 at 127.0.0.1:1\n"):
        connection.connect("127.0.0.1", 1, "a", Store({connection.KEY: json.dumps([1, word])}))


def test_a_step_that_is_stuck_writes_where_every_thread_is_and_then_ends(tmp_path, monkeypatch):
    """Held against the last ones by its rows: a batch that grows is no fault, nor are the first steps."""
    monkeypatch.setattr(watchdog.StepWatchdog, "SHORTEST", 0.0)
    log = os.open(tmp_path / "log.txt", os.O_WRONLY | os.O_CREAT)
    pace, clock = watchdog.StepWatchdog([log]), [0.0]
    monkeypatch.setattr(watchdog, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))

    def late(seconds: float, rows: int) -> str:
        with pace(rows):
            clock[0] += seconds
            return pace.late()

    assert [late(500, 8), late(1, 8), late(1, 8), late(1, 8), late(9, 16)] == [""] * 5
    assert not (tmp_path / "log.txt").read_text()
    assert late(11, 8) == "" and "test_a_step_that_is_stuck" in (tmp_path / "log.txt").read_text()
    assert [late(1, 8) for _ in range(6)] == [""] * 6
    assert late(22, 8) == "has been in one step for 22 s: stuck"
    os.close(log)


class Script:
    """A line whose other end is written down: what process 0 decided in one run is what another one hears."""

    host = "here"

    def __init__(self, decided: list | None = None):
        self.is_main_process, self.decided = decided is None, [] if decided is None else [*decided]

    def agree(self, value, about: str):
        if self.is_main_process:
            self.decided.append((about, json.dumps(value)))
            return value
        of, found = self.decided.pop(0)
        assert of == about, f"this process is at {about!r}, process 0 at {of!r}"
        return json.loads(found)

    def everyone(self, value, about: str) -> list:
        return self.agree([value, value], about)

    def stepped(self, step: int) -> None: ...

    def watchdog(self, rows: int) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()


def never(*arguments, **named):
    raise AssertionError("a process that does not lead reads what the leading one decides by")


def run_as(script: Script, workdir, words: list[str], is_stopped: bool, rate: float) -> list[tuple]:
    """[(what, at which step), ...] that a run did together with others: steps, evaluations, saves.

    Its clock runs `rate` times as fast. `is_stopped`: a signal comes, to the leading process in an evaluation, to another one
    before the first step. Where it does not lead it has no file of the run to look at.
    """
    done: list[tuple] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers, "line", script)
        if not script.is_main_process:
            patch.setattr(workdir_lock, "TOGETHER", 0)
            patch.setattr(checkpoint, "wait_for", lambda path: None)
            patch.setattr(metrics_file, "read", lambda folder, log=None: [])
            modules = (
                between_steps,
                open_run,
                start,
                samples,
                rewind,
                checkpoint,
                step_folders,
                workdir_lock,
                distributed,
            )
            for module in modules:
                patch.setattr(module, "is_main_process", lambda: False)
            for module, name in ((run_folder, "read_config"), (step_folders, "expected_data_state")):
                patch.setattr(module, name, never)
        patch.setattr(between_steps, "time", types.SimpleNamespace(monotonic=lambda: rate * time.monotonic()))

        def spied(module, name: str, what: str, before=lambda *arguments: None, step=lambda run, *_: run.data.step):
            real = getattr(module, name)

            def spy(*arguments, **named):
                before(*arguments)
                done.append((what, step(*arguments)))
                return real(*arguments, **named)

            patch.setattr(module, name, spy)

        def signalled(run, *_) -> None:
            run.stop.requested |= is_stopped

        for module in (between_steps, closing):
            spied(module, "evaluate_now", "evaluation", signalled if script.is_main_process else lambda *_: None)
        spied(train, "steps", "steps", lambda *_: None if script.is_main_process else signalled(*_))
        spied(train.CompiledStep, "__call__", "step", step=lambda _, state, *__: int(state.step))
        spied(checkpoint.Saver, "save", "save", step=lambda _, state, data, *__: data.step)
        overrides, _ = experiment.split_overrides(words)
        config, origins = experiment.load_config("experiments/quickstart.py:smoke", overrides)
        train.run(config, "experiments/quickstart.py:smoke", str(workdir), origins)
    return done


RUN = [
    "--config.data.tokenizer=bytes", "--config.evaluate.prompt=", "--config.evaluate.num_rows=40", "--config.evaluate.every=2",
    "--config.train.microbatch_rows=4", "--config.mesh.data=1", "--config.optimizer.decay_over=9",
    "--config.model.num_layers=1",
]  # fmt: skip


def test_who_does_not_lead_does_what_process_0_decides_whatever_it_sees_itself(tmp_path):
    """A run that is stopped in an evaluation, then one that saves by a clock; the other process' clock, signals and files say
    something else each time."""
    for name, every, clocks, stopped in (
        ("begun", "--config.checkpoint.every=60 min", (1, 1e9), (True, False)),
        ("gone on with", "--config.checkpoint.every=1 min", (1e9, 1), (False, True)),
    ):
        words = [
            every,
            "--config.train.num_steps=5",
            "--config.checkpoint.keep_best=eval/loss",
            "--config.evaluate.patience=9",
        ]
        leading = Script()
        expected = run_as(leading, tmp_path / "run", [*RUN, *words], stopped[0], clocks[0])
        assert leading.decided and ("save" in {what for what, _ in expected}) and expected[0][0] != "save", expected
        other = tmp_path / name
        if name != "begun":
            shutil.copytree(tmp_path / "before", other)
        following = Script(leading.decided)
        assert run_as(following, other, [*RUN, *words], stopped[1], clocks[1]) == expected, name
        assert not following.decided, name
        if name == "begun":
            shutil.copytree(tmp_path / "run", tmp_path / "before")
    assert {about for about, _ in leading.decided} >= {
        "stop",
        "time to save",
        "hopeless",
        "a step",
        "is evaluated",
        "is the best",
        "look",
    }


@pytest.mark.parametrize(("held", "code"), [(True, 70), (False, -signal.SIGABRT)])
def test_an_abort_waits_for_the_thread_that_knows_better(held, code):
    """As JAX's client aborts in a thread of its own where process 0 is gone."""
    lines = ["import ctypes, os, threading, time", "from lm_jax.multihost import peers"]
    lines += ["peers.hold_up_aborts()"] * held
    lines += ["threading.Thread(target=ctypes.CDLL(None).abort).start()", "time.sleep(0.5)", "os._exit(70)"]
    line = [sys.executable, "-c", "\n".join(lines)]
    assert subprocess.run(line, cwd=ROOT, capture_output=True, timeout=LIMIT).returncode == code
