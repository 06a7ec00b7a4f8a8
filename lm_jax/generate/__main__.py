"""The door of `python -m lm_jax.generate`."""

from lm_jax import cli
from lm_jax.generate import command

if __name__ == "__main__":
    cli.run_command(command.main)
