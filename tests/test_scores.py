"""Scores are those of the reference libraries; intervals and the paired test are what their formulas say."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from etils import epath
from helpers import LIMIT, ROOT

from lm_jax.errors import UserError
from lm_jax.tasks import results, scores

LABELS = ("a b a c b a a c b b".split(), "a b b c a a c d b a".split())
NUMBERS = ([1.0, 2.0, 2.0, 4.0, 5.5, 5.5, 7.0, 8.0], [1.5, 1.0, 2.5, 5.0, 4.0, 6.0, 6.0, 9.0])
SPANS = (
    ["O B-x I-x O B-y".split(), "B-x B-x I-x I-y O".split(), "B-x O I-y I-y B-y".split(), "O O".split()],
    ["O B-x I-x O I-y".split(), "B-x I-x I-x I-y O".split(), "O B-y I-y O B-y".split(), "O B-x".split()],
)
TEXTS = (
    [
        ["a small boat crosses the river .", "the small boat goes over the river ."],
        "rain fell on the hills all night .",
    ],
    ["a small boats goes over a river .", "rain fell all night on the hills ."],
)
ANSWERS = (["The Nile", ["12 May", "May 12, 1820"], [], "blue whale", ["Paris"]],
           ["nile river", "may 12 1820", "", "a whale", "Paris!"])  # fmt: skip
# Numbers of scikit-learn 1.9.1, scipy 1.17.1, seqeval 1.2.2, sacrebleu 2.6.0 and rouge-score 0.1.2 on the pairs above.
RECORDED = {
    "labels": (LABELS, {"accuracy": 0.5, "macro_f1": 0.3928571429, "matthews": 0.2689264371}),
    "numbers": (NUMBERS, {"rmse": 0.9354143467, "pearson": 0.9281592933, "spearman": 0.9030468881}),
    "spans": (SPANS, {"f1": 0.5333333333, "precision": 0.5714285714, "recall": 0.5}),
    "translations": (TEXTS, {"chrf": 66.6847271226, "bleu": 20.6629204595}),
    "summaries": (TEXTS, {"rouge1": 0.7857142857, "rouge2": 0.4242424242, "rougeL": 0.6428571429}),
}
NEEDS = {"translations": "sacrebleu", "summaries": "rouge_score"}


def measured(kind: str, pairs) -> dict[str, scores.Measure]:
    if kind in NEEDS:
        pytest.importorskip(NEEDS[kind], reason="pip install '.[eval]'")
    return scores.KINDS[kind](*pairs)


@pytest.mark.parametrize("kind", RECORDED)
def test_scores_are_the_recorded_ones_of_the_reference_libraries(kind):
    pairs, recorded = RECORDED[kind]
    assert scores.values(measured(kind, pairs), len(pairs[0])) == pytest.approx(recorded, abs=1e-9)


def of_libraries(kind: str, truths, predictions) -> dict[str, float]:
    """The same scores by the reference libraries themselves."""
    if kind == "labels":
        metrics = pytest.importorskip("sklearn.metrics")
        f1 = metrics.f1_score(truths, predictions, average="macro")
        matthews = metrics.matthews_corrcoef(truths, predictions)
        return {"accuracy": metrics.accuracy_score(truths, predictions), "macro_f1": f1, "matthews": matthews}
    if kind == "numbers":
        stats = pytest.importorskip("scipy.stats")
        apart = np.subtract(truths, predictions)
        correlations = {
            f"{name}": getattr(stats, f"{name}r")(truths, predictions)[0] for name in ("pearson", "spearman")
        }
        return {"rmse": np.sqrt((apart**2).mean())} | correlations
    if kind == "spans":
        seqeval = pytest.importorskip("seqeval.metrics")
        return {name: getattr(seqeval, f"{name}_score")(truths, predictions) for name in ("f1", "precision", "recall")}
    listed = [[truth] if isinstance(truth, str) else truth for truth in truths]
    if kind == "translations":
        sacrebleu = pytest.importorskip("sacrebleu")
        references = [[each[k] if k < len(each) else None for each in listed] for k in range(max(map(len, listed)))]
        return {name: getattr(sacrebleu, f"corpus_{name}")(predictions, references).score for name in ("chrf", "bleu")}
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge1", "rouge2", "rougeL"])
    found = [scorer.score_multi(truth, prediction) for truth, prediction in zip(listed, predictions, strict=True)]
    return {name: np.mean([each[name].fmeasure for each in found]) for name in found[0]}


def drawn(kind: str, rng: np.random.Generator, num: int = 60):
    """Random pairs of a kind whose predictions are often right."""
    right = rng.random(num) < 0.6
    mixed = lambda truth, other: [a if keep else b for a, b, keep in zip(truth, other, right, strict=True)]
    words = "the a cat dog sat ran on in mat hill big red . ,".split()
    texts = lambda: [" ".join(rng.choice(words, rng.integers(4, 12))) for _ in range(num)]
    tags = lambda: [rng.choice(["O", "B-x", "I-x", "B-y", "I-y"], 9).tolist() for _ in range(num)]
    some = {
        "labels": lambda: rng.choice(["a", "b", "c", "d"], num, p=[0.6, 0.2, 0.15, 0.05]).tolist(),
        "numbers": lambda: rng.integers(0, 9, num).astype(float).tolist(),
        "spans": tags,
    }.get(kind, texts)
    truths = some()
    if kind == "spans":
        other = [
            [a if rng.random() < 0.7 else b for a, b in zip(x, y, strict=True)]
            for x, y in zip(truths, tags(), strict=True)
        ]
        return truths, other
    return truths, mixed(truths, some())


@pytest.mark.proof
@pytest.mark.parametrize("kind", RECORDED)
def test_scores_are_those_of_the_reference_libraries_live(kind):
    rng = np.random.default_rng(0)
    for pairs in [RECORDED[kind][0], *(drawn(kind, rng) for _ in range(20))]:
        found = scores.values(measured(kind, pairs), len(pairs[0]))
        assert found == pytest.approx(of_libraries(kind, *pairs), abs=1e-9)


def test_spearman_shares_ranks_as_scipy_does():
    """scipy comes with jax: live in every run."""
    rng = np.random.default_rng(1)
    for _ in range(20):
        pairs = drawn("numbers", rng)
        assert scores.values(scores.numbers(*pairs), 60) == pytest.approx(of_libraries("numbers", *pairs), abs=1e-12)


@pytest.mark.parametrize("kind", scores.KINDS)
def test_weights_are_records_that_stand_several_times(kind):
    """A resample's score is the score of its records, for every measure."""
    rng = np.random.default_rng(2)
    pairs = ([t.split() for t in drawn(kind, rng)[0]], drawn(kind, rng)[1]) if kind == "answers" else drawn(kind, rng)
    measures = measured(kind, pairs)
    chosen = rng.integers(0, 60, (3, 60))
    weights_BN = np.stack([np.bincount(row, minlength=60) for row in chosen]).astype(float)
    for b, row in enumerate(chosen):
        again = measured(kind, [[side[i] for i in row] for side in pairs])
        for name, measure in measures.items():
            assert measure.of(weights_BN)[b] == pytest.approx(again[name].value(60), abs=1e-9), name


