"""Many runs of one experiment over values of its settings, then a table and a picture.

python tools/sweep.py --config experiments/quickstart.py --over optimizer.learning_rate=1e-3,3e-3 --over model.num_layers=2,4
python tools/sweep.py --config experiments/quickstart.py --over optimizer.learning_rate=1e-4..1e-2:log --trials 20
The same command goes on where it was stopped. Flags that it does not know are given to every run.
"""

import subprocess
import sys

from etils import epath

from lm_jax import cli
from lm_jax.experiment import run_name
from lm_jax.stop import EXIT_PREEMPTED
from lm_jax.trust.sweep import Sweep, grid, parse, proposed


def main(arguments: list[str]) -> int:
    parser = cli.Parser("tools/sweep.py", __doc__)
    parser.add_argument("--config", default="experiments/quickstart.py")
    parser.add_argument(
        "--over", action="append", default=[], help="KEY=VALUE,VALUE,... or, with --trials, KEY=LOW..HIGH[:log]"
    )
    parser.add_argument(
        "--trials", type=int, default=0, help="so many runs that Optuna chooses; without it the whole grid"
    )
    parser.add_argument("--measure", default="final/loss", help="a number of metrics.jsonl")
    parser.add_argument("--maximise", action="store_true", help="the largest is best, such as of an accuracy")
    parser.add_argument("--workdir", default="", help="of the sweep; by default runs/<experiment>-sweep")
    flags, more = parser.parse_known_args(arguments)
    folder = epath.Path(flags.workdir or f"runs/{run_name(flags.config)}-sweep")
    over = parse(flags.over)
    run = lambda words: subprocess.run([sys.executable, "-m", "lm_jax.main", *words]).returncode
    sweep = Sweep(folder, ["--config", flags.config, *more], flags.measure, flags.maximise, run)
    for values in proposed(over, sweep, flags.trials) if flags.trials else grid(over):
        if sweep.trial(values).code == EXIT_PREEMPTED:
            print("stopped; the same command goes on from there")
            return EXIT_PREEMPTED
    print(sweep.table())
    sweep.draw(str(folder / "sweep.png"))
    print(f"picture: {folder / 'sweep.png'}")
    return 0 if any(trial.measure is not None for trial in sweep.trials) else cli.EXIT_USER


if __name__ == "__main__":
    cli.run_command(main, sys.argv[1:])
