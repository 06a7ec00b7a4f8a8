"""What a finetuned model has to beat, on the records of a config; scored as the model is.

    pip install scikit-learn && python tools/baselines.py --config experiments/finetune_reviews.py --split test

Labels: the most frequent, and TF-IDF of words and word pairs with logistic regression. Values: the mean, and TF-IDF with ridge
regression. Tags: the most frequent, and the most frequent of each word. Answers: the most frequent, and the whole context.
"""

import collections
import json
from typing import Any

import numpy as np

from lm_jax import cli, experiment
from lm_jax.errors import UserError
from lm_jax.tasks import TASKS
from lm_jax.tasks.records import read_splits
from lm_jax.tasks.results import Result
from lm_jax.tasks.task import Task

Guesses = dict[str, list[Any]]  # by baseline: a prediction for each record


def labels(task: Task, train: list[tuple], held: list[tuple]) -> tuple[list[Any], Guesses]:
    (most, _), names = most_common(value[1] for value in train), task.labels
    chosen = fitted("LogisticRegression", {"C": 10, "max_iter": 1000}, task, train, held)
    guesses = {"majority": [names[most]] * len(held), "tfidf": [names[k] for k in chosen]}
    return [names[value[1]] for value in held], guesses


def value(task: Task, train: list[tuple], held: list[tuple]) -> tuple[list[Any], Guesses]:
    mean = float(np.mean([value[1] for value in train]))
    guesses = {"mean": [mean] * len(held), "tfidf": fitted("Ridge", {"alpha": 1.0}, task, train, held)}
    return [value[1] for value in held], guesses


def tags(task: Task, train: list[tuple], held: list[tuple]) -> tuple[list[Any], Guesses]:
    of_word = collections.defaultdict(list)
    for words, tags in train:
        for word, tag in zip(words, tags, strict=True):
            of_word[word].append(tag)
    most, _ = most_common(tag for _, tags in train for tag in tags)
    known = {word: task.labels[most_common(tags)[0]] for word, tags in of_word.items()}
    guesses = {
        "majority": [[task.labels[most]] * len(words) for words, _ in held],
        "word": [[known.get(word, task.labels[most]) for word in words] for words, _ in held],
    }
    return [[task.labels[tag] for tag in tags] for _, tags in held], guesses


def spans(task: Task, train: list, held: list) -> tuple[list[Any], Guesses]:
    most, _ = most_common(value.answers[0] if value.answers else "" for value in train)
    guesses = {"most frequent": [most] * len(held), "context": [value.context for value in held]}
    return [list(value.answers) for value in held], guesses


BASELINES = {function.__name__: function for function in (labels, value, tags, spans)}


def most_common(found) -> tuple[Any, int]:
    return collections.Counter(found).most_common(1)[0]


def fitted(kind: str, settings: dict[str, Any], task: Task, train: list[tuple], held: list[tuple]) -> list:
    """What a linear model of scikit-learn says of the texts, learnt from TF-IDF of those to train on. Raises UserError."""
    try:
        from sklearn import linear_model
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError:
        raise UserError("the baselines need the package scikit-learn: pip install scikit-learn") from None
    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    seen = words.fit_transform(task.text(value) for value in train)
    model = getattr(linear_model, kind)(**settings).fit(seen, [value[1] for value in train])
    return model.predict(words.transform(task.text(value) for value in held)).tolist()


def main(arguments: list[str]) -> int:
    overrides, rest = experiment.split_overrides(arguments)
    parser = cli.Parser("tools/baselines.py", __doc__)
    parser.add_argument("--config", required=True, help="an experiment file; it is executed")
    parser.add_argument("--split", default="validation", choices=("validation", "test"))
    flags = parser.parse_args(rest)
    config, _ = experiment.load_config(flags.config, overrides)
    if config.model.head not in BASELINES:
        raise UserError(f"--config {flags.config}: there are baselines for {', '.join(BASELINES)}, not for its task")
    task = TASKS[config.train.task](config)
    found = read_splits(config.data.sources[0][0], task, config.data)
    train, held = ([value for _, value in found[split]] for split in ("train", flags.split))
    if not held:
        raise UserError(f"the {flags.split} split is empty: raise config.data.{flags.split}_fraction")
    truths, guesses = BASELINES[config.model.head](task, train, held)
    for name, given in guesses.items():
        results = tuple(Result("", truth, guess) for truth, guess in zip(truths, given, strict=True))
        print(json.dumps({"baseline": name, "split": flags.split} | task.scores(results)))
    return 0


if __name__ == "__main__":
    cli.run_command(main)
