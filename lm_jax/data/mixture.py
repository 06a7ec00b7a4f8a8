"""Several sources as one stream: which source row i is of, and which of its rows, in closed form; nothing is drawn.

The weights of a stage are exact fractions; the rows of a source are its own stream, in its own epochs.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

from lm_jax.config import Data
from lm_jax.data import shards, special_ids, tokenizer
from lm_jax.data.objectives import make_hide
from lm_jax.data.packing import Batch, BestFit, Held, Hide, Stream, as_it_is, stacked
from lm_jax.errors import UserError
from lm_jax.knob import Weight


class Shares:
    """How the rows are shared out. Of rows [0, i) of a stage, the first source has round(i * its weight), of those that
    remain the second has round(that * its share of the remaining weight), and so on: counts never fall, none is off by a row
    more than its neighbours make it, and row i is found without looking at any other."""

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
        """The weight of source k over that of sources k, k + 1, ..., doubled for rounding: floor((2 n p + q) / 2 q)."""
        rest = sum(stage[k:], Fraction(0))
        ratio = stage[k] / rest if rest else Fraction(0)
        return ratio.numerator, ratio.denominator

    def _stage(self, i: int) -> int:
        """The stage of row i; a row at which a stage starts is counted from the stage before while that is built."""
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


class Mixed:
    """The training stream: row i is the next row of the source whose turn it is."""

    def __init__(self, streams: list[Stream | BestFit], shares: Shares, hide: Hide = as_it_is):
        self.streams, self.shares, self.sequence_length = streams, shares, streams[0].sequence_length
        self.rows_per_epoch, self.hide = sum(stream.rows_per_epoch for stream in streams), hide

    def row(self, i: int) -> Batch:
        return self.hide(self.whole, i, 0)

    def whole(self, i: int) -> Batch:
        """Row i with nothing hidden."""
        source, j = self.shares.locate(i)
        return self.streams[source].row(j) | {"row": np.uint32(i)}

    def rows(self, indices: list[int]) -> Batch:
        """These rows as [rows, T] arrays, taken together from each source where nothing is hidden in them."""
        if self.hide is not as_it_is:
            return stacked([self.row(i) for i in indices])
        found = np.array([self.shares.locate(i) for i in indices])
        given = np.array(indices, np.uint32)
        parts = [np.flatnonzero(found[:, 0] == source) for source in range(len(self.streams))]
        taken = [stream.rows(found[at, 1].tolist()) for stream, at in zip(self.streams, parts, strict=True) if len(at)]
        if len(taken) == 1:
            return taken[0] | {"row": given}
        back = np.argsort(np.concatenate(parts))
        return {name: np.concatenate([part[name] for part in taken])[back] for name in taken[0]} | {"row": given}


class Kept:
    """A stream without the rows of `skipped`, sorted ranges [first, last): the cursor counts the rows that are left."""

    def __init__(self, mixed: Mixed, skipped: tuple[tuple[int, int], ...]):
        self.mixed, self.skipped, self.sequence_length = mixed, skipped, mixed.sequence_length

    def row(self, cursor: int) -> Batch:
        return self.mixed.row(self.row_at(cursor))

    def rows(self, indices: list[int]) -> Batch:
        return self.mixed.rows([self.row_at(cursor) for cursor in indices])

    def row_at(self, cursor: int) -> int:
        """The row of the stream that stands at a cursor."""
        i = cursor
        for first, last in self.skipped:
            if i < first:
                break
            i += last - first
        return i


@dataclasses.dataclass(frozen=True)
class Mixture:
    """The corpora of a config by their short names, in its order; all tokenised by one tokenizer."""

    corpora: dict[str, shards.Corpus]
    places: tuple[str, ...]

    @property
    def tokenizer(self) -> tokenizer.Tokenizer:
        return next(iter(self.corpora.values())).tokenizer

    @property
    def compares(self) -> bool:
        """Whether the loss compares a model with the first parameters, as a task may want it."""
        return False

    @property
    def answers(self) -> bool:
        """Whether what is learnt is what texts are answered with."""
        return False

    @property
    def chat_template(self) -> Any:
        """In which a task writes conversations."""
        return None

    @property
    def special_ids(self) -> special_ids.SpecialIds:
        """What begins and ends a text that a model has learnt from."""
        return special_ids.of_documents(self.tokenizer)

    def stream(self, data: Data) -> Mixed:
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
        mixed = Mixed(streams, Shares([weight for _, weight in data.sources]), make_hide(data, self.tokenizer))
        if mixed.rows_per_epoch < data.global_batch_size:
            raise UserError(
                f"config.data.sources hold {mixed.rows_per_epoch:,.1f} rows of {data.sequence_length} tokens, less than a batch "
                f"of {data.global_batch_size}:\ngive more text, or lower config.data.global_batch_size"
            )
        return mixed

    def held(self, data: Data, split: str) -> dict[str, Held]:
        """Rows of a held-out split by source, without the sources that have none. Raises UserError where nobody has."""
        document_id, hide = self.tokenizer.document_id, make_hide(data, self.tokenizer)
        found = {
            name: Held(corpus.splits[split], data.sequence_length, document_id, hide)
            for name, corpus in self.corpora.items()
            if corpus.splits[split].num_documents
        }
        if not found:
            raise UserError(f"the {split} split is empty: raise config.data.{split}_fraction, or give more documents")
        return found

    def kept(self, results: tuple) -> tuple[str, tuple]:
        """The kind of results that are kept record by record, and these; of a text there are none."""
        return "", ()

    def scores(self, results: tuple) -> dict[str, float]:
        """Metrics of what a task's head made of records; a text has none."""
        return {}

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
    return 0 if any(shards.is_prepared(place) for place, _ in data.sources) else tokenizer.num_pieces(data.tokenizer)


def open_mixture(data: Data, say: Callable[[str], None] = lambda line: None) -> Mixture:
    """Opens, and where it must builds, every source of a config. Raises UserError, also for two tokenizers.

    The tokenizer is that of the first prepared source, else `data.tokenizer`, trained on the first source where it must be.
    """
    places = tuple(place for place, _ in data.sources)
    names = short_names(places)
    first = next((place for place in places if shards.is_prepared(place)), places[0])
    opened = {first: shards.open_corpus(data, say, first)}
    like = opened[first].tokenizer
    if shards.is_prepared(first) and not tokenizer.num_pieces(data.tokenizer):
        check_same(data.tokenizer, tokenizer.load(data.tokenizer), first, like)
    for place in places:
        if place not in opened:
            opened[place] = shards.open_corpus(data, say, place, like)
            check_same(first, like, place, opened[place].tokenizer)
    return Mixture({name: opened[place] for name, place in zip(names, places, strict=True)}, places)


def check_same(first: str, a: tokenizer.Tokenizer, second: str, b: tokenizer.Tokenizer) -> None:
    if a.fingerprint != b.fingerprint:
        raise UserError(
            f"config.data.sources: {second} was made by another tokenizer ({b.num_pieces:,} pieces, {b.fingerprint}) than\n"
            f"{first} ({a.num_pieces:,} pieces, {a.fingerprint}); prepare one of them again with the other's tokenizer"
        )


def short_names(places: tuple[str, ...]) -> list[str]:
    """The last part of each place, for the names of metrics; with a number where it is not the first of that name."""
    last = [os.path.basename(os.path.normpath(place)) for place in places]
    earlier = [last[:k].count(name) for k, name in enumerate(last)]
    return [f"{name}-{1 + number}" if number else name for name, number in zip(last, earlier, strict=True)]
