"""Sums are float32: in bfloat16 the gradient of every leaf on 16,384 tokens of real text is as near to float32's as bfloat16
inputs allow; and a product of float32 arrays is asked for in float32, whatever the platform does by default."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import LLAMA, tiny

from lm_jax.data.objectives import example, specials
from lm_jax.generate.decoding import next_logits, prefill
from lm_jax.generate.likelihood import of_rows
from lm_jax.loss import batch_loss
from lm_jax.model.build import build
from lm_jax.model_config import RECURRENT
from lm_jax.open_data import open_data
from lm_jax.sharding import einsum
from lm_jax.train_state import fresh, make_program
from lm_jax.train_step import train_step

ROWS = 256  # of 64 tokens
# Where only 1,024 labels are added up, whose gradients nearly cancel, bfloat16 inputs cost more.
LIMIT, HEADS_LIMIT = 0.02, 0.2
OF_ALL = ("model__model_dim", "model__unroll")


def small_of(kind: str) -> dict:
    """What is small of a model of this kind; a recurrent one has no heads."""
    return {name: value for name, value in SMALL.items() if kind not in RECURRENT or name in OF_ALL}


SMALL = dict(model__model_dim=32, model__mlp_dim=64, model__num_heads=2, model__num_kv_heads=2, model__unroll=False)
LABELS = dict(train__task="classification", model__labels=("a", "b"), data__packing="best_fit")
ENCODER_DECODER = dict(model__kind="encoder_decoder", data__objective="span_corruption")
KINDS = {
    "decoder": {},
    "llama": dict(LLAMA, model__num_kv_heads=1, model__qk_norm=True, model__qkv_bias=True),
    "sandwich": dict(model__norm_place="both", model__scale_embedding=True, model__window=(0, 8)),
    "encoder": dict(model__kind="encoder", data__objective="masked"),
    "encoder_decoder": dict(ENCODER_DECODER, model__positions="relative"),
    "encoder_decoder_2017": dict(ENCODER_DECODER, model__norm_place="post"),
    "rnn": dict(model__kind="rnn", model__init_scale=0.05),
    "lstm": dict(model__kind="lstm", model__init_scale=0.05),
    "gru": dict(model__kind="gru", model__init_scale=0.05),
    "moe": dict(LLAMA, model__num_kv_heads=2, model__num_experts=4, model__experts_per_token=2),
    "lora": dict(model__lora_rank=4, model__lora_pattern="attention|mlp"),
}


DEFAULT = ("decoder", "train moe", "train encoder_decoder", "train muon", "write decoder")
some = lambda names: [pytest.param(n, marks=[pytest.mark.proof] * (n not in DEFAULT)) for n in names]


def gradients(config, vocab_size: int, batch: dict, dtype: str) -> dict[str, np.ndarray]:
    """Of the mean loss, with z, balance and router losses, by the path of the leaf."""
    graph = build(dataclasses.replace(config.model, compute_dtype=dtype), vocab_size, config.data.sequence_length)
    parameters = graph.init(jax.random.key(0))
    settings = None, 1e-4, (0.01, 0.001)
    of = lambda parameters: batch_loss(graph, parameters, batch, *settings).objective / batch["loss_mask"].sum()
    flat, _ = jax.tree.flatten_with_path(jax.jit(jax.grad(of))(parameters))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x, np.float64) for path, x in flat}


def apart(found: np.ndarray, expected: np.ndarray, whole: float) -> float:
    """Relative; what is nothing beside the whole gradient (a key's bias, which softmax does not see) is not looked at."""
    size = np.linalg.norm(expected)
    return float(np.linalg.norm(found - expected) / size) if size > 1e-6 * whole else 0.0


@pytest.mark.parametrize("kind", some(KINDS))
def test_gradients_in_bfloat16_are_those_in_float32(kind):
    small = small_of(kind)
    config = tiny(**{**small, **KINDS[kind]})
    mixed = open_data(config)
    vocab_size = specials(mixed.tokenizer, config.data.objective).vocab_size
    batch = mixed.stream(config.data).rows(list(range(ROWS)))
    expected, found = (gradients(config, vocab_size, batch, dtype) for dtype in ("float32", "bfloat16"))
    whole = np.sqrt(sum(np.linalg.norm(x) ** 2 for x in expected.values()))
    errors = {path: apart(found[path], x, whole) for path, x in expected.items()}
    table = expected["embedding/table"]
    often = np.linalg.norm(table, axis=-1).argmax()  # the row whose gradient has most terms
    errors["embedding/table, its largest row"] = apart(found["embedding/table"][often], table[often], whole)
    limit = lambda path: HEADS_LIMIT if path.startswith(("pooler", "next_sentence")) else LIMIT
    assert not {path: error for path, error in errors.items() if not error < limit(path)}


def batch_of(config) -> dict:
    row = example(config.data.objective, config.data.sequence_length, config.model.head, config.train.task)
    return {name: jax.ShapeDtypeStruct((2, *x.shape), x.dtype) for name, x in row.items()}


def train(config) -> str:
    program = make_program(config, 500)
    state = jax.eval_shape(lambda: fresh(program))
    return jax.jit(functools.partial(train_step, program)).lower(state, batch_of(config)).as_text()


def write(config) -> str:
    """Prefill and decode of two prompts."""
    graph = build(config.model, 500, config.data.sequence_length)
    parameters = jax.eval_shape(lambda: graph.init(jax.random.key(0)))
    tokens, lengths = jax.ShapeDtypeStruct((2, 16), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.int32)

    def whole(parameters, tokens, lengths):
        state = prefill(graph, parameters, tokens, lengths, 32, 0, False)
        return next_logits(graph, parameters, state)[0]

    return jax.jit(whole).lower(parameters, tokens, lengths).as_text()


def score(config) -> str:
    graph = build(config.model, 500, config.data.sequence_length)
    parameters = jax.eval_shape(lambda: graph.init(jax.random.key(0)))
    ids = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    return of_rows.lower(graph, parameters, ids(2, 64), ids(2), ids(2, 32), 32).as_text()


PROGRAMS = {
    **{f"train {kind}": (train, kind, {}) for kind in KINDS},
    "train classification": (train, "encoder", dict(LABELS)),
    "train preference": (train, "decoder", dict(train__task="preference", data__packing="best_fit")),
    "train muon": (train, "decoder", dict(optimizer__name="muon")),
    "train chunked attention": (train, "decoder", dict(data__sequence_length=512)),
    **{f"write {kind}": (write, kind, {}) for kind in ("decoder", "encoder_decoder", "lstm", "moe")},
    **{f"score {kind}": (score, kind, {}) for kind in ("decoder", "moe")},
}


def products(text: str) -> list[str]:
    return [line for line in text.split("\n") if re.search(r"dot_general|ragged_dot|convolution", line)]


@pytest.mark.parametrize("name", some(PROGRAMS))
def test_float32_asks_for_float32(name):
    """A TPU would multiply in bfloat16, a GPU in TF32, where nothing is said."""
    program, kind, changes = PROGRAMS[name]
    found = products(program(tiny(**small_of(kind) | KINDS[kind] | changes)))
    assert len(found) > 4 and not [line for line in found if "[HIGHEST, HIGHEST]" not in line]


@pytest.mark.device
def test_products_of_float32_on_an_accelerator():
    """TF32 keeps ten bits and is 3e-4 off, bfloat16 seven: what the model multiplies is as near as float32 comes, also where
    the router of a model in bfloat16 does it."""
    random = np.random.default_rng(0)
    x, y = (random.normal(size=(512, 512)).astype(np.float32) for _ in range(2))
    exact = x.astype(np.float64) @ y.astype(np.float64)
    off = lambda product: float(
        np.abs(np.asarray(jax.jit(product)(x, y), np.float64) - exact).max() / np.abs(exact).max()
    )
    assert off(lambda x, y: einsum("NI,IO->NO", x, y, "tokens", None)) < 2e-6
    print("by default", off(jnp.matmul))
