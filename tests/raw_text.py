"""Raw text that tests prepare: English that filters keep, corpora of it, and what a corpus holds."""

import json
import pathlib
import random

import pytest
from helpers import tiny

from lm_jax.data import sources
from lm_jax.data.corpus import open_corpus
from lm_jax.prepare import executors
from lm_jax.prepare import run as prepare

needs_datatrove = pytest.mark.skipif(not executors.has_datatrove(), reason="pip install -e '.[prep]'")

WORDS = """the of to and with that have be a in for over under before after letter proof table engine garden bridge number
method picture record wrote read mended measured compared answered counted sorted drew slowly early often never once green
small heavy quiet river station window paper morning winter friend teacher sailor doctor question story reason answer""".split()


def story(seed: int, sentences: int = 12) -> str:
    """Text that filters for English take for prose, different for each seed."""
    pick = random.Random(seed)
    lines = [[" ".join(pick.choices(WORDS, k=14)).capitalize() + "." for _ in range(2)] for _ in range(sentences // 2)]
    return "\n".join(map(" ".join, lines))


def write(path: pathlib.Path, texts, key="text") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({key: text}, ensure_ascii=False) + "\n" for text in texts))


def settings(place: pathlib.Path, *names: str, **changes) -> prepare.Settings:
    given = {"tokenizer": "bytes", "workers": 1, "validation_fraction": 0.1, "test_fraction": 0.1} | changes
    return prepare.Settings(sources=tuple(str(place / name) for name in names), output=str(place / "out"), **given)


def run(*arguments, **changes):
    return prepare.run(settings(*arguments, **changes), lambda line: None)


def texts_of(folder) -> list[str]:
    """All documents of a corpus, in order."""
    corpus = open_corpus(tiny(data__sources=((str(folder), 1.0),)).data)
    found = []
    for name in sources.SPLITS:
        split = corpus.splits[name]
        for start, end in zip(split.offsets[:-1], split.offsets[1:], strict=True):
            assert split.tokens[start : start + 1][0] == corpus.tokenizer.document_id
            found.append(corpus.tokenizer.decode(split.tokens[start + 1 : end]))
    return found


def files_of(folder) -> dict[str, bytes]:
    made = {"report.json", "report.html"}  # which say how long it took
    return {path.name: path.read_bytes() for path in pathlib.Path(folder).iterdir() if path.name not in made}


def raw_text(tmp_path: pathlib.Path) -> tuple[pathlib.Path, list[str]]:
    """(a place with raw text below `raw`, its documents)."""
    texts = [story(seed) for seed in range(120)] + ["价格是￥１２８．００；真的吗？", "a\ttab  and two spaces\n"]
    write(tmp_path / "raw" / "one.jsonl", texts[:60])
    write(tmp_path / "raw" / "deep" / "two.jsonl", [*texts[60:], texts[3], texts[70], "", " \n"])
    (tmp_path / "raw" / "three.txt").write_bytes("\ufeffonce\r\nmore\n".encode())
    return tmp_path, [*texts, "once\nmore\n"]
