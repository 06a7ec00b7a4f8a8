"""The door: flags -> config -> devices -> train. `python -m lm_jax.main --config experiments/gpt_125m.py`."""

from lm_jax import cli, experiment
from lm_jax.config import Config, leaves

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
    config, origins = experiment.load_config(flags.config, overrides)
    if flags.print_config:
        print(table(config, origins))
        return 0
    from lm_jax import train  # after the flags: a mistake is answered before JAX wakes up

    return train.run(config, flags.config, flags.workdir, origins, flags.dry_run)


def table(config: Config, origins: dict[str, dict]) -> str:
    """One line a setting: path, value, where the value came from, meaning."""
    rows = []
    for path, field in leaves().items():
        section, name = path.split(".")
        value = getattr(getattr(config, section), name)
        rows.append((path, repr(value), origins.get(path, {}).get("from", "default"), field.metadata["meaning"]))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(f"{a:<{widths[0]}} = {b:<{widths[1]}}  {c:<{widths[2]}}  {d}" for a, b, c, d in rows)


if __name__ == "__main__":
    cli.with_kept_memory()
    cli.run_command(main)
