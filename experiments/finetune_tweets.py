"""How many like a tweet: a regression."""

from finetune_reviews import get_config as reviews


def get_config():
    config = reviews()
    config.model.labels, config.data.sources, config.train.task = (), "tweets", "regression"
    config.optimizer.learning_rate, config.evaluate.every = 2e-4, 100
    return config
