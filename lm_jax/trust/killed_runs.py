"""Kills the real command again and again, and compares every bit of what comes out in the end: `tools/chaos.py`.

The kills are at named points (LM_JAX_FAULT) and at any moment; the same command goes on each time. When a run is done, its whole
log (but speeds) and the arrays of its last checkpoint are compared with those of a run that nobody disturbed.
"""

import dataclasses
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import numpy as np
from etils import epath

from lm_jax import checkpoint, fault_points, load_model, manifest, metrics_file, step_folders
from lm_jax.config import Mesh
from lm_jax.mesh import make_mesh
from lm_jax.multihost.roll_call import free_port
from lm_jax.plan.counts import duration
from lm_jax.train_state import make_program

ROOT = str(pathlib.Path(__file__).parents[2])  # of the clone, which has the experiments
EVERY = 5  # steps from one checkpoint to the next
SILENCE_SECONDS = 600  # without a word of any process, until a start that neither ends nor is killed counts as hanging
LEAVE_SECONDS = 20  # that the others have to leave, once one is killed
STARTING, RUNNING = "any moment of a start", "any moment after it"
LEADING = {"save.begin", "save.manifest", "save.mark", "save.commit", "retain", "send", "quarantine"}  # process 0 alone
# The last time at which a point is killed; 2 where nothing is said, 1 for what a process comes to once.
TIMES = {"step": 3 * EVERY, "microbatch": 3 * EVERY, "evaluation": 6, "send": 6}
TIMES |= dict.fromkeys(("start", "restore", "compile", "quarantine", "end"), 1)
LINE = [
    "--config=experiments/quickstart.py:smoke", "--config.train.microbatch_rows=4", "--config.model.dropout=0.1",
    f"--config.checkpoint.every={EVERY}", f"--config.evaluate.every={2 * EVERY}", "--config.evaluate.prompt=",
    "--config.log.every=1", "--config.model.num_layers=1",
]  # fmt: skip


class RecoveryError(Exception):
    """A killed run hung, left with another exit code, or came to another result."""


@dataclasses.dataclass
class Kill:
    """One kill, and what it cost."""

    phase: str  # a fault point, or STARTING, RUNNING
    behind: int  # processes that did not leave by themselves
    lost: int = 0  # steps that were done, and are done again
    recovery: float = 0.0  # seconds of the next start until its first step is done; 0: that was killed before


class Processes:
    """The real command, as the processes of one run; each has a home and a cache of its own."""

    def __init__(self, num: int, folder: str, arguments: list[str], fault: str):
        given = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": ROOT, "LM_JAX_FAULT": fault}
        if num > 1:
            given |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": str(num)}
        self.outputs, self.all, self.start = [f"{folder}/output-{k}.txt" for k in range(num)], [], time.monotonic()
        for k, path in enumerate(self.outputs):
            own = {"HOME": f"{folder}/home-{k}", "LM_JAX_CACHE": f"{folder}/home-{k}/cache", "JAX_PROCESS_ID": str(k)}
            line = [sys.executable, "-u", "-m", "lm_jax.main", *LINE, *arguments]
            with open(path, "w") as out:
                self.all.append(subprocess.Popen(line, env=os.environ | given | own, cwd=ROOT, stdout=out, stderr=out))

    def steps(self) -> list[int]:
        """The steps that process 0 said are done; before them the one that it resumed from, if there is one."""
        with open(self.outputs[0]) as file:
            found = re.findall(r"^(?:resumed at step|step) +([\d,]+)(?:,| of).*\n", file.read(), re.MULTILINE)
        return [int(number.replace(",", "")) for number in found]

    def silence(self) -> float:
        """Seconds since a process last said anything, or since the start."""
        return time.time() - max(os.stat(path).st_mtime for path in self.outputs)

    def alive(self) -> list[subprocess.Popen]:
        """The processes that have not ended."""
        return [process for process in self.all if process.poll() is None]

    def end(self, seconds: float) -> int:
        """Waits up to `seconds` for all to leave, and kills those that do not. Returns how many were killed."""
        until = time.monotonic() + seconds
        while (behind := self.alive()) and time.monotonic() < until:
            time.sleep(0.02)
        for process in behind:
            process.kill()
            process.wait()
        return len(behind)


