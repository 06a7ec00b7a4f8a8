"""Mixtures: exact quotas in closed form, each source its own stream, one tokenizer, and what a resume refuses by name."""

import dataclasses
import pickle
import shutil

import jax
import numpy as np
import pytest
from helpers import made_up, tiny, write_shards
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_jax import run_folder
from lm_jax.config import Mesh, flatten
from lm_jax.data import best_fit, loader, mixed_rows, mixture, packing, shards
from lm_jax.data.corpus import open_corpus
from lm_jax.errors import UserError
from lm_jax.evaluator import Totals, by_source
from lm_jax.mesh import make_mesh

positive = st.floats(0.01, 10)


@settings(max_examples=80, deadline=None)
@given(st.lists(positive, min_size=1, max_size=6), st.integers(0, 10**12))
def test_quotas_are_exact(weights, start):
    quotas = mixed_rows.Quotas(weights)
    before = quotas.counts(start)
    for i in range(start, start + 50):
        source, j = quotas.locate(i)
        after = quotas.counts(i + 1)
        assert j == before[source] and after == [n + (k == source) for k, n in enumerate(before)]
        assert sum(after) == i + 1
        if i < 10**9:  # beyond it the float that we compare with is coarse
            assert max(abs(n - (i + 1) * w / sum(weights)) for n, w in zip(after, weights, strict=True)) < len(weights)
        before = after


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30), positive, positive), min_size=1, max_size=4))
def test_stages_start_where_they_say(stages):
    firsts = np.cumsum([0, *(rows for rows, _, _ in stages)])[:-1].tolist()
    tables = [tuple((f, stage[1 + k]) for f, stage in zip(firsts, stages, strict=True)) for k in range(2)]
    quotas, before = mixed_rows.Quotas(tables), [0, 0]
    for i in range(200):
        source, j = quotas.locate(i)
        assert j == before[source]
        before[source] += 1
        assert quotas.counts(i + 1) == before
    for f, (rows, a, b) in zip(firsts, stages, strict=True):
        seen = np.subtract(quotas.counts(f + rows), quotas.counts(f))
        assert abs(seen[0] - rows * a / (a + b)) <= 1


def test_weights_hold_over_a_thousand_steps():
    weights = [0.62, 0.3, 0.08]
    counts = mixed_rows.Quotas(weights).counts(1000 * 16)
    np.testing.assert_allclose(np.array(counts) / 16_000, weights, rtol=0.01)


def splits(*lengths) -> list[shards.Split]:
    """Sources of documents; source s has the tokens from 20,000 * s on, all different."""
    made = []
    for s, sizes in enumerate(lengths):
        tokens = (20_000 * s + np.arange(sum(sizes))).astype(np.uint16)
        made.append(shards.Split(tokens, np.cumsum([0, *sizes]), len(tokens)))
    return made


sizes = st.lists(st.integers(1, 50), min_size=1, max_size=30)


@settings(max_examples=40, deadline=None)
@given(sizes, sizes, positive, st.integers(0, 3), st.integers(8, 20), st.sampled_from(["split", "best_fit"]))
def test_a_source_is_its_own_stream_and_every_token_is_seen_once_an_epoch(a, b, weight, seed, length, way):
    one = lambda split: (
        packing.Stream(split, length, seed) if way == "split" else best_fit.BestFit(split, length, seed, 60_000)
    )
    streams = [one(split) for split in splits(a, b)]
    mixed = mixed_rows.MixedRows(streams, mixed_rows.Quotas([weight, 1.0]))
    seen, taken = [[], []], [0, 0]
    while min(taken[s] - 3 * streams[s].rows_per_epoch for s in (0, 1)) < 0:
        i = sum(taken)
        row, (source, j) = mixed.row(i), mixed.quotas.locate(i)
        assert row["row"] == i and j == taken[source]
        seen[source].append(row["tokens"][row["loss_mask"] > 0])
        taken[source] += 1
        if i > 2000:
            return
    for s, split in enumerate(splits(a, b)):
        tokens, size = np.concatenate(seen[s]), len(split.tokens)
        for epoch in range(3):
            np.testing.assert_array_equal(np.sort(tokens[epoch * size : (epoch + 1) * size]), split.tokens)


@pytest.mark.parametrize("way", ["split", "best_fit"])
def test_rows_of_two_sources_taken_together_are_the_rows_one_by_one(way):
    make = {"split": packing.Stream, "best_fit": lambda *given: best_fit.BestFit(*given, 9999)}[way]
    mixed = mixed_rows.MixedRows(
        [make(split, 8, 0) for split in splits([5, 7, 30], [11, 2, 9, 9])], mixed_rows.Quotas([0.7, 0.3])
    )
    for rows in (mixed, mixed_rows.SkippingRows(mixed, ((3, 5), (20, 21)))):
        for indices in (list(range(32)), [40, 2, 3]):
            together = rows.rows(indices)
            for k, i in enumerate(indices):
                for name, value in rows.row(i).items():
                    np.testing.assert_array_equal(together[name][k], value)


