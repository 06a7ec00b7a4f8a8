"""The steps of a run on Cloud TPU VMs, each as commands of gcloud: what `tpu.py` beside it performs. Python 3.9 is enough."""

import argparse
import shlex
import subprocess
import sys
import time

VERSIONS = {"v5litepod": "v2-alpha-tpuv5-lite", "v5p": "v2-alpha-tpuv5", "v6e": "v2-alpha-tpuv6e"}
OLDER = "tpu-ubuntu2204-base"  # v2 to v4
AGAIN = (70, 75, 137)  # a process or host was lost; stopped and saved; process 0 was itself the lost one
NO_SSH = 255
LOST = ("FAILED", "SUSPENDING", "SUSPENDED")  # states of a queued resource whose machines are gone
POLL_SECONDS = 30
ARCHIVE = "lm_jax.tar.gz"
INSTALL = (
    f"mkdir -p lm_jax && tar -xzf {ARCHIVE} -C lm_jax && cd lm_jax && {{ [ -x .venv/bin/pip ] || "
    "{ python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' && python3 -m venv .venv; } || "
    "{ python3 -m pip install -q --user uv && python3 -m uv venv -q --clear --seed --python 3.12 .venv; }; } && "
    "PIP_CONSTRAINT=constraints.txt .venv/bin/pip install -q -e '.[tpu]'"
)
STOP = 'cd lm_jax && [ ! -f run.pid ] || kill -s TERM -- "-$(cat run.pid)" 2> /dev/null || true'
FOLLOW = "cd lm_jax && tail -n +1 -f run.log --pid=$(cat run.pid); exit $(cat run.code)"


class Pod:
    """The slices behind one queued resource, and what is done with them; every step is a command that can be pasted."""

    def __init__(self, flags: argparse.Namespace):
        self.flags = flags

    def perform(self, line: list[str], check: bool = True, note: str = "") -> int:
        """Runs a command, or prints it. Returns its code; ends this process with it where `check` and it is not 0."""
        print(shlex.join(line) + (f"    # {note}" if note else ""), flush=True)
        code = 0 if self.flags.dry_run else subprocess.run(line).returncode
        if code and check:
            sys.exit(code)
        return code

    def gcloud(self, verb: str, *more: str) -> list[str]:
        where = [f"--zone={self.flags.zone}"] + [f"--project={self.flags.project}"] * bool(self.flags.project)
        return ["gcloud", "compute", "tpus", "queued-resources", verb, *more, *where]

    def on(self, workers: str, script: str) -> list[str]:
        """A shell command on "all" workers of all slices, or on worker "0" of the first."""
        return self.gcloud("ssh", self.flags.name, f"--node={workers}", f"--worker={workers}", f"--command={script}")

    def state(self, note: str = "") -> str:
        """ACTIVE, PROVISIONING, SUSPENDED, ..., "" where there is none."""
        line = self.gcloud("describe", self.flags.name, "--format=value(state.state)")
        if self.flags.dry_run:
            self.perform(line, note=note)
            return "ACTIVE" if note.startswith("until") else ""
        return subprocess.run(line, stdout=subprocess.PIPE, text=True).stdout.strip()

    def create(self) -> None:
        flags = self.flags
        several = [f"--node-count={flags.slices}", f"--node-prefix={flags.name}"]
        nodes = several if flags.slices > 1 else [f"--node-id={flags.name}"]
        version = flags.version or next((v for kind, v in VERSIONS.items() if flags.type.startswith(kind)), OLDER)
        more = [f"--accelerator-type={flags.type}", f"--runtime-version={version}", *nodes, *["--spot"] * flags.spot]
        self.perform(self.gcloud("create", flags.name, *more))

    def up(self) -> None:
        """Waits until the machines are there, whoever asked for them, and installs this clone on all of them."""
        state = self.state(note="where it says nothing:")
        if state in LOST:
            self.delete()
        if state in ("", *LOST):
            self.create()
        while (state := self.state(note="until it says ACTIVE")) != "ACTIVE":
            if state in LOST:
                sys.exit(f"{self.flags.name} is {state}: there are no such machines now; the same command asks again")
            print(f"{self.flags.name} is {state or 'not there yet'}", flush=True)
            time.sleep(POLL_SECONDS)
        pack = f"git ls-files -z --cached --others --exclude-standard | tar --null -T - -czf {ARCHIVE}"
        self.perform(["sh", "-c", pack])
        copy = [ARCHIVE, f"{self.flags.name}:{ARCHIVE}", "--node=all", "--worker=all"]
        self.perform(self.gcloud("scp", *copy))
        self.perform(self.on("all", INSTALL))

    def start(self) -> None:
        """The training on all workers, which goes on where this connection is lost."""
        train = shlex.join([".venv/bin/python", "-u", "-m", "lm_jax.main", *self.flags.arguments])
        inner = shlex.quote(f"trap : TERM; echo $$ > run.pid; {train} > run.log 2>&1; echo $? > run.code")
        alone = f"{{ setsid nohup sh -c {inner} < /dev/null > /dev/null 2>&1 & }}"
        clean = "rm -f run.pid run.code && : > run.log"
        self.perform(self.on("all", f"cd lm_jax && {clean} && {alone} && sleep 1"))

    def follow(self) -> int:
        """The log of process 0 until it ends. Returns its exit code, or NO_SSH where the machines are gone."""
        while (code := self.perform(self.on("0", FOLLOW), check=False)) == NO_SSH and self.state() == "ACTIVE":
            time.sleep(POLL_SECONDS)
        return code

    def run(self) -> int:
        for attempt in range(self.flags.restarts + 1):
            self.start()
            code = self.follow()
            if code not in (NO_SSH, *AGAIN) or attempt == self.flags.restarts:
                break
            why = "the machines were taken away" if code == NO_SSH else f"process 0 left with {code}"
            print(f"{why}: once more, {attempt + 1} of at most {self.flags.restarts} times", flush=True)
            if code == NO_SSH:
                self.delete()
                self.up()
            else:
                self.stop()
        self.fetch()
        return code

    def stop(self) -> None:
        """Asks every process to save and leave."""
        self.perform(self.on("all", STOP), check=False)

    def fetch(self) -> None:
        """TensorBoard's files and the metrics, into runs/NAME here. What is not there is said, and no reason to fail."""
        home, workdir = f"runs/{self.flags.name}", self.flags.workdir
        self.perform(["mkdir", "-p", f"{home}/tensorboard"])
        inside = workdir if workdir.startswith("/") else f"lm_jax/{workdir}"
        for name in ("tensorboard", "metrics.jsonl"):
            verb = ["rsync", "--recursive"] if name == "tensorboard" else ["cp"]
            line = ["gcloud", "storage", *verb, f"{workdir}/{name}", f"{home}/{name}"]
            if not workdir.startswith("gs://"):
                copied = [f"{self.flags.name}:{inside}/{name}", home]
                line = self.gcloud("scp", *copied, "--recurse", "--node=0", "--worker=0")
            self.perform(line, check=False)

    def delete(self) -> None:
        self.perform(self.gcloud("delete", self.flags.name, "--force", "--quiet"), check=False)
