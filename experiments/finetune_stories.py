"""Questions on stories: extractive question answering."""

from finetune_reviews import get_config as reviews


def get_config():
    config = reviews()
    config.model.labels, config.data.sources, config.train.task = (), "stories", "question_answering"
    config.data.sequence_length = 256
    config.optimizer.learning_rate = 2e-4
    config.train.num_steps = "4 epochs"
    return config
