"""Finetuning a model that is there on records of yours: each variant says what a task needs, and the model brings the rest.

    python -m lm_jax.main --config experiments/finetune.py:chat \
        --config.train.init_from=MODEL --config.data.sources=FOLDER --workdir runs/mine
    python -m lm_jax.evaluate --model runs/mine --split test

MODEL is a run or a Hugging Face folder; it brings its settings, its tokenizer, and the length of its rows (the header says
which). FOLDER holds `train.jsonl`, .csv, .tsv or .parquet (docs/finetuning.md has the columns of each task; other names by
--config.data.columns); of the variant `text` it holds plain text. Labels and tags are those that stand in the records.

Variants: chat (messages), preference (prompt, chosen, rejected), summaries, translation and answers (source, target), text; with
a head: classification (text, label), pairs (text, label, second), regression (text, value), tags (tokens, tags), questions
(question, context, answer; from an encoder).
Expected: it depends on both. The files finetune_*.py start from here, with numbers; rates are those of models of 20M to 1B
parameters, which tens of millions want larger and billions smaller.
"""

from lm_jax.config import default_config

HEAD = {
    "data.packing": "best_fit",
    "optimizer.learning_rate": 1e-4,
    "train.num_steps": "3 epochs",
    "model.dropout": 0.1,
}
WRITING = {"data.packing": "best_fit", "optimizer.learning_rate": 5e-5, "train.num_steps": "1 epochs"}
TEXTS = WRITING | {"train.task": "text_to_text"}
VARIANTS = {
    "chat": WRITING | {"train.task": "instruction"},
    "preference": WRITING | {"train.task": "preference", "optimizer.learning_rate": 1e-6},
    "summaries": TEXTS | {"data.prompt": "{source}\n\nIn one line:", "evaluate.metrics": "summaries"},
    "translation": TEXTS | {"evaluate.metrics": "translations"},
    "answers": TEXTS | {"evaluate.metrics": "answers"},
    "text": WRITING | {"data.packing": "split", "evaluate.prompt": ""},
    "classification": HEAD | {"train.task": "classification"},
    "pairs": HEAD | {"train.task": "classification", "data.columns": ("text", "label", "second")},
    "regression": HEAD | {"train.task": "regression"},
    "tags": HEAD | {"train.task": "token_classification"},
    "questions": HEAD | {"train.task": "question_answering"},
}


def get_config(variant: str = ""):
    config = default_config()
    config.train.init_from, config.data.sources = "MODEL", "FOLDER"  # both are to be given
    config.data.global_batch_size = 8
    config.data.validation_fraction, config.data.test_fraction = 0.05, 0.05
    config.optimizer.schedule, config.optimizer.decay_to, config.optimizer.weight_decay = "linear", 0.0, 0.01
    config.optimizer.beta2, config.optimizer.warmup = 0.999, 20
    for path, value in VARIANTS[variant or "chat"].items():
        section, name = path.split(".")
        config[section][name] = value
    return config
