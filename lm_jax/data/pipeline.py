"""Row i of the training stream is a pure function of (corpus, seed, i); batches are rows laid over the mesh.

Our code computes which tokens a row holds; Grain runs the threads or workers that fetch rows ahead. The only state is an
integer, the cursor: neither batch size, mesh, processes nor workers enter a row.
"""

import functools
import hashlib
from collections.abc import Iterator
from typing import Any

import grain
import jax
import numpy as np
from absl import flags
from jax.sharding import NamedSharding

from lm_jax.config import UserError
from lm_jax.data.shards import Split
from lm_jax.sharding import computed

Batch = dict[str, Any]  # of numpy arrays


def permutation(num: int, seed: int, epoch: int) -> np.ndarray:
    """A keyed permutation of range(num): the order of Philox words, whose bits no numpy release may change."""
    key = int.from_bytes(hashlib.sha256(f"epoch {epoch} of seed {seed}".encode()).digest()[:16], "little")
    return np.argsort(np.random.Philox(key=key).random_raw(num), kind="stable")


class Stream:
    """Concatenate-and-split over endless epochs: row i holds tokens [i * T, i * T + T] of all documents in order.

    Every epoch has its own permutation of the documents; a row may hold the end of one epoch and the start of the next, so
    that every token is a target exactly once an epoch.
    """

    def __init__(self, split: Split, sequence_length: int, seed: int):
        self.split, self.sequence_length, self.seed = split, sequence_length, seed
        self.tokens_per_epoch = len(split.tokens)
        self._epoch = functools.lru_cache(maxsize=2)(self._epoch)  # type: ignore[method-assign]

    def __getstate__(self):  # for worker processes: the cache stays behind
        return self.split, self.sequence_length, self.seed

    def __setstate__(self, state):
        self.__init__(*state)  # type: ignore[misc]

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
        start = i * self.sequence_length
        return make_row(list(self.pieces(start, start + self.sequence_length + 1)), self.sequence_length, i)


class Held:
    """The rows of a held-out split: documents in order, the last row padded, every token a target exactly once."""

    def __init__(self, split: Split, sequence_length: int, document_id: int):
        self.split, self.sequence_length, self.document_id = split, sequence_length, document_id
        self.num_rows = -(-len(split.tokens) // sequence_length)

    def row(self, i: int) -> Batch:
        offsets, start = self.split.offsets, i * self.sequence_length
        stop = min(start + self.sequence_length + 1, len(self.split.tokens))
        pieces, document = [], int(np.searchsorted(offsets, start, side="right")) - 1
        while start < stop:
            end = min(int(offsets[document + 1]), stop)
            pieces.append((document, self.split.tokens[start:end]))
            start, document = end, document + 1
        if stop == len(self.split.tokens):  # what follows the last document
            pieces.append((document, np.array([self.document_id], self.split.tokens.dtype)))
        return make_row(pieces, self.sequence_length, i)


def make_row(pieces: list[tuple[int, np.ndarray]], length: int, i: int) -> Batch:
    """A row of the batch contract from up to length + 1 tokens: the last is a target only; what is short is padding."""
    tokens = np.concatenate([piece for _, piece in pieces]).astype(np.int32)[: length + 1]
    sizes = [len(piece) for _, piece in pieces]
    segments = np.repeat(np.arange(1, len(pieces) + 1, dtype=np.int32), sizes)[: len(tokens)]
    positions = np.concatenate([np.arange(size, dtype=np.int32) for size in sizes])[: len(tokens)]
    num = len(tokens) - 1
    pad = lambda x: np.pad(x, (0, length - num))
    return {
        "tokens": pad(tokens[:-1]),
        "targets": pad(tokens[1:]),
        "loss_mask": pad(np.ones(num, np.float32)),
        "segment_ids": pad(segments[:-1]),
        "positions": pad(positions[:-1]),
        "row": np.uint32(i),
    }


class First:
    """The first `num_rows` of held-out rows."""

    def __init__(self, held: Held, num_rows: int):
        self.sequence_length, self.num_rows, self.row = held.sequence_length, num_rows, held.row


class Batches:
    """Random access for Grain: item j = rows [first + j * size, ...) of a stream, those that this process holds."""

    def __init__(self, rows: Stream | Held | First, first: int, num: int, size: int, local: tuple[int, ...]):
        self.rows, self.first, self.num, self.size, self.local = rows, first, num, size, local

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, j) -> Batch:
        start = self.first + int(j) * self.size
        limit = getattr(self.rows, "num_rows", None)
        made = [
            self.rows.row(start + i) if limit is None or start + i < limit else self._nothing(start + i)
            for i in self.local
        ]
        return {name: np.stack([row[name] for row in made]) for name in made[0]}

    def _nothing(self, i: int) -> Batch:
        """A row of padding, where the last batch is not full."""
        return {name: np.zeros_like(value) for name, value in self.rows.row(0).items()} | {"row": np.uint32(i)}


