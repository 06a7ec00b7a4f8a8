"""Translation: Debian's package descriptions from English into Chinese; the encoder-decoder of finetune_german.py, fewer pairs.

    python tools/records_debian.py --lists lists --task zh_CN --output english_chinese   # see its head
    python -m lm_jax.main --config experiments/finetune_chinese.py
    python -m lm_jax.evaluate --model runs/finetune_chinese --split test
    python tools/text_baselines.py --config experiments/finetune_chinese.py --split test

Expected:
"""

import finetune_german


def get_config():
    config = finetune_german.get_config()
    config.data.sources, config.data.tokenizer = "english_chinese", "unigram:4096"
    config.train.num_steps = 300
    return config
