"""Translation: Debian's package descriptions from English into Chinese; the encoder-decoder of finetune_german.py, fewer pairs.

    python tools/records_debian.py --lists lists --task zh_CN --characters 300 --output english_chinese   # see its head
    python -m lm_jax.main --config experiments/finetune_chinese.py
    python -m lm_jax.evaluate --model runs/finetune_chinese --split test
    python tools/text_baselines.py --config experiments/finetune_chinese.py --split test

2,201 lines and paragraphs to train on, 111 of validation, 175 of test, of other source packages.
Expected: not trained here yet. What there is to beat on the test, in chrF (BLEU counts words between spaces, which Chinese has
not): the dictionary (IBM model 1, characters) 23.9, the English as it is 18.9, the most frequent line 3.2.
"""

import finetune_german


def get_config():
    config = finetune_german.get_config()
    config.data.sources, config.data.tokenizer = "english_chinese", "unigram:4096"
    config.train.num_steps = 300
    return config
