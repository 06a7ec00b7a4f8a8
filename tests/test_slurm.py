"""Slurm, really: its daemons on this machine, `sbatch tools/launch/slurm.sbatch`, and a job that is queued again."""

import contextlib
import getpass
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from helpers import LIMIT, ROOT, assert_same_run, free_port

SCRIPT = str(ROOT / "tools" / "launch" / "slurm.sbatch")
TRAIN = [
    "--config", "experiments/quickstart.py:smoke", "--config.train.num_steps=40", "--config.checkpoint.every=4",
    "--config.evaluate.every=8", "--config.evaluate.prompt=",
]  # fmt: skip

pytestmark = [
    pytest.mark.proof,
    pytest.mark.skipif(shutil.which("slurmctld") is None, reason="Slurm is not installed: apt install slurm-wlm munge"),
]


def conf(folder: pathlib.Path) -> str:
    host, user = socket.gethostname().split(".")[0], getpass.getuser()
    return f"""
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={free_port()}
SlurmdPort={free_port()}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
JobRequeue=1
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName={host} NodeAddr=127.0.0.1 CPUs={os.cpu_count()} State=UNKNOWN
PartitionName=all Nodes={host} Default=YES State=UP
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[dict[str, str]]:
    """A cluster of this machine, and the environment in which its commands find it."""
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "slurm.conf").write_text(conf(folder))
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    places = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    daemons = [
        ["munged", "--force", "--foreground", f"--socket={folder}/munge.socket", *places],
        ["slurmctld", "-D", "-f", str(folder / "slurm.conf")],
        ["slurmd", "-D", "-f", str(folder / "slurm.conf")],
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "JAX_NUM"))}
    environment |= {"SLURM_CONF": str(folder / "slurm.conf"), "PYTHONPATH": str(ROOT), "LM_JAX_PYTHON": sys.executable}
    environment |= {"JAX_NUM_CPU_DEVICES": "1"}
    with contextlib.ExitStack() as stack:
        for line in daemons:
            path = shutil.which(line[0], path=os.environ["PATH"] + ":/usr/sbin")
            assert path is not None, f"{line[0]} is not installed"
            process = stack.enter_context(
                subprocess.Popen([path, *line[1:]], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            )
            stack.callback(process.terminate)
            time.sleep(1)
        wait_until(lambda: "idle" in said(environment, "sinfo", "-h"))
        yield environment


def said(environment: dict[str, str], *line: str) -> str:
    return subprocess.run(line, env=environment, capture_output=True, text=True, cwd=ROOT, timeout=LIMIT).stdout


def wait_until(condition) -> None:
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.5)


def submit(slurm: dict[str, str], log: pathlib.Path, workdir: pathlib.Path) -> str:
    """The number of a job of two tasks that trains."""
    line = ["sbatch", "--parsable", "-n", "2", "-o", str(log), SCRIPT, *TRAIN, "--workdir", str(workdir)]
    return said(slurm, *line).strip()


def test_a_job_that_is_queued_again_ends_as_one_that_nobody_touched(slurm, tmp_path):
    jobs = {name: submit(slurm, tmp_path / f"{name}.log", tmp_path / name) for name in ("whole", "again")}
    wait_until(lambda: (tmp_path / "again" / "checkpoints" / "8" / "MANIFEST.json").exists())
    said(slurm, "scontrol", "requeue", jobs["again"])
    wait_until(lambda: "PENDING" in said(slurm, "scontrol", "show", "job", jobs["again"]))
    said(slurm, "scontrol", "update", f"JobId={jobs['again']}", "StartTime=now")  # Slurm would wait two minutes
    wait_until(lambda: not said(slurm, "squeue", "-h"))
    logs = {name: (tmp_path / f"{name}.log").read_text() for name in jobs}
    assert all(f"2 processes on 1 host, 2 devices (job {jobs[name]} of Slurm)" in log for name, log in logs.items()), (
        logs
    )
    assert "resumed at step" in logs["again"] and "resumed" not in logs["whole"]
    assert all("COMPLETED" in said(slurm, "scontrol", "show", "job", job) for job in jobs.values()), logs
    assert_same_run(tmp_path / "again", tmp_path / "whole")


PLACES = {  # words of Slurm -> processes of the job that a command in it belongs to
    "a step of two tasks": (["srun", "-n", "2"], 2),
    "a step of one task": (["srun", "-n", "1"], 0),
    "the shell of salloc": (["salloc", "-n", "2"], 0),
    "a step inside an allocation": (["salloc", "-n", "2", "srun"], 2),
    "one task inside an allocation of two": (["salloc", "-n", "2", "srun", "-n", "1"], 0),
}


@pytest.mark.parametrize("place", PLACES)
def test_only_the_tasks_of_a_step_are_several_processes(place, slurm):
    words, expected = PLACES[place]
    asked = "from lm_jax.multihost import cluster; f = cluster.find(); print(f.num_processes if f else 0)"
    assert set(said(slurm, *words, sys.executable, "-c", asked).split()) == {str(expected)}


def test_the_script_of_sbatch_is_one_process(slurm, tmp_path):
    script = tmp_path / "script.sh"
    script.write_text(f"#!/bin/sh\n{sys.executable} -c 'from lm_jax.multihost import cluster; print(cluster.find())'\n")
    said(slurm, "sbatch", "--wait", "-n", "2", "-o", str(tmp_path / "log"), str(script))
    assert (tmp_path / "log").read_text() == "None\n"


def test_a_job_that_goes_on_failing_is_not_queued_for_ever(slurm, tmp_path):
    """70 and 75 are queued again, a mistake is not; LM_JAX_RESTARTS is how often."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho $SLURM_RESTART_COUNT >> {tmp_path}/starts.$SLURM_PROCID; exit $CODE\n")
    python.chmod(0o755)
    for code, starts in (("2", 1), ("70", 2), ("75", 2), ("0", 1)):
        for process in (0, 1):
            (tmp_path / f"starts.{process}").unlink(missing_ok=True)
        environment = slurm | {"LM_JAX_PYTHON": str(python), "CODE": code, "LM_JAX_RESTARTS": "1"}
        job = said(environment, "sbatch", "--parsable", "-n", "2", "-o", str(tmp_path / "log"), SCRIPT).strip()
        end = lambda job=job: not said(slurm, "squeue", "-h", "-j", job).strip()
        hurry = lambda job=job: said(slurm, "scontrol", "update", f"JobId={job}", "StartTime=now")
        wait_until(lambda hurry=hurry, end=end: (hurry(), end())[1])
        assert len((tmp_path / "starts.0").read_text().splitlines()) == starts, code
