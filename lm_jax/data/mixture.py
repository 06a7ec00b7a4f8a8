"""Several sources as one stream: from which source row i comes, and which row of that source it is, in closed form.

Nothing is drawn at random: the number of rows of each source follows its weight exactly (`Quotas`). Each source is a stream of
its own, with its own epochs.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, Protocol

import numpy as np

from lm_jax.config import Data
from lm_jax.data import shards, special_ids, tokenizer_files
from lm_jax.data.corpus import is_prepared, open_corpus
from lm_jax.data.objectives import make_corruption
from lm_jax.data.packing import Batch, BestFit, Corruption, HeldOutRows, Stream, identity, stacked
from lm_jax.data.tokenizer import Tokenizer
from lm_jax.errors import UserError
from lm_jax.knob import Weight


class Quotas:
    """How many of rows [0, i) come from each source.

    Source 0 has round(i * w0 / (w0 + w1 + ...)) of them. Of the i' rows that are left, source 1 has
    round(i' * w1 / (w1 + w2 + ...)), and so on. No count falls when i grows, so that row i is found without looking at any
    other. A weight is the exact fraction of its decimal text, or a table of (first row, weight): at each first row a stage
    begins, in which the weights are constant and rows are counted anew.
    """

    def __init__(self, weights: list[Weight]):
        tables = [((0, weight),) if isinstance(weight, float) else weight for weight in weights]
        firsts = sorted({0} | {row for table in tables for row, _ in table})
        at = lambda table, row: next((Fraction(str(w)) for first, w in reversed(table) if first <= row), Fraction(0))
        self.weights = [[at(table, first) for table in tables] for first in firsts]
        self.firsts, self._before = firsts, [[0] * len(weights)]
        self._ratios = [[self._ratio(stage, k) for k in range(len(stage))] for stage in self.weights]
        for stage in range(1, len(firsts)):
            self._before.append(self.counts(firsts[stage]))

    @staticmethod
    def _ratio(stage: list[Fraction], k: int) -> tuple[int, int]:
        """(p, q): the weight of source k over that of sources k, k + 1, ... is p / q; round(n p / q) is (2 n p + q) // (2 q)."""
        rest = sum(stage[k:], Fraction(0))
        ratio = stage[k] / rest if rest else Fraction(0)
        return ratio.numerator, ratio.denominator

    def _stage(self, i: int) -> int:
        """The stage of row i. While `__init__` builds stage s, its first row still counts as the end of stage s - 1."""
        known = len(self._before)
        return next(stage for stage in reversed(range(known)) if self.firsts[stage] <= i)

    def counts(self, i: int) -> list[int]:
        """How many of rows [0, i) are of each source."""
        stage = self._stage(i)
        left, found = i - self.firsts[stage], []
        for before, (p, q) in zip(self._before[stage], self._ratios[stage], strict=True):
            mine = (2 * left * p + q) // (2 * q)
            found.append(before + mine)
            left -= mine
        return found

    def locate(self, i: int) -> tuple[int, int]:
        """(source, which of its rows) that row i is."""
        stage = self._stage(i)
        left = i - self.firsts[stage]
        for source, (p, q) in enumerate(self._ratios[stage]):
            mine = (2 * left * p + q) // (2 * q)
            if (2 * (left + 1) * p + q) // (2 * q) > mine:
                return source, self._before[stage][source] + mine
            left -= mine
        raise AssertionError(i)


class MixedRows:
    """The training stream: row i is the next row of the source that `quotas` gives for it, then corrupted."""

    def __init__(self, streams: list[Stream | BestFit], quotas: Quotas, corruption: Corruption = identity):
        self.streams, self.quotas, self.sequence_length = streams, quotas, streams[0].sequence_length
        self.rows_per_epoch, self.corruption = sum(stream.rows_per_epoch for stream in streams), corruption

    def row(self, i: int) -> Batch:
        return self.corruption(self.whole, i, 0)

    def whole(self, i: int) -> Batch:
        """Row i as it was before the corruption."""
        source, j = self.quotas.locate(i)
        return self.streams[source].row(j) | {"row": np.uint32(i)}

    def rows(self, indices: list[int]) -> Batch:
        """These rows as [rows, T] arrays; where nothing is corrupted, those of a source are taken in one call."""
        if self.corruption is not identity:
            return stacked([self.row(i) for i in indices])
        found = np.array([self.quotas.locate(i) for i in indices])
        given = np.array(indices, np.uint32)
        parts = [np.flatnonzero(found[:, 0] == source) for source in range(len(self.streams))]
        taken = [stream.rows(found[at, 1].tolist()) for stream, at in zip(self.streams, parts, strict=True) if len(at)]
        if len(taken) == 1:
            return taken[0] | {"row": given}
        back = np.argsort(np.concatenate(parts))
        return {name: np.concatenate([part[name] for part in taken])[back] for name in taken[0]} | {"row": given}


class SkippingRows:
    """A stream without the rows in `skipped`, sorted ranges [first, last). The cursor counts only the rows that are left."""

    def __init__(self, mixed: MixedRows, skipped: tuple[tuple[int, int], ...]):
        self.mixed, self.skipped, self.sequence_length = mixed, skipped, mixed.sequence_length

    def row(self, cursor: int) -> Batch:
        return self.mixed.row(self.row_at(cursor))

    def rows(self, indices: list[int]) -> Batch:
        return self.mixed.rows([self.row_at(cursor) for cursor in indices])

    def row_at(self, cursor: int) -> int:
        """The number of the row in the whole stream that stands at a cursor."""
        i = cursor
        for first, last in self.skipped:
            if i < first:
                break
            i += last - first
        return i


class Task(Protocol):
    """What a run asks of the task whose records it learns; the tasks themselves stand in lm_jax/tasks."""

    writes: bool  # whether its answers are texts that a model writes
    compares: bool  # whether its loss compares a model with the first parameters

    @property
    def chat_template(self) -> object: ...  # in which it writes conversations, None where it writes none
    def files(self, tokenizer: Tokenizer) -> dict[str, bytes]: ...  # what a run keeps of it, by file name
    def scores(self, results: tuple) -> dict[str, float]: ...  # its metrics of what a model made of records
    def kept(self, results: tuple) -> tuple[str, tuple]: ...  # kind of the results that are kept ("" = none), and these


class RecordRows(Protocol):
    """Held-out rows that hold a task's records, and say what the outputs of a model mean for them."""

    split: shards.Split
    sequence_length: int
    num_rows: int

    def first(self, num_rows: int) -> "RecordRows": ...
    def row(self, i: int) -> Batch: ...
    def rows(self, indices: list[int]) -> Batch: ...
    def results(self, i: int, logits_TC: np.ndarray) -> list: ...
    def joined(self, results: tuple) -> tuple: ...


HeldOut = Mapping[str, HeldOutRows | RecordRows]  # the rows of a split by source


@dataclasses.dataclass(frozen=True)
class Mixture:
    """The corpora of a config by their short names, in its order, all tokenised by one tokenizer; and the task of its records,
    None where text is learnt as it is."""

    corpora: dict[str, shards.Corpus]
    places: tuple[str, ...]
    tokenizer: Tokenizer
    task: Task | None = None

    @property
    def special_ids(self) -> special_ids.SpecialIds:
        """What begins and ends a text that a model has learnt from."""
        return special_ids.of_documents(self.tokenizer)

    def stream(self, data: Data) -> MixedRows:
        """The rows to train on. Raises UserError where a source has none, or all of them fill no batch."""
        streams: list[Stream | BestFit] = []
        for name, corpus in self.corpora.items():
            split = corpus.splits["train"]
            if not split.num_documents:
                raise UserError(f"config.data.sources: {name} has no document to train on")
            if data.packing == "split":
                streams.append(Stream(split, data.sequence_length, data.seed))
            else:
                cut, document_id = data.packing == "best_fit", corpus.tokenizer.document_id
                streams.append(BestFit(split, data.sequence_length, data.seed, document_id, cut))
        mixed = MixedRows(
            streams, Quotas([weight for _, weight in data.sources]), make_corruption(data, self.tokenizer)
        )
        if mixed.rows_per_epoch < data.global_batch_size:
            raise UserError(
                f"config.data.sources hold {mixed.rows_per_epoch:,.1f} rows of {data.sequence_length} tokens, less than a batch "
                f"of {data.global_batch_size}:\ngive more text, or lower config.data.global_batch_size"
            )
        return mixed

    def held(self, data: Data, split: str) -> HeldOut:
        """Rows of a held-out split by source, without the sources that have none. Raises UserError where nobody has."""
        document_id, corruption = self.tokenizer.document_id, make_corruption(data, self.tokenizer)
        found = {
            name: HeldOutRows(corpus.splits[split], data.sequence_length, document_id, corruption)
            for name, corpus in self.corpora.items()
            if corpus.splits[split].num_documents
        }
        if not found:
            raise UserError(f"the {split} split is empty: raise config.data.{split}_fraction, or give more documents")
        return found

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        """What a run must find again: the tokenizer, every shard, and one hash of all of it."""
        files = {
            place: {name: file["sha256"][:16] for name, file in corpus.manifest["files"].items()}
            for place, corpus in zip(self.places, self.corpora.values(), strict=True)
        }
        content = json.dumps([shards.PIPELINE, list(files.values())], sort_keys=True)
        digest = hashlib.sha256(content.encode()).hexdigest()[:16]
        return {
            "pipeline": shards.PIPELINE,
            "tokenizer": self.tokenizer.fingerprint,
            "data": digest,
            "shards": files,
        }

    @property
    def alike(self) -> dict[str, Any]:
        """`facts`, flat, for processes that compare what each of them reads: {what it is: hash}."""
        files = {f"{place}/{name}": digest for place, of in self.facts["shards"].items() for name, digest in of.items()}
        return {name: self.facts[name] for name in ("pipeline", "tokenizer")} | files | {"data": self.facts["data"]}


def pieces_expected(data: Data) -> int:
    """Pieces of the tokenizer that will be trained, 0 where one is given and must be opened to know."""
    return 0 if any(is_prepared(place) for place, _ in data.sources) else tokenizer_files.vocab_size(data.tokenizer)


def open_mixture(data: Data, log: Callable[[str], None] = lambda line: None) -> Mixture:
    """Opens, and where it must builds, every source of a config. Raises UserError, also for two tokenizers.

    The tokenizer is that of the first prepared source, else `data.tokenizer`, trained on the first source where it must be.
    """
    places = tuple(place for place, _ in data.sources)
    names = short_names(places)
    first = next((place for place in places if is_prepared(place)), places[0])
    opened = {first: open_corpus(data, log, first)}
    like = opened[first].tokenizer
    if is_prepared(first) and not tokenizer_files.vocab_size(data.tokenizer):
        check_same(data.tokenizer, tokenizer_files.load(data.tokenizer), first, like)
    for place in places:
        if place not in opened:
            opened[place] = open_corpus(data, log, place, like)
            check_same(first, like, place, opened[place].tokenizer)
    return Mixture({name: opened[place] for name, place in zip(names, places, strict=True)}, places, like)


def check_same(first: str, a: Tokenizer, second: str, b: Tokenizer) -> None:
    if a.fingerprint != b.fingerprint:
        raise UserError(
            f"config.data.sources: {second} was made by another tokenizer ({b.vocab_size:,} pieces, {b.fingerprint}) than\n"
            f"{first} ({a.vocab_size:,} pieces, {a.fingerprint}); prepare one of them again with the other's tokenizer"
        )


def short_names(places: tuple[str, ...]) -> list[str]:
    """The last part of each place, for the names of metrics; with a number where it is not the first of that name."""
    last = [os.path.basename(os.path.normpath(place)) for place in places]
    earlier = [last[:k].count(name) for k, name in enumerate(last)]
    return [f"{name}-{1 + number}" if number else name for name, number in zip(last, earlier, strict=True)]
