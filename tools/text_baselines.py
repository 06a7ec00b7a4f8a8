"""What a model that writes texts has to beat, on the records of a config: baselines that know nothing of language.

    python tools/text_baselines.py --config experiments/finetune_synopsis.py --split test

`lead`: the first words of the source, as many as targets have on average. `copy`: the source as it is. `frequent`: the most
frequent target. `dictionary`: word by word the likeliest word of the targets (IBM model 1, aclanthology.org/J93-2003), the word
itself where it is unknown, and the whole target of a source that was trained on.
"""

import collections
import json
import re

from lm_jax import cli, experiment
from lm_jax.errors import UserError
from lm_jax.tasks import TASKS
from lm_jax.tasks.records import read_splits
from lm_jax.tasks.results import Result, scores_of

WORD = re.compile(r"[\u2e80-\uffff]|\w+|[^\w\s]")  # of a script without spaces, a character
ROUNDS = 5  # of expectation and maximisation


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
    size = round(sum(len(target.split()) for _, target in pairs["train"]) / len(pairs["train"]))
    [(most, _)] = collections.Counter(target for _, target in pairs["train"]).most_common(1)
    known, words = dict(pairs["train"]), dictionary(pairs["train"])
    translate = lambda source: known.get(source) or by_words(words, source)
    baselines = {
        "lead": lambda source: " ".join(source.split()[:size]),
        "copy": lambda source: source,
        "frequent": lambda source: most,
        "dictionary": translate,
    }
    for name, answer in baselines.items():
        results = [Result("", target, answer(source)) for source, target in held]
        print(
            json.dumps(
                {"baseline": name, "split": flags.split, "records": len(held)}
                | scores_of(config.evaluate.metrics, results)
            )
        )
    return 0


def dictionary(pairs: list[tuple[str, str]]) -> dict[str, str]:
    """The likeliest word of the target for each word of the source; rare pairs and long texts are left out."""
    texts = [(WORD.findall(a.lower()), WORD.findall(b)) for a, b in pairs]
    texts = [(set(a), set(b)) for a, b in texts if len(a) <= 40 and len(b) <= 40]
    share: dict[tuple[str, str], float] = {}
    for _ in range(ROUNDS):
        count: collections.Counter = collections.Counter()
        for ours, theirs in texts:
            for b in theirs:
                weights = {a: share.get((a, b), 1e-6 if share else 1.0) for a in ours}
                total = sum(weights.values())
                for a, weight in weights.items():
                    count[a, b] += weight / total
        whole: collections.Counter = collections.Counter()
        for (a, _), number in count.items():
            whole[a] += number
        share = {(a, b): number / whole[a] for (a, b), number in count.items() if number > 0.01}
    best: dict[str, tuple[float, str]] = {}
    for (a, b), value in share.items():
        best[a] = max(best.get(a, (0.0, "")), (value, b))
    return {a: b for a, (_, b) in best.items()}


def by_words(words: dict[str, str], source: str) -> str:
    return re.sub(WORD, lambda word: words.get(word[0].lower(), word[0]), source)


if __name__ == "__main__":
    cli.run_command(main)
