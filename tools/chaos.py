"""Kills the real command again and again, at named points (LM_JAX_FAULT) and at any moment; the same command goes on each time.

    python tools/chaos.py --kills 25 [--processes 4] [--place gs] [--seed 1] [--json]

When a run is done, its whole log (but speeds) and the arrays of its last checkpoint are compared with those of a run that nobody
disturbed. Exit code 1 where a bit differs or something hangs. The seed decides what is killed, where, and how often it went by.
"""

import contextlib
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
from bucket_emulator import bucket, free_port
from etils import epath

from lm_jax import checkpoint, cli, fault_points, load_model, manifest, metrics_file, step_folders
from lm_jax.config import Mesh
from lm_jax.mesh import make_mesh
from lm_jax.plan.counts import duration
from lm_jax.train_state import make_program

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
EVERY = 5  # steps from one checkpoint to the next
LIMIT = (
    600  # seconds without a word of any process, until a start that neither ends nor is killed counts as one that hangs
)
LEFT = 20  # seconds that the others have to leave, once one is killed
STARTING, RUNNING = "any moment of a start", "any moment after it"
LEADING = {"save.begin", "save.manifest", "save.mark", "save.commit", "retain", "send", "quarantine"}  # process 0 alone
# The last time at which a point is killed; 2 where nothing is said, 1 for what a process comes to once.
TIMES = {"step": 3 * EVERY, "microbatch": 3 * EVERY, "evaluation": 6, "send": 6}
TIMES |= dict.fromkeys(("start", "restore", "compile", "quarantine", "end"), 1)
LINE = [
    "--config=experiments/quickstart.py:smoke", "--config.train.microbatch_rows=4", "--config.model.dropout=0.1",
    f"--config.checkpoint.every={EVERY}", f"--config.evaluate.every={2 * EVERY}", "--config.evaluate.prompt=",
    "--config.log.every=1",
]  # fmt: skip


class Wrong(Exception):
    """What must not happen."""


@dataclasses.dataclass
class Kill:
    phase: str
    behind: int  # processes that did not leave by themselves
    lost: int = 0  # steps that were done, and are done again
    recovery: float = 0.0  # seconds of the next start until its first step is done; 0: that was killed before


class Started:
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
        """Those that the first process said are done; before them the one that it goes on from, if there is one."""
        with open(self.outputs[0]) as file:
            found = re.findall(r"^(?:resumed at step|step) +([\d,]+)(?:,| of).*\n", file.read(), re.MULTILINE)
        return [int(number.replace(",", "")) for number in found]

    def silence(self) -> float:
        """Seconds since a process last said anything, or since the start."""
        return time.time() - max(os.stat(path).st_mtime for path in self.outputs)

    def alive(self) -> list[subprocess.Popen]:
        return [process for process in self.all if process.poll() is None]

    def end(self, seconds: float) -> int:
        """Waits so long for all to leave, and kills those that do not. Returns how many those are."""
        until = time.monotonic() + seconds
        while (behind := self.alive()) and time.monotonic() < until:
            time.sleep(0.02)
        for process in behind:
            process.kill()
            process.wait()
        return len(behind)


