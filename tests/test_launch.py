"""The launchers: what each step would run, what a loop of restarts does, and that what runs on a worker is a shell's."""

import functools
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml
from helpers import LIMIT, ROOT
from schema import wrong

LAUNCH = ROOT / "tools" / "launch"
DOCS = ROOT / "docs" / "pods.md"
RUN = ["--", "--config", "experiments/gpt_125m.py", "--workdir", "gs://bucket/x"]
POD = ["my-pod", "--zone=us-west4-a", "--type=v5litepod-16", "--spot", "--slices=2"]


def launched(name: str, *words: str, **environment: str) -> subprocess.CompletedProcess:
    line = [sys.executable, str(LAUNCH / name), *words]
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=os.environ | environment, timeout=LIMIT)


@functools.cache
def dry(name: str, step: str, *words: str) -> str:
    at = words.index("--") if "--" in words else len(words)
    result = launched(name, step, *words[:at], "--dry_run", *words[at:])
    assert result.returncode == 0, result.stderr
    return result.stdout


STEPS = {
    "up, one machine": ("tpu.py", "up", "one", "--zone=us-west4-a"),
    "up, two slices": ("tpu.py", "up", *POD),
    "up, a project and an image": (
        "tpu.py", "up", "one", "--zone=z", "--project=p", "--type=v4-8", "--version=tpu-vm-base",
    ),
    "run, two slices": ("tpu.py", "run", *POD, *RUN),
    "run, one machine": ("tpu.py", "run", "one", "--zone=z", "--", "--workdir=runs/x"),
    "follow": ("tpu.py", "follow", *POD),
    "fetch": ("tpu.py", "fetch", *POD, *RUN),
    "stop": ("tpu.py", "stop", *POD),
    "delete": ("tpu.py", "delete", *POD),
    "gke, run": (
        "gke.py", "run", "my-run", "--image=us-docker.pkg.dev/p/r/lm_jax", "--topology=4x4", "--slices=2", *RUN,
    ),
    "gke, follow": ("gke.py", "follow", "my-run"),
    "gke, delete": ("gke.py", "delete", "my-run"),
}  # fmt: skip
PINNED = (
    ROOT / "tests" / "launch_dry_runs.json"
)  # rewritten by `python tests/test_launch.py`, read before it is committed


@pytest.mark.parametrize("step", STEPS)
def test_a_dry_run_prints_exactly_what_would_run(step):
    assert dry(*STEPS[step]).splitlines() == json.loads(PINNED.read_text())[step]


def commands(text: str) -> list[list[str]]:
    """The lines of a dry run as words."""
    return [
        shlex.split(line, comments=True) for line in re.sub(r"<<'END'.*?END", "", text, flags=re.DOTALL).splitlines()
    ]


def test_every_script_for_a_worker_is_a_shells(tmp_path):
    scripts = [
        word.removeprefix("--command=")
        for step in STEPS.values()
        for line in commands(dry(*step))
        for word in line
        if word.startswith("--command=")
    ]
    assert len(scripts) >= 8
    for script in scripts:
        assert subprocess.run(["sh", "-n", "-c", script]).returncode == 0, script


FAKE = """#!/usr/bin/env python3
# gcloud with one machine: what it is asked is written down, scripts run here, states and ends of ssh are as in a list.
import json, os, pathlib, subprocess, sys
words, home = sys.argv[1:], pathlib.Path(os.environ["FAKE_HOME"])
verb = words[3] if words[0] == "compute" else "storage"
with open(home / "asked", "a") as file:
    file.write(verb + chr(10))
states = json.loads((home / "states").read_text())
if verb == "describe":
    print(states.pop(0) if states else "ACTIVE")
    (home / "states").write_text(json.dumps(states))
script = next((word.removeprefix("--command=") for word in words if word.startswith("--command=")), "")
if verb == "ssh" and "pip install" not in script:
    ends = json.loads((home / "ends").read_text())
    if "run.code" in script and "setsid" not in script and ends and ends.pop(0):
        (home / "ends").write_text(json.dumps(ends))
        sys.exit(255)
    (home / "ends").write_text(json.dumps(ends))
    sys.exit(subprocess.run(["sh", "-c", script], cwd=home).returncode)
"""
PYTHON = """#!/bin/sh
code=$(head -1 codes); sed -i 1d codes; echo "trained $*"; exit "$code"
"""


