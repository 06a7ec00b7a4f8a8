"""What a finetuned model has to beat, on the records of a config; scored as the model is.

    pip install scikit-learn && python tools/baselines.py --config experiments/finetune_reviews.py --split test

Labels: the most frequent, and TF-IDF of words and word pairs with logistic regression. Values: the mean, and TF-IDF with ridge
regression. Tags: the most frequent, and the most frequent of each word. Answers: the most frequent, and the whole context.
"""

import json

from lm_jax import cli, experiment
from lm_jax.errors import UserError
from lm_jax.tasks import TASKS
from lm_jax.tasks.baselines import BASELINES
from lm_jax.tasks.records import read_splits
from lm_jax.tasks.results import Result


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
    truths, predictions = BASELINES[config.model.head](task, train, held)
    for name, given in predictions.items():
        results = tuple(Result("", truth, prediction) for truth, prediction in zip(truths, given, strict=True))
        print(json.dumps({"baseline": name, "split": flags.split} | task.scores(results)))
    return 0


if __name__ == "__main__":
    cli.run_command(main)
