"""The config is an interface: its leaves are frozen here, and what `resolve` refuses is listed."""

import dataclasses
import shlex
import sys

import pytest
from helpers import ROOT, tiny

from lm_jax import experiment
from lm_jax.batch_ramp import make_ramp, to_steps
from lm_jax.config import Config, default_config, flatten, leaves
from lm_jax.config_check import resolve
from lm_jax.errors import UserError
from lm_jax.knob import parse_length

# A new key must replace an `if` in two experiments; add it here in the same commit.
LEAVES = """
model.kind model.num_layers model.model_dim model.num_heads model.num_kv_heads model.head_dim model.mlp_dim
model.positions
model.rotary_base model.rotary_local_base model.rotary_scaling model.rotary_scaling_kind model.rotary_share
model.norm model.norm_place model.norm_epsilon
model.activation model.gated model.bias model.qkv_bias model.qk_norm model.qk_norm_whole
model.logit_softcap model.multipliers model.scale_embedding model.num_experts
model.experts_per_token model.tie_embedding model.window model.labels model.lora_rank
model.lora_alpha model.lora_pattern model.head model.dropout model.init_scale model.attention model.remat
model.unroll model.compute_dtype
data.sources data.tokenizer data.sequence_length data.global_batch_size data.batch_ramp data.packing data.objective
data.seed data.columns data.prompt data.num_workers data.validation_fraction data.test_fraction
optimizer.name optimizer.learning_rate optimizer.schedule optimizer.warmup optimizer.decay_over optimizer.decay_to
optimizer.beta1 optimizer.beta2 optimizer.epsilon optimizer.moment_dtype optimizer.weight_decay optimizer.clip_norm
optimizer.ema
optimizer.trainable optimizer.layer_decay optimizer.loss_scale
train.task train.num_steps train.microbatch_rows train.z_loss train.balance_loss train.router_z_loss train.dpo_beta train.seed
train.init_from train.export_to train.on_spike
mesh.data mesh.fsdp mesh.tensor mesh.slices mesh.expert mesh.context
checkpoint.every checkpoint.keep_last checkpoint.keep_every checkpoint.keep_best
evaluate.every evaluate.num_rows evaluate.patience evaluate.tasks evaluate.tasks_every evaluate.metrics evaluate.prompt
log.every log.profile log.trackers
"""


def test_leaves_are_frozen():
    assert list(leaves()) == LEAVES.split()


def test_every_leaf_says_what_it_means():
    assert all(len(field.metadata["meaning"]) > 3 for field in leaves().values())


def test_resolved_config_is_hashable_and_survives_a_round_trip():
    config = resolve(default_config())
    assert hash(config) == hash(resolve(default_config()))
    assert resolve(dataclasses.asdict(config)) == config


def test_derived_sizes_are_filled_in():
    model = tiny(model__head_dim=0, model__mlp_dim=0, model__num_kv_heads=0).model
    assert (model.head_dim, model.mlp_dim, model.num_kv_heads) == (16, 256, 4)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("model.num_layers", "four", "expected an int"),
        ("model.num_layers", 4.0, "did you mean 4?"),
        ("model.num_layers", True, "expected an int"),
        ("model.dropout", float("nan"), "finite"),
        ("optimizer.learning_rate", float("inf"), "finite"),
        ("model.dropout", -0.1, "at least 0.0"),
        ("model.norm", "layernorn", "did you mean layernorm?"),
        ("model.bias", 1, "expected a bool"),
        ("model.window", 256, "expected a tuple"),
        ("model.window", (), "at least 1"),
        ("data.batch_ramp", (16,), "expected 2 values"),
        ("train.num_steps", "3 weeks", "tokens"),
        ("optimizer.warmup", "30 min", "tokens"),
        ("train.microbatch_rows", "all", "choose one of auto"),
        ("train.num_steps", 0, "at least 1"),
        ("model.rotary_share", (0.5,), "read only where config.model.positions is rotary"),
        ("model.rotary_share", (1.5,), "at most 1.0"),
        ("model.qk_norm_whole", True, "read only where config.model.qk_norm is True"),
        ("model.logit_softcap", (1e-9, 0.0), "0, or at least 0.1"),
        ("model.logit_softcap", (50.0,), "expected 2 values"),
        ("model.multipliers", (0.0, 1.0, 0.0, 1.0), "at least 1e-6"),
        ("model.rotary_scaling_kind", "yarm", "did you mean yarn?"),
    ],
)
def test_a_wrong_value_is_refused_by_name(path, value, words):
    config = default_config()
    section, name = path.split(".")
    config[section][name] = value
    with pytest.raises(UserError) as error:
        resolve(config)
    assert path in str(error.value) and words in str(error.value)


