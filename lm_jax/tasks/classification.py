"""Sequence classification: records (a text and its label) -> rows in which a segment's first token asks for its label.

    {"text": "a film to see twice", "label": "positive"}

A place holds `train.jsonl`, and may hold `validation.jsonl` and `test.jsonl`; a split without a file is cut from the first by
content hash. Records are packed as whole segments, so that a row is as full as in pretraining and a loss is one of a record.
"""

import dataclasses
import difflib
import json
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from etils import epath

from lm_jax.config import Config, Data, UserError, nearest
from lm_jax.data import tokenizer
from lm_jax.data.mixture import Mixed, Mixture, Shares, short_names
from lm_jax.data.objectives import specials
from lm_jax.data.packing import Batch, BestFit, lay_out, stacked_or_padding
from lm_jax.data.shards import Corpus, Split, file_hash
from lm_jax.data.sources import SPLITS, split_of
from lm_jax.data.tokenizer import Tokenizer

COLUMNS = ("text", "label")


class Record(NamedTuple):
    text: str
    label: int  # its place in `config.model.labels`
    where: str  # file and line


class Examples(BestFit):
    """Whole examples packed into rows; the id of a label is the target at its example's first token, and the only target."""

    def __init__(self, split: Split, labels: np.ndarray, sequence_length: int, seed: int):
        super().__init__(split, sequence_length, seed, document_id=0, cut=False)
        self.labels = labels

    def __reduce__(self):
        return type(self), (self.split, self.labels, self.sequence_length, self.seed)

    def row(self, i: int) -> Batch:
        pieces = self.pieces(i)
        documents, sizes = self.document[pieces], self.size[pieces]
        tokens = np.concatenate([self.split.tokens[slice(*self.split.offsets[d : d + 2])] for d in documents])
        row = lay_out(tokens, np.zeros_like(tokens), sizes.tolist(), self.sequence_length, i)
        starts = np.cumsum(sizes) - sizes
        row["loss_mask"][:] = 0
        row["targets"][starts], row["loss_mask"][starts] = self.labels[documents], 1
        return row | {"token_type_ids": np.zeros_like(row["tokens"])}


class HeldExamples:
    """Every example once: the rows of one epoch, and padding in the place of each beyond the last."""

    def __init__(self, examples: Examples, num_rows: int):
        self.examples, self.split, self.num_rows = examples, examples.split, num_rows
        self.sequence_length = examples.sequence_length

    def first(self, num_rows: int) -> "HeldExamples":
        """The first of the rows alone."""
        return HeldExamples(self.examples, min(num_rows, self.num_rows))

    def row(self, i: int) -> Batch:
        return self.examples.row(i)

    def rows(self, indices: list[int]) -> Batch:
        return stacked_or_padding(self.row, self.num_rows, indices)


@dataclasses.dataclass(frozen=True)
class Records(Mixture):
    """A mixture of one source, whose documents are examples with labels."""

    by: Tokenizer
    labels: dict[str, np.ndarray]

    @property
    def tokenizer(self) -> Tokenizer:
        return self.by

    def _split(self, split: str) -> tuple[Split, np.ndarray]:
        (corpus,) = self.corpora.values()
        return corpus.splits[split], self.labels[split]

    def stream(self, data: Data) -> Mixed:
        examples = Examples(*self._split("train"), data.sequence_length, data.seed)
        if examples.rows_per_epoch < data.global_batch_size:
            raise UserError(
                f"config.data.sources: the records fill {examples.rows_per_epoch:,} rows of {data.sequence_length} tokens, less "
                f"than a batch of {data.global_batch_size}:\ngive more records, or lower config.data.global_batch_size"
            )
        return Mixed([examples], Shares([1.0]))

    def held(self, data: Data, split: str) -> dict:
        """{name: rows} of a held-out split. Raises UserError where it has none."""
        examples, labels = self._split(split)
        if not examples.num_documents:
            raise UserError(f"the {split} split is empty: give {split}.jsonl, or raise config.data.{split}_fraction")
        (name,) = self.corpora
        rows = Examples(examples, labels, data.sequence_length, data.seed)
        return {name: HeldExamples(rows, rows.rows_per_epoch)}