def layout(mesh: jax.sharding.Mesh) -> NamedSharding:
    """How a batch [rows, length] lies on the mesh."""
    return NamedSharding(mesh, computed(("batch", "length")))


def abstract_batch(mesh: jax.sharding.Mesh, size: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and layouts of a batch, for compiling before there is one."""
    row = make_row([(0, np.zeros(length + 1, np.int32))], length, 0)
    lay = lambda x: NamedSharding(mesh, computed(("batch", "length")[: 1 + x.ndim]))
    return {name: jax.ShapeDtypeStruct((size, *x.shape), x.dtype, sharding=lay(x)) for name, x in row.items()}


def local_rows(mesh: jax.sharding.Mesh, size: int, length: int) -> tuple[int, ...]:
    """Rows of a batch that the devices of this process hold; several processes may hold the same."""
    held = layout(mesh).addressable_devices_indices_map((size, length)).values()
    return tuple(sorted({row for rows, _ in held for row in range(size)[rows]}))  # type: ignore[misc]


def batches(
    rows: Stream | Held | First, mesh: jax.sharding.Mesh, first: int, num: int, size: int, num_workers: int = 0
) -> Iterator[dict[str, jax.Array]]:
    """`num` batches of `size` rows from row `first` on, fetched ahead, as global arrays on the mesh."""
    local = local_rows(mesh, size, rows.sequence_length)
    dataset = grain.MapDataset.source(Batches(rows, first, num, size, local)).to_iter_dataset(
        grain.ReadOptions(num_threads=0 if num_workers else 1, prefetch_buffer_size=0 if num_workers else 4)
    )
    if num_workers:
        flags.FLAGS.mark_as_parsed()  # Grain's workers read absl's flags, which our own parser leaves alone
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=2))
    place = {row: index for index, row in enumerate(local)}
    for batch in dataset:
        yield {name: _on_mesh(value, mesh, size, place) for name, value in batch.items()}


def _on_mesh(local: np.ndarray, mesh: jax.sharding.Mesh, size: int, place: dict[int, int]) -> jax.Array:
    shape = (size, *local.shape[1:])
    sharding = NamedSharding(mesh, computed(("batch", "length")[: local.ndim]))

    def shard(index):
        rows = [place[row] for row in range(size)[index[0]]]
        return local[rows][(slice(None), *index[1:])]

    with jax.transfer_guard_host_to_device("allow"):  # the one transfer that the loop means
        return jax.make_array_from_callback(shape, sharding, shard)


def held_rows(split: Split, name: str, sequence_length: int, document_id: int) -> Held:
    """Rows of a held-out split. Raises UserError where the split has no document."""
    if not split.num_documents:
        raise UserError(f"the {name} split is empty: raise config.data.{name}_fraction, or give more documents")
    return Held(split, sequence_length, document_id)
