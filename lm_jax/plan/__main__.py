"""The door of `python -m lm_jax.plan`."""

from lm_jax import cli
from lm_jax.plan import command

if __name__ == "__main__":
    cli.run_command(command.main)
