"""Speeds, each in a script of its own: `python tools/benchmark.py NAME [...]`; results belong into docs/benchmarks.md."""

import os
import runpy
import sys

from lm_jax import cli
from lm_jax.errors import UserError


def main(arguments: list[str]) -> int:
    here = os.path.dirname(os.path.abspath(__file__))
    known = sorted(name[10:-3] for name in os.listdir(here) if name.startswith("benchmark_") and name.endswith(".py"))
    if arguments[:1] == [] or arguments[0] not in known:
        raise UserError(f"python tools/benchmark.py {' '.join(arguments)}: name one of {', '.join(known)}")
    sys.argv = [f"benchmark {arguments[0]}", *arguments[1:]]
    runpy.run_path(os.path.join(here, f"benchmark_{arguments[0]}.py"), run_name="__main__")
    return 0


if __name__ == "__main__":
    cli.run_command(main, sys.argv[1:])
