"""Words of transformers, nanoGPT and MaxText are answered with the key that means the same, the value put in."""

import re

import pytest
from helpers import ROOT

from lm_jax import main, other_words
from lm_jax.config import leaves
from lm_jax.errors import UserError

QUICKSTART = f"--config={ROOT / 'experiments' / 'quickstart.py:gpt3'}"
# (arguments, how the answer ends)
TYPED = [
    (["--config.lr=3e-4"], "--config.optimizer.learning_rate=3e-4"),
    (["--config.optimizer.lr=3e-4"], "--config.optimizer.learning_rate=3e-4"),
    (["--lr", "3e-4"], "--config.optimizer.learning_rate=3e-4"),
    (["lr=3e-4"], "--config.optimizer.learning_rate=3e-4"),
    (["--learning-rate=1"], "--config.optimizer.learning_rate=1"),
    (["--optimizer.learning_rate=1"], "--config.optimizer.learning_rate=1"),
    (["--config.optimizer=adamw"], "--config.optimizer.name=adamw"),
    (["--config.train.epochs=3"], "--config.train.num_steps='3 epochs'"),
    (["--max_steps=100"], "--config.train.num_steps=100"),
    (["--n_layer=3"], "--config.model.num_layers=3"),
    (["--config.model.d_model=64"], "--config.model.model_dim=64"),
    (["--config.model.dropout_rate=.1"], "--config.model.dropout=.1"),
    (["--batch_size=8"], "--config.data.global_batch_size=8 (rows of a step over all devices"),
    (
        ["--config.gradient_accumulation_steps=4", "--config.data.global_batch_size=64"],
        "--config.train.microbatch_rows=16 (data",
    ),
    (["--gradient_accumulation_steps=4"], "--config.train.microbatch_rows='<data.global_batch_size / 4>'"),
    (["--config.min_lr=1.5e-4"], "--config.optimizer.decay_to=0.1 (1.5e-4 / optimizer.learning_rate)"),
    (["--config.warmup_ratio=0.03"], "--config.optimizer.warmup=30 (0.03 * train.num_steps)"),
    (["--bf16", "--workdir=x"], "--config.model.compute_dtype=bfloat16 (parameters"),
    (["--config.bf16=False"], "--config.model.compute_dtype=float32 (parameters"),
    (["--fp16"], "--config.model.compute_dtype=float16 --config.optimizer.loss_scale=1024 (parameters"),
    (["--lr_scheduler_type=inverse_sqrt"], "--config.optimizer.schedule=inverse_square_root"),
    (["--config.output_dir=a b"], "--workdir='a b'"),
]


@pytest.mark.parametrize(
    ("arguments", "expected"), TYPED, ids=lambda value: value[0] if isinstance(value, list) else ""
)
def test_a_word_on_the_command_line_is_answered(arguments, expected):
    with pytest.raises(UserError) as error:
        main.main([QUICKSTART, *arguments])
    assert f": here that is {expected}" in str(error.value)
    assert "(" in expected or str(error.value).endswith(expected)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("config.optimizer.lr = 3e-4", "lr = 0.0003: here that is config.optimizer.learning_rate = 0.0003"),
        ("config.train.num_steps = config.train.max_steps", "max_steps: here that is config.train.num_steps"),
        (
            "config.bf16 = True",
            "bf16 = True: here that is config.model.compute_dtype = 'bfloat16' (parameters stay float32)",
        ),
        ("config.train.update(dict(epochs=3))", "epochs = 3: here that is config.train.num_steps = '3 epochs'"),
    ],
)
def test_a_word_in_an_experiment_is_answered(line, expected, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from lm_jax.config import default_config\ndef get_config():\n    config = default_config()\n"
        f"    {line}\n    return config\n"
    )
    with pytest.raises(UserError) as error:
        main.main(["--config", str(file)])
    assert str(error.value).endswith(f"line 4: {expected}")


def test_every_word_means_a_setting_and_is_none_itself():
    words = [word for some in other_words.SAME.values() for word in some.split()]
    assert len({*words, *other_words.OTHERWISE}) == len(words) + len(other_words.OTHERWISE), "a word stands twice"
    names = {key.split(".")[1] for key in leaves()} - {"seed"}  # of which there are two
    assert not names & {*words, *other_words.OTHERWISE}
    for word in (*words, *other_words.OTHERWISE):
        found = other_words.meaning(word, "1", {})
        assert {*found.values} <= {*leaves(), "--workdir"} and re.fullmatch("[a-z_0-9]+", word), word
