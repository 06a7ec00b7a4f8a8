"""What the model is trained on: `python tools/inspect_data.py --config experiments/quickstart.py --step 100`.

Each row of the step (of a run that always had this config) as text: tokens that are trained on in green, others grey; `¦` where
a document starts; its source. Of a task whose answers are texts: a segment a line, what the model reads grey, what it is to
write green, special pieces by name.
`--statistics 1000` counts instead, over that many steps: rows, tokens and epochs by source against the weights.
"""

import itertools
import sys

import numpy as np

from lm_jax import cli, experiment
from lm_jax.batch_ramp import make_ramp, with_steps
from lm_jax.data import mixture
from lm_jax.data.tokenizer import DOCUMENT, Tokenizer, continuation
from lm_jax.open_data import open_data

TRAINED, REJECTED, OTHER, BORDER, PLAIN = "\x1b[32m", "\x1b[31m", "\x1b[90m", "\x1b[1;35m", "\x1b[0m"


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


def show(mixed: mixture.Mixture, stream: mixture.MixedRows, i: int, colours: bool) -> list[str]:
    """A row as a line on what it is and its text. Without colours, what is not trained on stands in [brackets]."""
    row, (source, j) = stream.row(i), stream.quotas.locate(i)
    epoch = j / stream.streams[source].rows_per_epoch
    used, segments = int((row["segment_ids"] > 0).sum()), int(row["segment_ids"].max())
    title = f"row {i:,}: {mixed.places[source]}, its row {j:,} (epoch {epoch:.2f}), {segments} segments, {used} tokens"
    if mixed.task and (mixed.task.writes or mixed.task.compares):
        return [title, *show_answers(mixed.tokenizer, row, colours), ""]
    starts = np.flatnonzero(np.diff(row["segment_ids"], prepend=0) + 1j * np.diff(row["loss_mask"], prepend=0))
    text, first = [], 0
    for start, stop in zip(starts, [*starts[1:], len(row["tokens"])], strict=True):
        if not row["segment_ids"][start]:
            continue
        new = start == 0 or row["segment_ids"][start] != row["segment_ids"][start - 1]
        first = start if new else first
        part = continuation(mixed.tokenizer, row["tokens"][first:start], row["tokens"][start:stop])
        trained = row["loss_mask"][start] > 0
        border = ("¦" if row["positions"][start] == 0 else "") * bool(new)
        if colours:
            text.append(f"{BORDER}{border}{TRAINED if trained else OTHER}{part}{PLAIN}")
        else:
            text.append(border + (part if trained else f"[{part}]"))
    return [title, "".join(text), ""]


def show_answers(tokenizer: Tokenizer, row: dict, colours: bool) -> list[str]:
    """The segments of a row of a task whose answers are texts: what is read, then every target, special pieces by their names;
    of a pair of answers the rejected one in red, or after a minus."""
    names = {index: name for name, index in tokenizer.special.items()} | {tokenizer.document_id: DOCUMENT}
    weight, lines = row.get("weight", row["loss_mask"]), []
    for segment in range(1, int(row["segment_ids"].max()) + 1):
        own = row["segment_ids"] == segment
        source = row["encoder_tokens"][row["encoder_segment_ids"] == segment] if "encoder_tokens" in row else []
        ids = np.concatenate([source, row["tokens"][own][:1], row["targets"][own]]).astype(int)
        trained = np.concatenate([np.zeros(len(source) + 1), np.sign(weight[own])])
        text = BORDER * colours + "¦"
        borders = [0, *(np.flatnonzero(np.diff(trained)) + 1), len(ids)]
        for start, stop in itertools.pairwise(borders):
            part = spelled(tokenizer, names, ids, start, stop)
            kind = int(trained[start])
            if colours:
                text += {0: OTHER, 1: TRAINED, -1: REJECTED}[kind] + part + PLAIN
            else:
                text += {0: f"[{part}]", 1: part, -1: f"-{part}"}[kind]
        lines.append(text)
    return lines


def spelled(tokenizer: Tokenizer, names: dict[int, str], ids: np.ndarray, start: int, stop: int) -> str:
    """What the ids [start, stop) add to the text before them, with the names of those that stand for none."""
    special = np.isin(ids[start:stop], list(names))
    borders = [start, *(start + 1 + np.flatnonzero(special[1:] | special[:-1])), stop]
    text = lambda a, b: names[ids[a]] if ids[a] in names else continuation(tokenizer, ids[:a], ids[a:b])
    return "".join(text(a, b) for a, b in itertools.pairwise(borders) if a < b)


def statistics(mixed: mixture.Mixture, stream: mixture.MixedRows, first: int, last: int) -> list[str]:
    """A table by source: its weight at the first of the rows, and what the rows [first, last) are made of, read one by one."""
    names = list(mixed.corpora)
    rows, trained, documents = (dict.fromkeys(names, 0) for _ in range(3))
    for i in range(first, last):
        row, name = stream.row(i), names[stream.quotas.locate(i)[0]]
        rows[name] += 1
        trained[name] += int(row["loss_mask"].sum())
        documents[name] += int(row["segment_ids"].max())
    stage = stream.quotas.weights[max(k for k, row in enumerate(stream.quotas.firsts) if row <= first)]
    lines = [f"rows {first:,} to {last:,}", f"{'source':<20}  weight    rows  off by  targets  segments a row"]
    for k, name in enumerate(names):
        weight, share = float(stage[k] / sum(stage)), rows[name] / (last - first)
        off = f"{100 * (share / weight - 1):+.2f}%" if weight else "-"
        each = documents[name] / max(1, rows[name])
        lines.append(f"{name:<20}  {weight:6.4f}  {share:6.4f}  {off:>6}  {trained[name]:>7,}  {each:.2f}")
    return lines


if __name__ == "__main__":
    cli.run_command(main)
