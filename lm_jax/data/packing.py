"""Documents -> rows. Row i is a pure function of (documents, seed, i): every epoch has its own keyed permutation.

Three ways: concatenated and split, every token a target once an epoch (`Stream`); whole documents by best fit, short rows padded
(`BestFit`); held-out documents in their order (`HeldOutRows`). A row stands in the batch contract of `lay_out`.
"""

import copy
import functools
import glob
import hashlib
import io
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from lm_jax.data.shards import PIPELINE, Split, cache_folder
from lm_jax.errors import UserError
from lm_jax.files import write_whole

Batch = dict[str, Any]  # of numpy arrays
# (rows, i, number of rows or 0 where they are endless) -> row i of the batch contract with other inputs and targets
Corruption = Callable[[Callable[[int], Batch], int, int], Batch]


def identity(rows: Callable[[int], Batch], i: int, num_rows: int) -> Batch:
    """The corruption that changes nothing: the next token is the target."""
    return rows(i)


def permutation(num: int, seed: int, epoch: int, of: str = "epoch") -> np.ndarray:
    """A keyed permutation of range(num): the order of Philox words, whose bits no numpy release may change."""
    key = int.from_bytes(hashlib.sha256(f"{of} {epoch} of seed {seed}".encode()).digest()[:16], "little")
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

    def __reduce__(self):  # for worker processes: the cache stays behind
        return type(self), (self.split, self.sequence_length, self.seed)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Documents in this epoch's order, and where each starts in the epoch's tokens (one more: the end)."""
        order = permutation(self.split.num_documents, self.seed, epoch)
        return order, np.concatenate([[0], np.cumsum(np.diff(self.split.offsets)[order])])

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """(document, its tokens there) for the endless stream's tokens [start, stop)."""
        while start < stop:
            epoch, place = divmod(start, self.tokens_per_epoch)
            order, starts = self._epoch(epoch)
            index = int(np.searchsorted(starts, place, side="right")) - 1
            num = min(int(starts[index + 1]) - place, stop - start)
            first = int(self.split.offsets[order[index]]) + place - int(starts[index])
            yield int(order[index]), self.split.tokens[first : first + num]
            start += num

    def row(self, i: int) -> Batch:
        return {name: value[0] for name, value in self.block(i, 1).items()}

    def rows(self, indices: list[int]) -> Batch:
        """These rows as [rows, T] arrays: one pass over the tokens for each run of neighbours, whatever its length."""
        borders = [0, *(k for k in range(1, len(indices)) if indices[k] != indices[k - 1] + 1), len(indices)]
        blocks = [self.block(indices[a], b - a) for a, b in itertools.pairwise(borders)]
        if len(blocks) == 1:
            return blocks[0]
        return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}

    def block(self, first: int, num: int) -> Batch:
        """Rows [first, first + num) of the batch contract."""
        length, size = self.sequence_length, num * self.sequence_length
        pieces = [piece for _, piece in self.pieces(first * length, first * length + size + 1)]
        tokens, shape = np.concatenate(pieces).astype(np.int32), (num, length)
        borders = np.cumsum([len(piece) for piece in pieces[:-1]], dtype=np.int64)
        starts = np.zeros(size, bool)  # of segments: at a document's first token, and at a row's
        starts[borders[borders < size]] = starts[::length] = True
        place = count_to(size)
        return {
            "tokens": tokens[:-1].reshape(shape),
            "targets": tokens[1:].reshape(shape),
            "segment_ids": np.cumsum(starts.reshape(shape), axis=1, dtype=np.int32),
            "positions": (place - np.maximum.accumulate(np.where(starts, place, 0))).reshape(shape),
            "loss_mask": np.ones(shape, np.float32),
            "row": np.arange(first, first + num, dtype=np.uint32),
        }


