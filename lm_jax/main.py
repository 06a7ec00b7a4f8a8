"""The door: flags -> config -> devices -> train. `python -m lm_jax.main --config experiments/gpt_125m.py`."""

from typing import Any

from lm_jax import cli, experiment

DEFAULT = "experiments/quickstart.py"


def main(arguments: list[str]) -> int:
    """Runs the command with its arguments. Returns the exit code; raises UserError."""
    if "--json" not in arguments:
        return trained(arguments)
    from lm_jax.summary import Summary

    with Summary().at_the_end() as summary:
        return summary.done(trained(arguments, summary))


def trained(arguments: list[str], summary: Any = None) -> int:
    """The command; `summary`, a `Summary` or None, is told what is known of the run."""
    overrides, rest = experiment.split_overrides(arguments)
    parser = cli.Parser("lm_jax.main", __doc__)
    parser.add_argument("--config", default=DEFAULT, help="an experiment file, file.py:variant; it is executed")
    parser.add_argument("--workdir", default="", help="default: runs/<experiment>[-<variant>]")
    parser.add_argument(
        "--print_config", action="store_true", help="show every value, where it came from and what it means"
    )
    parser.add_argument("--dry_run", action="store_true", help="stop after the checks and the header")
    parser.add_argument("--json", action="store_true", help="the last line says what came out, as one JSON object")
    parser.epilog = "--config.section.name=value overrides a value; --print_config lists them"
    flags = parser.parse_args(rest)
    workdir = flags.workdir or f"runs/{experiment.run_name(flags.config)}"
    config, origins = experiment.load_config(flags.config, overrides, workdir)
    if summary:
        summary.config, summary.dry_run = config, flags.dry_run or flags.print_config
    if flags.print_config:
        print(experiment.table(config, origins))
        return 0
    from lm_jax import train  # after the flags: a mistake is answered before JAX wakes up

    return train.run(config, flags.config, flags.workdir, origins, flags.dry_run, summary=summary)


if __name__ == "__main__":
    cli.with_kept_memory()
    cli.run_command(main)
