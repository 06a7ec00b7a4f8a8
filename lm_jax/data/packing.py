"""Documents -> rows. Row i is a pure function of (documents, seed, i): every epoch has its own keyed permutation.

Documents are concatenated and split, so that every token is a target once an epoch (`Stream`); held-out documents in their order
(`HeldOutRows`). `best_fit.py` packs whole documents instead. What the arrays of a row are, `lay_out` says.
"""

import copy
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from lm_jax.data.shards import Split

Batch = dict[str, Any]  # of numpy arrays
# (rows, i, number of rows or 0 where they are endless) -> row i with other inputs and targets
Corruption = Callable[[Callable[[int], Batch], int, int], Batch]


def identity(rows: Callable[[int], Batch], i: int, num_rows: int) -> Batch:
    """The corruption that changes nothing: the next token is the target."""
    return rows(i)


def permutation(num: int, seed: int, epoch: int, name: str = "epoch") -> np.ndarray:
    """A keyed permutation of range(num): the order of Philox words, whose bits no numpy release may change."""
    key = int.from_bytes(hashlib.sha256(f"{name} {epoch} of seed {seed}".encode()).digest()[:16], "little")
    return np.argsort(np.random.Philox(key=key).random_raw(num), kind="stable")


class Stream:
    """Concatenate-and-split over endless epochs: row i holds tokens [i * T, i * T + T] of all documents in order.

    Every epoch has its own permutation of the documents; a row may hold the end of one epoch and the start of the next, so
    that every token is a target exactly once an epoch.
    """

    def __init__(self, split: Split, sequence_length: int, seed: int):
        self.split, self.sequence_length, self.seed = split, sequence_length, seed
        self.tokens_per_epoch = len(split.tokens)
        self.rows_per_epoch = self.tokens_per_epoch / sequence_length
        self._epoch = functools.lru_cache(maxsize=2)(self._epoch)  # type: ignore[method-assign]

    def __reduce__(
        self,
    ) -> tuple[type["Stream"], tuple[Split, int, int]]:  # for worker processes: the cache stays behind
        return type(self), (self.split, self.sequence_length, self.seed)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Documents in this epoch's order, and where each starts in the epoch's tokens (one more: the end)."""
        order = permutation(self.split.num_documents, self.seed, epoch)
        return order, np.concatenate([[0], np.cumsum(np.diff(self.split.offsets)[order])])

    def chunks(self, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """(document, its tokens there) for the endless stream's tokens [start, stop)."""
        while start < stop:
            epoch, position = divmod(start, self.tokens_per_epoch)
            order, starts = self._epoch(epoch)
            index = int(np.searchsorted(starts, position, side="right")) - 1
            num = min(int(starts[index + 1]) - position, stop - start)
            first = int(self.split.offsets[order[index]]) + position - int(starts[index])
            yield int(order[index]), self.split.tokens[first : first + num]
            start += num

    def row(self, i: int) -> Batch:
        """Row i, as `lay_out` has it."""
        return {name: value[0] for name, value in self.block(i, 1).items()}

    def rows(self, indices: list[int]) -> Batch:
        """These rows as [rows, T] arrays: one pass over the tokens for each run of neighbours, whatever its length."""
        borders = [0, *(k for k in range(1, len(indices)) if indices[k] != indices[k - 1] + 1), len(indices)]
        blocks = [self.block(indices[a], b - a) for a, b in itertools.pairwise(borders)]
        if len(blocks) == 1:
            return blocks[0]
        return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}

    def block(self, first: int, num: int) -> Batch:
        """Rows [first, first + num) as [num, T] arrays."""
        length, size = self.sequence_length, num * self.sequence_length
        chunks = [chunk for _, chunk in self.chunks(first * length, first * length + size + 1)]
        tokens, shape = np.concatenate(chunks).astype(np.int32), (num, length)
        borders = np.cumsum([len(chunk) for chunk in chunks[:-1]], dtype=np.int64)
        starts = np.zeros(size, bool)  # of segments: at a document's first token, and at a row's
        starts[borders[borders < size]] = starts[::length] = True
        index = count_to(size)
        return {
            "tokens": tokens[:-1].reshape(shape),
            "targets": tokens[1:].reshape(shape),
            "segment_ids": np.cumsum(starts.reshape(shape), axis=1, dtype=np.int32),
            "positions": (index - np.maximum.accumulate(np.where(starts, index, 0))).reshape(shape),
            "loss_mask": np.ones(shape, np.float32),
            "row": np.arange(first, first + num, dtype=np.uint32),
        }