YARN = dict(model__positions="rotary", model__rotary_scaling_kind="yarn")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(model__positions="rotary", model__rotary_share=(0.5, 1.0)), "one for each of window = (0,)"),
        (dict(model__positions="rotary", model__rotary_share=(0.2,)), "0.2 of head_dim = 16 is no even number; the nearest"),
        (dict(model__positions="rotary", model__rotary_share=(0.01,)), "the nearest that is one is 0.125"),
        (dict(YARN, model__rotary_scaling=(4.0, 0.0, 32.0, 64.0)), "low and length above 0"),
        (dict(YARN, model__rotary_scaling=(4.0, 1.0, 32.0, 0.0)), "low and length above 0"),
        (dict(model__kind="lstm", model__logit_softcap=(0.0, 30.0)), "logit_softcap = (0.0, 30.0) is read only where"),
        (
            dict(model__kind="encoder_decoder", data__objective="span_corruption", model__multipliers=(2.0, 1.0, 0.0, 1.0)),
            "multipliers = (2.0, 1.0, 0.0, 1.0) is read only where config.model.kind is transformer or encoder",
        ),
        (
            dict(model__kind="encoder_decoder", data__objective="span_corruption", model__norm_place="branch"),
            "norm_place = branch is not of an encoder_decoder",
        ),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together(changes, words):
    with pytest.raises(UserError) as error:
        tiny(**changes)
    assert words in str(error.value), error.value


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("/a/text", (("/a/text", 1.0),)),
        ([["a", 2], ["b", 0.5]], (("a", 2.0), ("b", 0.5))),
        ((("a", ((0, 1), (1000, 0.5))), ("b", ((1000, 1),))), (("a", ((0, 1.0), (1000, 0.5))), ("b", ((1000, 1.0),)))),
    ],
)
def test_sources_have_one_form(given, expected):
    config = default_config()
    config.data.sources = given
    found = resolve(config)
    assert found.data.sources == expected and hash(found)
    assert resolve(dataclasses.asdict(found)) == found


def test_lengths_have_units():
    assert parse_length("375M tokens") == (375e6, "tokens")
    assert parse_length("0.5 epochs") == (0.5, "epochs")
    assert parse_length(7) == (7, "steps")


def test_the_ramp_counts_every_row_once():
    config = tiny(data__global_batch_size=64, data__batch_ramp=(16, "100k tokens"), train__microbatch_rows=8)
    ramp = make_ramp(config)
    assert [rows for _, _, rows in ramp.stages] == [16, 32, 48, 64]
    cursor = 0
    for step in range(200):
        assert ramp.cursor(step) == cursor
        assert ramp.step_at(cursor) == step
        cursor += ramp.rows(step)
    end_of_ramp = ramp.stages[-1][1] * config.data.sequence_length
    assert 100e3 <= end_of_ramp < 100e3 + 48 * config.data.sequence_length  # within one step of the size before


def test_a_length_in_tokens_goes_through_the_ramp():
    config = tiny(data__global_batch_size=64, data__batch_ramp=(16, "100k tokens"), train__microbatch_rows=8)
    ramp = make_ramp(config)
    steps = to_steps("1M tokens", config, ramp, rows_per_epoch=1000)
    assert ramp.cursor(steps - 1) * 64 < 1e6 <= ramp.cursor(steps) * 64
    assert to_steps("2 epochs", config, ramp, rows_per_epoch=1000) == ramp.step_at(2000)


EXPERIMENTS = sorted(path.name for path in (ROOT / "experiments").glob("*.py"))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_resolve_and_say_how_they_are_run(name, starts):
    config, origins = experiment.load_config(f"experiments/{name}", {})
    assert isinstance(config, Config) and origins
    text = (ROOT / "experiments" / name).read_text()
    assert "python -m lm_jax.main" in text and "Expected:" in text


def test_overrides_remember_where_values_come_from():
    config, origins = experiment.load_config("experiments/quickstart.py", {"optimizer.learning_rate": "1e-4"})
    assert config.optimizer.learning_rate == 1e-4
    assert origins["optimizer.learning_rate"]["from"] == "command line"
    assert origins["model.model_dim"]["from"] == "file"
    assert set(origins) < set(flatten(config))


def test_the_command_to_paste_trains_the_same():
    """With values that a shell would take apart, and without the number of steps, which the reader is to choose."""
    overrides = {
        "data.sources": "(('/a b', 0.7), ('python', 0.3))",
        "model.window": "(0, 8)",
        "train.num_steps": "7",
        "model.norm": "rmsnorm",
        "model.num_layers": "4",
    }
    config, origins = experiment.load_config("experiments/quickstart.py", overrides)
    line = shlex.split(experiment.as_given("experiments/quickstart.py", config, origins))
    assert line[:5] == [sys.orig_argv[0], "-m", "lm_jax.main", "--config", "experiments/quickstart.py"]
    again, rest = experiment.split_overrides(line[5:])
    assert not rest and "train.num_steps" not in again
    assert experiment.load_config("experiments/quickstart.py", again | {"train.num_steps": "7"})[0] == config
