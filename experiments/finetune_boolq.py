"""BoolQ."""

from finetune_reviews import get_config as reviews


def get_config():
    config = reviews()
    config.model.labels, config.data.sources = ("no", "yes"), "boolq"
    config.data.sequence_length = 160
    config.train.num_steps = "1 epochs"
    return config
