"""The rows of a step as text, by source; and a mixture counted against its weights: `tools/inspect_data.py` is the command."""

import itertools
from collections.abc import Callable

import numpy as np

from lm_jax import load_model, run_folder, step_folders
from lm_jax.batch_ramp import START, DataState, make_ramp
from lm_jax.config import Config
from lm_jax.data import mixed_rows, mixture
from lm_jax.data.tokenizer import DOCUMENT, Tokenizer, continuation
from lm_jax.errors import UserError
from lm_jax.open_data import open_data

TRAINED, REJECTED, OTHER, BORDER, PLAIN = "\x1b[32m", "\x1b[31m", "\x1b[90m", "\x1b[1;35m", "\x1b[0m"


def of_run(model: str) -> tuple[Config, DataState]:
    """The config of a run, and where it stands in its stream. Raises UserError, also where its data are not those any more."""
    found = load_model.locate(model)
    if found.described:
        raise UserError(f"--model {model}: a Hugging Face folder does not say what it was trained on")
    saved = run_folder.read_config(found.workdir)
    if different := run_folder.other_data(saved, open_data(found.config).facts):
        raise UserError(f"{model} was trained on other data:\n{run_folder.few(different)}")
    return found.config, step_folders.read_data_state(found.workdir, found.step)


def opened(config: Config, data: DataState = START) -> tuple[mixture.Mixture, mixed_rows.MixedRows, Callable]:
    """(data, stream, (first step, last step) -> the rows of these steps), of a run that has got as far as `data`."""
    mixed, ramp = open_data(config), make_ramp(config).through(data.step, data.cursor)
    stream = mixed.stream(config.data)
    row_at = mixed_rows.SkippingRows(stream, data.skipped).row_at
    return mixed, stream, lambda first, last: list(map(row_at, range(ramp.cursor(first), ramp.cursor(last))))


def show(mixed: mixture.Mixture, stream: mixed_rows.MixedRows, i: int, colours: bool) -> list[str]:
    """Row i as lines: what it is, and its text. Without colours, what is not trained on stands in [brackets]."""
    row, (source, j) = stream.row(i), stream.quotas.locate(i)
    epoch = j / stream.streams[source].rows_per_epoch
    used, segments = int((row["segment_ids"] > 0).sum()), int(row["segment_ids"].max())
    title = f"row {i:,}: {mixed.sources[source]}, its row {j:,} (epoch {epoch:.2f}), {segments} segments, {used} tokens"
    if mixed.task and (mixed.task.writes or mixed.task.compares):
        return [title, *_answers(mixed.tokenizer, row, colours), ""]
    starts = np.flatnonzero(np.diff(row["segment_ids"], prepend=0) + 1j * np.diff(row["loss_mask"], prepend=0)).tolist()
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


def _answers(tokenizer: Tokenizer, row: dict, colours: bool) -> list[str]:
    """The segments of a row of a task whose answers are texts: what is read, then every target, special tokens by name.

    Of a pair of answers the rejected one is red, or stands after a minus.
    """
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
            part = _spelled(tokenizer, names, ids, start, stop)
            kind = int(trained[start])
            if colours:
                text += {0: OTHER, 1: TRAINED, -1: REJECTED}[kind] + part + PLAIN
            else:
                text += {0: f"[{part}]", 1: part, -1: f"-{part}"}[kind]
        lines.append(text)
    return lines


def _spelled(tokenizer: Tokenizer, names: dict[int, str], ids: np.ndarray, start: int, stop: int) -> str:
    """The text that the ids [start, stop) add to the ids before them; special tokens appear by name."""
    special = np.isin(ids[start:stop], list(names))
    borders = [start, *(start + 1 + np.flatnonzero(special[1:] | special[:-1])), stop]
    text = lambda a, b: names[int(ids[a])] if ids[a] in names else continuation(tokenizer, ids[:a], ids[a:b])
    return "".join(text(a, b) for a, b in itertools.pairwise(borders) if a < b)


def statistics(mixed: mixture.Mixture, stream: mixed_rows.MixedRows, taken: list[int]) -> list[str]:
    """A table by source: its weight at the first of these rows, and its share of them, read one by one."""
    names, first = list(mixed.corpora), taken[0]
    rows, trained, documents = (dict.fromkeys(names, 0) for _ in range(3))
    for i in taken:
        row, name = stream.row(i), names[stream.quotas.locate(i)[0]]
        rows[name] += 1
        trained[name] += int(row["loss_mask"].sum())
        documents[name] += int(row["segment_ids"].max())
    shares = stream.quotas.shares(first)
    lines = [f"rows {first:,} to {taken[-1] + 1:,}", f"{'source':<20}  weight    rows  off by  targets  segments a row"]
    for k, name in enumerate(names):
        weight, share = shares[k], rows[name] / len(taken)
        off = f"{100 * (share / weight - 1):+.2f}%" if weight else "-"
        each = documents[name] / max(1, rows[name])
        lines.append(f"{name:<20}  {weight:6.4f}  {share:6.4f}  {off:>6}  {trained[name]:>7,}  {each:.2f}")
    return lines
