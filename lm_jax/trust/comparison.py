"""Runs side by side: the last numbers of each as a table, and their curves as a picture."""

from lm_jax import metrics_file

CURVES = {"train/loss": "training loss, nats per token", "eval/bits_per_byte": "validation text, bits per byte"}
NUMBERS = ("train/loss", "eval/loss", "eval/bits_per_byte", "final/loss", "final/bits_per_byte", "perf/tokens_per_second",
           "perf/mfu")  # fmt: skip


def table(runs: dict[str, list[dict]]) -> str:
    """The last value of every number, one column a run, `-` where a run has none; steps and tokens first.

    `runs` are the lines of each run's metrics.jsonl, by the name that the run has in the table.
    """
    rows = [["", *runs]]
    rows.append(["steps", *(f"{lines[-1]['step']:,}" for lines in runs.values())])
    for scalar in ("train/tokens", *NUMBERS):
        last = [metrics_file.series(lines, scalar)[-1:] for lines in runs.values()]
        if any(last):
            rows.append([scalar, *(f"{value[0][1]:,.5g}" if value else "-" for value in last)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def draw(runs: dict[str, list[dict]], picture: str) -> None:
    """Writes a picture: one panel a curve that any run has, over tokens; a run without it is not in it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    _, panels = pyplot.subplots(1, len(CURVES), figsize=(5 * len(CURVES), 3.6), layout="constrained")
    for panel, (scalar, title) in zip(panels, CURVES.items(), strict=True):
        for run, lines in runs.items():
            tokens = dict(metrics_file.series(lines, "train/tokens"))
            points = [(tokens[step], value) for step, value in metrics_file.series(lines, scalar) if step in tokens]
            if points:
                panel.plot(*zip(*points, strict=True), label=run, linewidth=1.2)
        panel.set(xlabel="tokens", title=title)
        panel.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend()
    pyplot.savefig(picture, dpi=110)
