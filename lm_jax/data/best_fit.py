"""Whole documents -> rows, by best-fit decreasing (Ding et al., arXiv:2404.10830); beside `packing.py`, which cuts them."""

import functools
import glob
import hashlib
import io
import os

import numpy as np

from lm_jax.data.packing import Batch, lay_out, permutation, stacked
from lm_jax.data.shards import PIPELINE, Split
from lm_jax.errors import UserError
from lm_jax.files import cache_folder, write_whole


class BestFit:
    """Whole documents packed into rows of T tokens by best-fit decreasing, short rows padded.

    A document that is longer than a row is cut into chunks: rows of their own, and a rest that is packed. Where `cut` is False
    it is refused (UserError). Which sizes share a row is planned once, for all epochs; an epoch permutes the documents of
    equal size, and the rows. The last token of a document predicts `document_id`, as everywhere.
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
        self.document, self.first, self.size = chunks_of(sizes, sequence_length)
        self.row_of = plan_rows(self.size, sequence_length, keep=split.origin is not None)
        self.rows_per_epoch = int(self.row_of.max()) + 1
        self.slots = np.argsort(self.row_of, kind="stable")  # slot k: the k-th largest chunk; here by row
        self.starts = np.searchsorted(self.row_of[self.slots], np.arange(self.rows_per_epoch + 1))
        self._epoch = functools.lru_cache(maxsize=2)(self._epoch)  # type: ignore[method-assign]

    def __reduce__(self):
        return type(self), (self.split, self.sequence_length, self.seed, self.document_id)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The chunk that each slot holds in this epoch, and the order of the rows."""
        order = permutation(len(self.size), self.seed, epoch)
        chunks = order[np.argsort(-self.size[order], kind="stable")]
        return chunks, permutation(self.rows_per_epoch, self.seed, epoch, "rows of epoch")

    def chunks(self, i: int) -> np.ndarray:
        """The chunks that row i holds, in their order."""
        epoch, position = divmod(i, self.rows_per_epoch)
        chunks, rows = self._epoch(epoch)
        return chunks[self.slots[self.starts[rows[position]] : self.starts[rows[position] + 1]]]

    def row(self, i: int) -> Batch:
        """Row i, as `lay_out` has it."""
        tokens, targets = [], []
        for chunk in self.chunks(i):
            start, end = self.split.offsets[self.document[chunk] : self.document[chunk] + 2].tolist()
            start += int(self.first[chunk])
            stop = start + int(self.size[chunk])
            found = self.split.tokens[start : min(stop + 1, end)]
            tokens.append(found[: stop - start])
            targets.append(found[1:])
            if stop == end:
                targets.append(np.array([self.document_id], found.dtype))
        sizes = [len(chunk) for chunk in tokens]
        return lay_out(np.concatenate(tokens), np.concatenate(targets), sizes, self.sequence_length, i)

    def rows(self, indices: list[int]) -> Batch:
        """These rows as [rows, T] arrays."""
        return stacked([self.row(i) for i in indices])


def chunks_of(sizes: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Documents of these sizes as chunks of at most `length` tokens: (document, first token in it, size) of each."""
    num = -(-sizes // length)
    document = np.repeat(np.arange(len(sizes)), num)
    first = (np.arange(len(document)) - np.repeat(np.cumsum(num) - num, num)) * length
    return document, first, np.minimum(sizes[document] - first, length)


def plan_rows(size: np.ndarray, length: int, keep: bool) -> np.ndarray:
    """`assign_rows` of chunks in falling order of their sizes; kept in the cache, by hash, where `keep`."""
    falling = -np.sort(-size)
    key = hashlib.sha256(f"{PIPELINE} {length} ".encode() + falling.astype(np.int64).tobytes()).hexdigest()[:16]
    folder = os.path.join(cache_folder(), "packing")
    for path in glob.glob(os.path.join(glob.escape(folder), f"{key}-*.npy")) if keep else []:
        with open(path, "rb") as file:
            raw = file.read()
        if path.endswith(f"-{content_hash(raw)}.npy"):
            return np.load(io.BytesIO(raw))
    rows = assign_rows(falling, length)
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


def assign_rows(sizes: np.ndarray, length: int) -> np.ndarray:
    """The row of each chunk, int64, in falling order of sizes: the fullest row that has room for it, else a new one.

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
