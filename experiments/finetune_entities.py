"""Names in newspaper lines: token classification."""

from finetune_reviews import get_config as reviews


def get_config():
    config = reviews()
    kinds = ("PER", "LOC", "ORG", "MISC")
    config.model.labels = ("O", *(f"{letter}-{kind}" for kind in kinds for letter in "BI"))
    config.data.sources, config.data.test_fraction = "entities", 0.0
    config.train.task, config.train.num_steps = "token_classification", 120
    config.optimizer.learning_rate = 2e-4
    config.evaluate.every = 30
    return config