def stacked(rows: list[Batch]) -> Batch:
    """Rows as one batch, [rows, ...] each."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def stacked_or_padding(row: Callable[[int], Batch], num_rows: int, indices: list[int]) -> Batch:
    """Held-out rows as one batch; the last batch is filled up with rows of padding."""
    nothing = {name: np.zeros_like(value) for name, value in row(0).items()}
    return stacked([row(i) if i < num_rows else nothing | {"row": np.uint32(i)} for i in indices])


class HeldOutRows:
    """The rows of a held-out split: documents in order, the last row padded, every token a target exactly once."""

    def __init__(self, split: Split, sequence_length: int, document_id: int, corruption: Corruption = identity):
        self.split, self.sequence_length, self.document_id = split, sequence_length, document_id
        self.num_rows, self.corruption = -(-len(split.tokens) // sequence_length), corruption

    def first(self, num_rows: int) -> "HeldOutRows":
        """The first of the rows alone."""
        limited = copy.copy(self)
        limited.num_rows = min(num_rows, self.num_rows)
        return limited

    def row(self, i: int) -> Batch:
        """Row i, corrupted."""
        return self.corruption(self.whole, i, self.num_rows)

    def whole(self, i: int) -> Batch:
        """Row i as it was before the corruption."""
        offsets, start = self.split.offsets, i * self.sequence_length
        stop = min(start + self.sequence_length + 1, len(self.split.tokens))
        tokens = self.split.tokens[start:stop]
        if len(tokens) <= self.sequence_length:  # what follows the last document
            tokens = np.append(tokens, np.array([self.document_id], tokens.dtype))
        first, last = np.searchsorted(offsets, start, side="right"), np.searchsorted(offsets, stop)
        sizes = np.diff([start, *offsets[first:last], start + len(tokens)])
        return lay_out(tokens[:-1], tokens[1:], sizes.tolist(), self.sequence_length, i)

    def rows(self, indices: list[int]) -> Batch:
        """These rows as [rows, T] arrays; padding beyond the last."""
        return stacked_or_padding(self.row, self.num_rows, indices)


def make_row(chunks: list[tuple[int, np.ndarray]], length: int, i: int) -> Batch:
    """Row i from up to length + 1 tokens, the last of them a target only; what is missing is padding."""
    tokens = np.concatenate([chunk for _, chunk in chunks])[: length + 1]
    return lay_out(tokens[:-1], tokens[1:], [len(chunk) for _, chunk in chunks], length, i)


def lay_out(tokens: np.ndarray, targets: np.ndarray, sizes: list[int], length: int, i: int) -> Batch:
    """Row i: int32 [length] `tokens`, `targets`, `segment_ids` (0 = padding), `positions`; float32 `loss_mask`; uint32 [] `row`.

    There are at most `length` tokens, in segments of `sizes` (the last may reach beyond the row); then padding. Positions
    begin anew in every segment.
    """
    num, start = len(tokens), 0
    ints = np.zeros((4, length), np.int32)
    ints[0, :num], ints[1, :num] = tokens, targets
    for segment, size in enumerate(sizes, 1):
        stop = min(start + size, num)
        ints[2, start:stop], ints[3, start:stop] = segment, count_to(length)[: stop - start]
        start = stop
    loss_mask = np.zeros(length, np.float32)
    loss_mask[:num] = 1
    names = ("tokens", "targets", "segment_ids", "positions")
    return dict(zip(names, ints, strict=True)) | {"loss_mask": loss_mask, "row": np.uint32(i)}


@functools.cache
def count_to(length: int) -> np.ndarray:
    """0, 1, ..., int32 [length], made once."""
    return np.arange(length, dtype=np.int32)
