"""Sections."""

from finetune_reviews import get_config as reviews

SECTIONS = (
    "devel", "doc", "gnu-r", "golang", "haskell", "java", "javascript", "libdevel", "libs", "net", "perl", "python", "ruby",
    "rust", "science", "utils",
)  # fmt: skip


def get_config():
    config = reviews()
    config.model.labels, config.data.sources = SECTIONS, "sections"
    config.optimizer.learning_rate = 2e-4
    return config
