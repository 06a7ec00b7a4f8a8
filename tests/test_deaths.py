"""Real processes of one run save, stop, refuse and die as one, each with a cache, a home, a folder and a clock of its own."""

import contextlib
import itertools
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from helpers import LIMIT, ROOT, assert_same_run, free_port
from one_process import QUICK

from lm_jax import checkpoint, manifest, step_folders

# Runs in every process before anything else: the clocks of process k are 7 k seconds ahead and run 1 + k / 4 times as fast; a
# file that appears says what happens there.
PLANT = """
import ctypes, os, threading, time
number = int(os.environ["JAX_PROCESS_ID"])
def ahead(clock, origin): return lambda: origin + (clock() - origin) * (1 + number / 4) + 7 * number
time.time, time.monotonic = ahead(time.time, time.time()), ahead(time.monotonic, time.monotonic())

def planted():
    while not os.path.exists(os.environ["PLANTED"]):
        time.sleep(0.02)
    what = open(os.environ["PLANTED"]).read()
    if what == "exit":
        os._exit(0)
    if what == "raise":
        main = ctypes.c_ulong(threading.main_thread().ident)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(main, ctypes.py_object(ZeroDivisionError))
    if what == "hold":
        ctypes.PyDLL(None).sleep(600)  # with the interpreter's lock: no thread goes on

threading.Thread(target=planted, daemon=True).start()
"""
SMOKE = [
    "--config.data.tokenizer=bytes", "--config.evaluate.prompt=", "--config.evaluate.num_rows=40", "--config.data.num_workers=1",
    "--config.train.microbatch_rows=4",
]  # fmt: skip


class Job:
    """`num` processes of one run in `folder`. Of process k alone are the words `more(k)`, in the place of its workdir, and the
    settings `environment(k)`."""

    def __init__(self, folder: pathlib.Path, num: int, *words: str, more=lambda k: [], environment=lambda k: {}):
        self.folder, self.workdir = folder, folder / "run"
        given_here = {word.split("=")[0] for word in words}
        smoke = [word for word in SMOKE if word.split("=")[0] not in given_here]
        address = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": str(num)}
        self.said: list[str] = [""] * num
        self.processes = []
        for k in range(num):
            home = folder / f"home-{k}"
            (home / "plant").mkdir(parents=True, exist_ok=True)
            (home / "plant" / "sitecustomize.py").write_text(PLANT)
            (home / "planted").unlink(missing_ok=True)
            given = address | {
                "JAX_PROCESS_ID": str(k), "JAX_NUM_CPU_DEVICES": "1", "HOME": str(home), "XLA_FLAGS": QUICK,
                "LM_JAX_CACHE": os.environ.get("LM_JAX_CACHES", str(folder)) + f"/cache-{k}", "PLANTED": str(home / "planted"),
                "PYTHONPATH": f"{home / 'plant'}:{ROOT}", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=0",
            }  # fmt: skip
            line = [
                sys.executable,
                "-u",
                "-m",
                "lm_jax.main",
                f"--config={ROOT}/experiments/quickstart.py:smoke",
                *smoke,
            ]
            self.processes.append(
                subprocess.Popen(
                    [*line, *words, *(more(k) or [f"--workdir={self.workdir}"])], env=os.environ | given | environment(k),
                    cwd=home, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
                )
            )  # fmt: skip
        self.threads = [threading.Thread(target=self._read, args=(k,), daemon=True) for k in range(num)]
        for thread in self.threads:
            thread.start()

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *error) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for process, thread in zip(self.processes, self.threads, strict=True):
            thread.join(LIMIT)
            process.stdout.close()

    def _read(self, k: int) -> None:
        for line in self.processes[k].stdout:
            self.said[k] += line

    def until(self, what, seconds: float = LIMIT) -> None:
        """Waits for words of process 0's, a pattern, or until what is called is true."""
        start = time.monotonic()
        is_so = what if callable(what) else lambda: re.search(what, self.said[0])
        while not is_so():
            assert time.monotonic() - start < seconds, f"{what}:\n" + "\n".join(self.said)
            assert any(process.poll() is None for process in self.processes), f"{what}:\n" + "\n".join(self.said)
            time.sleep(0.01)

    def does(self, k: int, what: str) -> None:
        """A signal's name, or what is planted."""
        if what.startswith("SIG"):
            os.kill(self.processes[k].pid, getattr(signal, what))
        else:
            draft = self.folder / f"home-{k}" / "draft"
            draft.write_text(what)
            draft.rename(draft.with_name("planted"))

    def ends(self, seconds: float = LIMIT, but=()) -> tuple[dict[int, int], float]:
        """({process: exit code}, seconds until the last had ended) of all `but` some."""
        start = time.monotonic()
        waited = [k for k in range(len(self.processes)) if k not in but]
        while any(self.processes[k].poll() is None for k in waited) and time.monotonic() - start < seconds:
            time.sleep(0.005)
        took = time.monotonic() - start
        for k in waited:
            self.threads[k].join(LIMIT)
        return {k: self.processes[k].returncode for k in waited}, took

    def left(self, but=(), seconds: float = 60) -> list[str]:
        """Processes that belong to those that have ended, and are still there after a minute: nobody ends them."""
        until = time.monotonic() + seconds
        while (found := self._left(but)) and time.monotonic() < until:
            time.sleep(0.1)
        return found

    def _left(self, but) -> list[str]:
        found = subprocess.run(["ps", "-eo", "sid,stat,args"], capture_output=True, text=True).stdout
        sessions = {str(process.pid) for k, process in enumerate(self.processes) if k not in but}
        lines = [line.split(maxsplit=2) for line in found.splitlines()]
        return [line[2] for line in lines if line[0] in sessions and not line[1].startswith("Z")]


