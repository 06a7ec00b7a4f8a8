"""The door: flags -> config -> devices -> train. `python -m lm_jax.main --config experiments/gpt_125m.py`."""

from lm_jax import cli, experiment

DEFAULT = "experiments/quickstart.py"


def main(arguments: list[str]) -> int:
    """Runs the command with its arguments. Returns the exit code; raises UserError."""
    overrides, rest = experiment.split_overrides(arguments)
    parser = cli.Parser("lm_jax.main", __doc__)
    parser.add_argument("--config", default=DEFAULT, help="an experiment file, file.py:variant; it is executed")
    parser.add_argument("--workdir", default="", help="default: runs/<experiment>[-<variant>]")
    parser.add_argument(
        "--print_config", action="store_true", help="show every value, where it came from and what it means"
    )
    parser.add_argument("--dry_run", action="store_true", help="stop after the checks and the header")
    parser.epilog = "--config.section.name=value overrides a value; --print_config lists them"
    flags = parser.parse_args(rest)
    workdir = flags.workdir or f"runs/{experiment.run_name(flags.config)}"
    config, origins = experiment.load_config(flags.config, overrides, workdir)
    if flags.print_config:
        print(experiment.table(config, origins))
        return 0
    from lm_jax import train  # after the flags: a mistake is answered before JAX wakes up

    return train.run(config, flags.config, flags.workdir, origins, flags.dry_run)


if __name__ == "__main__":
    cli.with_kept_memory()
    cli.run_command(main)
