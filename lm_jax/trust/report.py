"""Runs as one page: HTML with its pictures and style inside, no script, nothing that is fetched.

Numbers and curves are those of `metrics.jsonl`, samples those of TensorBoard's files, where the time went is in `log.txt`.
"""

import html
import io
import re
from typing import NamedTuple

from etils import epath

from lm_jax import load_model, metrics_file, run_folder
from lm_jax.config import difference
from lm_jax.errors import UserError
from lm_jax.plan import counts
from lm_jax.plan.page import document, table
from lm_jax.train_state import make_program
from lm_jax.trust import comparison
from lm_jax.trust.card import hours, spent

STAMP = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ?")  # before every line of a log
MOST_SAMPLES = 6  # of a run: the first, the last, and those evenly between


class Shown(NamedTuple):
    """A run in a report."""

    name: str
    workdir: epath.Path
    lines: list[dict]  # of its metrics.jsonl
    log: str


def read(paths: list[str]) -> list[Shown]:
    """The runs of a report. Raises UserError where a folder has no metrics."""
    short = [epath.Path(path).name for path in paths]
    found = []
    for name, path in zip(short if len({*short}) == len(short) else paths, paths, strict=True):
        workdir, log = epath.Path(path), epath.Path(path) / "log.txt"
        lines = metrics_file.read(workdir, print)
        if not lines:
            raise UserError(f"no metrics in {path}: name the folder that holds metrics.jsonl, such as runs/quickstart")
        found.append(Shown(name, workdir, lines, log.read_text() if log.exists() else ""))
    return found


def report(runs: list[Shown], price: float = 0.0) -> str:
    """The page of runs; `price` of an hour of one device, in any currency (0: no cost is said)."""
    parts = [_numbers(runs), _curves(runs), _differences(runs), _costs(runs, price), _times(runs), _samples(runs)]
    return document("lm_jax: " + ", ".join(run.name for run in runs), "".join(parts))


def _escaped(rows: list[list[str]]) -> list[list[str]]:
    return [[html.escape(str(cell)) for cell in row] for row in rows]


def _numbers(runs: list[Shown]) -> str:
    head, *rows = comparison.rows({run.name: run.lines for run in runs})
    return "<h2>The last numbers</h2>" + table(_escaped([head])[0], _escaped(rows), len(runs))


def _curves(runs: list[Shown]) -> str:
    picture = io.StringIO()
    comparison.draw({run.name: run.lines for run in runs}, picture, comparison.OF_A_REPORT)
    svg = picture.getvalue()
    svg = re.sub(
        r'(<svg[^>]*) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*) height="[^"]*"', r"\1", svg[svg.index("<svg") :])
    )
    told = "training loss, bits per byte, gradient norm and speed over tokens"
    return f'<h2>Curves</h2><div class="paper" role="img" aria-label="{told}">{svg}</div>'


def _differences(runs: list[Shown]) -> str:
    """What was set, one column a run: what is not the default where there is one run, what differs where there are more."""
    configs = [run_folder.read_config(run.workdir) for run in runs]
    if len(runs) == 1:
        rows = [[path, configs[0]["config"].get(path)] for path in sorted(configs[0].get("origins", {}))]
        title = "Settings that are not by default"
    else:
        first, *others = (kept["config"] for kept in configs)
        paths = sorted({path for other in others for path in difference(first, other)})
        rows = [[path, *(kept["config"].get(path) for kept in configs)] for path in paths]
        title = "Settings that differ"
    shown = table(_escaped([["", *(run.name for run in runs)]])[0], _escaped(rows)) if rows else "<p>None.</p>"
    return f"<h2>{title}</h2>{shown}"


def _costs(runs: list[Shown], price: float) -> str:
    """Parameters, tokens, FLOPs and device-hours, one column a run."""
    columns: dict[str, dict[str, str]] = {}
    for run in runs:
        try:
            found = load_model.locate(str(run.workdir), print)
        except UserError as error:  # no step is saved yet, or it has parts of its own
            columns[run.name] = {"not counted": str(error).split("\n")[0]}
            continue
        counted = counts.count(found.config, make_program(found.config, found.vocab_size).graph.declarations)
        lines = [line for line in run.lines if line["step"] <= found.step]
        columns[run.name] = dict(spent(found, counted, lines))
        if price:
            columns[run.name]["cost"] = f"{price * hours(lines, run.log)[0]:,.2f}"
    whats = list(dict.fromkeys(what for column in columns.values() for what in column))
    rows = [[what, *(column.get(what, "") for column in columns.values())] for what in whats]
    return "<h2>What it cost</h2>" + table(_escaped([["", *columns]])[0], _escaped(rows))


def _times(runs: list[Shown]) -> str:
    """The log's tables of where the time went, one for each time that a run was started and came to its end or stopped."""
    parts = []
    for run in runs:
        lines, blocks = [STAMP.sub("", line) for line in run.log.splitlines()], []
        for i, line in enumerate(lines):
            if line.startswith("goodput "):
                after = next((j for j in range(i + 1, len(lines)) if not lines[j].startswith("  ")), len(lines))
                blocks.append("\n".join(lines[i:after]))
        told = f"<pre>{html.escape(chr(10).join(blocks))}</pre>" if blocks else "<p>Its log does not say it.</p>"
        parts.append(f"<h3>{html.escape(run.name)}</h3>{told}")
    return "<h2>Where the time went</h2>" + "".join(parts)


def _samples(runs: list[Shown]) -> str:
    parts = []
    for run in runs:
        found = samples(run.workdir)
        chosen = sorted(
            {round(i * (len(found) - 1) / (MOST_SAMPLES - 1)) for i in range(MOST_SAMPLES)} if found else {}
        )
        texts = [f"<h4>step {found[i][0]:,}</h4><pre>{html.escape(found[i][1])}</pre>" for i in chosen]
        parts.append(f"<h3>{html.escape(run.name)}</h3>{''.join(texts) or '<p>None.</p>'}")
    return "<h2>What it wrote</h2>" + "".join(parts)


def samples(workdir: epath.Path) -> list[tuple[int, str]]:
    """(step, text) of the samples in a run's event files, each step once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # half a second

    events = EventAccumulator(str(workdir / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    if "sample" not in events.Tags()["tensors"]:
        return []
    texts = {event.step: event.tensor_proto.string_val[0].decode() for event in events.Tensors("sample")}
    return [(step, re.sub("^    ", "", text, flags=re.MULTILINE)) for step, text in sorted(texts.items())]