def test_what_never_changes_is_correlated_with_nothing():
    for constant in (0.1, 3.0):  # the mean of six times 0.1 is not 0.1
        found = scores.values(scores.numbers([1.0, 2.0, 3.0, 5.0, 4.0, 7.0], [constant] * 6), 6)
        assert found["pearson"] == 0 and found["spearman"] == 0
    assert scores.values(scores.labels(["a"] * 5, ["a"] * 5), 5) == {"accuracy": 1, "macro_f1": 1, "matthews": 0}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The  Amazon river.", "amazon river"),
        ("an apple a day", "apple day"),
        ("Theatre of another land", "theatre of another land"),
        ("$1,000.50!", "100050"),
        ("it's", "its"),
        ("the-end", "theend"),
        ("the–end", "–end"),  # a dash that is not ASCII stays, and ends a word
        ("", ""),
    ],
)
def test_answers_are_normalised_as_for_squad(answer, expected):
    assert scores.normalised(answer) == expected


def test_answers_count_by_the_best_of_the_right_ones():
    found = scores.answers(*ANSWERS)
    # nile / nile river: 2 * 1 / 3; a whale / blue whale: 2 * 1 / 3; no answer is right where none is given
    assert found["f1"].alone_N.tolist() == pytest.approx([2 / 3, 1, 1, 2 / 3, 1])
    assert found["exact_match"].alone_N.tolist() == [0, 1, 1, 0, 1]
    assert scores.answers([[]], ["something"])["f1"].value(1) == 0
    assert scores.answer_f1("b b c", "b b b d") == pytest.approx(2 * 2 / 7)  # a bag: b counts as often as both have it


