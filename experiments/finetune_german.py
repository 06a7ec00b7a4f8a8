"""Translation: Debian's package descriptions from English into German, by a small encoder-decoder that begins from nothing.

    python tools/records_debian.py --lists lists --task de --held 500 --characters 300 --output english_german   # see its head
    python -m lm_jax.main --config experiments/finetune_german.py
    python -m lm_jax.evaluate --model runs/finetune_german --split test
    python tools/text_baselines.py --config experiments/finetune_german.py --split test

25,308 lines and paragraphs to train on; 500 of validation and 500 of test, of other source packages, drawn by hash.
Expected: on the test chrF 34.3 and BLEU 9.3 after 2,000 steps of 8 rows (--config.train.num_steps=2000), 95 minutes of one busy
core. Not beaten: a dictionary (IBM model 1), chrF 53.5 and BLEU 16.7; the English as it is has 29.3 and 9.6, the most frequent
line 14.5 and 2.1. 300 steps of two CPU cores are a taste; on one GPU take
--config.model.num_layers=6 --config.model.model_dim=512 --config.model.num_heads=8 --config.model.mlp_dim=1024
--config.data.global_batch_size=128 --config.train.num_steps="20 epochs" --config.optimizer.learning_rate=1e-3.
"""

from lm_jax.config import default_config


def get_config():
    config = default_config()
    model, data, optimizer = config.model, config.data, config.optimizer
    model.kind, model.num_layers, model.model_dim, model.num_heads = "encoder_decoder", 2, 256, 4
    model.positions, model.norm, model.activation, model.bias = "relative", "rmsnorm", "gelu", False
    model.gated, model.mlp_dim, model.dropout, model.init_scale = True, 512, 0.1, 0.06
    data.sources, data.tokenizer, data.objective = "english_german", "sentencepiece:4096", "span_corruption"
    data.sequence_length, data.global_batch_size, data.packing = 256, 8, "best_fit"
    optimizer.learning_rate, optimizer.warmup, optimizer.weight_decay = 2e-3, 50, 0.01
    config.train.task, config.train.num_steps = "text_to_text", 300
    config.checkpoint.every = 300
    config.evaluate.every, config.evaluate.num_rows, config.evaluate.metrics = 100, 64, "translations"
    config.log.every = 25
    return config
