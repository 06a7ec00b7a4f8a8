"""What preparing did to the text: counts that add up, reasons with examples, a picture of the lengths; JSON and a page."""

import html
import json
import os
from collections import Counter
from collections.abc import Iterable
from typing import Any

from lm_jax.files import write_whole

EXAMPLES, EXAMPLE_CHARACTERS = 3, 200


class Tally:
    """Counts what one task, or all tasks of a stage, read and left out."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Starts again at zero."""
        self.documents, self.bytes, self.pieces = 0, 0, 0
        self.dropped: dict[str, dict[str, Any]] = {}
        self.found: dict[str, Any] = {}  # evaluation set -> {"documents": n, "items": indices}

    def see(self, text: str) -> None:
        """Counts a document that came in."""
        self.documents += 1
        self.bytes += len(text.encode("utf-8", "replace"))

    def drop(self, reason: str, name: str, text: str) -> None:
        """Counts a document that is left out. Examples are the first names, whatever the order of tasks."""
        self._drop(reason, 1, len(text.encode("utf-8", "replace")), [[name, text[:EXAMPLE_CHARACTERS]]])

    def _drop(self, reason: str, documents: int, num_bytes: int, examples: list[list[str]]) -> None:
        entry = self.dropped.setdefault(reason, {"documents": 0, "bytes": 0, "examples": []})
        entry["documents"] += documents
        entry["bytes"] += num_bytes
        entry["examples"] = sorted([*entry["examples"], *examples])[:EXAMPLES]

    def find(self, name: str, documents: int, items: Iterable[int]) -> None:
        """Counts documents that hold these items of an evaluation set."""
        entry = self.found.setdefault(name, {"documents": 0, "items": []})
        entry["documents"] += documents
        entry["items"] = sorted({*entry["items"], *items})

    def merge(self, other: dict[str, Any]) -> None:
        """Adds the counts of another task, as its file has them."""
        self.documents += other["documents"]
        self.bytes += other["bytes"]
        self.pieces += other["pieces"]
        for reason, entry in other["dropped"].items():
            self._drop(reason, *(entry[name] for name in ("documents", "bytes", "examples")))
        for name, entry in other["found"].items():
            self.find(name, entry["documents"], entry["items"])

    def save(self, path: str) -> None:
        """Writes the counts as JSON."""
        write_whole(path, json.dumps(vars(self)).encode(), alone=False)


class Dropped:
    """The writer through which a datatrove block hands over what it leaves out: counted under the rule's name."""

    def __init__(self, tally: Tally, rule: str):
        self.tally, self.rule = tally, rule

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def write(self, document, rank: int = 0) -> None:
        """Counts a document under its rule and the reason that datatrove gives."""
        reason = document.metadata.get("filter_reason", "")
        self.tally.drop(f"{self.rule}: {reason}" if reason else self.rule, document.id, document.text)


def histogram(lengths: Counter) -> list[tuple[int, int]]:
    """(from how many tokens, documents) for lengths that double; `lengths` counts documents by the bits of their length."""
    if not lengths:
        return []
    return [(2**bits >> 1, lengths[bits]) for bits in range(min(lengths), max(lengths) + 1)]


def check(report: dict[str, Any]) -> None:
    """Asserts that no document is lost: in = out + dropped."""
    dropped = sum(entry["documents"] for stage in report["stages"] for entry in stage["dropped"].values())
    assert report["in"]["documents"] == report["out"]["documents"] + dropped, "documents do not add up"


def page(report: dict[str, Any]) -> str:
    """The report as one HTML page that loads nothing."""
    out = report["out"]
    rows = [
        [split, f"{n['documents']:,}", f"{n['tokens']:,}", f"{n['bytes']:,}", f"{n['bytes'] / max(1, n['tokens']):.2f}"]
        for split, n in report["splits"].items()
    ]
    parts = [
        f"<h1>{html.escape(os.path.basename(report['output']))}</h1>",
        f"<p>{report['in']['documents']:,} documents ({report['in']['bytes']:,} bytes) in, {out['documents']:,} "
        f"({out['bytes']:,} bytes) out: {out['tokens']:,} tokens of {html.escape(report['tokenizer'])}.</p>",
        _table(["split", "documents", "tokens", "bytes", "bytes per token"], rows),
        "<h2>Left out</h2>",
        *(_stage(stage) for stage in report["stages"]),
        "<h2>Tokens per document</h2>",
        _bars(report["lengths"]),
    ]
    if report["near_duplicates"]:
        near = report["near_duplicates"]
        parts.append(
            f"<h2>Near-duplicates</h2><p>{near['clusters']:,} clusters of {near['documents']:,} documents.</p>"
        )
        parts.append(_table(["size", "members"], [[str(n), ", ".join(names)] for n, names in near["largest"]]))
    if report["contamination"]:
        rows = [
            [name, f"{n['items']:,}", f"{n['too_short']:,}", f"{n['found']:,}", f"{n['documents']:,}"]
            for name, n in report["contamination"].items()
        ]
        header = ["evaluation set", "items", "too short to tell", "items found in the text", "documents that hold one"]
        parts += ["<h2>Contamination</h2>", _table(header, rows)]
    parts += ["<h2>Settings</h2>", f"<pre>{html.escape(json.dumps(report['settings'], indent=1))}</pre>"]
    style = "body{font:15px sans-serif;max-width:60em;margin:2em auto}td,th{padding:.2em .8em;text-align:left;"
    style += "vertical-align:top}pre{white-space:pre-wrap}table{border-collapse:collapse}tr{border-top:1px solid #ccc}"
    return f'<!doctype html><meta charset="utf-8"><title>Report</title><style>{style}</style>' + "\n".join(parts)


def _table(header: list[str], rows: list[list[str]]) -> str:
    cells = lambda row, tag: "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
    lines = [f"<tr>{cells(header, 'th')}</tr>", *(f"<tr>{cells(row, 'td')}</tr>" for row in rows)]
    return f"<table>{''.join(lines)}</table>"


def _stage(stage: dict[str, Any]) -> str:
    if not stage["dropped"]:
        return f"<p>{html.escape(stage['name'])}: nothing.</p>"
    rows = [
        [reason, f"{entry['documents']:,}", f"{entry['bytes']:,}", "\n".join(f"{n}: {t}" for n, t in entry["examples"])]
        for reason, entry in sorted(stage["dropped"].items(), key=lambda item: -item[1]["documents"])
    ]
    return f"<h3>{html.escape(stage['name'])}</h3>" + _table(["reason", "documents", "bytes", "examples"], rows)


def _bars(bins: list[tuple[int, int]]) -> str:
    most, wide = max((n for _, n in bins), default=1), 40
    bars = [
        f'<rect x="{wide * i + 4}" y="{100 - 90 * n / most:.1f}" width="{wide - 8}" height="{90 * n / most:.1f}" fill="#47a"/>'
        f'<text x="{wide * i + wide / 2}" y="114" font-size="10" text-anchor="middle">{low:,}</text><title>{n:,}</title>'
        for i, (low, n) in enumerate(bins)
    ]
    return f'<svg width="{wide * len(bins)}" height="120" role="img">{"".join(bars)}</svg><p>from so many tokens on</p>'
