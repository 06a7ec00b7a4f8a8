"""A knob's declared reach is what is true: of every leaf and kind of model, task and rule, two values make two programs exactly
where the declaration says that it is read."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny

from lm_jax import config as configs
from lm_jax.config import Config, UserError, flatten, is_read, leaves
from lm_jax.data.objectives import example
from lm_jax.loss import objective
from lm_jax.model.layers import Dropout
from lm_jax.train_state import make_program

LABELS = dict(train__task="classification", model__labels=("a", "b"), data__packing="best_fit")
TEXTS = dict(train__task="text_to_text", data__packing="best_fit")
ENCODER = dict(model__kind="encoder", data__objective="masked")
ENCODER_DECODER = dict(model__kind="encoder_decoder", data__objective="span_corruption")
ROTARY = dict(model__positions="rotary")
MOE = dict(model__num_experts=4, model__gated=True, model__bias=False)
BASES: dict[str, dict] = {
    "transformer": {},
    "rotary": ROTARY,
    "windows": dict(ROTARY, model__window=(0, 8)),
    "sinusoidal": dict(model__positions="sinusoidal"),
    "no bias": dict(model__bias=False),
    "experts": MOE,
    "lora": dict(model__lora_rank=2),
    "encoder": dict(ENCODER, **ROTARY),
    "encoder of experts": dict(ENCODER, **MOE),
    "encoder_decoder": ENCODER_DECODER,
    "encoder_decoder rotary": dict(ENCODER_DECODER, **ROTARY),
    "encoder_decoder lora": dict(ENCODER_DECODER, model__lora_rank=2),
    "rnn": dict(model__kind="rnn"),
    "gru": dict(model__kind="gru"),
    "lstm": dict(model__kind="lstm"),
    "lstm lora": dict(model__kind="lstm", model__lora_rank=2, model__lora_pattern="input"),
    "classification": LABELS,
    "classification by an encoder": dict(LABELS, **ENCODER),
    "classification by an lstm": dict(LABELS, model__kind="lstm"),
    "regression": dict(train__task="regression", data__packing="best_fit"),
    "tags": dict(LABELS, train__task="token_classification"),
    "spans": dict(ENCODER, train__task="question_answering", data__packing="best_fit"),
    "texts": TEXTS,
    "texts by an encoder_decoder": dict(TEXTS, **ENCODER_DECODER),
    "instruction": dict(train__task="instruction", data__packing="best_fit"),
    "preference": dict(train__task="preference", data__packing="best_fit"),
    "preference of experts": dict(MOE, train__task="preference", data__packing="best_fit"),
    **{name: dict(optimizer__name=name) for name in ("adam", "adafactor", "lion", "muon", "sgd")},
    **{
        name: dict(optimizer__schedule=name)
        for name in ("constant", "linear", "inverse_square_root", "warmup_stable_decay")
    },
}
DEFAULT = ("transformer", "encoder_decoder", "lstm", "regression")
# What decides a program on its own, in another value than any of the bases has; the others of a section by their choices.
OTHER = {
    "model.num_layers": 4, "model.model_dim": 96, "model.num_heads": 2, "model.num_kv_heads": 2, "model.head_dim": 8,
    "model.mlp_dim": 32, "model.rotary_base": 99.0, "model.rotary_local_base": 77.0,
    "model.rotary_scaling": (8.0, 1.0, 4.0, 32.0),
    "model.norm_epsilon": 0.01, "model.num_experts": 2, "model.experts_per_token": 1, "model.window": (4,), "model.lora_rank": 3,
    "model.lora_alpha": 3.0, "model.lora_pattern": "key|recurrent|input", "model.labels": ("a", "b", "c"), "model.dropout": 0.3,
    "model.init_scale": 0.3, "optimizer.learning_rate": 0.3, "optimizer.warmup": 7, "optimizer.decay_over": 55,
    "optimizer.decay_to": 0.6, "optimizer.beta1": 0.3, "optimizer.beta2": 0.4, "optimizer.epsilon": 1e-3,
    "optimizer.weight_decay": 0.6, "optimizer.clip_norm": 0.6, "optimizer.ema": 0.6, "optimizer.trainable": "embedding",
    "optimizer.layer_decay": 0.6, "optimizer.loss_scale": 8, "train.z_loss": 0.6, "train.balance_loss": 0.6,
    "train.router_z_loss": 0.6, "train.seed": 9,
}  # fmt: skip
# Read by what is no program: the loop, the files, the data. What of these has a reach is held to the code that reads it below.
ELSEWHERE = {
    "model.kind", "model.head", "model.attention", "train.task", "train.num_steps", "train.microbatch_rows", "train.dpo_beta",
    "train.init_from",
}  # fmt: skip
TRACED = [path for path in leaves() if path.split(".")[0] in ("model", "optimizer", "train") and path not in ELSEWHERE]


def other_values(path: str, value) -> list:
    field = leaves()[path]
    if path in OTHER:
        return [OTHER[path]]
    if isinstance(value, bool):
        return [not value]
    return [choice for choice in field.metadata["choices"] if choice != value]


def changed(config: Config, path: str, value) -> Config:
    """The config with another value, whether anything reads it or not."""
    section, name = path.split(".")
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **{name: value})})


def of_model(config: Config) -> str:
    """What the model and its loss compute, and their parameters' first values: jaxprs with their constants."""
    made = make_program(config, 200)
    row = example(config.data.objective, config.data.sequence_length, config.model.head, config.train.task)
    batch = {name: jax.ShapeDtypeStruct((2, *x.shape), x.dtype) for name, x in row.items()}
    weights, parameters = config.train, jax.eval_shape(lambda: made.graph.init(made.root))

    def loss(parameters, batch):
        drop = Dropout(made.root, jnp.int32(1), batch["row"]) if config.model.dropout else None
        routing = weights.balance_loss, weights.router_z_loss
        return objective(made.graph, parameters, batch, drop, weights.z_loss, routing)

    return f"{jax.make_jaxpr(lambda: made.graph.init(made.root))()} {jax.make_jaxpr(loss)(parameters, batch)}"