def looped(tmp_path, codes, states=(), ends=(), *more: str) -> tuple[subprocess.CompletedProcess, list[str]]:
    """`run` where the training leaves with `codes` one after another; what gcloud was asked for."""
    (tmp_path / "lm_jax" / ".venv" / "bin").mkdir(parents=True)
    for path, content in ((tmp_path / "gcloud", FAKE), (tmp_path / "lm_jax" / ".venv" / "bin" / "python", PYTHON)):
        path.write_text(content)
        path.chmod(0o755)
    (tmp_path / "lm_jax" / "codes").write_text("".join(f"{code}\n" for code in codes))
    (tmp_path / "states").write_text(json.dumps(list(states)))
    (tmp_path / "ends").write_text(json.dumps(list(ends)))
    shutil.copytree(LAUNCH, tmp_path / "clone" / "tools" / "launch")
    subprocess.run(["git", "init", "-q", str(tmp_path / "clone")], check=True)
    script = (tmp_path / "clone" / "tools" / "launch" / "pod.py").read_text()
    assert "POLL_SECONDS = 30" in script and "tail -n +1" in script
    quick = script.replace("POLL_SECONDS = 30", "POLL_SECONDS = 0.1").replace("tail -n +1", "tail -s 0.1 -n +1")
    (tmp_path / "clone" / "tools" / "launch" / "pod.py").write_text(quick)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "FAKE_HOME": str(tmp_path)}
    line = [sys.executable, "tools/launch/tpu.py", "run", "one", "--zone=z", *more, "--", "--workdir", "gs://b/a b"]
    result = subprocess.run(
        line, capture_output=True, text=True, cwd=tmp_path / "clone", env=environment, timeout=LIMIT
    )
    return result, (tmp_path / "asked").read_text().split()


