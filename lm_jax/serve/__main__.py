"""The door of `python -m lm_jax.serve`."""

import importlib.util

from lm_jax import cli
from lm_jax.errors import needs


def main(arguments: list[str]) -> int:
    """The command, where what it needs is installed. Raises UserError."""
    for package in ("starlette", "uvicorn", "prometheus_client"):
        if not importlib.util.find_spec(package):
            raise needs("python -m lm_jax.serve", package, "serve")
    from lm_jax.serve import command

    return command.main(arguments)


if __name__ == "__main__":
    cli.run_command(main)
