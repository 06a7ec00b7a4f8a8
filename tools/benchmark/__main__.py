"""Speeds, each in a script of its own: `python tools/benchmark NAME [...]`; results belong into docs/benchmarks.md."""

import pathlib
import runpy
import sys

from lm_jax import cli
from lm_jax.errors import UserError


def main(arguments: list[str]) -> int:
    here = pathlib.Path(__file__).parent
    known = sorted(path.stem for path in here.glob("*.py") if path.stem != "__main__")
    if arguments[:1] == [] or arguments[0] not in known:
        raise UserError(f"python tools/benchmark {' '.join(arguments)}: name one of {', '.join(known)}")
    sys.argv = [f"benchmark {arguments[0]}", *arguments[1:]]
    runpy.run_path(str(here / f"{arguments[0]}.py"), run_name="__main__")
    return 0


if __name__ == "__main__":
    cli.run_command(main, sys.argv[1:])