ONCE, BROUGHT = ["ssh", "ssh"], ["storage", "storage"]
LOOPS = {  # codes of the training, states and lost connections -> the code of the launcher, and what was asked
    "done": ([0], [], [], 0, [*ONCE, *BROUGHT]),
    "a mistake": ([2], [], [], 2, [*ONCE, *BROUGHT]),
    "a refusal of the machine": ([74], [], [], 74, [*ONCE, *BROUGHT]),
    "a lost process, then done": ([70, 0], [], [], 0, [*ONCE, "ssh", *ONCE, *BROUGHT]),
    "stopped and saved twice": ([75, 75, 0], [], [], 0, [*ONCE, "ssh", *ONCE, "ssh", *ONCE, *BROUGHT]),
    "process 0 itself lost": ([137, 0], [], [], 0, [*ONCE, "ssh", *ONCE, *BROUGHT]),
    "a lost connection": ([0], ["ACTIVE"], [1], 0, ["ssh", "ssh", "describe", "ssh", *BROUGHT]),
    "preempted": (
        [0, 0], ["SUSPENDED", "", "WAITING_FOR_RESOURCES", "ACTIVE"], [1], 0,
        ["ssh", "ssh", "describe", "delete", "describe", "create", "describe", "describe", "scp", "ssh", *ONCE, *BROUGHT],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LOOPS)
def test_what_was_lost_is_started_again_and_a_mistake_is_not(case, tmp_path):
    codes, states, ends, code, asked = LOOPS[case]
    result, found = looped(tmp_path, codes, states, ends)
    assert (result.returncode, found) == (code, asked), result.stdout + result.stderr
    assert "trained -u -m lm_jax.main --workdir gs://b/a b" in result.stdout


def test_restarts_have_an_end(tmp_path):
    result, asked = looped(tmp_path, [70] * 9, (), (), "--restarts=2")
    assert result.returncode == 70 and asked == [*ONCE, "ssh", *ONCE, "ssh", *ONCE, *BROUGHT]


def test_a_run_that_is_asked_to_stop_leaves_its_own_code(tmp_path):
    """The scripts of `run`, `stop` and `follow`, on a training that saves when it is asked to."""
    python = tmp_path / "lm_jax" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\ntrap 'echo saved; exit 75' TERM\necho begins; while :; do sleep 0.1; done\n")
    python.chmod(0o755)
    on_worker = lambda step, k=0: [
        word[10:] for word in commands(dry(*STEPS[step]))[k] if word.startswith("--command=")
    ]
    (start,), (follow,), (stop,) = on_worker("run, two slices"), on_worker("follow"), on_worker("stop")
    subprocess.run(["sh", "-c", start], cwd=tmp_path, check=True, timeout=LIMIT)
    subprocess.run(["sh", "-c", stop], cwd=tmp_path, check=True, timeout=LIMIT)
    followed = subprocess.run(["sh", "-c", follow], cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT)
    assert followed.returncode == 75 and {"begins", "saved"} <= {*followed.stdout.splitlines()}, followed


MISTAKES = {
    "no words for the training": (("tpu.py", "run", *POD), "after --"),
    "no workdir": (("tpu.py", "run", *POD, "--", "--config", "x.py"), "--workdir"),
    "a disk that hosts do not share": (("tpu.py", "run", *POD, "--", "--workdir=runs/x"), "share no disk"),
    "no zone": (("tpu.py", "up", "x"), "--zone"),
    "no such step": (("tpu.py", "upp", "x", "--zone=z"), "upp"),
    "gke without an image": (("gke.py", "run", "x", *RUN), "--image"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_said_before_anything_runs(case):
    words, said = MISTAKES[case]
    result = launched(*words)
    assert result.returncode == 2 and said in result.stderr and result.stdout == ""


def test_the_script_for_slurm_says_what_it_would_run():
    line = ["bash", str(LAUNCH / "slurm.sbatch"), "--dry_run", "--config", "a b.py", "--workdir=/shared/x"]
    result = subprocess.run(line, capture_output=True, text=True, env={"PATH": os.environ["PATH"]})
    srun = "srun --mpi=none --kill-on-bad-exit=1 .venv/bin/python -u -m lm_jax.main"
    assert result.stdout == rf"{srun} --config a\ b.py --workdir=/shared/x " + "\n"
    assert subprocess.run(["bash", "-n", str(LAUNCH / "slurm.sbatch")]).returncode == 0
    alone = subprocess.run(line[:2], capture_output=True, text=True, env={"PATH": os.environ["PATH"]})
    assert alone.returncode == 2 and "not in a job of Slurm: sbatch" in alone.stderr


def filled(*words: str) -> dict:
    """The JobSet that a run on GKE applies."""
    return yaml.safe_load(dry("gke.py", "run", *words).split("<<'END'\n")[1].removesuffix("END\n"))


ODD = ["--", "--config", "a.py", '--config.evaluate.prompt=$HOME: "x" # {y}\n', "--workdir=gs://b/true"]
JOBSETS = {  # -> slices, hosts, chips of a host
    "one host": (("one", "--image=i", "--topology=2x2", *RUN), (1, 1, 4)),
    "part of a host": (("one", "--image=i", "--topology=1x1", "--chips=1", *RUN), (1, 1, 1)),
    "a slice": (("r", "--image=i", "--topology=4x4", *RUN), (1, 4, 4)),
    "slices of a v5p": (
        ("r", "--image=h:5/i@sha256:0", "--accelerator=tpu-v5p-slice", "--topology=2x2x4", "--slices=3", *RUN), (3, 4, 4),
    ),
    "odd words": (("r", "--image=i", *ODD), (1, 2, 4)),
}  # fmt: skip


@pytest.mark.parametrize("case", JOBSETS)
def test_a_jobset_is_as_its_schema_says(case):
    words, counts = JOBSETS[case]
    found = filled(*words)
    assert wrong(found, json.loads((ROOT / "tests" / "jobset_schema.json").read_text())) == []
    job = found["spec"]["replicatedJobs"][0]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    hosts = job["template"]["spec"]["parallelism"]
    assert (job["replicas"], hosts, container["resources"]["limits"]["google.com/tpu"]) == counts
    assert hosts == job["template"]["spec"]["completions"] and container["args"] == [*words[words.index("--") + 1 :]]


def test_the_schema_would_see_a_jobset_that_is_none():
    schema = json.loads((ROOT / "tests" / "jobset_schema.json").read_text())
    for change in ({"kind": "Job"}, {"metadata": {"name": "A_b"}}, {"spec": {}}, {"sepc": {}}):
        assert wrong(filled(*JOBSETS["a slice"][0]) | change, schema), change


def docs_commands() -> list[str]:
    """The lines in the code blocks of docs/pods.md that are commands."""
    blocks = re.findall(r"```\n(.*?)```", DOCS.read_text(), flags=re.DOTALL)
    return [
        line for block in blocks for line in block.splitlines() if re.match(r"python3|sbatch|docker|JAX_|tail", line)
    ]


def test_the_commands_of_the_docs_are_dry_runs_as_they_stand():
    run = [line for line in docs_commands() if "tools/launch/" in line and not line.startswith("docker")]
    assert len(run) == 12
    for line in run:
        pasted = re.sub(r"^sbatch --ntasks=2 (\S+)", r"bash \1 --dry_run", line)
        pasted = re.sub(r"( --(?= )|$)", r" --dry_run\1", pasted, count=1) if pasted == line else pasted
        result = subprocess.run(pasted, shell=True, capture_output=True, text=True, cwd=ROOT)
        assert result.returncode == 0 and result.stdout, (pasted, result.stderr)
        for experiment in re.findall(r"experiments/\w+\.py", line):
            assert (ROOT / experiment).exists(), experiment


SAID = [  # fragments of the table of errors, which the code says
    "never came within", "where nobody listens (yet)", "whose name is not known (yet)", "which does not answer",
    "which answers, but not to this run", "of this host is taken", "both say that they are process", "is one of",
    "there are no such machines now", "share no disk", "LM_JAX_JOIN_SECONDS", "JAX_COORDINATOR_PORT", "LM_JAX_RESTARTS",
    "is gone without a word", "is silent for", "cannot reach process 0 at", "all processes of a run need the same",
    "far longer than the last ones", "is not in the --workdir of",
]  # fmt: skip


@pytest.mark.parametrize("words", SAID)
def test_errors_of_the_docs_are_those_of_the_code(words):
    sources = [*(ROOT / "lm_jax").rglob("*.py"), *LAUNCH.iterdir()]
    assert words in DOCS.read_text() and any(words in path.read_text() for path in sources if path.is_file())


@(pytest.mark.proof if shutil.which("shellcheck") is None else lambda test: test)
def test_shellcheck_finds_nothing():
    assert shutil.which("shellcheck"), "apt install shellcheck"
    subprocess.run(["shellcheck", str(LAUNCH / "slurm.sbatch")], check=True)


@pytest.mark.proof
@pytest.mark.skipif(shutil.which("gcloud") is None, reason="gcloud is not installed")
def test_gcloud_has_every_flag_that_is_given_to_it():
    """Of the flags in all dry runs; what gcloud does with them costs money."""
    given: dict[tuple[str, ...], set[str]] = {}
    for step in STEPS.values():
        for line in commands(dry(*step)):
            if line[:1] == ["gcloud"]:
                length = 3 if line[1] == "storage" else 5
                flags = {word.split("=")[0] for word in line[length:] if word.startswith("--")}
                given.setdefault(tuple(line[:length]), set()).update(flags)
    assert len(given) == 7
    for command, flags in given.items():
        text = subprocess.run([*command, "--help"], capture_output=True, text=True, timeout=LIMIT).stdout
        assert not {flag for flag in flags if f"{flag}" not in re.sub(r"\x1b\[[0-9;]*m", "", text)}, command


if __name__ == "__main__":
    found = {step: dry(*words).splitlines() for step, words in STEPS.items()}
    pathlib.Path(PINNED).write_text(json.dumps(found, indent=1) + "\n")
