"""What is hidden, how often, and that it can be put back; all of it a function of (row, key)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_jax.data import objectives, packing

START, SENTINEL, MASK, PIECES, DOCUMENT = 1, 1000, 999, 500, 7


def row_of(*sizes, length=64, i=3) -> packing.Batch:
    """A packed row of documents of these sizes."""
    tokens = np.random.RandomState(i).randint(10, PIECES, sum(sizes))
    tokens[np.cumsum([0, *sizes[:-1]])] = DOCUMENT
    return packing.lay_out(tokens, np.roll(tokens, -1), list(sizes), length, i)


def masked(row, seed=0, **more):
    key = objectives.key("masked", seed, row["row"])
    return objectives.masked(row, key, MASK, PIECES, special=(DOCUMENT,), **more)


def corrupted(row, seed=0):
    return objectives.span_corruption(row, objectives.key("span_corruption", seed, row["row"]), START, SENTINEL)


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("hide", [masked, corrupted])
def test_the_same_key_hides_the_same_and_another_row_or_seed_does_not(hide):
    row = row_of(40, 24)
    assert equal(hide(row), hide(row))
    assert not equal(hide(row), hide(row, seed=1))
    assert not equal(hide(row), hide(row | {"row": np.uint32(4)}) | {"row": row["row"]})


def test_fifteen_percent_are_chosen_and_eight_of_ten_masked():
    rows = [row_of(500, 400, length=1000, i=i) for i in range(60)]
    hidden = [masked(row) for row in rows]
    of = lambda name, made: np.concatenate([row[name][row["segment_ids"] > 0] for row in made])
    was, now, chosen = of("tokens", rows), of("tokens", hidden), of("loss_mask", hidden) > 0
    assert abs(chosen.mean() - 0.15) < 0.005
    assert abs((now[chosen] == MASK).mean() - 0.8) < 0.01
    assert abs((now[chosen] == was[chosen]).mean() - 0.1) < 0.01
    assert (now[~chosen] == was[~chosen]).all() and not chosen[was == DOCUMENT].any()
    assert (of("targets", hidden)[chosen] == was[chosen]).all()
    assert all(row["loss_mask"][row["segment_ids"] == 0].sum() == 0 for row in hidden)


def test_the_pieces_of_a_word_are_chosen_together():
    starts = np.arange(PIECES) % 3 == 0
    chosen_words = 0
    for i in range(50):
        row = row_of(30, 30, i=i)
        chosen = masked(row, starts_word=starts)["loss_mask"] > 0
        begins = starts[row["tokens"]] | (row["positions"] == 0) | (row["positions"] == 1)
        for place in range(1, 60):
            if not begins[place]:
                assert chosen[place] == chosen[place - 1]
        chosen_words += chosen.any()
    assert chosen_words > 40


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(0, 50))
def test_spans_can_be_put_back(sizes, i):
    row = row_of(*sizes, length=sum(sizes) + 5, i=i)
    found = corrupted(row)
    for segment, size in enumerate(sizes, 1):
        kept = found["encoder_tokens"][found["encoder_segment_ids"] == segment].tolist()
        here = found["segment_ids"] == segment
        hidden = found["targets"][here].tolist()
        np.testing.assert_array_equal(found["tokens"][here], [START, *hidden[:-1]][: len(hidden)])
        np.testing.assert_array_equal(found["positions"][here], np.arange(len(hidden)))
        spans: dict[int, list[int]] = {}
        for token in hidden:
            if token >= SENTINEL:
                spans[token] = []
            else:
                spans[max(spans)].append(token)
        back = [x for token in kept for x in (spans[token] if token >= SENTINEL else [token])]
        np.testing.assert_array_equal(back, row["tokens"][row["segment_ids"] == segment])
        num_hidden = sum(map(len, spans.values()))
        assert num_hidden == (min(max(1, round(0.15 * size)), size - 1) if size > 2 else 0)
        assert list(spans) == [SENTINEL + k for k in range(len(spans))] and (not spans or not spans[max(spans)])


def test_another_document_changes_nothing_in_this_one():
    a, b = row_of(30, 30), row_of(30, 30)
    a["tokens"][1:30] = 11
    for hide in (masked, corrupted):
        for name, x in hide(a).items():
            if name != "row":
                ids = hide(a)["encoder_segment_ids" if name.startswith("encoder") else "segment_ids"]
                np.testing.assert_array_equal(x[ids == 2], hide(b)[name][ids == 2])


def test_bits_are_frozen():
    row = row_of(40, 24)
    assert np.flatnonzero(masked(row)["loss_mask"]).tolist() == [1, 2, 5, 21, 34, 41, 43]
    assert corrupted(row)["targets"][:12].tolist() == [1000, 445, 356, 79, 370, 1001, 116, 162, 1002, 1000, 284, 382]
