"""The card of a run, in the form that model hubs read.

Everything in it is read from the run: data and their hashes, tokens, FLOPs, hours, settings, what was evaluated. What only a
person knows (licence, use, what is known to be wrong) stands as a line to FILL IN.
"""

import json
import re

from lm_jax import load_model, metrics_file, run_folder, step_folders
from lm_jax.plan import counts
from lm_jax.train_state import make_program

# What a hub calls it; others: text-generation.
KINDS = {"encoder": "fill-mask", "encoder_decoder": "text2text-generation"}
TASKS = {"classification": "text-classification", "token_classification": "token-classification"}
TASKS |= {"question_answering": "question-answering", "text_to_text": "text2text-generation"}


def table(head: tuple[str, ...], rows) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (head, ("---",) * len(head), *rows))


def hours(lines: list[dict], log: str) -> tuple[float, str]:
    """(device-hours of the steps, the devices): seconds of the steps between two lines, times the devices of the last header."""
    seconds, before = 0.0, 0
    for line in lines:
        if "perf/step_seconds" in line:
            seconds += (line["step"] - before) * line["perf/step_seconds"]
            before = line["step"]
    found = re.findall(r"(?:this machine: )?([^\s]+) x(\d+), (?:about|time unknown)", log)
    name, num = found[-1] if found else ("unknown device", "1")
    return seconds / 3600 * (1 if name == "cpu" else int(num)), f"{name} x{num}"  # cores of a machine are one device


def evaluation(workdir, lines: list[dict]) -> str:
    """The scores of `results/<split>.json` with their intervals, else the last numbers of the training run."""
    rows = []
    for path in sorted(workdir.glob("results/*.json")):
        told = json.loads(path.read_text())
        for name, score in told["scores"].items():
            value, low, high = (f"{score[part]:.4f}" for part in score)
            rows.append((told["split"], told["records"], name, value, f"{low} to {high}"))
    if rows:
        return table(("split", "records", "measure", "value", "95% interval"), rows)
    last = {name: value for line in lines for name, value in line.items() if name.startswith("final/")}
    if not last:
        return "None yet: `python -m lm_jax.evaluate --model MODEL`."
    found = [("validation", name.removeprefix("final/"), f"{value:.4f}") for name, value in last.items()]
    return table(("split", "measure", "value"), found)


def spent(found: load_model.ModelRef, counted: counts.Costs, lines: list[dict]) -> list[tuple[str, str]]:
    """What the steps cost, as (what, how much)."""
    config, log = found.config, found.workdir / "log.txt"
    consumed = step_folders.read_data_state(found.workdir, found.step)
    tokens, dropped = (
        consumed.cursor * config.data.sequence_length,
        sum(last - first for first, last in consumed.skipped),
    )
    of_steps, device = hours(lines, log.read_text() if log.exists() else "")
    return [
        ("parameters", f"{counted.parameters:,}"),
        ("tokens seen", f"{tokens:,}" + f" ({dropped:,} rows left out)" * bool(dropped)),
        ("FLOPs, counted", f"{tokens * counted.flops_per_token:.2e}"),
        ("device-hours of steps", f"{of_steps:.2f} ({device})"),
        ("steps", f"{found.step:,}"),
        ("started from", config.train.init_from or "nothing"),
        *[
            (f"{' and '.join(own['replaced'])} of", f"{own['path']}, sha256 {own['sha256']}")
            for own in found.parts.record.values()
        ],
        ("longest text", f"{config.data.sequence_length} tokens"),
    ]


def card(found: load_model.ModelRef) -> str:
    """The card of a run, or of a step of it: Markdown with a head of YAML."""
    config, workdir, saved = found.config, found.workdir, run_folder.read_config(found.workdir)
    lines = [line for line in metrics_file.read(workdir, print) if line["step"] <= found.step]
    counted = counts.count(config, make_program(config, found.vocab_size, parts=found.parts).graph.declarations)
    task, data = config.train.task, config.data
    what = TASKS.get(task) or KINDS.get(config.model.kind, "text-generation")
    size, purpose = counts.short(counted.parameters), f" for {task}" if task else ""
    sources = [(source, weight, len(saved.get("shards", {}).get(source, {}))) for source, weight in data.sources]
    hashes = [(name, digest) for files in saved.get("shards", {}).values() for name, digest in sorted(files.items())]
    changed = [(path, f"`{saved['config'][path]}`") for path in sorted(saved.get("origins", {}))]
    return f"""---
license: other  # FILL IN: that of the data may bind the model too
library_name: lm_jax
pipeline_tag: {what}
---

# {workdir.name}

A model of kind `{config.model.kind}`, {size} parameters, trained with lm_jax{purpose}.

FILL IN: who made it, what it is for, and what it must not be used for.

## Data

{table(("source", "weight", "files"), sources)}

Split by content hash: {data.validation_fraction:.1%} validation, {data.test_fraction:.1%} test; equal texts never stand in two.
Tokenizer {found.tokenizer.fingerprint}, {found.tokenizer.vocab_size:,} pieces; data {saved.get("data", "unknown")}.

{table(("file", "sha256, first 16"), hashes)}

FILL IN: where each source comes from, its licence, and who is in it.

## Training

{table(("", ""), spent(found, counted, lines))}

What differs from the defaults of `lm_jax/config.py`:

{table(("key", "value"), changed)}

## Evaluation

{evaluation(workdir, lines)}

## Limits

It sees {data.sequence_length} tokens at a time and knows nothing that was not in its data. What it writes is likely, not true.
It may repeat texts that it saw often, and the proportions of its data.

FILL IN: what was tried and failed; groups and languages for which it works less well.
"""
