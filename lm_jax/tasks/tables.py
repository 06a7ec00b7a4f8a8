"""Files of records: JSON lines, tables of comma- or tab-separated values, Parquet. A folder holds one of each split.

    {"text": "a film to see twice", "label": "positive"}

A folder holds `train.jsonl` (or .csv, .tsv, .parquet) and may hold `validation` and `test`; a split without a file is cut from
the first by content hash, so that equal texts stand in one split. How a line is read: lm_jax/data/lines.py.
"""

import difflib
import io
import itertools
import json
import os
import re
import shlex
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from etils import epath

from lm_jax import regular_files
from lm_jax.data import lines
from lm_jax.data.sources import SPLITS
from lm_jax.errors import UserError, needs
from lm_jax.knob import LONGEST_TUPLE

SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")
SPACED = re.compile(r"[^ \t\r\n]+")  # words, or tags, in one string
MOST_ROWS = 100_000_000  # of a Parquet file, whose few bytes may say any number


class Row(NamedTuple):
    """One record of a file: its columns by name."""

    content: dict
    where: str  # file and line


def files_of(source: str) -> dict[str, epath.Path]:
    """{split: its file} of a folder. Raises UserError where there is none to train on, or two of one split."""
    folder = epath.Path(source)
    found: dict[str, epath.Path] = {}
    for split in SPLITS:
        paths = [path for path in (folder / f"{split}{suffix}" for suffix in SUFFIXES) if there(path)]
        if len(paths) > 1:
            raise UserError(f"config.data.sources: {paths[0]} and {paths[1].name}: which of them? Keep one")
        found |= dict.fromkeys([split] * len(paths), paths[0]) if paths else {}
    if "train" not in found:
        raise UserError(
            f"config.data.sources: {source!r}: a task needs a folder with train.jsonl (or .csv, .tsv, .parquet)"
            + what_is_there(folder)
        )
    return found


def there(path: epath.Path) -> bool:
    """Whether a file of this name exists; a broken link counts, so that it is reported when it is read."""
    return path.exists() or os.path.lexists(path)


def what_is_there(folder: epath.Path) -> str:
    """The end of a message: what is at a path without records, and how to make it right."""
    if not folder.exists():
        return ": no such folder"
    if not folder.is_dir():
        return f"; this is a file: name its folder, {str(folder.parent)!r}"
    others = sorted(path.name for path in folder.iterdir())
    return f"; it has {lines.listed(others)} (unpack what is packed, and name it so)" if others else "; it is empty"


def left_over(folder: str, read) -> list[str]:
    """Names of other tables in the folder, such as dev.jsonl, that are not read."""
    return sorted(
        path.name for path in epath.Path(folder).iterdir() if path.suffix in SUFFIXES and path.name not in read
    )


def rows(path: epath.Path, columns: tuple[str, ...], others: tuple[tuple[str, ...], ...] = ()) -> Iterator[Row]:
    """The records of a file, each with all of the columns, or of one of the `others`.

    Raises UserError at the first line that is no such record.
    """
    if path.suffix not in SUFFIXES and not path.is_dir():
        raise UserError(f"{path} is none of {', '.join(SUFFIXES)}: unpack it, or write it as one of these")
    try:
        for row in _parquet(path) if path.suffix == ".parquet" else _text(path):
            for column in () if has_one_of(others, row) else columns:
                if column not in row.content:
                    also = f"\n{listed_sets(others)} would be read too" if others else ""
                    near = taken(column, columns, row.content)
                    raise UserError(f"{row.where} {without(column, row.content)}{near}{also}")
            yield row
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def listed_sets(sets: tuple[tuple[str, ...], ...]) -> str:
    """Sets of columns as a message names them."""
    return ", or ".join(" with ".join(columns) for columns in sets)


def has_one_of(sets: tuple[tuple[str, ...], ...], row: Row) -> bool:
    """Whether a record has all columns of one of the sets."""
    return any(row.content.keys() >= set(columns) for columns in sets)