def newest(job: Job) -> int:
    """The newest step; it is whole."""
    steps = step_folders.complete_steps(step_folders.steps_folder(checkpoint.epath.Path(job.workdir)))
    assert steps and manifest.invalid_reason(checkpoint.epath.Path(job.workdir) / "checkpoints" / str(steps[-1])) == ""
    return steps[-1]


LONG = ["--config.train.num_steps=5000", "--config.checkpoint.every=100000"]
TIMED = ["--config.train.num_steps=300", "--config.checkpoint.every=0.05 min", "--config.evaluate.every=100"]
EVALUATES = [*LONG, "--config.evaluate.every=3", "--config.evaluate.num_rows=4000"]
HOPELESS = [*LONG, *(f"--config.optimizer.{each}" for each in ("learning_rate=1000", "weight_decay=100", "warmup=0"))]
STEP, COMPILE, EVALUATION = "step +3 of", "fits:", "step +3 of"

# {what happens: (words, when, process, what it does, exit code of all, words of the log, or where all end early of each)}
ALIKE = {
    "saves by a clock": (TIMED, None, 0, "", 0, ""),
    "SIGTERM to 0 in a step": (LONG, STEP, 0, "SIGTERM", 75, "saved at step|stopping"),
    "SIGTERM to 1 in a step": (LONG, STEP, 1, "SIGTERM", 75, "saved at step|stopping"),
    "SIGTERM to 1 in an evaluation": (EVALUATES, EVALUATION, 1, "SIGTERM", 75, ""),
    "SIGINT to all in a step": (LONG, STEP, None, "SIGINT", 75, "stopping"),
    "SIGTERM to 1 while 0 compiles": (LONG, COMPILE, 1, "SIGTERM", 143, "SIGTERM|lm_jax: stopped"),
    "updates that are not finite": (HOPELESS, None, 0, "", 70, ""),
    "an exception in 1": (LONG, STEP, 1, "raise", 70, "ZeroDivisionError"),
    "an exception in 0": (LONG, STEP, 0, "raise", 70, "ZeroDivisionError"),
    "a data worker of 1 dies": (LONG, STEP, 1, "worker", 70, "Worker process was terminated"),
    "a full disk in 1": ([*LONG[:1], "--config.checkpoint.every=4"], STEP, 1, "disk", 74, "File too large"),
}  # fmt: skip


def happens(job: Job, k: int | None, what: str) -> None:
    """What a table says, in process k, None: in all."""
    for one in range(len(job.processes)) if k is None else (k,):
        pid = job.processes[one].pid
        if what == "disk":
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (1000, 1000))
        elif what == "worker":
            found = subprocess.run(["pgrep", "-P", str(pid), "-f", "spawn_main"], capture_output=True, text=True).stdout
            os.kill(int(found.split()[-1]), signal.SIGKILL)
        else:
            job.does(one, what)


