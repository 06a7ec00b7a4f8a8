"""Runs side by side: `python tools/compare_runs.py runs/a runs/b [...] [--picture curves.png]`: curves, a table, and
where runs have results of the same records the paired test of the first against the others."""

import os
import sys

import matplotlib
from etils import epath

from lm_jax import cli, metrics_file, run_folder
from lm_jax.config import difference
from lm_jax.errors import UserError
from lm_jax.tasks import results

matplotlib.use("Agg")
from matplotlib import pyplot, ticker  # noqa: E402

CURVES = {"train/loss": "training loss, nats per token", "eval/bits_per_byte": "validation text, bits per byte"}
NUMBERS = ("train/loss", "eval/loss", "eval/bits_per_byte", "final/loss", "final/bits_per_byte", "perf/tokens_per_second",
           "perf/mfu")  # fmt: skip


def draw(runs: dict[str, list[dict]], picture: str) -> None:
    """One panel a curve that any run has, over tokens; a run without it is not in it."""
    _, panels = pyplot.subplots(1, len(CURVES), figsize=(5 * len(CURVES), 3.6), layout="constrained")
    for panel, (scalar, title) in zip(panels, CURVES.items(), strict=True):
        tokens = {run: dict(metrics_file.series(lines, "train/tokens")) for run, lines in runs.items()}
        for run, lines in runs.items():
            points = [
                (tokens[run][step], value) for step, value in metrics_file.series(lines, scalar) if step in tokens[run]
            ]
            if points:
                panel.plot(*zip(*points, strict=True), label=run, linewidth=1.2)
        panel.set(xlabel="tokens", title=title)
        panel.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend()
    pyplot.savefig(picture, dpi=110)


def table(runs: dict[str, list[dict]]) -> str:
    """The last value of every number, one column a run, `-` where a run has none; steps and tokens first."""
    rows = [["", *runs]]
    rows.append(["steps", *(f"{lines[-1]['step']:,}" for lines in runs.values())])
    for scalar in ("train/tokens", *NUMBERS):
        last = [metrics_file.series(lines, scalar)[-1:] for lines in runs.values()]
        if any(last):
            rows.append([scalar, *(f"{value[0][1]:,.5g}" if value else "-" for value in last)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def main(arguments: list[str]) -> int:
    parser = cli.Parser("tools/compare_runs.py", __doc__)
    parser.add_argument("runs", nargs="+", help="work folders, such as runs/quickstart")
    parser.add_argument("--picture", default="compare_runs.png")
    flags = parser.parse_args(arguments)
    names = (
        flags.runs
        if len(set(map(os.path.basename, flags.runs))) < len(flags.runs)
        else map(os.path.basename, flags.runs)
    )
    runs = {name: metrics_file.read(epath.Path(place), print) for name, place in zip(names, flags.runs, strict=True)}
    if empty := [name for name, lines in runs.items() if not lines]:
        raise UserError(
            f"no metrics in {', '.join(empty)}: name the folder that holds metrics.jsonl, such as runs/quickstart"
        )
    print(table(runs))
    first, *others = (run_folder.read_config(epath.Path(place))["config"] for place in flags.runs)
    for place, other in zip(flags.runs[1:], others, strict=True):
        for path, (here, there) in difference(first, other).items():
            print(f"config.{path}: {here!r} in {flags.runs[0]}, {there!r} in {place}")
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