def write(folder: str, split: str, records: Iterable[dict]) -> None:
    """Writes records as JSON lines: <folder>/<split>.jsonl."""
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, f"{split}.jsonl"), "w", encoding="utf-8") as out:
        out.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def without(column: str, there) -> str:
    """The end of a message: the missing column, the columns that exist, and the nearest of them."""
    names = ", ".join(repr(name[:40]) for name in list(there)[:8]) + ", ..." * (len(there) > 8)
    close = like(column, there)
    return f"has no column {column!r}, only {names}" + (f"; did you mean {close[0]}?" if close else "")


def taken(column: str, columns: tuple[str, ...], there) -> str:
    """The end of a message: the setting that takes the nearest of the columns that exist, or one that shows its form."""
    close = like(column, there)
    if not close and len(there) >= len(columns):
        shown = shlex.quote(repr((*list(there)[: len(columns)],)))
        return f"\n--config.data.columns={shown} would read these as {', '.join(columns)}"
    names = tuple(close[0] if name == column else name for name in columns) if close else ()
    return f"\n--config.data.columns={shlex.quote(repr(names))} takes it" if names else ""


def like(column: str, there) -> list[str]:
    """The most similar of the names, regardless of case: a list of one, or []."""
    lowered = {name.lower(): name for name in there}
    return [lowered[name] for name in difflib.get_close_matches(column.lower(), lowered, n=1, cutoff=0.5)]


def _text(path: epath.Path) -> Iterator[Row]:
    with regular_files.opened(path) as file:
        for row in lines.rows(file, path.suffix[1:]):
            where = f"{path} line {row.number}"
            if isinstance(row, lines.Wrong):
                raise UserError(f"{where}: {row.reason}")
            if reason := lines.no_text(row.content):
                raise UserError(f"{where}: {reason}")
            yield Row(row.content, where)


def _parquet(path: epath.Path) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise needs(str(path), "pyarrow", "prep") from None
    with regular_files.opened(path) as file:
        content = file.read()
    number = 0
    try:
        table = parquet.ParquetFile(io.BytesIO(content))
        if wrong := lines.wrong_header(table.schema_arrow.names):
            raise UserError(f"{path}: {wrong}")
        if table.metadata.num_rows > MOST_ROWS:
            raise UserError(f"{path} says that it has {table.metadata.num_rows:,} rows; at most {MOST_ROWS:,} are read")
        for batch in table.iter_batches(1024):
            for row in batch.to_pylist():
                number += 1
                if reason := lines.no_text(row):
                    raise UserError(f"{path} row {number}: {reason}")
                yield Row(row, f"{path} row {number}")
    except UserError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        first = str(error).split("\n")[0][:200]
        raise UserError(f"{path} cannot be read after row {number}: {first}; copy or download it again") from None


def labels_of(folder: str, task: str, given: tuple[str, ...]) -> tuple[str, ...]:
    """The labels, or tags, that stand in the records of all splits, sorted; `given` as `data.columns`. Raises UserError."""
    columns = given[:2] or (("text", "label") if task == "classification" else ("tokens", "tags"))
    found: dict[str, None] = {}
    for path in files_of(folder).values():
        for row in rows(path, columns):
            value = row.content[columns[-1]]
            value = SPACED.findall(value) if task != "classification" and isinstance(value, str) else value
            several = value if isinstance(value, list) else [value]
            found |= {str(x): None for x in several if type(x) in (str, int) and str(x).strip()}
            if len(found) > LONGEST_TUPLE:
                raise UserError(
                    f"{row.where}: by here the column {columns[-1]!r} has more than {LONGEST_TUPLE:,} different values: "
                    "are these labels?\nname the column by config.data.columns; numbers are of --config.train.task=regression"
                )
    for one, other in itertools.pairwise(sorted(found, key=lambda x: (x.strip(), x))):
        if one.strip() == other.strip():
            raise UserError(
                f"{folder}: the labels {one!r} and {other!r} differ in the spaces around them:\n"
                "make them one in the records, or name all of them by config.model.labels"
            )
    whole = all(re.fullmatch(r"-?\d{1,18}", x, re.ASCII) for x in found)
    return tuple(sorted(found, key=(lambda x: (int(x), x)) if whole else str))