def stacked(rows: list[Batch]) -> Batch:
    """Rows as one batch, [rows, ...] each."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def stacked_or_padding(row: Callable[[int], Batch], num_rows: int, indices: list[int]) -> Batch:
    """Held-out rows as one batch; one of padding in the place of each beyond the last, where the last batch is not full."""
    nothing = {name: np.zeros_like(value) for name, value in row(0).items()}
    return stacked([row(i) if i < num_rows else nothing | {"row": np.uint32(i)} for i in indices])


class BestFit:
    """Whole documents packed into rows of T tokens by best-fit decreasing (Ding et al., arXiv:2404.10830), short rows padded.

    A document that is longer than a row is cut into rows of its own and a rest that is packed, or refused where `cut` is False.
    Which sizes share a row is planned once, for all epochs; an epoch permutes the documents of equal size, and the rows.
    The last token of a document predicts `document_id`, as everywhere.
    """

    def __init__(self, split: Split, sequence_length: int, seed: int, document_id: int, cut: bool = True):
        self.split, self.sequence_length, self.seed, self.document_id = split, sequence_length, seed, document_id
        sizes = np.diff(split.offsets)
        self.num_cut = int((sizes > sequence_length).sum())
        if self.num_cut and not cut:
            raise UserError(
                f"{self.num_cut:,} documents are longer than a row of {sequence_length} tokens, the longest {sizes.max():,}:\n"
                f"raise config.data.sequence_length, or take config.data.packing = best_fit, which cuts them"
            )
        self.document, self.first, self.size = pieces_of(sizes, sequence_length)
        self.row_of = planned(self.size, sequence_length, keep=split.place is not None)
        self.rows_per_epoch = int(self.row_of.max()) + 1
        self.slots = np.argsort(self.row_of, kind="stable")  # slot k: the k-th largest piece; here by row
        self.starts = np.searchsorted(self.row_of[self.slots], np.arange(self.rows_per_epoch + 1))
        self._epoch = functools.lru_cache(maxsize=2)(self._epoch)  # type: ignore[method-assign]

    def __reduce__(self):
        return type(self), (self.split, self.sequence_length, self.seed, self.document_id)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The piece that each slot holds in this epoch, and the order of the rows."""
        order = permutation(len(self.size), self.seed, epoch)
        pieces = order[np.argsort(-self.size[order], kind="stable")]
        return pieces, permutation(self.rows_per_epoch, self.seed, epoch, "rows of epoch")

    def pieces(self, i: int) -> np.ndarray:
        """The pieces that row i holds, in their order."""
        epoch, place = divmod(i, self.rows_per_epoch)
        pieces, rows = self._epoch(epoch)
        return pieces[self.slots[self.starts[rows[place]] : self.starts[rows[place] + 1]]]

    def row(self, i: int) -> Batch:
        pieces, tokens, targets = self.pieces(i), [], []
        for piece in pieces:
            start, end = self.split.offsets[self.document[piece] : self.document[piece] + 2].tolist()
            start += int(self.first[piece])
            stop = start + int(self.size[piece])
            found = self.split.tokens[start : min(stop + 1, end)]
            tokens.append(found[: stop - start])
            targets.append(found[1:])
            if stop == end:
                targets.append(np.array([self.document_id], found.dtype))
        sizes = [len(piece) for piece in tokens]
        return lay_out(np.concatenate(tokens), np.concatenate(targets), sizes, self.sequence_length, i)

    def rows(self, indices: list[int]) -> Batch:
        return stacked([self.row(i) for i in indices])


def pieces_of(sizes: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Documents of these sizes as pieces of at most `length` tokens: (document, first token in it, size) of each."""
    num = -(-sizes // length)
    document = np.repeat(np.arange(len(sizes)), num)
    first = (np.arange(len(document)) - np.repeat(np.cumsum(num) - num, num)) * length
    return document, first, np.minimum(sizes[document] - first, length)


def planned(size: np.ndarray, length: int, keep: bool) -> np.ndarray:
    """`best_fit` of pieces in falling order of their sizes; kept in the cache, by hash, where `keep`."""
    falling = -np.sort(-size)
    key = hashlib.sha256(f"{PIPELINE} {length} ".encode() + falling.astype(np.int64).tobytes()).hexdigest()[:16]
    folder = os.path.join(cache_folder(), "packing")
    for path in glob.glob(os.path.join(glob.escape(folder), f"{key}-*.npy")) if keep else []:
        with open(path, "rb") as file:
            raw = file.read()
        if path.endswith(f"-{content_hash(raw)}.npy"):
            return np.load(io.BytesIO(raw))
    rows = best_fit(falling, length)
    if keep:
        content = io.BytesIO()
        np.save(content, rows)
        os.makedirs(folder, exist_ok=True)
        name = f"{key}-{content_hash(content.getvalue())}.npy"
        write_whole(os.path.join(folder, name), content.getvalue(), alone=False)
    return rows


def content_hash(raw: bytes) -> str:
    """Stands in the name of a kept plan: one that is not as it was written is made again, under the same name."""
    return hashlib.sha256(raw).hexdigest()[:16]


def best_fit(sizes: np.ndarray, length: int) -> np.ndarray:
    """The row of each piece, in falling order of sizes: the fullest row that has room for it, else a new one.

    Bit r of `open_rows` says that some row has r tokens of room, so that the best one is found by one shift.
    """
    rows, num_rows, open_rows = np.empty(len(sizes), np.int64), 0, 0
    with_room: list[list[int]] = [[] for _ in range(length + 1)]
    for k, size in enumerate(sizes.tolist()):
        fitting = open_rows >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                open_rows ^= 1 << room
        else:
            row, room, num_rows = num_rows, length, num_rows + 1
        rows[k] = row
        if room > size:
            with_room[room - size].append(row)
            open_rows |= 1 << (room - size)
    return rows


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
        return stacked_or_padding(self.row, self.num_rows, indices)


def make_row(pieces: list[tuple[int, np.ndarray]], length: int, i: int) -> Batch:
    """A row of the batch contract from up to length + 1 tokens: the last is a target only; what is short is padding."""
    tokens = np.concatenate([piece for _, piece in pieces])[: length + 1]
    return lay_out(tokens[:-1], tokens[1:], [len(piece) for _, piece in pieces], length, i)


def lay_out(tokens: np.ndarray, targets: np.ndarray, sizes: list[int], length: int, i: int) -> Batch:
    """Row i of the batch contract: at most `length` tokens and their targets, in segments of `sizes` (the last may reach
    beyond the row); then padding."""
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
    return np.arange(length, dtype=np.int32)
