"""Debian's package descriptions -> the records of a task: a summary of each, or its translation, made by people.

    printf '#clear Acquire::Languages;\nAcquire::Languages { "en"; "de"; "zh_CN"; };\n' > lang.conf
    mkdir -p lists/partial cache/archives/partial
    apt-get -c lang.conf -o Dir::State::lists=$PWD/lists -o Dir::Cache=$PWD/cache update
    python tools/records_debian.py --lists lists --task synopsis --held 100 --output synopsis
    python tools/records_debian.py --lists lists --task de --held 500 --characters 300 --output english_german

`synopsis`: a long description and the line above it. `de`, `zh_CN`, ...: that line and each paragraph in English and in the other
language. foo, foo-dev and foo-doc share text: all packages of a source package stand in one split.
"""

import hashlib
import json
import os
import subprocess
from collections.abc import Iterator

from lm_jax import cli
from lm_jax.errors import UserError

HELPER = "/usr/lib/apt/apt-helper"
SPLITS = {"train": 0.9, "validation": 0.95, "test": 1.0}  # up to which share of the source packages


def main(arguments: list[str]) -> int:
    parser = cli.Parser("tools/records_debian.py", __doc__)
    parser.add_argument("--lists", required=True, help="the folder that apt-get update filled")
    parser.add_argument("--task", required=True, help="synopsis, or a language that was downloaded")
    parser.add_argument("--held", type=int, default=0, help="records of validation and of test, drawn by hash; 0 = all")
    parser.add_argument("--characters", type=int, default=0, help="the longest text of a record; 0 = any")
    parser.add_argument("--output", required=True, help="a folder")
    flags = parser.parse_args(arguments)
    source_of = {s["Package"]: s.get("Source", s["Package"]).split(" ")[0] for s in stanzas(flags.lists, "Packages")}
    english = list(stanzas(flags.lists, "Translation-en"))
    made = synopses(english) if flags.task == "synopsis" else translations(english, flags.lists, flags.task)
    os.makedirs(flags.output, exist_ok=True)
    digest = lambda text: hashlib.sha256(text.encode()).hexdigest()
    found: dict[str, dict[str, str]] = {split: {} for split in SPLITS}  # {source: target}, the first of equal sources
    too_long = 0
    for package, source, target in made:
        if flags.characters and max(len(source), len(target)) > flags.characters:
            too_long += 1
            continue
        share = int(digest(source_of.get(package, package))[:8], 16) / 16**8
        split = next(split for split, end in SPLITS.items() if share < end)
        if not any(source in others for others in found.values()):
            found[split][source] = target
    for split, pairs in found.items():
        order = sorted(pairs, key=digest)[: flags.held or None if split != "train" else None]
        with open(os.path.join(flags.output, f"{split}.jsonl"), "w") as file:
            for source in order:
                file.write(json.dumps({"source": source, "target": pairs[source]}, ensure_ascii=False) + "\n")
        print(f"{split}: {len(order):,} of {len(pairs):,} records in {flags.output}")
    if too_long:
        print(f"left out: {too_long:,} pairs with more than {flags.characters} characters in one text")
    return 0


def stanzas(folder: str, ending: str) -> Iterator[dict[str, str]]:
    """The stanzas of the files of that name, whatever apt packed them with. Raises UserError where there are none."""
    if not os.path.isdir(folder):
        raise UserError(f"--lists {folder}: no such folder; the head of this file says how to fill one")
    names = [name for name in sorted(os.listdir(folder)) if name.rsplit(".", 1)[0].replace("%5f", "_").endswith(ending)]
    if not names:
        raise UserError(f"--lists {folder} has no file {ending}; name its language in Acquire::Languages and update")
    for name in names:
        text = subprocess.run([HELPER, "cat-file", os.path.join(folder, name)], capture_output=True, check=True).stdout
        for stanza in text.decode().split("\n\n"):
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


def parts(described: str) -> tuple[str, list[str]]:
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


def synopses(english: list[dict[str, str]]) -> Iterator[tuple[str, str, str]]:
    for stanza in english:
        synopsis, paragraphs = parts(stanza["Description-en"])
        body = "\n\n".join(paragraphs)
        if len(body) >= 150 and len(synopsis) >= 15:
            yield stanza["Package"], body, synopsis


def translations(english: list[dict[str, str]], folder: str, language: str) -> Iterator[tuple[str, str, str]]:
    """Pairs of equal place; paragraphs only where both descriptions have as many."""
    field = f"Description-{language}"
    theirs = {s["Description-md5"]: s[field] for s in stanzas(folder, f"Translation-{language}") if field in s}
    for stanza in english:
        if other := theirs.get(stanza["Description-md5"]):
            (ours, paragraphs), (translated, others) = parts(stanza["Description-en"]), parts(other)
            pairs = [(ours, translated)]
            pairs += zip(paragraphs, others, strict=True) if len(paragraphs) == len(others) else []
            yield from ((stanza["Package"], a, b) for a, b in pairs if a and b and a != b and "<trans>" not in b)


if __name__ == "__main__":
    cli.run_command(main)