def test_spans_are_read_as_conlleval_reads_them():
    assert scores.spans_of("I-x I-x I-y B-y O I-x".split()) == {("x", 0, 2), ("y", 2, 3), ("y", 3, 4), ("x", 5, 6)}
    with pytest.raises(UserError, match="tag 'E-x'"):
        scores.spans_of(["B-x", "E-x"])


def test_calibration_error_is_the_mean_gap_over_bins():
    # Ten bins: (0.5, 0.6] holds 0.6 and 0.55, (0.9, 1] holds 0.95 twice: gaps of 1 - 1.15 and of 2 - 1.9, over four records.
    found = scores.calibration([0.6, 0.55, 0.95, 0.95], [True, False, True, True], bins=10)
    assert found["calibration_error"].value(4) == pytest.approx((0.15 + 0.1) / 4)
    opposite = scores.calibration([0.61, 0.59], [True, False], bins=10)["calibration_error"].value(2)
    assert opposite == pytest.approx((0.39 + 0.59) / 2)  # gaps of different bins do not cancel
    assert scores.calibration([0.0, 1.0], [False, True])["calibration_error"].value(2) == 0


@pytest.mark.proof
def test_calibration_error_is_that_of_scikit_learns_curve():
    curve = pytest.importorskip("sklearn.calibration").calibration_curve
    rng = np.random.default_rng(4)
    sure = rng.random(500)
    right = rng.random(500) < sure**2
    share, mean = curve(right, sure, n_bins=15)
    counts = np.bincount(np.ceil(sure * 15).astype(int) - 1, minlength=15)
    expected = np.abs(share - mean) @ counts[counts > 0] / 500
    assert scores.calibration(sure, right)["calibration_error"].value(500) == pytest.approx(expected, abs=1e-12)


def test_intervals_of_a_mean_are_the_normal_ones(monkeypatch):
    x = np.random.default_rng(5).normal(3.0, 2.0, 400)
    found = scores.intervals({"mean": scores.mean(x)}, 400, seed=1)["mean"]
    error = x.std() / 20
    assert found.value == pytest.approx(x.mean())
    assert (found.low, found.high) == pytest.approx(
        (x.mean() - 1.96 * error, x.mean() + 1.96 * error), abs=0.15 * error
    )
    assert scores.intervals({"mean": scores.mean(x)}, 400, seed=2)["mean"] != found
    monkeypatch.setattr(scores, "BLOCK", 999)  # how many are drawn together is nobody's business
    assert scores.intervals({"mean": scores.mean(x)}, 400, seed=1)["mean"] == pytest.approx(found, abs=1e-12)
    rows = np.concatenate(list(scores.resamples_of(7, 0, 50)))
    assert rows.shape == (50, 7) and (rows.sum(1) == 7).all() and len(np.unique(rows, axis=0)) > 40


def test_the_paired_test_finds_what_is_there_and_nothing_else():
    rng = np.random.default_rng(6)
    hard = rng.normal(0, 5, 200)  # what both find hard hides a difference from whoever does not pair
    first, second = scores.mean(hard + rng.normal(0, 1, 200)), scores.mean(hard + 0.4 + rng.normal(0, 1, 200))
    found = scores.paired({"x": first}, {"x": second}, 200)["x"]
    assert found.p < 0.01 and 0 < found.low < found.second - found.first < found.high
    assert scores.paired({"x": first}, {"x": first}, 200)["x"].p == 1
    p = []
    for seed in range(200):  # two systems that are equally good
        a, b = rng.random((2, 50)) < 0.7
        p.append(scores.paired({"x": scores.mean(a)}, {"x": scores.mean(b)}, 50, seed, 200)["x"].p)
    assert 0.01 <= np.mean(np.array(p) < 0.05) <= 0.10


