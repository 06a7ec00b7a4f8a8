"""Runs side by side: the last numbers of each as a table, and their curves as a picture."""

from collections.abc import Mapping
from typing import IO

from lm_jax import metrics_file

CURVES = {"train/loss": "training loss, nats per token", "eval/bits_per_byte": "validation text, bits per byte"}
OF_A_REPORT = CURVES | {"train/grad_norm": "gradient norm", "perf/tokens_per_second": "tokens a second"}
NUMBERS = ("train/loss", "eval/loss", "eval/bits_per_byte", "final/loss", "final/bits_per_byte", "perf/tokens_per_second",
           "perf/mfu")  # fmt: skip


def rows(runs: dict[str, list[dict]]) -> list[list[str]]:
    """The last value of every number, one column a run, `-` where a run has none; the names, then steps and tokens first.

    `runs` are the lines of each run's metrics.jsonl, by the name that the run has in the table.
    """
    found = [["", *runs]]
    found.append(["steps", *(f"{lines[-1]['step']:,}" for lines in runs.values())])
    for scalar in ("train/tokens", *NUMBERS):
        last = [metrics_file.series(lines, scalar)[-1:] for lines in runs.values()]
        if any(last):
            found.append([scalar, *(f"{value[0][1]:,.5g}" if value else "-" for value in last)])
    return found


def table(runs: dict[str, list[dict]]) -> str:
    """The same as text, in columns."""
    return aligned(rows(runs))


def aligned(found: list[list[str]]) -> str:
    """Rows as text, in columns."""
    widths = [max(len(row[i]) for row in found) for i in range(len(found[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in found)


def draw(runs: dict[str, list[dict]], picture: str | IO, curves: Mapping[str, str] = CURVES) -> None:
    """Writes a picture (a path, or a file that gets SVG): one panel a curve, two in a row, over tokens.

    A run that does not have a curve is not in its panel.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    num = -(-len(curves) // 2)
    figure, grid = pyplot.subplots(num, 2, figsize=(10, 3.6 * num), layout="constrained")
    panels = grid.flat
    for panel, (scalar, title) in zip(panels, curves.items(), strict=True):
        for run, lines in runs.items():
            tokens = dict(metrics_file.series(lines, "train/tokens"))
            points = [(tokens[step], value) for step, value in metrics_file.series(lines, scalar) if step in tokens]
            if points:
                panel.plot(*zip(*points, strict=True), label=run, linewidth=1.2)
        panel.set(xlabel="tokens", title=title)
        panel.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend()
    figure.savefig(picture, dpi=110, format="png" if isinstance(picture, str) else "svg")
    pyplot.close(figure)
