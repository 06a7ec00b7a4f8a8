"""Results of an evaluation, record by record, and what follows from them: scores with intervals, and two systems compared.

<workdir>/results/<split>.jsonl  a line a record: {"record": ..., "truth": ..., "prediction": ..., "score": ...}
<workdir>/results/<split>.json   what it is of, and every score with its 95% interval;  <split>.md  the same as a table
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from etils import epath

from lm_jax.errors import UserError, nearest
from lm_jax.files import sealed, unsealed, write_whole
from lm_jax.regular_files import read_bytes
from lm_jax.tasks.scores import KINDS, RESAMPLES, Difference, Measure, calibration, intervals, paired, values


class Result(NamedTuple):
    """The truth and a model's prediction of one record, as `scores.KINDS[kind]` takes them."""

    record: str  # what names it in every run: a hash of its content, or its file and line
    truth: Any
    prediction: Any
    confidence: float | None = None  # the probability that the model gave to its prediction


def measures_of(kind: str, results: Sequence[Result]) -> dict[str, Measure]:
    """All measures of a kind; of labels with a confidence each, the calibration error too."""
    pairs = [result.truth for result in results], [result.prediction for result in results]
    found = KINDS[kind](*pairs)
    confidences = [result.confidence for result in results if result.confidence is not None]
    if kind == "labels" and len(confidences) == len(results):
        found |= calibration(confidences, [truth == prediction for truth, prediction in zip(*pairs, strict=True)])
    return found


def scores_of(kind: str, results: Sequence[Result]) -> dict[str, float]:
    """The scores of a kind. Raises UserError where the package that counts them is missing."""
    return values(measures_of(kind, results), len(results))


def write(
    workdir: epath.Path, split: str, kind: str, results: Sequence[Result], about: dict[str, Any], seed: int = 0
) -> dict[str, float]:
    """Writes the three files, and returns the scores by name; `about` says what was evaluated (model, step).

    A record's `score` is the kind's first measure of it alone; its confidence is kept where it is one in a label.
    Raises UserError where a measure's package is missing.
    """
    assert results, "an evaluation has records"
    results = results if kind == "labels" else [result._replace(confidence=None) for result in results]
    measures = measures_of(kind, results)
    found = intervals(measures, len(results), seed)
    alone_N = next(iter(measures.values())).alone_N
    scores = [None] * len(results) if alone_N is None else alone_N.tolist()
    lines = [
        {name: value for name, value in result._asdict().items() if value is not None} | {"score": score}
        for result, score in zip(results, scores, strict=True)
    ]
    plain = lambda value: value.tolist()  # numbers and arrays of numpy
    text = "".join(json.dumps(line, default=plain, ensure_ascii=False) + "\n" for line in lines)
    summary = about | {
        "format": 2,
        "split": split,
        "kind": kind,
        "records": len(results),
        "lines": hashlib.sha256(text.encode()).hexdigest(),
        "bootstrap": {"resamples": RESAMPLES, "seed": seed, "share": 0.95},
        "scores": {name: interval._asdict() for name, interval in found.items()},
    }
    rows = [[name, *(f"{value:.4f}" for value in interval)] for name, interval in found.items()]
    title = ", ".join(f"{name} {value}" for name, value in (about | {"split": split}).items())
    page = (
        f"{title}: {len(results):,} records; intervals hold 95% of {RESAMPLES:,} resamples of them\n\n"
        + markdown(["", "score", "from", "to"], rows)
        + "\n"
    )
    folder = workdir / "results"
    folder.mkdir(parents=True, exist_ok=True)
    summary = json.loads(json.dumps(summary, default=plain))
    for ending, content in (("jsonl", text.encode()), ("md", page.encode()), ("json", sealed(summary))):
        write_whole(folder / f"{split}.{ending}", content)
    return {name: interval.value for name, interval in found.items()}


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table whose first column is words and whose others are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def read(workdir: epath.Path, split: str) -> tuple[str, list[Result]]:
    """(kind, results) of an evaluated split. Raises UserError where there are none or a line cannot be read."""
    path = workdir / "results" / f"{split}.jsonl"
    try:
        summary, raw = unsealed(read_bytes(workdir / "results" / f"{split}.json"), first=2), read_bytes(path)
        if summary.get("lines", "") not in ("", hashlib.sha256(raw).hexdigest()):
            raise ValueError("it is not as it was written")
        kind, lines = summary["kind"], [json.loads(line) for line in raw.split(b"\n") if line]
        results = [Result(x["record"], x["truth"], x["prediction"], x.get("confidence")) for x in lines]
    except FileNotFoundError:
        raise UserError(f"no results of the {split} split in {workdir}: evaluate it first") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {error}): evaluate once more") from None
    if kind not in KINDS:
        raise UserError(f"{path}: kind {kind!r} is none of {', '.join(KINDS)}{nearest(str(kind), KINDS)}")
    return kind, results


def evaluated(workdir: epath.Path) -> list[str]:
    """The splits that have results."""
    return sorted(path.name.removesuffix(".jsonl") for path in (workdir / "results").glob("*.jsonl"))


def compare(first: epath.Path, second: epath.Path, split: str, seed: int = 0) -> dict[str, Difference]:
    """The paired test of two runs on the same records. Raises UserError where their records differ."""
    (kind, ours), (other_kind, theirs) = read(first, split), read(second, split)
    ours, theirs = (sorted(results, key=lambda result: str(result.record)) for results in (ours, theirs))
    if kind != other_kind or len(ours) != len(theirs):
        raise UserError(
            f"results of the {split} split: {len(ours):,} {kind} in {first}, {len(theirs):,} {other_kind} in {second}:\n"
            "a paired test needs the same records; evaluate both on the same data"
        )
    for a, b in zip(ours, theirs, strict=True):
        if (a.record, a.truth) != (b.record, b.truth):
            raise UserError(
                f"results of the {split} split: record {a.record} with truth {str(a.truth)[:60]!r} in {first},\n"
                f"{b.record} with {str(b.truth)[:60]!r} in {second}:\n"
                "a paired test needs the same records; evaluate both on the same data"
            )
    return paired(measures_of(kind, ours), measures_of(kind, theirs), len(ours), seed)


def compared(first: epath.Path, second: epath.Path, split: str, seed: int = 0) -> str:
    """`compare` as a Markdown table under one line that says what was tested."""
    found = compare(first, second, split, seed)
    rows = [
        [name, f"{d.first:.4f}", f"{d.second:.4f}", f"{d.second - d.first:+.4f}", f"{d.low:+.4f}", f"{d.high:+.4f}"]
        + [f"{d.p:.4f}"]
        for name, d in found.items()
    ]
    names = [first.name, second.name] if first.name != second.name else [str(first), str(second)]
    head = ["", *names, "difference", "from", "to", "p"]
    return f"{split}: paired bootstrap, {RESAMPLES:,} resamples of the same records\n\n{markdown(head, rows)}"
