"""What a model that writes texts has to beat, on the records of a config: baselines that know nothing of language.

    python tools/text_baselines.py --config experiments/finetune_synopsis.py --split test

`lead`: the first words of the source, as many as targets have on average. `copy`: the source as it is. `frequent`: the most
frequent target. `dictionary`: word by word the likeliest word of the targets (IBM model 1, aclanthology.org/J93-2003), the word
itself where it is unknown, and the whole target of a source that was trained on.
"""

import json

from lm_jax import cli, experiment
from lm_jax.errors import UserError
from lm_jax.tasks import TASKS
from lm_jax.tasks.records import read_splits
from lm_jax.tasks.results import Result, scores_of
from lm_jax.tasks.text_baselines import text_baselines


def main(arguments: list[str]) -> int:
    overrides, rest = experiment.split_overrides(arguments)
    parser = cli.Parser("tools/text_baselines.py", __doc__)
    parser.add_argument("--config", required=True, help="an experiment file; it is executed")
    parser.add_argument("--split", default="validation", choices=("validation", "test"))
    parser.add_argument("--records", type=int, default=0, help="the first of the split; 0 = all")
    flags = parser.parse_args(rest)
    config, _ = experiment.load_config(flags.config, overrides)
    if config.train.task != "text_to_text" or not config.evaluate.metrics:
        raise UserError(f"--config {flags.config}: expected the task text_to_text, and config.evaluate.metrics")
    task = TASKS[config.train.task](config)
    found = read_splits(config.data.sources[0][0], task, config.data)
    pairs = {split: [(values[0], task.truth(values)) for _, values in found[split]] for split in ("train", flags.split)}
    held = pairs[flags.split][: flags.records or None]
    for name, answer in text_baselines(pairs["train"]).items():
        scores = scores_of(config.evaluate.metrics, [Result("", target, answer(source)) for source, target in held])
        print(json.dumps({"baseline": name, "split": flags.split, "records": len(held)} | scores))
    return 0


if __name__ == "__main__":
    cli.run_command(main)