def check_alike(name: str, folder: pathlib.Path, num: int) -> Job:
    """One line of the table."""
    words, when, k, what, code, says = ALIKE[name]
    with Job(folder, num, *words) as job:
        if when:
            job.until(when)
            happens(job, k, what)
        codes, took = job.ends()
        told = f"{name}: {codes} in {took:.1f} s\n" + "\n----\n".join(job.said)
        print(told[:200], flush=True)
        assert codes == dict.fromkeys(range(num), code), told
        assert all(re.search(says, said) for said in (job.said[:1] if code in (0, 75) else job.said)), told
        assert not job.left(), told
    return job


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Iterator[None]:
    """What a process compiled in one test is there for that process in the next."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LM_JAX_CACHES", str(tmp_path_factory.mktemp("caches")))
        yield


@pytest.mark.parametrize("name", ["SIGTERM to 1 in a step"])
def test_two_processes_end_alike(name, tmp_path, compiled):
    check_alike(name, tmp_path, 2)


@pytest.mark.proof
@pytest.mark.parametrize("num", [2, 4])
@pytest.mark.parametrize("name", ALIKE)
def test_processes_end_alike_whatever_happens_to_one(name, num, tmp_path):
    check_alike(name, tmp_path, num)


RUN = "--workdir=../run"
# What is not alike in process 1: (its own words, its own settings, words that both say).
APART = {
    "a learning rate": ([RUN, "--config.optimizer.learning_rate=0.01"], {}, "learning_rate 0.01 there, .* on process 0"),
    "a corpus": ([], {"SOURCE": "other"}, "source/.* there, .* on process 0"),
    "a corpus that is missing": ([], {"SOURCE": "missing"}, "source"),
    "a workdir": (["--workdir=other"], {}, "what process 0 writes into .*/run is not in the --workdir of process 1 .*other"),
    "code": ([], {"PYTHONPATH": "code"}, "lm_jax/batch_ramp.py .* there, .* on process 0"),
    "a flag of XLA": ([], {"XLA_FLAGS": f"{QUICK} --xla_cpu_enable_fast_math=true"}, "XLA_FLAGS .*fast_math"),
    "a dry run": ([RUN, "--dry_run"], {}, "--dry_run true there, false on process 0"),
    "a mistake before it joins": ([RUN, "--config.no.such=1"], {}, "no such|config.no"),
}  # fmt: skip


def check_apart(name: str, folder: pathlib.Path, num: int) -> None:
    """Process 1 has something that the others have not: all leave with 2 and the first difference, and nothing is trained."""
    more, given, says = APART[name]
    for k in range(num):
        (folder / f"home-{k}" / "source").mkdir(parents=True)
        text = "other" * 400 if given.get("SOURCE") == "other" and k == 1 else "words " * 400
        for number in range(60):
            (folder / f"home-{k}" / "source" / f"{number}.txt").write_text(f"{number} {text}")
    if given.get("SOURCE") == "missing":
        shutil.rmtree(folder / "home-1" / "source")
    if given.get("PYTHONPATH"):
        shutil.copytree(ROOT / "lm_jax", folder / "code" / "lm_jax", ignore=shutil.ignore_patterns("__pycache__"))
        with open(folder / "code" / "lm_jax" / "batch_ramp.py", "a") as file:
            file.write("# of another version\n")
    settings = {name: value.replace("code", f"{folder}/code") for name, value in given.items() if name != "SOURCE"}
    of_one = lambda value, nothing: lambda k: value if k == 1 else nothing
    words = [*LONG, "--config.data.sources=(('source', 1.0),)"] if "SOURCE" in given else LONG
    with Job(folder, num, *words, more=of_one(more, []), environment=of_one(settings, {})) as job:
        codes, took = job.ends()
        told = f"{name}: {codes} in {took:.1f} s\n" + "\n----\n".join(job.said)
        print(told[:200], flush=True)
        assert codes == dict.fromkeys(range(num), 2), told
        assert all(re.search(says, said) and "Traceback" not in said for said in job.said), told
        assert not job.left() and "step " not in job.said[0], told


@pytest.mark.proof
@pytest.mark.parametrize("num", [2, 4])
@pytest.mark.parametrize("name", APART)
def test_processes_that_differ_all_say_how_and_none_trains(name, num, tmp_path):
    check_apart(name, tmp_path, num)


# {phase: (what process 0 has said when it comes to it, seconds until it is surely over)}
PHASES = {
    "start-up": ("fits:", 1.0),
    "compile": ("fits:", 5.0),
    "step": (STEP, 0.3),
    "save": ("step +5 of", 0.3),
    "evaluation": ("step +4 of", 0.5),
}
DIES = {"SIGKILL": "without a word", "SIGSTOP": "silent", "raise": "ZeroDivisionError", "exit": "without a word"}
DYING = [
    LONG[0],
    "--config.checkpoint.every=5",
    "--config.evaluate.every=4",
    "--config.evaluate.num_rows=2000",
]


def death(folder: pathlib.Path, num: int, phase: str, who: int, how: str) -> float:
    """Seconds until all the others of a run are out, one of which dies in a phase."""
    with Job(folder, num, *DYING) as job:
        words, until = PHASES[phase]
        job.until(words)
        time.sleep(random.uniform(0, until))
        job.does(who, how)
        stopped = (who,) * (how == "SIGSTOP")
        codes, took = job.ends(but=stopped)
        told = f"{num} processes, {phase}, {how} of {who}: {codes} in {took:.2f} s\n" + "\n----\n".join(job.said)
        others = [k for k in range(num) if k != who]
        assert [codes[k] for k in others] == [70] * len(others), told
        assert all(re.search(f"process {who} .*{DIES[how]}", job.said[k]) for k in others), told
        assert not job.left(but=stopped), told
    return took


@pytest.mark.proof
def test_who_is_killed_is_named_and_the_other_leaves(tmp_path, compiled):
    death(tmp_path, 2, "step", 1, "SIGKILL")


@pytest.mark.proof
def test_how_soon_all_are_out_where_one_dies(tmp_path):
    """LM_JAX_DEATHS of them over kinds, phases, processes and who; a stopped process has done a step before."""
    trials = [
        (num, phase, who, how)
        for how in DIES
        for phase in PHASES
        for num, who in ((2, 1), (4, 0), (2, 0), (4, 2))
        if how != "SIGSTOP" or phase not in ("start-up", "compile")
    ]
    random.Random(15).shuffle(trials)
    wanted, seconds = int(os.environ.get("LM_JAX_DEATHS", "40")), []
    for number, (num, phase, who, how) in enumerate(itertools.islice(itertools.cycle(trials), wanted), 1):
        seconds.append(death(tmp_path / str(number), num, phase, who, how))
        print(f"{number}: {num} processes, {phase}, {how} of {who}: {seconds[-1]:.2f} s", flush=True)
    p50, p99 = np.percentile(seconds, [50, 99])
    print(f"{wanted} deaths: p50 {p50:.2f} s, p99 {p99:.2f} s, the slowest {max(seconds):.2f} s", flush=True)
    assert p99 <= 5


@pytest.mark.proof
def test_saves_by_a_clock_and_signals_leave_what_goes_on_to_the_bit(tmp_path):
    """A run that is stopped twice and killed once, by two processes, has the lines of one that nobody disturbed."""
    words = ["--config.train.num_steps=60", "--config.checkpoint.every=0.05 min", "--config.evaluate.every=20"]
    (tmp_path / "whole").mkdir()
    with Job(tmp_path / "whole", 2, *words) as whole:
        assert whole.ends()[0] == {0: 0, 1: 0}, whole.said
    for step, who, what, code in ((5, 1, "SIGTERM", 75), (20, 0, "SIGTERM", 75), (40, 1, "SIGKILL", 70)):
        with Job(tmp_path, 2, *words) as job:
            job.until(rf"step +{step} of")
            job.does(who, what)
            assert job.ends()[0] == {1 - who: code, who: code if what == "SIGTERM" else -9}, job.said
        assert newest(job) >= step if code == 75 else newest(job)
    with Job(tmp_path, 2, *words) as job:
        assert job.ends()[0] == {0: 0, 1: 0}, job.said
    assert_same_run(job.workdir, whole.workdir)
    assert newest(job) == 60


@pytest.mark.proof
def test_who_is_slow_to_begin_is_waited_for(tmp_path):
    """Before the first collective, which on CPUs waits 30 s for the others of the run, and then fails."""
    fault = lambda k: {"LM_JAX_FAULT": "stop@step#1"}
    with Job(tmp_path, 2, "--config.train.num_steps=2", environment=fault) as job:
        job.until(lambda: "LM_JAX_FAULT" in job.said[1])
        time.sleep(45)
        job.processes[1].send_signal(signal.SIGCONT)
        assert job.ends(LIMIT)[0] == {0: 0, 1: 0}, job.said
