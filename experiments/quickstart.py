"""A small GPT on the interpreter's own library and manual: three minutes on two CPU cores, ahead of xz -9.

    python -m lm_jax.main

1.1M parameters, 1.0M tokens. Muon for the matrices of the blocks (github.com/KellerJordan/Muon, arXiv:2502.16982), each head's
queries and keys normalised (arXiv:2302.05442), a rate that falls linearly to nothing (arXiv:2502.15938). Weights start at
sqrt(1 / 2 / width): the usual 0.02 is meant for models many times as wide.
Variants: modern, the default; gpt3, the same model trained as GPT-3 was (AdamW, cosine to a tenth), with which the experiments
that change one part begin, and the tests: `:smoke` shrinks this one.
Expected: 1.91 validation bits per byte (three seeds: 1.909, 1.906, 1.913), gpt3 2.22, where gzip -9 takes 2.19 and xz -9 1.93 on
the same text; train longer to go on from there.
"""

from lm_jax.config import default_config

VARIANTS = ("modern", "gpt3", "smoke")


def get_config(variant: str = ""):
    config = default_config()
    config.model.num_layers, config.model.model_dim, config.model.num_heads = 4, 128, 2
    config.model.positions, config.model.init_scale = "rotary", 0.06
    config.data.tokenizer = "sentencepiece:2048"
    config.data.sequence_length, config.data.global_batch_size = 512, 2
    config.optimizer.learning_rate, config.optimizer.warmup = 1.5e-3, 50
    config.train.num_steps = 1000
    config.checkpoint.every, config.evaluate.every, config.log.every = 200, 250, 25
    config.evaluate.num_rows = 0
    if variant in ("", "modern"):
        config.model.qk_norm = True
        config.optimizer.name, config.optimizer.learning_rate = "muon", 1e-2
        config.optimizer.schedule, config.optimizer.decay_to = "linear", 0.0
    return config
