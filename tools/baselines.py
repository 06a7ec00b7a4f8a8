"""What a classifier has to beat, on the records of a config: the majority class, and TF-IDF with logistic regression.

pip install scikit-learn && python tools/baselines.py --config experiments/finetune_reviews.py --split test
"""

import json

import numpy as np

from lm_jax import command
from lm_jax.config import UserError
from lm_jax.tasks import TASKS
from lm_jax.tasks.classification import label_scores
from lm_jax.tasks.records import read_splits


def main(arguments: list[str]) -> int:
    overrides, rest = command.split_overrides(arguments)
    parser = command.Parser("tools/baselines.py", __doc__)
    parser.add_argument("--config", required=True, action=command.Once, help="an experiment file; it is executed")
    parser.add_argument("--split", default="validation", choices=("validation", "test"))
    flags = parser.parse_args(rest)
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise UserError("the baselines need the package scikit-learn: pip install scikit-learn") from None
    config, _ = command.load_config(flags.config, overrides)
    if not config.train.task:
        raise UserError(f"--config {flags.config} has no task: config.train.task is empty")
    records = read_splits(config.data.sources[0][0], TASKS[config.train.task](config), config.data)
    texts = {split: [text for _, (text, _) in records[split]] for split in ("train", flags.split)}
    labels = {split: np.array([label for _, (_, label) in records[split]]) for split in texts}
    if not texts[flags.split]:
        raise UserError(f"the {flags.split} split is empty: raise config.data.{flags.split}_fraction")
    majority = np.full(len(labels[flags.split]), np.bincount(labels["train"]).argmax())
    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    model = LogisticRegression(C=10, max_iter=1000).fit(words.fit_transform(texts["train"]), labels["train"])
    predicted = {"majority": majority, "tfidf": model.predict(words.transform(texts[flags.split]))}
    for name, guess in predicted.items():
        counts = np.zeros((len(config.model.labels),) * 2)
        np.add.at(counts, (labels[flags.split], guess), 1)
        print(json.dumps({"baseline": name, "split": flags.split} | label_scores(counts)))
    return 0


if __name__ == "__main__":
    command.door(main)
