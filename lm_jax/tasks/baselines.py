"""What a finetuned model has to beat: simple predictors, learnt from the training records. `tools/baselines.py` prints scores.

Labels: the most frequent, and TF-IDF of words and word pairs with logistic regression. Values: the mean, and TF-IDF with ridge
regression. Tags: the most frequent, and the most frequent of each word. Answers: the most frequent, and the whole context.
Every function takes the values of the training and of the held-out records, and returns the truths and a prediction of each
baseline for each held-out record.
"""

import collections
from collections.abc import Callable
from typing import Any

import numpy as np

from lm_jax.errors import UserError
from lm_jax.tasks.task import Task

Predictions = dict[str, list[Any]]  # by baseline: a prediction for each record


def labels(task: Task, train: list[tuple], held: list[tuple]) -> tuple[list[Any], Predictions]:
    """Classification: the most frequent label, and logistic regression. Raises UserError without scikit-learn."""
    most, names = _most_common(value[1] for value in train), task.labels
    chosen = _fitted("LogisticRegression", {"C": 10, "max_iter": 1000}, task, train, held)
    predictions = {"majority": [names[most]] * len(held), "tfidf": [names[k] for k in chosen]}
    return [names[value[1]] for value in held], predictions


def value(task: Task, train: list[tuple], held: list[tuple]) -> tuple[list[Any], Predictions]:
    """Regression: the mean of the values, and ridge regression. Raises UserError without scikit-learn."""
    mean = float(np.mean([value[1] for value in train]))
    predictions = {"mean": [mean] * len(held), "tfidf": _fitted("Ridge", {"alpha": 1.0}, task, train, held)}
    return [value[1] for value in held], predictions


def tags(task: Task, train: list[tuple], held: list[tuple]) -> tuple[list[Any], Predictions]:
    """Token classification: the most frequent tag, and the most frequent tag of each word."""
    of_word = collections.defaultdict(list)
    for words, tags in train:
        for word, tag in zip(words, tags, strict=True):
            of_word[word].append(tag)
    most = _most_common(tag for _, tags in train for tag in tags)
    known = {word: task.labels[_most_common(tags)] for word, tags in of_word.items()}
    predictions = {
        "majority": [[task.labels[most]] * len(words) for words, _ in held],
        "word": [[known.get(word, task.labels[most]) for word in words] for words, _ in held],
    }
    return [[task.labels[tag] for tag in tags] for _, tags in held], predictions


def spans(task: Task, train: list, held: list) -> tuple[list[Any], Predictions]:
    """Question answering: the most frequent answer, and the whole context."""
    most = _most_common(value.answers[0] if value.answers else "" for value in train)
    predictions = {"most frequent": [most] * len(held), "context": [value.context for value in held]}
    return [list(value.answers) for value in held], predictions


# By `model.head`.
BASELINES: dict[str, Callable[[Task, list, list], tuple[list[Any], Predictions]]] = {
    function.__name__: function for function in (labels, value, tags, spans)
}


def _most_common(found) -> Any:
    return collections.Counter(found).most_common(1)[0][0]


def _fitted(kind: str, settings: dict[str, Any], task: Task, train: list[tuple], held: list[tuple]) -> list:
    """What a linear model of scikit-learn predicts from the TF-IDF of the held-out texts."""
    try:
        from sklearn import linear_model
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError:
        raise UserError("the baselines need the package scikit-learn: pip install scikit-learn") from None
    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    inputs = words.fit_transform(task.text(value) for value in train)
    model = getattr(linear_model, kind)(**settings).fit(inputs, [value[1] for value in train])
    return model.predict(words.transform(task.text(value) for value in held)).tolist()
