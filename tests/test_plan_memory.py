"""Counted memory beside what JAX saves of a layer, and beside what compilers said of steps near the limit of a device."""

import itertools
import json
import math

import jax
import jax.numpy as jnp
import pytest
from helpers import ROOT

from lm_jax import experiment
from lm_jax.model import build
from lm_jax.model.attention import Context
from lm_jax.plan import devices
from lm_jax.plan.estimate import Estimate, changes, estimate, mesh_of
from lm_jax.plan.layer_memory import layer_bytes

# Made by `python tools/benchmark fits`, which says of each pair what it is.
RECORDED = [json.loads(line) for line in (ROOT / "tests" / "fixtures" / "fits.jsonl").read_text().splitlines()]
WITHIN, NEAR = 0.15, 0.05  # of the compiled peak; of the memory, where the verdicts may differ


def counted(file: str, topology: str, settings: dict[str, str]) -> Estimate:
    return estimate(experiment.load_config(str(ROOT / file), settings)[0], devices.parse(topology))


@pytest.mark.parametrize("recorded", RECORDED, ids=lambda recorded: recorded["pair"])
def test_counts_and_compiler_agree_near_the_limit(recorded):
    """On bytes, and on whether it fits; of what does not, the first change that is proposed was compiled, and fits."""
    found = check(recorded, recorded, {})
    if not found.fits:
        proposed, _ = changes(found.config, found)[0]
        change = recorded["change"]
        assert change["fits"] and change["flags"].split() == [f"--config.{name}={proposed[name]}" for name in proposed]
        check(recorded, change, {name: str(value) for name, value in proposed.items()})


def check(recorded: dict, compiled: dict, more: dict[str, str]) -> Estimate:
    """The estimate of a recorded pair with more settings, beside what the compiler said of it."""
    found = counted(recorded["experiment"], recorded["topology"], recorded["settings"] | more)
    assert found.device.memory == compiled["memory"]
    assert found.needed == pytest.approx(compiled["peak"], rel=WITHIN), found.memory
    assert found.fits == compiled["fits"] or abs(compiled["peak"] / compiled["memory"] - 1) <= NEAR
    return found


def test_forty_pairs_are_recorded_of_all_kinds():
    pairs = " ".join(recorded["pair"] for recorded in RECORDED)
    assert len(RECORDED) >= 40 and all(0.5 < one["peak"] / one["memory"] < 2 for one in RECORDED)
    assert {one["fits"] for one in RECORDED} == {True, False} and sum("change" in one for one in RECORDED) >= 8
    kinds = "v5e v5p v6e H100 A100 L4 T4 adafactor muon bfloat16 float32 qwen3 gemma3 gpt3 mixtral tensor expert unroll"
    assert all(kind in pairs for kind in kinds.split())


LENGTH, LAYERS = 384, 3  # no other dim of the models below
GPT = {"model.model_dim": "640", "model.num_heads": "10"}
LLAMA = GPT | {"model.num_kv_heads": "5", "model.norm": "rmsnorm", "model.bias": "False", "model.positions": "rotary"}
LLAMA |= {"model.activation": "silu", "model.gated": "True"}
FAMILIES = {
    "gpt": GPT,
    "gpt, post": GPT | {"model.norm_place": "post"},
    "gpt, float32": GPT | {"model.compute_dtype": "float32"},
    "relu": GPT | {"model.activation": "relu"},
    "gated gelu": GPT | {"model.gated": "True", "model.norm_place": "both"},
    "gelu_exact": GPT | {"model.activation": "gelu_exact"},
    "llama": LLAMA,
    "qwen3": LLAMA | {"model.qk_norm": "True"},
    "mixtral": LLAMA | {"model.num_experts": "8"},
}


def saved(found: Estimate) -> float:
    """Bytes that JAX saves of a token in each scanned layer: its residuals, stacked."""
    model = found.config.model
    graph = build.build(model, 512, LENGTH)

    def run(x_BTD: jax.Array, parameters: dict) -> jax.Array:
        context = Context(jnp.zeros((1, LENGTH), jnp.int32), jnp.ones((1, LENGTH), jnp.int32))
        return graph.module(parameters).through(x_BTD, context)[0]

    x_BTD = jax.ShapeDtypeStruct((1, LENGTH, model.model_dim), jnp.dtype(model.compute_dtype))
    parameters = graph.tree(lambda declared: jax.ShapeDtypeStruct(declared.shape, declared.dtype))
    with jax.sharding.use_abstract_mesh(mesh_of(found.topology, found.sizes)):
        residuals = jax.tree.leaves(jax.eval_shape(lambda *given: jax.vjp(run, *given)[1], x_BTD, parameters))
    tokens = {LENGTH, LENGTH * model.experts_per_token} if model.num_experts else {LENGTH}
    stacked = [x for x in residuals if x.shape[:1] == (LAYERS,) and tokens & set(x.shape)]
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in stacked) / LAYERS / LENGTH


@pytest.mark.parametrize(
    ("family", "remat"), [*itertools.product(FAMILIES, ["none", "dots"]), ("llama", "names"), ("llama", "full")]
)
def test_a_layer_keeps_what_jax_saves_of_it(family, remat):
    settings = {"model.compute_dtype": "bfloat16", "data.sequence_length": str(LENGTH), "model.num_layers": str(LAYERS)}
    settings |= {"model.remat": remat, "model.unroll": "False"} | FAMILIES[family]
    found = counted("experiments/quickstart.py", "v5e:1x1", settings)
    model, sizes = found.config.model, found.sizes
    kept = layer_bytes(model, sizes, "unpadded").kept
    act = jnp.dtype(model.compute_dtype).itemsize
    if remat == "none":  # the result of attention twice, which XLA keeps once
        kept += act * model.num_heads * model.head_dim
    assert saved(found) == pytest.approx(kept, rel=0.02), (saved(found), kept)
