"""The four applications of the tour (docs/tour.md), on records that every machine can make: minutes on two CPU cores.

    python tools/records_python.py --output records
    python -m lm_jax.main --config experiments/tour.py:translation

Variants: classification and summaries go on from the quickstart's model, questions and translation begin from nothing.
Expected: on validation, classification 0.841 accuracy after ten epochs (TF-IDF with logistic regression 0.892, the most frequent
label 0.38; on the test 0.913 and 0.894); questions 0.69 exact match after 320 steps (the most frequent answer 0.14); translation
chrF 99.3 of 64 numbers after 240 steps (a dictionary 57.6); summaries ROUGE-1 0.11 after 300 steps (the first words of the text
0.15). One seed each; one to two and a half minutes on two CPU cores, other work beside them.
"""

from lm_jax.config import default_config

VARIANTS = ("classification", "questions", "summaries", "translation")


def small(kind: str, objective: str):
    """An encoder or an encoder-decoder of the quickstart's width that begins from nothing."""
    config = default_config()
    config.model.kind, config.data.objective, config.model.init_scale = kind, objective, 0.06
    config.model.num_layers, config.model.model_dim, config.model.num_heads = 2, 128, 4
    config.optimizer.learning_rate, config.optimizer.warmup = 2e-3, 50
    return config


def from_quickstart():
    """The pretrained decoder, which brings its settings and its tokenizer; a smaller rate."""
    config = default_config()
    config.train.init_from, config.model.init_scale = "runs/quickstart", 0.06
    config.optimizer.learning_rate, config.optimizer.warmup, config.optimizer.weight_decay = 5e-4, 10, 0.01
    return config


def get_config(variant: str = ""):
    variant = variant or VARIANTS[0]
    if variant == "classification":
        config = from_quickstart()
        config.train.task, config.train.num_steps = "classification", "10 epochs"
        config.model.labels = ("asyncio", "email", "multiprocessing", "tkinter", "turtle", "unittest")
    elif variant == "questions":
        config = small("encoder", "masked")
        config.train.task, config.train.num_steps = "question_answering", 320
        config.data.tokenizer = "sentencepiece:1024"
    elif variant == "summaries":
        config = from_quickstart()
        config.train.task, config.train.num_steps = "text_to_text", 300
        config.data.prompt, config.evaluate.metrics = "{source}\n\nIn one line: ", "summaries"
    else:
        config = small("encoder_decoder", "span_corruption")
        config.model.positions, config.model.norm = "relative", "rmsnorm"
        config.train.task, config.train.num_steps = "text_to_text", 240
        config.data.tokenizer, config.evaluate.metrics = "sentencepiece:512", "translations"
    config.data.sources, config.data.packing = f"records/{variant}", "best_fit"
    config.data.sequence_length, config.data.global_batch_size = 256, 8
    config.data.validation_fraction, config.data.test_fraction = 0.1, 0.1
    config.evaluate.every, config.evaluate.num_rows, config.log.every = 0, 64, 25
    config.checkpoint.every = 1000
    return config
