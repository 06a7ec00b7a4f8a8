"""Mutants of every shipped experiment: each is refused in one to five lines, or harmless: its plan is made, counted and traced.

The seeds are ours; a mutant is a leaf of a config with a value that a hand, a script or a copied table might put there.
"""

import random
import re
import sys

import jax
import pytest
from helpers import ROOT

from lm_jax import decide, experiment
from lm_jax.batch_ramp import clocks, make_ramp, with_steps
from lm_jax.config import Config, flatten, leaves, unflatten
from lm_jax.config_check import resolve
from lm_jax.data.objectives import EXTRA
from lm_jax.errors import UserError
from lm_jax.model_config import LARGEST_HEAD
from lm_jax.run_plan import NEW, check
from lm_jax.train_state import fresh, program_of

sys.path.insert(0, str(ROOT / "experiments"))
DEEP = eval("(" * 50 + "1," + ")" * 50)
for _ in range(20_000):
    DEEP = (DEEP,)
NUMBERS = (
    0, 1, -1, 2, 3, 7, 8, 64, 127, 300, 1025, 10**6, 10**9, 2**31 - 1, 2**31, 2**40, 2**63, 2**64, 10**400, -(10**400), 10**5000,
    0.0, -0.0, 0.5, 0.999, 1.0, 1.5, 2.0, 1e-300, 5e-324, 1e-45, 1e38, 1e39, 1e308, float("nan"), float("inf"), -float("inf"),
    1e-9, 1e9, True, False,
)  # fmt: skip
WORDS = (
    "", " ", "auto", "none", "None", "True", "1e3", "0x10", "1_000", "٣", "３", "1 tokens", "10 epochs", "0 steps", "30 min",
    "9" * 310 + " tokens", "1" + "0" * 310, "1.5 steps", "1e3 tokens", "٣ tokens", "-1 tokens", "100B tokens", "nan tokens",
    "x\0y", "a\nb", "é" * 50, "\ud800", "x" * 4_000_000, "../../etc/passwd", "[", "(", "*", "(?P<a>", "a{9999999}", "%s", "{0}",
    "{source}", "rotary", "encoder", "lstm", "adamw", "bfloat16", "classification", "sentencepiece:0", "sentencepiece:-1",
    "sentencepiece:9e9", "unigram:1", "bytes", "/dev/zero",
)  # fmt: skip
TUPLES = (
    (), (0,), (1,), (0, 256), (0, 0), (1, 2, 3, 4), (1.0, 1.0, 4.0, 8192.0), (1e39, 1.0, 4.0, 1.0), (8.0, 4.0, 1.0, 0.0),
    (2**31,), (-1,), (0,) * 100_000, ("a", "b"), ("a", "a"), ("",), ("a", 1), (8, "10 tokens"), (8, "9" * 310 + " tokens"),
    (("python", 1.0),), (("python", -1),), (("python", 10**400),), (("python", float("nan")),), (("a", ((0, 1), (0, 2))),),
    (("python", 1), ("python", 2)), [], [1, 2], {}, {"a": 1}, None, b"bytes", DEEP, {1, 2}, object(), lambda: 0,
)  # fmt: skip
SITE = decide.Site("cpu", True, 2.0**34, 8, 8, 1)
EXPERIMENTS = sorted(path.stem for path in (ROOT / "experiments").glob("*.py"))


def plan(config: Config) -> None:
    """What `main --dry_run` does before there is data, and the trace of the first parameters."""
    check(config, SITE)
    pieces, ramp = 500 + EXTRA[config.data.objective], make_ramp(config)
    found = decide.decide(config, pieces, ramp, SITE, NEW, SITE.size)
    program = program_of(with_steps(found.config, ramp, rows_per_epoch=1000), found.model, clocks(config, ramp))
    jax.eval_shape(lambda: fresh(program))


def answer(make) -> str:
    """The refusal, or "" where the plan was made. Any other exception is a traceback, which fails the test."""
    try:
        plan(make())
    except UserError as error:
        return str(error)
    return ""


def check_refusal(refusal: str, name: str) -> None:
    lines = refusal.split("\n")
    assert len(lines) <= 5 and max(map(len, lines)) <= 700, f"{name}: {refusal[:2000]}"
    assert "Traceback" not in refusal and not re.search(r" at 0x[0-9a-f]{6}", refusal), f"{name}: {refusal}"


