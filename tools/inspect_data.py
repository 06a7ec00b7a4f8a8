"""What the model is trained on: `python tools/inspect_data.py --config experiments/quickstart.py --step 100`.

Rows of a step (of a run that always had this config; `--model RUN`: of that run) as text: tokens that are trained on in green,
others grey; `¦` where a document starts; its source. Of a task whose answers are texts: a segment a line, what the model reads
grey, what it is to write green, special tokens by name.
`--statistics 1000` counts instead, over that many steps: rows, tokens and epochs by source against the weights.
"""

import sys

from lm_jax import cli, experiment
from lm_jax.plan.inspection import of_run, opened, show, statistics


def main(arguments: list[str]) -> int:
    overrides, rest = experiment.split_overrides(arguments)
    parser = cli.Parser("tools/inspect_data.py", __doc__)
    parser.add_argument("--config", help="an experiment file; it is executed")
    parser.add_argument("--model", default="", help="a run (runs/x): its config, and the rows that it left out")
    parser.add_argument("--step", type=int, default=0)
    parser.add_argument("--rows", type=int, default=4, help="rows of the step to show; 0 = all")
    parser.add_argument("--statistics", type=int, default=0, help="count over this many steps from --step on")
    flags = parser.parse_args(rest)
    if min(flags.step, flags.rows, flags.statistics) < 0:
        parser.error("--step, --rows and --statistics are at least 0")
    if bool(flags.config) == bool(flags.model) or (flags.model and overrides):
        parser.error("give --config with what is overridden in it, or --model")
    config, *data = of_run(flags.model) if flags.model else experiment.load_config(flags.config, overrides)[:1]
    mixed, stream, rows_of = opened(config, *data)
    rows = rows_of(flags.step, flags.step + max(1, flags.statistics))
    if flags.statistics:
        print("\n".join(statistics(mixed, stream, rows)))
        return 0
    for i in rows[: flags.rows or None]:
        print("\n".join(show(mixed, stream, i, sys.stdout.isatty())))
    return 0


if __name__ == "__main__":
    cli.run_command(main)
