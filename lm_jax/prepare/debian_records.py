"""Debian's package descriptions -> pairs of texts: a description and its summary, or its translation, made by people.

`tools/records_debian.py` is the command; it says how apt fetches the lists.
"""

import hashlib
import os
import subprocess
from collections.abc import Iterator

from lm_jax.errors import UserError

HELPER = "/usr/lib/apt/apt-helper"
SPLITS = {"train": 0.9, "validation": 0.95, "test": 1.0}  # up to which share of the source packages


def pairs_by_split(lists: str, task: str, longest: int = 0) -> tuple[dict[str, dict[str, str]], int]:
    """({split: {source: target}}, how many pairs were left out: those with a text of more than `longest` characters).

    `lists` is the folder that apt-get update filled, `task` is synopsis or a language that was downloaded; `longest` 0 is any
    length. foo, foo-dev and foo-doc share text: all packages of a source package are in one split, and of pairs with equal
    sources the first is kept. Raises UserError where a list is missing.
    """
    source_of = {s["Package"]: s.get("Source", s["Package"]).split(" ")[0] for s in stanzas(lists, "Packages")}
    english = list(stanzas(lists, "Translation-en"))
    made = _synopses(english) if task == "synopsis" else _translations(english, lists, task)
    found: dict[str, dict[str, str]] = {split: {} for split in SPLITS}
    too_long = 0
    for package, source, target in made:
        if longest and max(len(source), len(target)) > longest:
            too_long += 1
            continue
        share = int(digest(source_of.get(package, package))[:8], 16) / 16**8
        split = next(split for split, end in SPLITS.items() if share < end)
        if not any(source in others for others in found.values()):
            found[split][source] = target
    return found, too_long


def digest(text: str) -> str:
    """The sha256 of a text, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def parse(text: str) -> Iterator[dict[str, str]]:
    """The packages of one of Debian's lists: {field: value}; a line that starts with a space goes on with the one before."""
    for stanza in text.split("\n\n"):
        fields: dict[str, str] = {}
        key = ""
        for line in stanza.split("\n"):
            if line.startswith(" ") and key:
                fields[key] += "\n" + line[1:]
            elif ":" in line:
                key, _, value = line.partition(":")
                fields[key] = value.strip()
        if "Package" in fields:
            yield fields


def stanzas(folder: str, ending: str) -> Iterator[dict[str, str]]:
    """The stanzas of the files whose names end so, whatever apt packed them with. Raises UserError where there are none."""
    if not os.path.isdir(folder):
        raise UserError(f"--lists {folder}: no such folder; the head of tools/records_debian.py says how to fill one")
    names = [name for name in sorted(os.listdir(folder)) if name.rsplit(".", 1)[0].replace("%5f", "_").endswith(ending)]
    if not names:
        raise UserError(f"--lists {folder} has no file {ending}; name its language in Acquire::Languages and update")
    for name in names:
        text = subprocess.run([HELPER, "cat-file", os.path.join(folder, name)], capture_output=True, check=True).stdout
        yield from parse(text.decode())


def _parts(described: str) -> tuple[str, list[str]]:
    """(synopsis, paragraphs) of a description; what is indented stays a line of its own, other lines are joined."""
    synopsis, _, body = described.partition("\n")
    paragraphs = []
    for paragraph in body.split("\n.\n"):
        text = ""
        for line in paragraph.split("\n"):
            is_item = line.startswith((" ", "*", "-"))
            gap = "\n" if is_item else "" if text[-1:] > "\u2e80" else " "  # Chinese has no spaces
            text += gap * bool(text) + line.strip()
        paragraphs.append(text.strip())
    return synopsis.strip(), [text for text in paragraphs if text]


def _synopses(english: list[dict[str, str]]) -> Iterator[tuple[str, str, str]]:
    for stanza in english:
        synopsis, paragraphs = _parts(stanza["Description-en"])
        body = "\n\n".join(paragraphs)
        if len(body) >= 150 and len(synopsis) >= 15:
            yield stanza["Package"], body, synopsis


def _translations(english: list[dict[str, str]], folder: str, language: str) -> Iterator[tuple[str, str, str]]:
    """Pairs at equal positions; paragraphs only where both descriptions have as many."""
    field = f"Description-{language}"
    theirs = {s["Description-md5"]: s[field] for s in stanzas(folder, f"Translation-{language}") if field in s}
    for stanza in english:
        if other := theirs.get(stanza["Description-md5"]):
            (ours, paragraphs), (translated, others) = _parts(stanza["Description-en"]), _parts(other)
            pairs = [(ours, translated)]
            pairs += zip(paragraphs, others, strict=True) if len(paragraphs) == len(others) else []
            yield from ((stanza["Package"], a, b) for a, b in pairs if a and b and a != b and "<trans>" not in b)
