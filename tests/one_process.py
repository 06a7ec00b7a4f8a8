"""Commands one after another in a process of their own: imported once, compiled fast, each with its exit code and output."""

import gc
import json
import os
import pathlib
import runpy
import subprocess
import sys
import traceback
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from importlib.metadata import version
from io import StringIO

ROOT = pathlib.Path(__file__).parent.parent
# Seconds after which a process counts as one that hangs. Far above what a starved machine needs: no promise of speed.
LIMIT = 1800
# Of jaxlib 0.10, another one may not know it: fewer passes before a program is compiled, the same bits (docs/notebook.md).
PRESET = " --xla_cpu_opt_preset=FAST_COMPILE" * version("jaxlib").startswith("0.10.")
# Nothing runs long: compile fast.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true" + PRESET


def performed(commands: list[list[str]], folder: pathlib.Path) -> list[dict]:
    """[{"code": ..., "output": ...}] of commands (words after `python`), run in `folder` on one device."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_NUM_CPU_DEVICES": "1",
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=0",  # set: so that no command starts itself anew
        "XLA_FLAGS": QUICK,
    }
    line = [sys.executable, str(pathlib.Path(__file__)), json.dumps(commands)]
    result = subprocess.run(line, capture_output=True, text=True, env=environment, cwd=folder, timeout=LIMIT)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return json.loads(result.stdout)


def perform(words: list[str]) -> int:
    """A command in this process. Returns its exit code."""
    sys.argv = words[1:] if words[0] == "-m" else words
    try:
        if words[0] == "-c":
            exec(compile(words[1], "command", "exec"), {})
        elif words[0] == "-m":
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(
                0, os.path.dirname(os.path.abspath(words[0]))
            )  # as Python does: a tool may import its neighbour
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    except Exception:  # the next command is performed all the same
        traceback.print_exc()
        return 1
    return 0


def told(words: list[str], around=nullcontext) -> dict:
    """{"code": ..., "output": ...} of a command in this process, performed inside the context `around`."""
    with redirect_stdout(StringIO()) as out, redirect_stderr(out), around():
        code = perform(words)
    with redirect_stderr(StringIO()):
        gc.collect()  # what a refused command leaves half made would be told in the next one's output
    return {"code": code, "output": out.getvalue()}


if __name__ == "__main__":
    gc.set_threshold(50_000, 10, 10)
    print(json.dumps([told(words) for words in json.loads(sys.argv[1])]))