def test_skipped_rows_are_dropped_and_nothing_else():
    [split] = splits([50] * 40)
    mixed = mixed_rows.MixedRows([packing.Stream(split, 10, 0)], mixed_rows.Quotas([1.0]))
    kept = mixed_rows.SkippingRows(mixed, ((3, 5), (5, 6), (10, 14)))
    assert [int(kept.row(k)["row"]) for k in range(10)] == [0, 1, 2, 6, 7, 8, 9, 14, 15, 16]


def test_row_a_billion_is_found_at_once(corpus):
    streams = [packing.Stream(corpus.splits["train"], 64, seed) for seed in (0, 1)]
    mixed = mixed_rows.MixedRows(streams, mixed_rows.Quotas([((0, 0.3), (1000, 0.5)), 0.7]))
    calls = []
    for stream in streams:
        real = stream.split.tokens

        class Counting:  # how many tokens are touched, not how long it takes
            dtype = real.dtype

            def __getitem__(self, window, real=real):
                calls.append(window.stop - window.start)
                return real[window]

        stream.split = shards.Split(Counting(), stream.split.offsets, 0)
    assert mixed.row(10**9)["row"] == 10**9
    assert sum(calls) == 65


def test_twice_the_batch_goes_on_with_the_next_row(corpus):
    mixed = mixed_rows.MixedRows([packing.Stream(corpus.splits["train"], 64, 0)], mixed_rows.Quotas([1.0]))
    mesh = make_mesh(Mesh(), jax.devices()[:1])
    first = [batch["row"] for batch in loader.batches(mixed, mesh, 0, 5, 4)]
    then = [batch["row"] for batch in loader.batches(mixed, mesh, 20, 5, 8)]
    np.testing.assert_array_equal(np.concatenate([*first, *then]), np.arange(60))


@pytest.fixture(scope="module")
def other() -> shards.Corpus:
    """The same text by another tokenizer."""
    return open_corpus(tiny(data__tokenizer="sentencepiece:600").data)


@pytest.fixture
def places(corpus, other, tmp_path, monkeypatch):
    """Two prepared folders by the corpus' tokenizer, one by another; an empty cache."""
    monkeypatch.setenv("LM_JAX_CACHE", str(tmp_path / "cache"))
    for name, seed in (("books", 1), ("code", 2)):
        write_shards(tmp_path / name, corpus, made_up(200, seed), 1000)
    write_shards(tmp_path / "other", other, made_up(20))
    write_shards(tmp_path / "small", corpus, made_up(2))
    write_shards(tmp_path / "untrained", corpus, {"test": made_up(2)})
    return tmp_path


def two(places, a="books", b="code", **changes):
    return tiny(data__sources=((str(places / a), 0.75), (str(places / b), 0.25)), **changes).data


def test_two_prepared_folders_are_one_stream(places):
    data = two(places)
    mixed = mixture.open_mixture(data)
    assert list(mixed.corpora) == ["books", "code"] and mixed.tokenizer.vocab_size == 512
    stream = mixed.stream(data)
    rows = [stream.row(i) for i in range(40)]
    assert [stream.quotas.locate(i)[0] for i in range(40)].count(0) == 30
    again = pickle.loads(pickle.dumps(stream))
    assert all(np.array_equal(again.row(i)[name], x) for i, row in enumerate(rows) for name, x in row.items())


@pytest.mark.parametrize(
    ("names", "changes", "words"),
    [
        (
            ("books", "other"),
            {},
            r"other was made by another tokenizer \(600 pieces[^}]*books \(512 pieces[^}]*--tokenizer '.*books' --output",
        ),
        (
            ("books", "code"),
            {"data__tokenizer": "{places}/other/tokenizer.model"},
            r"books was made by another tokenizer",
        ),
        (("untrained", "code"), {}, "untrained has no document to train on"),
        (("small", "small2"), {}, "no such folder"),
        (
            ("books", "code"),
            {"data__packing": "best_fit_whole", "data__sequence_length": 32},
            "longer than a row of 32",
        ),
        (("books", "code"), {"data__global_batch_size": 800}, "less than a batch of 800"),
    ],
)
def test_what_cannot_be_mixed_is_refused_by_name(places, names, changes, words):
    changes = {key: x.format(places=places) if isinstance(x, str) else x for key, x in changes.items()}
    data = two(places, *names, **changes)
    with pytest.raises(UserError, match=words):
        mixture.open_mixture(data).stream(data)