@pytest.mark.parametrize("kind", NEEDS)
def test_a_missing_package_is_named(kind, monkeypatch):
    monkeypatch.setitem(sys.modules, NEEDS[kind], None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[eval\]'"):
        scores.KINDS[kind](["x"], ["x"])


def some_results(wrong: int) -> list[results.Result]:
    truths = ["good", "bad"] * 20
    predictions = [("bad" if t == "good" else "good") if i < wrong else t for i, t in enumerate(truths)]
    return [results.Result(f"r{i}", t, p, 0.9) for i, (t, p) in enumerate(zip(truths, predictions, strict=True))]


def test_results_are_written_and_read_back(tmp_path):
    workdir = epath.Path(tmp_path)
    given = [*some_results(10), results.Result("line \u2028 two", np.int64(3), np.int64(3), np.float32(0.5))]
    found = results.write(workdir, "test", "labels", given, {"model": "runs/x", "step": 3})
    assert found["accuracy"] == 31 / 41 and found["calibration_error"] == pytest.approx((0.5 + 40 * 0.9 - 30) / 41)
    assert results.read(workdir, "test") == ("labels", given) and results.evaluated(workdir) == ["test"]
    first = json.loads((tmp_path / "results" / "test.jsonl").read_text().split("\n")[0])
    assert first == {"record": "r0", "truth": "good", "prediction": "bad", "confidence": 0.9, "score": 0.0}
    summary = json.loads((tmp_path / "results" / "test.json").read_text())
    assert summary["step"] == 3 and summary["records"] == 41
    accuracy = summary["scores"]["accuracy"]
    assert accuracy["low"] < accuracy["value"] < accuracy["high"]
    page = (tmp_path / "results" / "test.md").read_text()
    assert page.startswith("model runs/x, step 3, split test: 41 records")
    assert f"| accuracy | 0.7561 | {accuracy['low']:.4f} | {accuracy['high']:.4f} |" in page


def test_results_that_are_none_are_named(tmp_path):
    workdir = epath.Path(tmp_path)
    with pytest.raises(UserError, match="no results of the test split"):
        results.read(workdir, "test")
    results.write(workdir, "test", "labels", some_results(3), {})
    place = tmp_path / "results" / "test.jsonl"
    place.write_text(place.read_text().replace("r0", "r1"))
    with pytest.raises(UserError, match="cannot be read .*it is not as it was written.*: evaluate once more"):
        results.read(workdir, "test")


def test_two_systems_are_compared_on_the_same_records_alone(tmp_path):
    first, second, other = (epath.Path(tmp_path / name) for name in ("first", "second", "other"))
    results.write(first, "test", "labels", some_results(15), {})
    results.write(second, "test", "labels", some_results(2)[::-1], {})  # their order does not matter
    found = results.compare(first, second, "test")["accuracy"]
    assert (found.first, found.second) == (25 / 40, 38 / 40) and found.p < 0.01
    assert "| accuracy | 0.6250 | 0.9500 | +0.3250 |" in results.compared(first, second, "test")
    changed = [result._replace(truth="bad") if i == 4 else result for i, result in enumerate(some_results(2))]
    results.write(other, "test", "labels", changed, {})
    with pytest.raises(UserError, match="record r4 with truth 'good'"):
        results.compare(first, other, "test")
    results.write(other, "test", "labels", changed[:-1], {})
    with pytest.raises(UserError, match="40 labels in .*, 39 labels in"):
        results.compare(first, other, "test")


def test_compare_runs_adds_the_paired_test(finished, tmp_path):
    runs = [tmp_path / "first", tmp_path / "second"]
    for run, wrong in zip(runs, (15, 2), strict=True):
        shutil.copytree(finished, run)
        results.write(epath.Path(run), "validation", "labels", some_results(wrong), {})
    line = [
        sys.executable,
        str(ROOT / "tools" / "compare_runs.py"),
        *map(str, runs),
        "--picture",
        str(tmp_path / "x.png"),
    ]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, timeout=LIMIT)
    assert done.returncode == 0, done.stderr
    assert "validation: paired bootstrap" in done.stdout and "| accuracy | 0.6250 | 0.9500 | +0.3250 |" in done.stdout