class KilledRuns:
    """Runs one after another, each killed again and again until it ends.

    `flags` are those of tools/chaos.py, `folder` is for files of this machine, `workdirs` (a folder or a bucket) for the runs.
    """

    def __init__(self, flags, folder: str, workdirs: str):
        self.flags, self.folder, self.workdirs, self.chance = flags, folder, workdirs, random.Random(flags.seed)
        self.phases, self.kills, self.num_runs = list[str](), list[Kill](), 0
        self.done, self.owing = 0, list[Kill]()  # the newest step; the kill after which it was not gone on with yet
        self.start_seconds = 0.0  # of the newest start until its first step

    def next_phase(self, workdir: str) -> str:
        """Where the next kill is: every point once, and twice any moments; then all again in another order."""
        num_saved = len(step_folders.complete_steps(checkpoint.steps_folder(epath.Path(workdir))))
        for phase in self.phases:
            if num_saved >= {"restore": 1, "quarantine": 2}.get(phase, 0):
                self.phases.remove(phase)
                return phase
        left_out = ("send" if self.flags.place == "local" else "", "save.part" if self.flags.processes == 1 else "")
        self.phases += [point for point in fault_points.POINTS if point not in left_out] + 2 * [STARTING, RUNNING]
        self.chance.shuffle(self.phases)
        return self.next_phase(workdir)

    def start(self, workdir: str, phase: str) -> bool:
        """One start, killed in this phase ("": not at all). Returns whether the run came to its end before that."""
        chance, before, num = self.chance, self.start_seconds, self.flags.processes
        victim = 0 if phase in LEADING else chance.randrange(num)
        times, after, moment = chance.randint(1, TIMES.get(phase, 2)), chance.randint(1, 2 * EVERY), chance.random()
        if phase == "quarantine":
            _flip_a_bit(checkpoint.steps_folder(epath.Path(workdir)))
        fault = f"kill@{phase}:{times}#{victim}" if phase in fault_points.POINTS else ""
        line = [f"--config.train.num_steps={self.flags.steps}", f"--workdir={workdir}"]
        started, seconds = Processes(num, self.folder, line, fault), 0.0
        try:
            while len(started.alive()) == num:
                steps, now = started.steps(), time.monotonic() - started.start
                if not seconds and len(steps) > 1:
                    seconds = self.start_seconds = now
                if phase == STARTING and now > moment * before or phase == RUNNING and len(steps) > after:
                    time.sleep(0.3 * moment * (phase == RUNNING))
                    started.all[victim].kill()
                if started.silence() > SILENCE_SECONDS:
                    raise RecoveryError(f"it hangs ({phase})")
                time.sleep(0.01)
            behind = started.end(LEAVE_SECONDS)
        finally:
            started.end(0)
        self.charge(started.steps(), seconds)
        codes = [process.returncode for process in started.all]
        if any(codes) and (not phase or codes[victim] != -signal.SIGKILL):
            raise RecoveryError(f"it left with {codes} ({phase or 'not killed'})")
        if any(codes):
            self.kills.append(Kill(phase, behind))
            self.owing = self.owing if self.owing and phase != "quarantine" else self.kills[-1:]
        return not any(codes)

    def charge(self, steps: list[int], seconds: float) -> None:
        """Adds what this start did again, and how long it took, to the kills before it."""
        for kill in self.kills[-1:]:
            kill.recovery = kill.recovery or seconds
        if steps:
            for kill in self.owing:
                kill.lost = max(0, self.done - steps[0] * (steps[0] > 1))
            self.done, self.owing = steps[-1], []

    def run(self, log: Callable[[str], None]) -> None:
        """Runs until there were `flags.kills` kills and all runs are at their ends. Raises RecoveryError."""
        log("the run that nobody disturbs")
        reference, wanted = f"{self.folder}/reference", self.flags.kills
        self.start(reference, "")
        expected = outcome(reference)
        programs = lambda k: f"{self.folder}/home-{k}/cache/compiled"
        for k in range(1, self.flags.processes):  # JAX keeps programs in process 0 alone: each start would compile
            shutil.copytree(programs(0), programs(k), dirs_exist_ok=True)
        start = time.monotonic()
        while len(self.kills) < wanted:
            workdir, over = f"{self.workdirs}/run-{self.num_runs}", False
            self.num_runs, self.done, self.owing = self.num_runs + 1, 0, []
            while not over and len(self.kills) < wanted:
                phase = self.next_phase(workdir)
                if over := self.start(workdir, phase):
                    self.phases.append(phase)
                rest = (time.monotonic() - start) / max(1, len(self.kills)) * (wanted - len(self.kills))
                run = f"step {self.done}, run {self.num_runs}"
                log(f"{len(self.kills)} of {wanted} kills, {run}, {duration(rest)} left")
            over = over or self.start(workdir, "")
            for what, found in outcome(workdir).items():
                if found != expected[what]:
                    raise RecoveryError(f"run {self.num_runs}: its {what} are not those of the undisturbed run")

    def table(self) -> list[dict]:
        """A row for each phase; seconds of those starts that came to a step."""
        rows = []
        for phase in sorted({kill.phase for kill in self.kills}):
            kills = [kill for kill in self.kills if kill.phase == phase]
            lost = [kill.lost for kill in kills]
            seconds: list = sorted(round(kill.recovery, 1) for kill in kills if kill.recovery) or ["-"]
            row = {"phase": phase, "kills": len(kills), "steps lost": sum(lost), "at most": max(lost)}
            row |= {"seconds to recover": seconds[len(seconds) // 2], "longest": seconds[-1]}
            rows.append(row | {"left behind": sum(kill.behind for kill in kills)})
        return rows


def _flip_a_bit(steps: epath.Path) -> None:
    """Flips a bit of the newest step, so that the next start has to set it aside."""
    folder = steps / str(step_folders.complete_steps(steps)[-1])
    path = folder / max(manifest.read_manifest(folder)["files"].items(), key=lambda item: item[1]["bytes"])[0]
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def outcome(workdir: str) -> dict[str, list]:
    """The log of a run, and the arrays of its newest step: parameters and the optimizer's state."""
    lines, found = metrics_file.read(epath.Path(workdir)), load_model.locate(workdir)
    with jax.set_mesh(make_mesh(Mesh(), jax.devices()[:1])):
        state, _ = checkpoint.restore(found.workdir, found.step, make_program(found.config, found.vocab_size))
    numbers = [{name: x for name, x in line.items() if not name.startswith("perf/")} for line in lines]
    return {"numbers": numbers, "arrays": [np.asarray(x).tobytes() for x in jax.tree.leaves(state)]}