def test_raw_text_takes_the_tokenizer_of_the_prepared_source(places, tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.txt").write_text("def f(x):\n    return x\n" * 200)
    data = two(places, "raw", "code")
    mixed = mixture.open_mixture(data)
    assert mixed.corpora["raw"].tokenizer.fingerprint == mixed.corpora["code"].tokenizer.fingerprint


def test_an_empty_split_says_what_fills_it(places, tmp_path, corpus):
    write_shards(tmp_path / "prepared", corpus, made_up(30))
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.txt").write_text("a note")
    for folder, mend in (
        ("prepared", "prepare it again with a larger --validation_fraction"),
        ("raw", "raise config.data.valid"),
    ):
        data = tiny(
            data__sources=str(tmp_path / folder), data__tokenizer=("bytes", "sentencepiece:512")[folder == "prepared"]
        ).data
        data = dataclasses.replace(data, validation_fraction=0.0) if folder == "raw" else data
        with pytest.raises(UserError, match=mend):
            mixture.open_mixture(data).held(data, "validation")


def test_names_are_short_and_different():
    assert mixture.short_names(("python", "/a/text", "gs://b/text/", "x/text")) == [
        "python",
        "text",
        "text-2",
        "text-3",
    ]


def test_the_whole_is_the_sum_of_its_sources():
    parts = {"books": Totals(30.0, 10.0, 40.0), "code": Totals(5.0, 10.0, 20.0)}
    found = by_source(parts, "eval")
    assert found["eval/loss"] == 35 / 20 and found["eval/books/loss"] == 3 and found["eval/code/loss"] == 0.5
    np.testing.assert_allclose(found["eval/bits_per_byte"], 35 / 60 / np.log(2))
    np.testing.assert_allclose(found["eval/code/bits_per_byte"], 5 / 20 / np.log(2))
    assert "eval/weighted_loss" not in found
    assert by_source({"books": parts["books"]}, "eval") == parts["books"].metrics("eval")


def test_losses_are_weighted_as_the_sources_are_trained(places):
    parts = {"books": Totals(30.0, 10.0, 40.0), "code": Totals(5.0, 100.0, 20.0)}
    weighted = lambda parts, shares: by_source(parts, "eval", None, shares).get("eval/weighted_loss")
    np.testing.assert_allclose(weighted(parts, {"books": 0.75, "code": 0.25}), 0.75 * 3 + 0.25 * 0.05)
    np.testing.assert_allclose(weighted(parts, {"books": 0.1, "code": 0.1, "web": 0.8}), 0.5 * 3 + 0.5 * 0.05)
    assert weighted({"books": parts["books"]}, {"books": 0.75, "code": 0.25}) is None
    data = two(places, "books", "code")
    data = dataclasses.replace(data, sources=((data.sources[0][0], ((0, 3.0), (100, 1.0))), (data.sources[1][0], 1.0)))
    mixed = mixture.open_mixture(data)
    assert mixed.shares(data, 99) == {"books": 0.75, "code": 0.25} and mixed.shares(data, 100) == {
        "books": 0.5,
        "code": 0.5,
    }


def refused(saved, data, mixed) -> str:
    """What `check_resume` says about going on with a run started with `saved` = (config, facts)."""
    content = {"config": flatten(saved[0]), **saved[1]}
    config = tiny()
    config = type(config)(**{**vars(config), "data": data})
    try:
        run_folder.check_resume("the run", content, config, mixed.facts)
    except UserError as error:
        return str(error)
    return ""


def test_other_data_is_refused_by_name_on_resume(places, corpus, other):
    data = two(places)
    mixed = mixture.open_mixture(data)
    base = tiny()
    saved = type(base)(**{**vars(base), "data": data}), mixed.facts
    assert refused(saved, data, mixed) == ""
    bigger = two(places, data__global_batch_size=16)
    assert refused(saved, bigger, mixed) == ""
    assert "config.data.seed: 0 there, 7 here" in refused(saved, two(places, data__seed=7), mixed)
    heavier = tiny(data__sources=((str(places / "books"), 0.5), (str(places / "code"), 0.25))).data
    assert f"weight of '{places}/books': 0.75 there, 0.5 here" in refused(saved, heavier, mixed)
    without = tiny(data__sources=((str(places / "books"), 0.75),)).data
    assert f"weight of '{places}/code': 0.25 there, none here" in refused(saved, without, mixed)
    (places / "code" / "manifest.json").unlink()
    write_shards(places / "code", corpus, made_up(200, seed=2)[:-1] + [[5]], 1000)
    words = refused(saved, data, mixture.open_mixture(data))
    assert f"{places}/code: train-0000" in words and "tokens.npy" in words and f"{places}/books" not in words
    shutil.rmtree(places / "code")
    write_shards(places / "code", other, made_up(200, seed=2), 1000)
    shutil.rmtree(places / "books")
    write_shards(places / "books", other, made_up(200, seed=1), 1000)
    assert refused(saved, data, mixture.open_mixture(data)).split("\n")[1].startswith("tokenizer '")
