"""Rows -> batches, laid over the mesh and fetched ahead.

Our code computes which tokens a row holds (`packing`, `mixed_rows`); Grain runs the threads or workers that fetch rows ahead. The
only state is an integer, the cursor: neither batch size, mesh, processes nor workers enter a row.
"""

import contextlib
from collections.abc import Iterator
from typing import SupportsIndex

import grain
import jax
import numpy as np
from absl import flags
from jax.sharding import NamedSharding

from lm_jax import stop
from lm_jax.config import Config
from lm_jax.data.best_fit import BestFit
from lm_jax.data.mixed_rows import MixedRows, SkippingRows
from lm_jax.data.mixture import RecordRows
from lm_jax.data.objectives import example
from lm_jax.data.packing import Batch, HeldOutRows, Stream
from lm_jax.data.worker import end_with_parent
from lm_jax.sharding import computed

Rows = Stream | BestFit | MixedRows | SkippingRows | HeldOutRows | RecordRows


class Batches:
    """Random access for Grain: item j = rows [first + j * size, ...) of a stream, those that this process holds."""

    def __init__(self, rows: Rows, first: int, num: int, size: int, local: tuple[int, ...]):
        self.rows, self.first, self.num, self.size, self.local = rows, first, num, size, local

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, j: SupportsIndex) -> Batch:
        start = self.first + int(j) * self.size
        return self.rows.rows([start + i for i in self.local])


def layout(mesh: jax.sharding.Mesh, num_dims: int) -> NamedSharding:
    """How the array [rows] or [rows, length, ...] of a batch lies on the mesh."""
    return NamedSharding(mesh, computed(("batch", "length")[:num_dims], mesh))


def abstract_batch(mesh: jax.sharding.Mesh, size: int, config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and layouts of a batch, for compiling before there is one."""
    row = example(config.data.objective, config.data.sequence_length, config.model.head, config.train.task)
    return {
        name: jax.ShapeDtypeStruct((size, *x.shape), x.dtype, sharding=layout(mesh, 1 + x.ndim))
        for name, x in row.items()
    }


def local_rows(mesh: jax.sharding.Mesh, size: int, length: int) -> tuple[int, ...]:
    """Rows of a batch that the devices of this process hold; several processes may hold the same."""
    held = layout(mesh, 2).addressable_devices_indices_map((size, length)).values()
    return tuple(sorted({row for rows, _ in held for row in range(size)[rows]}))  # type: ignore[misc]


def batches(
    rows: Rows, mesh: jax.sharding.Mesh, first: int, num: int, size: int, num_workers: int = 0
) -> Iterator[dict[str, jax.Array]]:
    """`num` batches of `size` rows from row `first` on, fetched ahead, as global arrays on the mesh."""
    local = local_rows(mesh, size, rows.sequence_length)
    dataset = grain.MapDataset.source(Batches(rows, first, num, size, local)).to_iter_dataset(
        grain.ReadOptions(num_threads=0 if num_workers else 1, prefetch_buffer_size=0 if num_workers else 4)
    )
    if num_workers:
        flags.FLAGS.mark_as_parsed()  # Grain's workers read absl's flags, which our own parser leaves alone
        options = grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=2)
        dataset = dataset.mp_prefetch(options, worker_init_fn=end_with_parent)
    index_of = {row: index for index, row in enumerate(local)}
    with stop.children_deaf_to_ctrl_c() if num_workers else contextlib.nullcontext():
        iterator = iter(dataset)
        if num_workers:
            iterator.start_prefetch()
    try:
        for batch in iterator:
            yield {name: _on_mesh(value, mesh, size, index_of) for name, value in batch.items()}
    finally:
        iterator.close()


def _on_mesh(local: np.ndarray, mesh: jax.sharding.Mesh, size: int, index_of: dict[int, int]) -> jax.Array:
    """The global array [size, ...] whose row r is local[index_of[r]]; a device's rows are neighbours, which are not copied."""

    def shard(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        rows = range(size)[index[0]]
        return local[(slice(index_of[rows[0]], index_of[rows[-1]] + 1), *index[1:])]

    with jax.transfer_guard_host_to_device("allow"):  # the one transfer that the loop means
        return jax.make_array_from_callback((size, *local.shape[1:]), layout(mesh, local.ndim), shard)
