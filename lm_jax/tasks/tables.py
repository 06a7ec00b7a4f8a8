"""Files of records: JSON lines, tables of comma- or tab-separated values, Parquet. A place holds one of each split.

    {"text": "a film to see twice", "label": "positive"}

A place holds `train.jsonl` (or .csv, .tsv, .parquet) and may hold `validation` and `test`; a split without a file is cut from
the first by content hash, so that equal texts stand in one split.
"""

import csv
import difflib
import io
import json
from collections.abc import Iterator
from typing import NamedTuple

from etils import epath

from lm_jax.config import UserError, needs
from lm_jax.data.sources import SPLITS

SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")


class Row(NamedTuple):
    content: dict
    where: str  # file and line


def files_of(place: str) -> dict[str, epath.Path]:
    """The file of each split that has one. Raises UserError where there is none to train on, or two of one split."""
    folder = epath.Path(place)
    found: dict[str, epath.Path] = {}
    for split in SPLITS:
        paths = [path for path in (folder / f"{split}{suffix}" for suffix in SUFFIXES) if path.exists()]
        if len(paths) > 1:
            raise UserError(f"config.data.sources: {paths[0]} and {paths[1].name}: which of them? Keep one")
        found |= dict.fromkeys([split] * len(paths), paths[0]) if paths else {}
    if "train" not in found:
        raise UserError(
            f"config.data.sources: {place!r}: a task needs a folder with train.jsonl (or .csv, .tsv, .parquet)"
        )
    return found


def rows(path: epath.Path, columns: tuple[str, ...]) -> Iterator[Row]:
    """The records of a file, each with all of the columns. Raises UserError at the first line that is none."""
    for row in _parquet(path) if path.suffix == ".parquet" else _text(path):
        for column in columns:
            if column not in row.content:
                there = f"; did you mean {close[0]}?" if (close := like(column, row.content)) else ""
                names = ", ".join(map(repr, row.content))
                raise UserError(f"{row.where} has no column {column!r}, only {names}{there}")
        yield row


def like(column: str, there) -> list[str]:
    """The most similar of the names that are there, whatever their case."""
    lowered = {name.lower(): name for name in there}
    return [lowered[name] for name in difflib.get_close_matches(column.lower(), lowered, n=1, cutoff=0.5)]


def _text(path: epath.Path) -> Iterator[Row]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8") from None
    if path.suffix != ".jsonl":
        table = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
        yield from _table(path, table)
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield _json(line, f"{path} line {number}")


def _json(line: str, where: str) -> Row:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f'{where} is no JSON object; a record is {{"text": ..., "label": ...}}, one a line')
    return Row(content, where)


def _table(path: epath.Path, table) -> Iterator[Row]:
    names: list[str] = []
    while True:
        first = table.line_num + 1
        where = f"{path} line {first}"
        try:
            values = next(table, None)
        except csv.Error as error:
            raise UserError(f"{where}: {error}") from None
        if values is None:
            return
        if not names:
            names = values
        elif values:
            if len(values) != len(names):
                raise UserError(f"{where} has {len(values)} values, the header names {len(names)}: {', '.join(names)}")
            yield Row(dict(zip(names, values, strict=True)), where)


def _parquet(path: epath.Path) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise needs(str(path), "pyarrow", "prep") from None
    try:
        content = parquet.read_table(io.BytesIO(path.read_bytes())).to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    yield from (Row(row, f"{path} row {number}") for number, row in enumerate(content, 1))
