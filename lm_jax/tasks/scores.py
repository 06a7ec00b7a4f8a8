"""Scores of (truth, prediction) pairs, their bootstrap intervals, and the paired test of two systems.

A measure is a function of weights: how often each record counts. All ones give the score; the counts of a resample give the
score that those records would have had. Most measures are functions of sums over records, so that a thousand resamples are one
matrix product. Shape suffixes: B resamples, N records, K numbers that are summed, C labels.

Shares are from 0 to 1; BLEU and chrF from 0 to 100, as sacrebleu has them.
"""

import collections
import hashlib
import importlib.util
import re
import string
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from lm_jax.errors import UserError, needs

RESAMPLES = 1000
BLOCK = 2**22  # weights that exist at the same time


class Measure(NamedTuple):
    """`of` takes float64 weights [B, N] to scores [B]; `alone_N` scores each record by itself, where that means something."""

    of: Callable[[np.ndarray], np.ndarray]
    alone_N: np.ndarray | None = None

    def value(self, num: int) -> float:
        """The score of all `num` records."""
        return float(self.of(np.ones((1, num)))[0])


def values(measures: dict[str, Measure], num: int) -> dict[str, float]:
    """The scores of all `num` records by name."""
    return {name: measure.value(num) for name, measure in measures.items()}


def of_sums(terms_NK: np.ndarray, value: Callable[[np.ndarray], np.ndarray]) -> Measure:
    """The measure `value` [.., K] -> [..] of sums over records."""
    terms_NK = np.asarray(terms_NK, np.float64)
    return Measure(lambda weights_BN: value(weights_BN @ terms_NK), value(terms_NK))


def ratio(part_N: Sequence[float], whole_N: Sequence[float]) -> Measure:
    """The quotient of two sums: a mean where `whole` is 1 for every record, a mean over tokens where it counts them."""
    return of_sums(np.stack([part_N, whole_N], axis=1), lambda sums: share(sums[..., 0], sums[..., 1]))


def mean(values_N: Sequence[float]) -> Measure:
    """The mean of one number a record."""
    return ratio(values_N, np.ones(len(values_N)))  # type: ignore[arg-type]


def share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """The quotient part / whole, 0 where `whole` is 0."""
    return np.divide(part, whole, out=np.zeros(np.broadcast(part, whole).shape), where=np.asarray(whole) > 0)


def labels(truths: Sequence[Any], predictions: Sequence[Any]) -> dict[str, Measure]:
    """Accuracy, macro-F1 and Matthews correlation, functions of what each label is the truth of, is predicted for, and is both.

    F1 = 2 TP / (2 TP + FP + FN) of each label that stands or is predicted, then their mean. Matthews for any number of labels
    (Gorodkin, doi:10.1016/j.compbiolchem.2004.09.006): the covariance of truth and prediction over the roots of their
    variances; 0 where one of them never changes.
    """
    names = {name: index for index, name in enumerate(dict.fromkeys([*truths, *predictions]))}
    one_hot = lambda found: np.eye(len(names))[[names[name] for name in found]]
    truth_NC, predicted_NC = one_hot(truths), one_hot(predictions)
    terms_NK = np.concatenate([truth_NC, predicted_NC, truth_NC * predicted_NC], axis=1)

    def macro_f1(sums):
        truth, predicted, both = np.split(sums, 3, axis=-1)
        return share(share(2 * both, truth + predicted).sum(-1), (truth + predicted > 0).sum(-1))

    def matthews(sums):
        truth, predicted, both = np.split(sums, 3, axis=-1)
        total = truth.sum(-1)
        spread = (total**2 - (truth**2).sum(-1)) * (total**2 - (predicted**2).sum(-1))
        return share(both.sum(-1) * total - (truth * predicted).sum(-1), np.sqrt(np.maximum(spread, 0)))

    return {
        "accuracy": mean([float(a == b) for a, b in zip(truths, predictions, strict=True)]),
        "macro_f1": of_sums(terms_NK, macro_f1),
        "matthews": of_sums(terms_NK, matthews),
    }


