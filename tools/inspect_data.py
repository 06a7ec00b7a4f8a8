"""What the model is trained on: `python tools/inspect_data.py --config experiments/quickstart.py --step 100`.

Each row of the step (of a run that always had this config) as text: tokens that are trained on in green, others grey; `¦` where
a document starts; its source. Of a task whose answers are texts: a segment a line, what the model reads grey, what it is to
write green, special tokens by name.
`--statistics 1000` counts instead, over that many steps: rows, tokens and epochs by source against the weights.
"""

import sys

from lm_jax import cli, experiment
from lm_jax.batch_ramp import make_ramp, with_steps
from lm_jax.open_data import open_data
from lm_jax.plan.inspection import show, statistics


def main(arguments: list[str]) -> int:
    overrides, rest = experiment.split_overrides(arguments)
    parser = cli.Parser("tools/inspect_data.py", __doc__)
    parser.add_argument("--config", required=True, help="an experiment file; it is executed")
    parser.add_argument("--step", type=int, default=0)
    parser.add_argument("--rows", type=int, default=4, help="rows of the step to show; 0 = all")
    parser.add_argument("--statistics", type=int, default=0, help="count over this many steps from --step on")
    flags = parser.parse_args(rest)
    if min(flags.step, flags.rows, flags.statistics) < 0:
        parser.error("--step, --rows and --statistics are at least 0")
    config, _ = experiment.load_config(flags.config, overrides)
    mixed = open_data(config)
    stream, ramp = mixed.stream(config.data), make_ramp(config)
    config = with_steps(config, ramp, stream.rows_per_epoch)
    first, last = ramp.cursor(flags.step), ramp.cursor(flags.step + max(1, flags.statistics))
    if flags.statistics:
        print("\n".join(statistics(mixed, stream, first, last)))
        return 0
    for i in range(first, min(last, first + flags.rows) if flags.rows else last):
        print("\n".join(show(mixed, stream, i, sys.stdout.isatty())))
    return 0


if __name__ == "__main__":
    cli.run_command(main)
