"""Documents packed whole: each once an epoch, never cut unless it is longer than a row, rows well filled."""

import collections
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_jax.data import best_fit, shards
from lm_jax.errors import UserError

DOCUMENT = 60_000


def tiny_split(sizes) -> shards.Split:
    """Documents of these sizes whose tokens are all different."""
    tokens = np.arange(sum(sizes), dtype=np.uint16)
    return shards.Split(tokens, np.cumsum([0, *sizes]), num_bytes=len(tokens))


def segments(row) -> list[np.ndarray]:
    ids = row["segment_ids"]
    return [np.flatnonzero(ids == segment) for segment in range(1, ids.max() + 1)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(8, 24), st.integers(0, 5))
def test_every_token_once_an_epoch_and_no_document_is_cut_that_fits(sizes, length, seed):
    split = tiny_split(sizes)
    stream = best_fit.BestFit(split, length, seed, DOCUMENT)
    starts = {int(start): int(size) for start, size in zip(split.offsets, sizes, strict=False)}
    for epoch in range(3):
        rows = [stream.row(epoch * stream.rows_per_epoch + j) for j in range(stream.rows_per_epoch)]
        trained = np.concatenate([row["tokens"][row["loss_mask"] > 0] for row in rows])
        np.testing.assert_array_equal(np.sort(trained), np.arange(sum(sizes)))
        for row in rows:
            for place in segments(row):
                tokens, targets = row["tokens"][place], row["targets"][place]
                np.testing.assert_array_equal(np.diff(tokens), 1)
                np.testing.assert_array_equal(row["positions"][place], np.arange(len(place)))
                np.testing.assert_array_equal(targets[:-1], tokens[1:])
                ends = int(tokens[-1]) + 1 in split.offsets
                assert targets[-1] == (DOCUMENT if ends else tokens[-1] + 1)
                if (size := starts.get(int(tokens[0]))) and size <= length:
                    assert len(place) == size, "a document that fits was cut"
            assert (row["loss_mask"] == (row["segment_ids"] > 0)).all()
            assert all(x.shape == (length,) for name, x in row.items() if name != "row")


def test_epochs_differ_and_seeds_differ():
    split = tiny_split([3] * 40)
    stream, other = best_fit.BestFit(split, 9, 0, DOCUMENT), best_fit.BestFit(split, 9, 1, DOCUMENT)
    epoch = lambda s, e: np.concatenate([s.row(e * 14 + j)["tokens"] for j in range(14)]).tolist()
    assert stream.rows_per_epoch == 14
    assert len({tuple(epoch(stream, 0)), tuple(epoch(stream, 1)), tuple(epoch(other, 0))}) == 3
    assert epoch(best_fit.BestFit(split, 9, 0, DOCUMENT), 1) == epoch(stream, 1)


def test_best_fit_takes_the_fullest_row_with_room():
    np.testing.assert_array_equal(best_fit.assign_rows(np.array([7, 6, 4, 3, 3, 1]), 10), [0, 1, 1, 0, 2, 2])


def test_rows_are_well_filled():
    sizes = np.random.RandomState(0).geometric(1 / 60, 2000).clip(1, 300)
    rows = best_fit.assign_rows(-np.sort(-sizes), 300)
    assert (np.bincount(rows, -np.sort(-sizes)) <= 300).all()
    assert sizes.sum() / (300 * (rows.max() + 1)) > 0.995


def test_long_documents_are_cut_into_whole_rows_or_refused():
    split = tiny_split([25, 4, 3])
    stream = best_fit.BestFit(split, 10, 0, DOCUMENT)
    assert stream.num_cut == 1 and collections.Counter(stream.size.tolist()) == {10: 2, 5: 1, 4: 1, 3: 1}
    with pytest.raises(UserError, match="1 documents are longer than a row of 10 tokens, the longest 25"):
        best_fit.BestFit(split, 10, 0, DOCUMENT, cut=False)


def test_the_plan_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("LM_JAX_CACHE", str(tmp_path))
    size = np.array([3, 9, 4, 6])
    rows = best_fit.plan_rows(size, 10, keep=True)
    [kept] = pathlib.Path(tmp_path).rglob("*.npy")
    monkeypatch.setattr(best_fit, "assign_rows", None)
    np.testing.assert_array_equal(best_fit.plan_rows(size, 10, keep=True), rows)
    assert kept.parent.name == "packing"