def of_optimizer(config: Config) -> str:
    """What an update computes."""
    made = make_program(config, 200)
    trained = jax.eval_shape(lambda: made.split(made.graph.init(made.root))[0])
    state = jax.eval_shape(made.optimizer.init, trained)
    found = jax.make_jaxpr(made.optimizer.update)(trained, state, trained)
    return f"{found} {[np.asarray(x).tobytes() for x in found.consts]} {jax.tree.structure(state)}"


def program(config: Config, path: str) -> str:
    """What a leaf may change; without the names that a process gives."""
    found = of_optimizer(config) if path.startswith("optimizer.") else of_model(config)
    return re.sub(r" at 0x[0-9a-f]+|id=[0-9]+", "", found)


def variants(config: Config, path: str):
    """Legal neighbours of a config in one leaf."""
    flat = flatten(config)
    for value in other_values(path, flat[path]):
        other = changed(config, path, value)
        if path in ("model.model_dim", "model.num_heads") and config.model.kind in configs.RECURRENT:
            yield other
            continue
        try:
            configs._check_together(other)
        except UserError:
            continue
        yield other


@pytest.mark.parametrize(
    "base", [pytest.param(base, marks=[pytest.mark.proof] * (base not in DEFAULT)) for base in BASES]
)
def test_a_leaf_is_read_where_it_says_so(base):
    config = tiny(model__num_layers=2, model__unroll=False, optimizer__decay_over=0, **BASES[base])
    config = changed(config, "optimizer.decay_over", 90)  # as `with_steps` gives it
    flat, wrong = flatten(config), {}
    expected = {section: program(config, f"{section}.") for section in ("model", "optimizer", "train")}
    for path in TRACED:
        found = [program(other, path) != expected[path.split(".")[0]] for other in variants(config, path)]
        if found and any(found) != is_read(flat, path):
            wrong[path] = "is read" if any(found) else "is not read"
    assert not wrong, f"{base}: declared otherwise in lm_jax/config.py"
