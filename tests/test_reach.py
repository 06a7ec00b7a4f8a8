"""A knob's declared reach is what is true: of every leaf and kind of model, task and rule, two values make two programs exactly
where the declaration says that it is read."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny

from lm_jax.config import Config, flatten, leaves, unflatten
from lm_jax.config_check import check_together, resolve, resolve_found
from lm_jax.data.objectives import example
from lm_jax.errors import UserError
from lm_jax.experiment import SHRUNK
from lm_jax.loss import batch_loss
from lm_jax.model.dropout import Dropout
from lm_jax.model_config import RECURRENT
from lm_jax.reach import is_read
from lm_jax.train_state import make_program

LABELS = dict(train__task="classification", model__labels=("a", "b"), data__packing="best_fit")
TEXTS = dict(train__task="text_to_text", data__packing="best_fit")
ENCODER = dict(model__kind="encoder", data__objective="masked")
ENCODER_DECODER = dict(model__kind="encoder_decoder", data__objective="span_corruption")
ROTARY = dict(model__positions="rotary")
SCALED = (8.0, 1.0, 4.0, 32.0)
MOE = dict(model__num_experts=4, model__gated=True, model__bias=False)
BASES: dict[str, dict] = {
    "transformer": {},
    "rotary": ROTARY,
    "scaled rotary": dict(ROTARY, model__rotary_scaling=(4.0, 1.0, 8.0, 64.0)),
    "norm of heads": dict(model__qk_norm=True),
    "windows": dict(ROTARY, model__window=(0, 8), model__num_layers=6),  # periods of two layers
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
DEFAULT = ("transformer", "lstm")
# What decides a program on its own, in another value than any of the bases has; the others of a section by their choices.
OTHER = {
    "model.num_layers": 4, "model.model_dim": 96, "model.num_heads": 2, "model.num_kv_heads": 2, "model.head_dim": 8,
    "model.mlp_dim": 32, "model.rotary_base": 99.0, "model.rotary_local_base": 77.0,
    "model.rotary_scaling": (9.0, 1.0, 4.0, 32.0), "model.rotary_share": (0.5,), "model.logit_softcap": (5.0, 7.0),
    "model.multipliers": (2.0, 0.5, 0.3, 3.0),
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
    "train.init_from", "train.export_to", "train.on_spike",
}  # fmt: skip
# Of their several numbers a model of another kind would read some: it is refused all of them.
PARTLY = {"model.logit_softcap", "model.multipliers"}
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
        return batch_loss(made.graph, parameters, batch, drop, weights.z_loss, routing)

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


def neighbours(config: Config, path: str):
    """Legal configs that differ in one leaf."""
    for value in other_values(path, flatten(config)[path]):
        other = changed(config, path, value)
        try:
            if config.model.kind not in RECURRENT or path not in SHRUNK:  # it has no sizes of heads to fit
                check_together(other)
            make_program(other, 200)
        except UserError:
            continue
        yield other


def declared_otherwise(base: str, paths: list[str]) -> dict[str, str]:
    """The leaves of which the declaration says something else than the programs do, with what these say."""
    config = tiny(**dict(model__num_layers=2, model__unroll=False, optimizer__decay_over=0) | BASES[base])
    config = changed(config, "optimizer.decay_over", 90)  # as `with_steps` gives it
    flat, wrong = flatten(config), {}
    expected = {section: program(config, f"{section}.") for section in ("model", "optimizer", "train")}
    for path in paths:
        if path in PARTLY and not is_read(flat, path):
            continue
        found = [program(other, path) != expected[path.split(".")[0]] for other in neighbours(config, path)]
        if found and any(found) != is_read(flat, path):
            wrong[path] = "is read" if any(found) else "is not read"
    return wrong


@pytest.mark.parametrize("base", DEFAULT)
def test_what_is_not_read_everywhere_is_read_where_it_says_so(base):
    assert not declared_otherwise(base, [path for path in TRACED if leaves()[path].metadata["reach"]])


@pytest.mark.proof
@pytest.mark.parametrize("base", BASES)
def test_every_leaf_is_read_where_it_says_so(base):
    only = {"lstm lora": "model.lora_pattern"}.get(base, "")  # a layer has one matrix to name; all else is refused
    assert not declared_otherwise(base, [path for path in TRACED if path != only])


REFUSED = {
    "experts of an encoder_decoder": dict(ENCODER_DECODER, model__num_experts=4),
    "scaling of an encoder_decoder": dict(ENCODER_DECODER, **ROTARY, model__rotary_scaling=SCALED),
    "scaling without a factor": dict(ROTARY, model__rotary_scaling_kind="yarn"),
    "rotary base of learned positions": dict(model__rotary_base=1e6),
    "local base without a window": dict(ROTARY, model__rotary_local_base=1e6),
    "experts of a token without experts": dict(model__experts_per_token=1),
    "balance without experts": dict(train__balance_loss=0.02),
    "router's z-loss without experts": dict(train__router_z_loss=0.1),
    "alpha without adapters": dict(model__lora_alpha=8.0),
    "pattern of adapters without adapters": dict(model__lora_pattern="key"),
    "heads of an LSTM": dict(model__kind="lstm", model__num_heads=2),
    "norm of an LSTM": dict(model__kind="lstm", model__norm="rmsnorm"),
    "attention of an LSTM": dict(model__kind="lstm", model__attention="xla"),
    "window of an LSTM": dict(model__kind="lstm", model__window=(8,)),
    "window of an encoder": dict(ENCODER, model__window=(8,)),
    "scaled embedding of an encoder_decoder": dict(ENCODER_DECODER, model__scale_embedding=True),
    "beta2 of sgd": dict(optimizer__name="sgd", optimizer__beta2=0.9),
    "epsilon of lion": dict(optimizer__name="lion", optimizer__epsilon=1e-6),
    "moments of adafactor": dict(optimizer__name="adafactor", optimizer__moment_dtype="bfloat16"),
    "decay of adam": dict(optimizer__name="adam", optimizer__weight_decay=0.2),
    "decay_over of a constant rate": dict(optimizer__schedule="constant", optimizer__decay_over=50),
    "decay_to of a rate without end": dict(optimizer__schedule="inverse_square_root", optimizer__decay_to=0.0),
    "beta of DPO without preferences": dict(train__dpo_beta=0.5),
    "labels without a task": dict(model__labels=("a", "b")),
    "labels of a regression": dict(train__task="regression", data__packing="best_fit", model__labels=("a", "b")),
    "z-loss of labels": dict(LABELS, train__z_loss=1e-4),
    "columns without a task": dict(data__columns=("a",)),
    "prompt of a task without texts": dict(LABELS, data__prompt="{text}"),
    "metrics of texts without texts": dict(evaluate__metrics="summaries"),
    "sample of an encoder": dict(ENCODER, evaluate__prompt="x"),
    "tasks of lm-eval for labels": dict(LABELS, evaluate__tasks=("arc_easy",)),
    "tasks of lm-eval for an encoder": dict(ENCODER, evaluate__tasks=("arc_easy",)),
    "how often tasks are asked without tasks": dict(evaluate__tasks_every=2),
    "sample of a task": dict(TEXTS, evaluate__prompt="x"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_nothing_reads_is_refused_by_name_with_its_mend(name):
    with pytest.raises(
        UserError, match=r"is read only where config\.\w+\.\w+ is .*\nleave it out, or: --config\."
    ) as error:
        tiny(**REFUSED[name])
    path = list(REFUSED[name])[-1].replace("__", ".")
    named = [line for line in str(error.value).split("\n") if line.startswith("config.")]
    assert len(named) == 1 and len(str(error.value).split("\n")) <= 5
    # The mend that it names is one: the same without that leaf.
    mended = re.search(r"--config\.(\w+\.\w+)=", str(error.value))[1]
    assert named[0].startswith(f"config.{mended} = ") and mended in [
        name.replace("__", ".") for name in REFUSED[name]
    ], path
    tiny(**{name: value for name, value in REFUSED[name].items() if name.replace("__", ".") != mended})


def test_what_a_run_or_another_folder_says_is_never_refused_for_its_reach():
    """Nobody typed it here: it is read without what nothing reads."""
    flat = flatten(tiny()) | {
        "model.rotary_base": 1e6,
        "optimizer.beta2": 0.9,
        "optimizer.name": "sgd",
        "train.dpo_beta": 0.3,
    }
    with pytest.raises(UserError):
        resolve(unflatten(flat))
    found = flatten(resolve_found(unflatten(flat)))
    assert found["model.rotary_base"] == 10_000.0 and found["train.dpo_beta"] == 0.1
