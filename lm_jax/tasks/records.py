"""Records of a task -> rows: read, split, tokenised, and packed as whole segments, so that a row is as full as in pretraining.

Rows, order, cursor and accounting are those of pretraining; what a segment asks for is its task's.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from lm_jax.config import Config, Data
from lm_jax.data.best_fit import BestFit
from lm_jax.data.lines import listed
from lm_jax.data.mixed_rows import MixedRows, Quotas
from lm_jax.data.mixture import Mixture, short_names
from lm_jax.data.packing import Batch, lay_out, stacked_or_padding
from lm_jax.data.shards import Corpus, Split
from lm_jax.data.sources import SPLITS, split_of
from lm_jax.data.special_ids import SpecialIds, of_documents
from lm_jax.data.tokenizer import Tokenizer
from lm_jax.data.tokenizer_training import make
from lm_jax.errors import UserError
from lm_jax.files import file_hash
from lm_jax.tasks import TASKS
from lm_jax.tasks.results import Result
from lm_jax.tasks.segments import Segment, with_two_lengths
from lm_jax.tasks.tables import Row, files_of, left_over, rows
from lm_jax.tasks.task import Task


@dataclasses.dataclass(frozen=True)
class Records:
    """The records of a split, tokenised.

    The tokens of record k are `split.tokens[offsets[k]:offsets[k + 1]]`, and so are `columns`, the other arrays of its
    segment.
    """

    split: Split
    columns: Segment
    firsts: np.ndarray  # tokens of each record's first segment where it has two, else 0
    where: list[str]
    values: list[tuple]

    def segment(self, k: int) -> Segment:
        """The segment of record k: its slice of the tokens and of every column."""
        own = slice(*self.split.offsets[k : k + 2])
        return {"tokens": self.split.tokens[own]} | {name: x[own] for name, x in self.columns.items()}


class Examples(BestFit):
    """Whole records packed into rows, with the targets and the mask that each brings."""

    def __init__(self, split: Split, columns: Segment, firsts: np.ndarray, sequence_length: int, seed: int):
        super().__init__(split, sequence_length, seed, document_id=0, cut=False)
        self.columns, self.firsts = columns, firsts

    def __reduce__(self):
        return type(self), (self.split, self.columns, self.firsts, self.sequence_length, self.seed)

    def records(self, i: int) -> np.ndarray:
        """Which records row i holds, in the order of its segments."""
        return self.document[self.chunks(i)]

    def row(self, i: int) -> Batch:
        """Row i of the packed records: arrays [sequence_length], with the columns of the task."""
        records = self.records(i)
        owns = [slice(*self.split.offsets[k : k + 2]) for k in records]
        tokens = np.concatenate([self.split.tokens[own] for own in owns])
        parts = [(self.firsts[k], own.stop - own.start - self.firsts[k]) for k, own in zip(records, owns, strict=True)]
        sizes = [size for part in parts for size in part if size]
        row = lay_out(tokens, np.zeros_like(tokens), sizes, self.sequence_length, i)
        for name, column in self.columns.items():
            row[name] = np.zeros(self.sequence_length, column.dtype)
            row[name][: len(tokens)] = np.concatenate([column[own] for own in owns])
        return with_two_lengths(row) if "encoder_tokens" in row else row


class HeldOutExamples:
    """Every record once: the rows of one epoch, and padding for each index beyond the last."""

    def __init__(self, task: Task, records: Records, examples: Examples, num_rows: int):
        self.task, self.records, self.examples, self.num_rows = task, records, examples, num_rows
        self.split, self.sequence_length = records.split, examples.sequence_length

    def first(self, num_rows: int) -> "HeldOutExamples":
        """Only the first `num_rows` rows."""
        return HeldOutExamples(self.task, self.records, self.examples, min(num_rows, self.num_rows))

    def row(self, i: int) -> Batch:
        """Row i of the one epoch."""
        return self.examples.row(i)

    def rows(self, indices: list[int]) -> Batch:
        """Rows as a batch [len(indices), sequence_length]; padding for an index beyond the last row."""
        return stacked_or_padding(self.row, self.num_rows, indices)

    def joined(self, results: tuple) -> tuple:
        """One result a record, from the results of its segments."""
        return self.task.joined(results)

    def results(self, i: int, logits_TC: np.ndarray) -> list[Result]:
        """One result for each segment of row i, from its logits [T, C]."""
        found, start = [], 0
        for k in self.examples.records(i) if i < self.num_rows else ():
            segment = self.records.segment(k)
            stop = start + len(segment["tokens"])
            found.append(
                self.task.result(self.records.where[k], self.records.values[k], segment, logits_TC[start:stop])
            )
            start = stop
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskData(Mixture):
    """A mixture of one source, whose documents are the records of a task."""

    task: Task
    records: dict[str, Records]

    @property
    def longest_answer(self) -> int:
        """Tokens of the longest answer that is trained on, with its end."""
        records = self.records["train"]
        return int(np.add.reduceat(records.columns["loss_mask"], records.split.offsets[:-1]).max())

    @property
    def special_ids(self) -> SpecialIds:
        """What begins a text and which ids end an answer of this task."""
        found = of_documents(self.tokenizer)
        return found._replace(ends=self.task.ends(self.tokenizer)).also(*found.ends)

    def _examples(self, data: Data, split: str) -> Examples:
        records = self.records[split]
        return Examples(records.split, records.columns, records.firsts, data.sequence_length, data.seed)

    def stream(self, data: Data) -> MixedRows:
        """The endless stream of training rows. Raises UserError where one epoch is less than a batch."""
        examples = self._examples(data, "train")
        if examples.rows_per_epoch < data.global_batch_size:
            raise UserError(
                f"config.data.sources: the records fill {examples.rows_per_epoch:,} rows of {data.sequence_length} tokens, less "
                f"than a batch of {data.global_batch_size}:\ngive more records, or lower config.data.global_batch_size"
            )
        return MixedRows([examples], Quotas([1.0]))

    def held(self, data: Data, split: str) -> dict[str, HeldOutExamples]:
        """{name: rows} of a held-out split. Raises UserError where it has none."""
        if not self.records[split].where:
            raise UserError(f"the {split} split is empty: give {split}.jsonl, or raise config.data.{split}_fraction")
        (name,) = self.corpora
        examples = self._examples(data, split)
        return {name: HeldOutExamples(self.task, self.records[split], examples, examples.rows_per_epoch)}


def open_records(config: Config, log: Callable[[str], None] = lambda line: None) -> TaskData:
    """Reads, checks and tokenises the records of a config. Raises UserError with file and line."""
    data, sources = config.data, tuple(source for source, _ in config.data.sources)
    if len(sources) > 1:
        raise UserError(f"config.data.sources: a task reads one folder of records, not {len(sources)}")
    task = TASKS[config.train.task](config)
    found = read_splits(sources[0], task, data)
    task.look([values for _, values in found["train"]])
    tokenizer = make(data.tokenizer, (text for _, values in found["train"] for text in task.texts(values)))
    records = {split: tokenised(task, found[split], tokenizer, data, split, log) for split in SPLITS}
    for split in SPLITS:
        log(f"{split}: {len(found[split]):,} records{task.count([values for _, values in found[split]])}")
    train_texts = {task.text(values) for _, values in found["train"]}
    for split in SPLITS[1:]:
        if twice := [where for where, values in found[split] if task.text(values) in train_texts]:
            log(f"{len(twice):,} {split} texts are also in train, the first at {twice[0]}")
    files = {path.name: file_hash(str(path)) for path in files_of(sources[0]).values()}
    if others := left_over(sources[0], files):
        log(f"not read: {listed(others)} (a split is {', '.join(SPLITS)})")
    counts = {split: {"tokens": len(records[split].split.tokens)} for split in SPLITS}
    corpus = Corpus("", {"files": files, "counts": counts}, {split: records[split].split for split in SPLITS})
    return TaskData({short_names(sources)[0]: corpus}, sources, tokenizer, task=task, records=records)


def read_splits(source: str, task: Task, data: Data) -> dict[str, list[tuple[str, tuple]]]:
    """(file and line, values) of every record of each split."""
    files, others = files_of(source), () if data.columns else task.other_columns

    def parse(row: Row) -> tuple[str, tuple]:
        if not row.content.keys() >= set(task.names):  # then it has one of the others
            return row.where, task.parse(row)
        own = (*task.columns, *task.optional)
        its = (*task.names, *own[len(task.names) :])
        renamed = {a: row.content[b] for a, b in zip(own, its, strict=True) if b in row.content}
        return row.where, task.parse(Row(renamed, row.where))

    found = {
        split: [parse(row) for row in rows(files[split], task.names, others)] if split in files else []
        for split in SPLITS
    }
    shares = [0.0 if split in files else share for split, share in
              (("validation", data.validation_fraction), ("test", data.test_fraction))]  # fmt: skip
    given, found["train"] = found["train"], []
    for where, values in given:
        found[split_of(task.text(values), *shares)[0]].append((where, values))
    if not found["train"]:
        raise UserError(f"config.data.sources: {files['train']} holds no record to train on")
    return found


def tokenised(
    task: Task, found: list[tuple[str, tuple]], tokenizer: Tokenizer, data: Data, split: str, log: Callable[[str], None]
) -> Records:
    """Tokenises the records of a split; a record that is longer than a row is cut by its task.

    How many are cut is logged; with `data.packing` = best_fit_whole none may be. Raises UserError.
    """
    num, found = len(found), task.spread(found, tokenizer, data.sequence_length)
    if len(found) > num:
        log(f"{split}: {num:,} records in {len(found):,} overlapping windows of up to {data.sequence_length} tokens")
    where, values = [w for w, _ in found], [v for _, v in found]
    encoded = task.encode(values, tokenizer, data.sequence_length)
    long = [k for k, one in enumerate(encoded) if one.whole > len(one.segment["tokens"])]
    if long and data.packing == "best_fit_whole":
        raise UserError(
            f"{len(long):,} {split} records are longer than a row of {data.sequence_length} tokens (the longest "
            f"{max(encoded[k].whole for k in long):,}),\nthe first at {where[long[0]]}:\n"
            "raise config.data.sequence_length, or take config.data.packing = best_fit, which cuts them"
        )
    if long:
        of = f"{len(long):,} of {len(found):,} records cut to {data.sequence_length} tokens"
        log(f"{split}: {of}, the first at {where[long[0]]}")
    if unlearnt := [k for k, one in enumerate(encoded) if one.unlearnt]:
        of = f"{sum(encoded[k].unlearnt for k in unlearnt):,} answers in {len(unlearnt):,} of {len(found):,} records"
        log(
            f"{split}: {of} are read and not learnt, the first at {where[unlearnt[0]]}: the chat template writes them in\n"
            "another way once the conversation goes on (it may leave out earlier thoughts)"
        )
    names = encoded[0].segment if encoded else {"tokens": np.zeros(0, np.int32)}
    columns = {name: np.concatenate([one.segment[name] for one in encoded]) for name in names} if encoded else names
    sizes = [len(one.segment["tokens"]) for one in encoded]
    num_bytes = sum(len(task.text(one).encode()) for one in values)
    tokens = columns.pop("tokens")
    firsts = np.array([one.first for one in encoded], np.int64)
    return Records(Split(tokens, np.cumsum([0, *sizes]), num_bytes), columns, firsts, where, values)
