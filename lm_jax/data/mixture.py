"""The data of a config, opened: the corpora of its sources, one tokenizer, their rows, and what a resumed run must find again."""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from lm_jax.config import Data
from lm_jax.data import shards, special_ids, tokenizer_files
from lm_jax.data.best_fit import BestFit
from lm_jax.data.corpus import is_prepared, open_corpus
from lm_jax.data.mixed_rows import MixedRows, Quotas
from lm_jax.data.objectives import make_corruption
from lm_jax.data.packing import Batch, HeldOutRows, Stream
from lm_jax.data.tokenizer import Tokenizer
from lm_jax.errors import UserError


class Task(Protocol):
    """What a run asks of the task whose records it learns; the tasks themselves stand in lm_jax/tasks."""

    writes: bool  # whether its answers are texts that a model writes
    compares: bool  # whether its loss compares a model with the first parameters

    @property
    def chat_template(self) -> object:
        """The template in which it writes conversations, None where it writes none."""

    @property
    def facts(self) -> dict[str, Any]:
        """What config.json keeps of its records."""

    def files(self, tokenizer: Tokenizer) -> dict[str, bytes]:
        """What a run keeps of it, by file name."""

    @property
    def measures(self) -> tuple[str, ...]:
        """The names of its `scores`, () where it has none."""

    def scores(self, results: tuple) -> dict[str, float]:
        """Its metrics of what a model made of records."""

    def kept(self, results: tuple) -> tuple[str, tuple]:
        """Kind of the results that are kept ("" = none), and these."""


class RecordRows(Protocol):
    """Held-out rows that hold a task's records, and say what the outputs of a model mean for them."""

    split: shards.Split
    sequence_length: int
    num_rows: int

    def first(self, num_rows: int) -> "RecordRows":
        """The first of the rows alone."""

    def row(self, i: int) -> Batch:
        """Row i, as `packing.lay_out` has it."""

    def rows(self, indices: list[int]) -> Batch:
        """These rows as [rows, T] arrays; padding beyond the last."""

    def results(self, i: int, logits_TC: np.ndarray) -> list:
        """What the logits of row i say of each of its records."""

    def joined(self, results: tuple) -> tuple:
        """Results of segments -> one of each record."""


HeldOut = Mapping[str, HeldOutRows | RecordRows]  # the rows of a split by source


@dataclasses.dataclass(frozen=True)
class Mixture:
    """The sources of a config, in its order, all tokenised by one tokenizer."""

    corpora: dict[str, shards.Corpus]  # by the short names of the sources
    sources: tuple[str, ...]  # paths, URLs, or "python"
    tokenizer: Tokenizer
    task: Task | None = None  # of the records; None where text is learnt as it is

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

    def shares(self, data: Data, row: int) -> dict[str, float]:
        """The share of the training rows that each source has around a row."""
        return dict(zip(self.corpora, Quotas([weight for _, weight in data.sources]).shares(row), strict=True))

    def held(self, data: Data, split: str) -> HeldOut:
        """Rows of a held-out split by source, without the sources that have none. Raises UserError where nobody has."""
        document_id, corruption = self.tokenizer.document_id, make_corruption(data, self.tokenizer)
        found = {
            name: HeldOutRows(corpus.splits[split], data.sequence_length, document_id, corruption)
            for name, corpus in self.corpora.items()
            if corpus.splits[split].num_documents
        }
        if not found:
            way = "prepare it again with a larger --" if all(map(is_prepared, self.sources)) else "raise config.data."
            raise UserError(f"the {split} split is empty: {way}{split}_fraction, or give more or longer documents")
        return found

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        """What a run must find again: the tokenizer, every shard, and one hash of all of it."""
        files = {
            source: {name: file["sha256"][:16] for name, file in corpus.manifest["files"].items()}
            for source, corpus in zip(self.sources, self.corpora.values(), strict=True)
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
        by_source = self.facts["shards"].items()
        files = {f"{source}/{name}": digest for source, digests in by_source for name, digest in digests.items()}
        return {name: self.facts[name] for name in ("pipeline", "tokenizer")} | files | {"data": self.facts["data"]}


def pieces_expected(data: Data) -> int:
    """Pieces of the tokenizer that will be trained, 0 where one is given and must be opened to know."""
    return 0 if any(is_prepared(source) for source, _ in data.sources) else tokenizer_files.vocab_size(data.tokenizer)


def open_mixture(data: Data, log: Callable[[str], None] = lambda line: None) -> Mixture:
    """Opens, and where it must builds, every source of a config. Raises UserError, also for two tokenizers.

    The tokenizer is that of the first prepared source, else `data.tokenizer`, trained on the first source where it must be.
    """
    sources = tuple(source for source, _ in data.sources)
    first = next((source for source in sources if is_prepared(source)), sources[0])
    opened = {first: open_corpus(data, log, first)}
    tokenizer = opened[first].tokenizer
    if is_prepared(first) and not tokenizer_files.vocab_size(data.tokenizer):
        check_same(data.tokenizer, tokenizer_files.load(data.tokenizer), first, tokenizer)
    for source in sources:
        if source not in opened:
            opened[source] = open_corpus(data, log, source, tokenizer)
            check_same(first, tokenizer, source, opened[source].tokenizer)
    corpora = {name: opened[source] for name, source in zip(short_names(sources), sources, strict=True)}
    return Mixture(corpora, sources, tokenizer)


def check_same(first: str, a: Tokenizer, second: str, b: Tokenizer) -> None:
    """Raises UserError where two sources, by their names, have two tokenizers."""
    if a.fingerprint != b.fingerprint:
        raise UserError(
            f"config.data.sources: {second} was made by another tokenizer ({b.vocab_size:,} pieces, {b.fingerprint}) than\n"
            f"{first} ({a.vocab_size:,} pieces, {a.fingerprint}); "
            f"prepare its text again:\npython tools/prepare_data.py --tokenizer {first!r} --output NEW TEXT..."
        )


def short_names(sources: tuple[str, ...]) -> list[str]:
    """The last part of each source, for the names of metrics; with a number where it is not the first of that name."""
    last = [os.path.basename(os.path.normpath(source)) for source in sources]
    earlier = [last[:k].count(name) for k, name in enumerate(last)]
    return [f"{name}-{1 + number}" if number else name for name, number in zip(last, earlier, strict=True)]