def numbers(truths: Sequence[float], predictions: Sequence[float]) -> dict[str, Measure]:
    """Root of the mean squared error, Pearson's and Spearman's correlation (equal numbers share their mean rank)."""
    truth_N, predicted_N = np.asarray(truths, np.float64), np.asarray(predictions, np.float64)
    squared = mean((truth_N - predicted_N) ** 2)  # type: ignore[arg-type]
    ranks = lambda weights_BN: (mean_ranks(truth_N, weights_BN), mean_ranks(predicted_N, weights_BN))
    return {
        "rmse": Measure(lambda weights_BN: np.sqrt(squared.of(weights_BN)), np.abs(truth_N - predicted_N)),
        "pearson": Measure(lambda weights_BN: correlation(weights_BN, truth_N[None], predicted_N[None])),
        "spearman": Measure(lambda weights_BN: correlation(weights_BN, *ranks(weights_BN))),
    }


def correlation(weights_BN: np.ndarray, x_BN: np.ndarray, y_BN: np.ndarray) -> np.ndarray:
    """[B]: Pearson's correlation of records that count `weights` times; 0 where x or y is constant."""
    total_B1 = weights_BN.sum(1, keepdims=True)

    def centred(x_BN):
        mean_B1 = (weights_BN * x_BN).sum(1, keepdims=True) / total_B1
        apart_BN = x_BN - mean_B1
        return np.where(np.abs(apart_BN) > 1e-13 * np.abs(mean_B1), apart_BN, 0)  # rounding is no change

    x_BN, y_BN = centred(x_BN), centred(y_BN)
    spread_B = np.sqrt((weights_BN * x_BN**2).sum(1) * (weights_BN * y_BN**2).sum(1))
    return share((weights_BN * x_BN * y_BN).sum(1), spread_B)


def mean_ranks(x_N: np.ndarray, weights_BN: np.ndarray) -> np.ndarray:
    """[B, N]: the rank of each number among records that count `weights` times; equal numbers share their mean rank."""
    values, group_N = np.unique(x_N, return_inverse=True)
    order_N = np.argsort(group_N, kind="stable")
    last_G = np.cumsum(np.bincount(group_N, minlength=len(values))) - 1
    through_BG = np.cumsum(weights_BN[:, order_N], axis=1)[:, last_G]  # records up to the end of each group
    before_BG = np.concatenate([np.zeros((len(weights_BN), 1)), through_BG[:, :-1]], axis=1)
    return ((before_BG + through_BG + 1) / 2)[:, group_N]


def several(truth: str | Sequence[str]) -> list[str]:
    """The right answers of a record."""
    return [truth] if isinstance(truth, str) else list(truth)


def normalised(answer: str) -> str:
    """SQuAD's normalisation (arXiv:1606.05250, 6.1): no case, no ASCII punctuation, no articles, single spaces."""
    bare = answer.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(?:a|an|the)\b", " ", bare).split())


def answer_f1(truth: str, prediction: str) -> float:
    """F1 of two answers' tokens as bags; where one has none, whether both have none (SQuAD 2.0, arXiv:1806.03822)."""
    a, b = normalised(truth).split(), normalised(prediction).split()
    if not a or not b:
        return float(a == b)
    common = (collections.Counter(a) & collections.Counter(b)).total()
    return 2 * common / (len(a) + len(b))


def answers(truths: Sequence[str | Sequence[str]], predictions: Sequence[str]) -> dict[str, Measure]:
    """Exact match and token F1 after SQuAD's normalisation, the best over a record's right answers; none: no answer is right."""
    pairs = [(several(truth) or [""], prediction) for truth, prediction in zip(truths, predictions, strict=True)]
    same = lambda truth, prediction: float(normalised(truth) == normalised(prediction))
    best = lambda score: mean([max(score(truth, given) for truth in right) for right, given in pairs])
    return {"f1": best(answer_f1), "exact_match": best(same)}


