"""Runs side by side: `python tools/compare_runs.py runs/a runs/b [...] [--picture curves.png]`: curves, a table, and
where runs have results of the same records the paired test of the first against the others.

`--bytes page.html` instead: where the second of two MODELs beats the first, byte by byte, as a picture over a text."""

import os
import sys

from etils import epath

from lm_jax import cli, metrics_file, run_folder
from lm_jax.config import difference
from lm_jax.errors import UserError
from lm_jax.tasks import results
from lm_jax.trust import byte_page
from lm_jax.trust.comparison import draw, table


def main(arguments: list[str]) -> int:
    parser = cli.Parser("tools/compare_runs.py", __doc__)
    parser.add_argument("runs", nargs="+", help="work folders, such as runs/quickstart")
    parser.add_argument("--picture", default="compare_runs.png")
    parser.add_argument("--bytes", default="", help="an HTML page to write")
    parser.add_argument("--text", default="", help="a file; by default validation text of the first run")
    parser.add_argument("--num_bytes", type=int, default=20_000, help="of the text, at most")
    parser.reads({"bytes": ()}, "text", "num_bytes")
    flags = parser.parse_args(arguments)
    if flags.bytes:
        print(byte_page.write(flags.bytes, flags.runs, flags.text, flags.num_bytes))
        return 0
    short = [os.path.basename(path) for path in flags.runs]
    names = short if len({*short}) == len(short) else flags.runs
    runs = {name: metrics_file.read(epath.Path(path), print) for name, path in zip(names, flags.runs, strict=True)}
    if empty := [name for name, lines in runs.items() if not lines]:
        raise UserError(
            f"no metrics in {', '.join(empty)}: name the folder that holds metrics.jsonl, such as runs/quickstart"
        )
    print(table(runs))
    first, *others = (run_folder.read_config(epath.Path(path))["config"] for path in flags.runs)
    for path, other in zip(flags.runs[1:], others, strict=True):
        for key, (here, there) in difference(first, other).items():
            print(f"config.{key}: {here!r} in {flags.runs[0]}, {there!r} in {path}")
    base, *rest = map(epath.Path, flags.runs)
    for other in rest:
        for split in results.evaluated(base):
            if split in results.evaluated(other):
                print(results.compared(base, other, split))
    draw(runs, flags.picture)
    print(f"curves: {flags.picture}")
    return 0


if __name__ == "__main__":
    cli.run_command(main, sys.argv[1:])
