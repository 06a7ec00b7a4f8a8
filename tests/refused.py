"""Commands one after another in one process, each while the system refuses something; as `one_process.py` performs them.

An audit hook refuses what Python opens, makes and renames, wherever it is done; limits of the process refuse what C++ writes.
"""

import json
import os
import pathlib
import resource
import subprocess
import sys
from contextlib import contextmanager
from functools import partial

from one_process import LIMIT, QUICK, ROOT, told

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir"}
READS = {"os.listdir", "os.scandir"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
now: dict = {}  # what is refused: {"part": of a path, "errno": 28, "reads": False}


def refuse(event: str, arguments: tuple) -> None:
    if not now or event not in EVENTS or not isinstance(arguments[0], (str, bytes, os.PathLike)):
        return
    path = os.fsdecode(arguments[0])
    reading = event in READS or (event == "open" and not arguments[2] & WRITES)
    if now["part"] in path and reading == now.get("reads", False):
        raise OSError(now["errno"], os.strerror(now["errno"]), path)


@contextmanager
def under(situation: dict):
    """The environment, the limits and what is refused, while a situation's command runs."""
    limits = {getattr(resource, name): value for name, value in situation.get("limits", {}).items()}
    before = {limit: resource.getrlimit(limit) for limit in limits}
    environment = dict(os.environ)
    os.environ.update(situation.get("environment", {}))
    for name in situation.get("unset", []):
        os.environ.pop(name, None)
    for limit, value in limits.items():
        open_now = len(os.listdir("/proc/self/fd")) if limit == resource.RLIMIT_NOFILE else 0
        resource.setrlimit(limit, (value + open_now, before[limit][1]))
    now.update(situation.get("refused", {}))
    yield
    now.clear()
    for limit, value in before.items():
        resource.setrlimit(limit, value)
    os.environ.clear()
    os.environ.update(environment)


def refused(situations: list[dict], folder: pathlib.Path, **environment: str) -> list[dict]:
    """What became of the situations, in their order."""
    given = {
        "PYTHONPATH": str(ROOT),
        "JAX_NUM_CPU_DEVICES": "1",
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=0",
        "XLA_FLAGS": QUICK,
    }
    line = [sys.executable, str(pathlib.Path(__file__))]
    result = subprocess.run(
        line, input=json.dumps(situations), capture_output=True, text=True, cwd=folder, timeout=LIMIT,
        env=os.environ | given | environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return [json.loads(line) for line in result.stdout.split("\n") if line.startswith("{")]


if __name__ == "__main__":
    sys.addaudithook(refuse)
    for situation in json.load(sys.stdin):
        print(json.dumps(told(situation["words"], partial(under, situation))), flush=True)
    os._exit(0)  # threads that still wait for what was refused are not waited for