def near(old) -> tuple:
    """Values of the same type that a hand might have meant."""
    if type(old) is int:
        return (old * 2, old * 4, old + 1, old // 2, old + 8)
    return (old * 2, old / 2, old + 1e-3) if type(old) is float else (not old,)


def mutant(seed: int) -> tuple[str, dict]:
    """(what was changed, the config with it as a nested dict): one to three leaves, each by a value of any type."""
    rng = random.Random(seed)
    name, small = rng.choice(EXPERIMENTS), rng.random() < 0.7
    flat = flatten(experiment.experiment_config(f"experiments/{name}.py{':smoke' * small}").to_dict())
    chosen = rng.sample(list(leaves()), rng.choice((1, 1, 1, 2, 3)))
    for path in chosen:
        old, choices = flat[path], leaves()[path].metadata["choices"]
        values = [NUMBERS, WORDS, TUPLES]
        if type(old) in (int, float, bool):
            values += [NUMBERS] * 2 + [near(old)] * 5
        else:
            values += [WORDS, choices or WORDS, choices or WORDS] if type(old) is str else [TUPLES] * 4
        flat[path] = rng.choice(rng.choice(values))
    return f"seed {seed} {name} {chosen}", unflatten(flat)


def run(seeds) -> tuple[int, int]:
    refused = harmless = 0
    for seed in seeds:
        name, config = mutant(seed)
        found = answer(lambda config=config: resolve(config))
        check_refusal(found, name)
        refused, harmless = refused + bool(found), harmless + (not found)
    return refused, harmless


def test_mutants_are_refused_or_harmless():
    refused, harmless = run(range(40))
    assert refused > 20 and harmless > 2


@pytest.mark.proof
def test_three_hundred_mutants_and_more():
    refused, harmless = run(range(1000, 1400))
    print(f"{refused} refused, {harmless} harmless")
    assert refused > 200 and harmless > 20


MIXED = (
    "model.num_layers",
    "train.num_steps",
    "optimizer.beta2",
    "data.sources",
    "model.window",
    "model.bias",
    "model.kind",
)
TEXTS = ("9" * 5000, "(" * 10_000, "[" * 300 + "]" * 300, "1e3", "True", "３", "1_0", "", "\ud800", "x\0", "-" * 4_000)
FLAGS = [f"--config.{path}={text}" for path in MIXED for text in TEXTS]


def test_texts_of_flags_are_refused_or_harmless():
    for flag in FLAGS:
        make = lambda flag=flag: experiment.load_config(
            "experiments/quickstart.py:smoke", experiment.split_overrides([flag])[0]
        )[0]
        check_refusal(answer(make), flag[:80])


RANGES = {
    "model.norm_epsilon": (1e38, 0.0, 1e-300), "model.init_scale": (0.0, 1e30), "model.head_dim": (LARGEST_HEAD + 1,),
    "model.window": ((2**31,), (-1,)), "model.num_layers": (10**9,), "model.model_dim": (2**40,), "model.num_heads": (2**40,),
    "model.mlp_dim": (2**40,), "data.num_workers": (300,), "data.sequence_length": (2**31,), "data.seed": (2**64,),
    "optimizer.beta1": (1.0, 0.99999999), "optimizer.beta2": (1.0,), "optimizer.ema": (1.0,), "optimizer.epsilon": (0.0, 1e-310),
    "optimizer.learning_rate": (1e38, 5e-324), "optimizer.warmup": ("9" * 310 + " tokens", 2**31, "٣ steps"),
    "train.num_steps": ("9" * 310 + " epochs", 2**40, "1e400 tokens"), "optimizer.clip_norm": (1e-320,),
    "data.batch_ramp": ((0, 100), (8, "9" * 310 + " tokens")), "train.dpo_beta": (0.0,), "optimizer.weight_decay": (1e9,),
    "data.tokenizer": ("a\0b", "x" * 4_000_000, "\ud800"), "mesh.data": (0, 2**40), "checkpoint.keep_last": (2**40,),
    "mesh.slices": (0, -2, 2**40),
}  # fmt: skip


@pytest.mark.parametrize("path", RANGES)
def test_what_no_run_can_have_is_refused_by_name(path):
    for value in RANGES[path]:
        flat = flatten(experiment.experiment_config("experiments/quickstart.py:smoke").to_dict()) | {path: value}
        with pytest.raises(UserError) as error:
            resolve(unflatten(flat))
        assert f"config.{path}" in str(error.value)
        check_refusal(str(error.value), path)


def test_heads_that_are_too_wide_are_refused_with_how_many_there_must_be():
    config = experiment.experiment_config("experiments/quickstart.py")
    config.model.model_dim, config.model.num_heads = 8192, 2
    with pytest.raises(UserError, match="at least 8 heads"):
        resolve(config)