class Chaos:
    """Runs one after another, each killed again and again until it ends."""

    def __init__(self, flags, folder: str, place: str):
        self.flags, self.folder, self.place, self.chance = flags, folder, place, random.Random(flags.seed)
        self.cards, self.kills, self.num_runs = list[str](), list[Kill](), 0
        self.done, self.owing = 0, list[Kill]()  # the newest step; the kill after which it was not gone on with yet
        self.start_seconds = 0.0  # of the newest start until its first step

    def card(self, workdir: str) -> str:
        """What is killed next: every point, and twice any moments; then all again in another order."""
        num_saved = len(step_folders.complete_steps(step_folders.steps_folder(epath.Path(workdir))))
        for card in self.cards:
            if num_saved >= {"restore": 1, "quarantine": 2}.get(card, 0):
                self.cards.remove(card)
                return card
        left_out = ("send" if self.flags.place == "local" else "", "save.part" if self.flags.processes == 1 else "")
        self.cards += [point for point in fault_points.POINTS if point not in left_out] + 2 * [STARTING, RUNNING]
        self.chance.shuffle(self.cards)
        return self.card(workdir)

    def life(self, workdir: str, card: str) -> bool:
        """One start, killed as the card says ("": not at all). Returns whether the run came to its end before that."""
        chance, before, num = self.chance, self.start_seconds, self.flags.processes
        victim = 0 if card in LEADING else chance.randrange(num)
        times, after, moment = chance.randint(1, TIMES.get(card, 2)), chance.randint(1, 2 * EVERY), chance.random()
        if card == "quarantine":
            turn_a_bit(step_folders.steps_folder(epath.Path(workdir)))
        fault = f"kill@{card}:{times}#{victim}" if card in fault_points.POINTS else ""
        line = [f"--config.train.num_steps={self.flags.steps}", f"--workdir={workdir}"]
        started, seconds = Started(num, self.folder, line, fault), 0.0
        try:
            while len(started.alive()) == num:
                steps, now = started.steps(), time.monotonic() - started.start
                if not seconds and len(steps) > 1:
                    seconds = self.start_seconds = now
                if card == STARTING and now > moment * before or card == RUNNING and len(steps) > after:
                    time.sleep(0.3 * moment * (card == RUNNING))
                    started.all[victim].kill()
                if started.silence() > LIMIT:
                    raise Wrong(f"it hangs ({card})")
                time.sleep(0.01)
            behind = started.end(LEFT)
        finally:
            started.end(0)
        self.charge(started.steps(), seconds)
        codes = [process.returncode for process in started.all]
        if any(codes) and (not card or codes[victim] != -signal.SIGKILL):
            raise Wrong(f"it left with {codes} ({card or 'not killed'})")
        if any(codes):
            self.kills.append(Kill(card, behind))
            self.owing = self.owing if self.owing and card != "quarantine" else self.kills[-1:]
        return not any(codes)

    def charge(self, steps: list[int], seconds: float) -> None:
        """What the kills before cost, as far as this start came."""
        for kill in self.kills[-1:]:
            kill.recovery = kill.recovery or seconds
        if steps:
            for kill in self.owing:
                kill.lost = max(0, self.done - steps[0] * (steps[0] > 1))
            self.done, self.owing = steps[-1], []

    def run(self) -> None:
        """Until there were so many kills, and all runs are at their ends. Raises Wrong."""
        tell("the run that nobody disturbs")
        reference, wanted = f"{self.folder}/reference", self.flags.kills
        self.life(reference, "")
        expected = outcome(reference)
        programs = lambda k: f"{self.folder}/home-{k}/cache/compiled"
        for k in range(1, self.flags.processes):  # JAX keeps programs in process 0 alone: each start would compile
            shutil.copytree(programs(0), programs(k), dirs_exist_ok=True)
        start = time.monotonic()
        while len(self.kills) < wanted:
            workdir, over = f"{self.place}/run-{self.num_runs}", False
            self.num_runs, self.done, self.owing = self.num_runs + 1, 0, []
            while not over and len(self.kills) < wanted:
                card = self.card(workdir)
                if over := self.life(workdir, card):
                    self.cards.append(card)
                left = (time.monotonic() - start) / max(1, len(self.kills)) * (wanted - len(self.kills))
                tell(
                    f"{len(self.kills)} of {wanted} kills, step {self.done}, run {self.num_runs}, {duration(left)} left"
                )
            over = over or self.life(workdir, "")
            for what, found in outcome(workdir).items():
                if found != expected[what]:
                    raise Wrong(f"run {self.num_runs}: its {what} are not those of the undisturbed run")

    def table(self) -> list[dict]:
        """A row for each phase; seconds of those starts that came to a step."""
        rows = []
        for phase in sorted({kill.phase for kill in self.kills}):
            kills = [kill for kill in self.kills if kill.phase == phase]
            lost = [kill.lost for kill in kills]
            seconds = sorted(round(kill.recovery, 1) for kill in kills if kill.recovery) or ["-"]
            row = {"phase": phase, "kills": len(kills), "steps lost": sum(lost), "at most": max(lost)}
            row |= {"seconds to recover": seconds[len(seconds) // 2], "longest": seconds[-1]}
            rows.append(row | {"left behind": sum(kill.behind for kill in kills)})
        return rows


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def turn_a_bit(steps: epath.Path) -> None:
    """Of the newest step: who restores is to set it aside."""
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


def main(arguments: list[str]) -> int:
    parser = cli.Parser("tools/chaos.py", __doc__)
    for name, default in (("kills", 25), ("processes", 1), ("steps", 200), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--place", choices=("local", "gs"), default="local")
    parser.add_argument("--json", action="store_true")
    flags = parser.parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")  # this process only reads: an accelerator stays free
    for name, least in (("kills", 1), ("processes", 1), ("steps", 6 * EVERY)):
        if getattr(flags, name) < least:
            parser.error(f"--{name} {getattr(flags, name)}: at least {least}")
    with bucket("chaos") if flags.place == "gs" else contextlib.nullcontext() as place:
        folder = tempfile.mkdtemp(prefix="chaos-")
        chaos = Chaos(flags, folder, place or folder)
        try:
            chaos.run()
        except Wrong as error:
            tell(f"after {len(chaos.kills)} kills (--seed {flags.seed}): {error}; all is kept in {folder}")
            return 1
    shutil.rmtree(folder)
    rows = chaos.table()
    if flags.json:
        print(json.dumps({"kills": len(chaos.kills), "runs": chaos.num_runs, "seed": flags.seed, "phases": rows}))
        return 0
    for row in ([*rows[0]], ["---"] * len(rows[0]), *[row.values() for row in rows]):
        print(f"| {' | '.join(map(str, row))} |")
    print(f"{len(chaos.kills)} kills in {chaos.num_runs} runs (--seed {flags.seed}): not a bit differs")
    return 0


if __name__ == "__main__":
    cli.run_command(main, sys.argv[1:])