def open_records(config: Config, say: Callable[[str], None] = lambda line: None) -> Records:
    """Reads, checks and tokenises the records of a config. Raises UserError with file and line."""
    data, places = config.data, tuple(place for place, _ in config.data.sources)
    if len(places) > 1:
        raise UserError(f"config.data.sources: a task reads one folder of records, not {len(places)}")
    records = read_splits(places[0], config.model.labels, data)
    by = tokenizer.make(data.tokenizer, (record.text for record in records["train"]))
    splits = {split: tokenised(found, by, data, split, say) for split, found in records.items()}
    labels = {split: np.array([record.label for record in found], np.int32) for split, found in records.items()}
    counts = {split: {"tokens": len(splits[split].tokens)} for split in SPLITS}
    for split, found in records.items():
        each = np.bincount(labels[split], minlength=len(config.model.labels))
        of = ", ".join(f"{name} {num:,}" for name, num in zip(config.model.labels, each, strict=True))
        say(f"{split}: {len(found):,} records ({of})")
    seen = {record.text for record in records["train"]}
    for split in SPLITS[1:]:
        if twice := [record for record in records[split] if record.text in seen]:
            say(f"{len(twice):,} {split} texts are also in train, the first at {twice[0].where}")
    files = {path.name: file_hash(str(path)) for path in files_of(places[0]).values()}
    corpus = Corpus("", {"files": files, "counts": counts}, splits)
    return Records({short_names(places)[0]: corpus}, places, by, labels)


def files_of(place: str) -> dict[str, epath.Path]:
    """The file of each split that has one. Raises UserError where there is none to train on."""
    folder = epath.Path(place)
    found = {split: folder / f"{split}.jsonl" for split in SPLITS if (folder / f"{split}.jsonl").exists()}
    if "train" not in found:
        raise UserError(f"config.data.sources: {place!r}: a task needs a folder with train.jsonl")
    return found


def read_splits(place: str, labels: tuple[str, ...], data: Data) -> dict[str, list[Record]]:
    files = files_of(place)
    found: dict[str, list[Record]] = {split: [] for split in SPLITS}
    for split, path in files.items():
        found[split] = read(path, labels)
    shares = [0.0 if split in files else share for split, share in
              (("validation", data.validation_fraction), ("test", data.test_fraction))]  # fmt: skip
    given, found["train"] = found["train"], []
    for record in given:
        found[split_of(record.text, *shares)[0]].append(record)
    if not found["train"]:
        raise UserError(f"config.data.sources: {files['train']} holds no record to train on")
    return found


def read(path: epath.Path, labels: tuple[str, ...]) -> list[Record]:
    """The records of a file. Raises UserError at the first line that is none."""
    ids = {label: index for index, label in enumerate(labels)}
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8") from None
    return [parse(line, f"{path} line {number}", ids) for number, line in enumerate(lines, 1) if line.strip()]


def parse(line: str, where: str, ids: dict[str, int]) -> Record:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f'{where} is no JSON object; a record is {{"text": ..., "label": ...}}')
    for column in COLUMNS:
        if column not in content:
            there = f"; did you mean {close[0]}?" if (close := like(column, content)) else ""
            raise UserError(f"{where} has no column {column!r}, only {', '.join(map(repr, content))}{there}")
    text, label = content["text"], content["label"]
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where}: the text is {'empty' if isinstance(text, str) else 'no string'}")
    if isinstance(label, bool) or not isinstance(label, (str, int)) or str(label) not in ids:
        known = ", ".join(ids)
        raise UserError(f"{where}: label {label!r} is none of config.model.labels: {known}{nearest(str(label), ids)}")
    return Record(text, ids[str(label)], where)


def like(column: str, there) -> list[str]:
    """The most similar of the names that are there, whatever their case."""
    lowered = {name.lower(): name for name in there}
    return [lowered[name] for name in difflib.get_close_matches(column, lowered, n=1, cutoff=0.5)]


def tokenised(records: list[Record], by: Tokenizer, data: Data, split: str, say: Callable[[str], None]) -> Split:
    """[CLS] text [SEP] of each record, or what stands for these in the tokenizer; what is longer than a row keeps its start.

    How many are cut is said; with `data.packing` = best_fit_whole none may be. Raises UserError.
    """
    ids, room = specials(by, data.objective), data.sequence_length - 2
    texts = by.encode_batch([record.text for record in records])
    long = [k for k, text in enumerate(texts) if len(text) > room]
    if long and data.packing == "best_fit_whole":
        longest = max(len(texts[k]) for k in long) + 2
        raise UserError(
            f"{len(long):,} {split} records are longer than a row of {data.sequence_length} tokens (the longest {longest:,}),\n"
            f"the first at {records[long[0]].where}:\n"
            "raise config.data.sequence_length, or take config.data.packing = best_fit, which keeps their first tokens"
        )
    if long:
        say(f"{split}: {len(long):,} of {len(texts):,} records cut to their first {data.sequence_length} tokens")
    whole = [np.concatenate([[ids.classifier], text[:room], [ids.document]]).astype(np.int32) for text in texts]
    tokens = np.concatenate([np.zeros(0, np.int32), *whole])
    num_bytes = sum(len(record.text.encode()) for record in records)
    return Split(tokens, np.cumsum([0, *map(len, whole)]), num_bytes)