def spans_of(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """(kind, start, end) of BIO tags as conlleval and seqeval's default read them: an I that continues nothing begins a span.

    Raises UserError for a tag that is none of B-kind, I-kind, O.
    """
    found: set[tuple[str, int, int]] = set()
    kind: str | None = None
    start = 0
    for position, tag in enumerate([*tags, "O"]):
        letter, _, name = tag.partition("-")
        if letter not in ("B", "I", "O"):
            raise UserError(f"tag {tag!r}: a span's tags are B-kind at its start, I-kind in it, and O outside")
        if kind is not None and not (letter == "I" and name == kind):
            found.add((kind, start, position))
            kind = None
        if kind is None and letter != "O":
            kind, start = name, position
    return found


def spans(truths: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]]) -> dict[str, Measure]:
    """Micro-averaged F1, precision and recall of spans that are right in kind, start and end; 0 where there are none."""
    pairs = [(spans_of(truth), spans_of(tags)) for truth, tags in zip(truths, predictions, strict=True)]
    terms_NK = np.array([(len(truth & found), len(found), len(truth)) for truth, found in pairs])
    return {
        "f1": of_sums(terms_NK, lambda sums: share(2 * sums[..., 0], sums[..., 1] + sums[..., 2])),
        "precision": of_sums(terms_NK, lambda sums: share(sums[..., 0], sums[..., 1])),
        "recall": of_sums(terms_NK, lambda sums: share(sums[..., 0], sums[..., 2])),
    }


def check(kind: str) -> None:
    """Raises UserError where the package for the scores of a kind is missing: asked before a model is trained."""
    if kind == "summaries" and importlib.util.find_spec("rouge_score") is None:
        raise needs("ROUGE", "rouge-score", "eval")
    if kind == "translations" and importlib.util.find_spec("sacrebleu") is None:
        raise needs("a score as BLEU or chrF", "sacrebleu", "eval")


def summaries(truths: Sequence[str | Sequence[str]], predictions: Sequence[str]) -> dict[str, Measure]:
    """F-measures of ROUGE-1, ROUGE-2 and ROUGE-L by `rouge-score`, without stemming, the best over a record's references.

    Its tokenizer knows a to z and 0 to 9 alone: other scripts need chrF. Raises UserError where the package is missing.
    """
    check("summaries")
    from rouge_score import rouge_scorer

    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = rouge_scorer.RougeScorer(kinds, use_stemmer=False)
    pairs = zip(truths, predictions, strict=True)
    found = [scorer.score_multi(several(truth), prediction) for truth, prediction in pairs]
    return {kind: mean([each[kind].fmeasure for each in found]) for kind in kinds}


def translations(
    truths: Sequence[str | Sequence[str]], predictions: Sequence[str], language: str = ""
) -> dict[str, Measure]:
    """Corpus chrF and BLEU by `sacrebleu`.

    `language` is the target's code (zh), where BLEU needs another tokenizer than 13a. Raises UserError where the
    package is missing.
    """
    check("translations")
    from sacrebleu import metrics

    listed = [several(truth) for truth in truths]
    most = max(map(len, listed))
    references = [[each[k] if k < len(each) else None for each in listed] for k in range(most)]

    def measure(metric) -> Measure:
        # What a corpus score is made of, record by record; its own bootstrap (sacrebleu.significance) goes the same way.
        terms_NK = np.array(metric._extract_corpus_statistics(predictions, references), np.float64)
        return of_sums(terms_NK, lambda sums_BK: np.array([metric._compute_score_from_stats(s).score for s in sums_BK]))

    return {"chrf": measure(metrics.CHRF()), "bleu": measure(metrics.BLEU(trg_lang=language))}


def calibration(confidences: Sequence[float], right: Sequence[bool], bins: int = 15) -> dict[str, Measure]:
    """Expected calibration error (arXiv:1706.04599, equation 3): mean gap of accuracy and confidence over equal-width bins.

    `confidences` are the probabilities that a model gave to what it predicted; a bin ((m - 1) / bins, m / bins] has its end.
    """
    sure_N, right_N = np.asarray(confidences, np.float64), np.asarray(right, np.float64)
    bin_N = np.clip(np.ceil(sure_N * bins).astype(int) - 1, 0, bins - 1)
    gaps_NK = np.eye(bins)[bin_N] * (right_N - sure_N)[:, None]
    terms_NK = np.concatenate([gaps_NK, np.ones((len(sure_N), 1))], axis=1)
    return {"calibration_error": of_sums(terms_NK, lambda sums: share(np.abs(sums[..., :-1]).sum(-1), sums[..., -1]))}


# What a file of results may say that it holds. The first measure of each scores a record alone.
KINDS: dict[str, Callable[..., dict[str, Measure]]] = {
    function.__name__: function for function in (labels, numbers, answers, spans, summaries, translations)
}


def resamples_of(num: int, seed: int, resamples: int = RESAMPLES) -> Iterator[np.ndarray]:
    """Blocks [b, N] of how often each of `num` records stands in each of `resamples` draws of `num` with replacement.

    Words of Philox, whose bits no numpy release may change, modulo `num`: biased by less than num / 2^64.
    """
    key = int.from_bytes(hashlib.sha256(f"bootstrap of seed {seed}".encode()).digest()[:16], "little")
    words = np.random.Philox(key=key)
    size = max(1, BLOCK // num)
    for first in range(0, resamples, size):
        rows = min(size, resamples - first)
        drawn = (words.random_raw(rows * num) % np.uint64(num)).astype(np.int64).reshape(rows, num)
        flat = drawn + num * np.arange(rows)[:, None]
        yield np.bincount(flat.ravel(), minlength=rows * num).reshape(rows, num).astype(np.float64)


class Interval(NamedTuple):
    """A score and the ends of its 95% interval."""

    value: float
    low: float
    high: float


def intervals(measures: dict[str, Measure], num: int, seed: int = 0, resamples: int = RESAMPLES) -> dict[str, Interval]:
    """Each score with its 95% percentile interval: 2.5% of the resamples are below it, 2.5% above (Efron, 1979)."""
    drawn = {name: [] for name in measures}  # type: dict[str, list[np.ndarray]]
    for weights_BN in resamples_of(num, seed, resamples):
        for name, measure in measures.items():
            drawn[name].append(measure.of(weights_BN))
    ends = {name: np.quantile(np.concatenate(values), (0.025, 0.975)) for name, values in drawn.items()}
    return {name: Interval(measures[name].value(num), *map(float, ends[name])) for name in measures}


class Difference(NamedTuple):
    """`second` less `first`, the 95% interval of that, and how probable so large a difference is between equals."""

    first: float
    second: float
    low: float
    high: float
    p: float


def paired(
    first: dict[str, Measure], second: dict[str, Measure], num: int, seed: int = 0, resamples: int = RESAMPLES
) -> dict[str, Difference]:
    """The paired bootstrap: both systems on the same resamples of the same records.

    p, two-sided: how often a resample's difference is as far from the observed one as that is from 0 (Berg-Kirkpatrick and
    others, aclanthology.org/D12-1091, section 2), one added to both counts, so that it is never 0.
    """
    names = [name for name in first if name in second]
    drawn = {name: [] for name in names}  # type: dict[str, list[np.ndarray]]
    for weights_BN in resamples_of(num, seed, resamples):
        for name in names:
            drawn[name].append(second[name].of(weights_BN) - first[name].of(weights_BN))
    found = {}
    for name in names:
        a, b, apart_B = first[name].value(num), second[name].value(num), np.concatenate(drawn[name])
        as_far = np.abs(apart_B - (b - a)) >= abs(b - a) - 1e-12  # equal but for rounding is equal
        low, high = map(float, np.quantile(apart_B, (0.025, 0.975)))
        found[name] = Difference(a, b, low, high, float((as_far.sum() + 1) / (resamples + 1)))
    return found
