"""Every kind of model under the same specifications: both sides or one, meshes, learning by heart, resuming."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny

from lm_jax import experiment, load_model, metrics_file, train, verify
from lm_jax.config import Mesh
from lm_jax.data import loader, mixture, objectives
from lm_jax.errors import UserError
from lm_jax.mesh import make_mesh
from lm_jax.model import layers
from lm_jax.model.attention import Context
from lm_jax.model.build import build
from lm_jax.plan import counts
from lm_jax.run_plan import make_plan, with_microbatch
from lm_jax.train_state import fresh, make_program
from lm_jax.train_step import compile_step

KINDS = {
    "lstm": dict(model__kind="lstm", model__init_scale=0.3),
    "encoder": dict(
        model__kind="encoder", model__norm_place="post", model__activation="gelu_exact", data__objective="masked"
    ),
    "encoder_decoder": dict(
        model__kind="encoder_decoder", model__positions="relative", model__norm="rmsnorm", model__gated=True,
        model__bias=False, model__tie_embedding=False, data__objective="span_corruption",
    ),
}  # fmt: skip
RATES = {"lstm": 3e-2, "encoder": 1e-2, "encoder_decoder": 1e-2}  # at which 150 steps are enough


def opened(**changes):
    """(config, pieces of the model, its stream) on the embedded corpus."""
    config = tiny(**changes)
    mixed = mixture.open_mixture(config.data)
    return (
        config,
        objectives.specials(mixed.tokenizer, config.data.objective).vocab_size,
        mixed.stream(config.data),
    )


@pytest.mark.parametrize("products", ["cpu", pytest.param("tpu", marks=pytest.mark.proof)])
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind == "encoder_decoder" else pytest.mark.proof) for kind in KINDS]
)
def test_sharded_and_accumulated_agree(kind, products, eight, monkeypatch):
    """2 x 2 x 2 devices, with the products of a platform, and four microbatches as one device and one batch; dropout is on."""
    changes = dict(
        data__global_batch_size=16, optimizer__name="sgd", optimizer__learning_rate=0.05, model__unroll=False,
        model__num_layers=1,
    )  # fmt: skip
    config, vocab_size, stream = opened(**KINDS[kind] | changes, model__dropout=0.1, train__microbatch_rows=16)
    expected = verify.trace(make_plan(config, vocab_size, eight[:1]), stream, 2)
    config = dataclasses.replace(with_microbatch(config, 4), mesh=Mesh(2, 2, 2))
    monkeypatch.setattr(layers, "platform", lambda: products)
    found = verify.trace(make_plan(config, vocab_size, eight), stream, 2)
    assert found.digest == expected.digest, "initial parameters are not bitwise equal"
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(found.parameters), jax.tree.leaves(expected.parameters), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.proof
@pytest.mark.parametrize("kind", KINDS)
def test_eight_rows_are_learnt_by_heart(kind):
    changes = dict(optimizer__learning_rate=RATES[kind], optimizer__warmup=10, optimizer__decay_over=150)
    config, vocab_size, stream = opened(**KINDS[kind] | changes, optimizer__weight_decay=0.0, model__unroll=False)
    mesh = make_mesh(Mesh(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        batch = next(loader.batches(stream, mesh, 0, 1, 8))
        program = make_program(config, vocab_size)
        state, one_step = jax.jit(lambda: fresh(program))(), compile_step(program, mesh, one_microbatch=True)
        for _ in range(150):
            state, found = one_step(state, 1, iter([batch]), lambda done: False)
            settled = float(found["train/loss"])
    assert settled < 0.1, settled


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # the log is open for the life of a process
@pytest.mark.proof
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_as_if_nothing_had_been(kind, tmp_path):
    """Two steps, then two more by the same command: metrics and parameters of four steps in one go."""
    changes = dict(optimizer__decay_over=4, data__global_batch_size=8, train__microbatch_rows=8, model__dropout=0.1)
    config = tiny(**KINDS[kind] | changes, evaluate__num_rows=4, mesh__data=1, model__num_layers=1)
    in_steps = lambda num: dataclasses.replace(config, train=dataclasses.replace(config.train, num_steps=num))
    for place, steps in (("whole", (4,)), ("parts", (2, 4))):
        for num in steps:
            assert train.run(in_steps(num), "experiments/quickstart.py", str(tmp_path / place), {}) == 0
    whole, parts = (
        {line["step"]: line["train/loss"] for line in metrics_file.read(tmp_path / place) if "train/loss" in line}
        for place in ("whole", "parts")
    )
    assert whole == parts and list(whole) == [1, 2, 3, 4]
    mesh = make_mesh(Mesh(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        of = lambda place: load_model.load_parameters(load_model.locate(str(tmp_path / place)))[1]
        jax.tree.map(np.testing.assert_array_equal, of("whole"), of("parts"))


def test_an_encoder_sees_both_sides_of_its_own_text_and_no_other():
    """The state of a token depends on every embedding of its segment, before and after it, and on none of the other's."""
    config, vocab_size, stream = opened(**KINDS["encoder"])
    program = make_program(config, vocab_size)
    parameters = jax.jit(lambda: program.graph.init(jax.random.key(0)))()
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 500, (1, 64)), jnp.int32)
    segments = jnp.where(jnp.arange(64) < 40, 1, 2)[None]
    positions = jnp.where(jnp.arange(64) < 40, jnp.arange(64), jnp.arange(64) - 40)[None]
    context = Context(positions, segments)

    def at_place(x_BTD, place):
        model = program.graph.module(parameters)
        model.embed = lambda tokens, positions: x_BTD
        return (model(tokens, context)[0][0, place] ** 3).sum()

    embedded = program.graph.module(parameters).embed(tokens, positions)
    moved = jnp.abs(jax.jit(jax.grad(at_place))(embedded, 20)).sum(-1)[0]
    assert float(moved[:40].min()) > 0 and float(moved[40:].max()) == 0
    together = program.graph.module(parameters)(tokens, context)[0][0, 40:]
    alone = program.graph.module(parameters)(tokens[:, 40:], Context(positions[:, 40:], segments[:, 40:]))
    np.testing.assert_allclose(together, alone[0][0], atol=2e-5)


@pytest.mark.parametrize(
    "positions", ["relative", *(pytest.param(x, marks=pytest.mark.proof) for x in ("rotary", "learned"))]
)
def test_an_encoder_decoder_reads_both_sides_writes_one_and_can_go_on_from_a_cache(positions):
    """By gradient: the state at a place of the target depends on all of its own source, on no other source, on no later target.

    With a cache, a token at a time, it is what it was in one pass.
    """
    config, vocab_size, _ = opened(**KINDS["encoder_decoder"] | dict(model__positions=positions))
    program = make_program(config, vocab_size)
    parameters = jax.jit(lambda: program.graph.init(jax.random.key(0)))()
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 500, (1, 64)), jnp.int32)
    segments = jnp.where(jnp.arange(64) < 40, 1, 2)[None]
    places = jnp.where(jnp.arange(64) < 40, jnp.arange(64), jnp.arange(64) - 40)[None]
    context = Context(places, segments)

    def at_place(source_BSD, target_BTD):
        model = program.graph.module(parameters)
        model.embed = lambda *_: source_BSD
        encoded = model.encode(tokens, context)
        model.embed = lambda *_: target_BTD
        return (model.decode(tokens, context, (encoded, context))[0][0, 20] ** 3).sum()

    embedded = jax.random.normal(jax.random.key(1), (1, 64, 64))
    source, target = (jnp.abs(x).sum(-1)[0] for x in jax.jit(jax.grad(at_place, (0, 1)))(embedded, embedded))
    assert float(source[:40].min()) > 0 and float(source[40:].max()) == 0
    assert float(target[:21].min()) > 0 and float(target[21:].max()) == 0

    def of_source(source_BSD):
        model = program.graph.module(parameters)
        model.embed = lambda *_: source_BSD
        return (model.encode(tokens, context)[0, 20] ** 3).sum()

    read = jnp.abs(jax.jit(jax.grad(of_source))(embedded)).sum(-1)[0]
    assert float(read[:40].min()) > 0 and float(read[40:].max()) == 0

    whole = Context(jnp.arange(64)[None], jnp.ones((1, 64), jnp.int32))

    @jax.jit
    def full(parameters):
        model = program.graph.module(parameters)
        encoded = model.encode(tokens, whole)
        return encoded, model.decode(tokens, whole, (encoded, whole))[0]

    @jax.jit
    def step(encoded, token, length, caches):
        model = program.graph.module(parameters)
        now = Context((length - 1)[:, None], jnp.ones((1, 1), jnp.int32))
        return model.decode(token, now, (encoded, whole), None, caches)

    encoded, expected = full(parameters)
    caches = program.graph.empty_caches(1, 64)
    for n in range(1, 40):
        found, caches = step(encoded, tokens[:, n - 1 : n], jnp.array([n]), caches)
        np.testing.assert_allclose(found[0, 0], expected[0, n - 1], atol=1e-4)


def test_rows_of_an_encoder_hold_two_texts():
    """[CLS] A [SEP] B [SEP]; the label stands at [CLS]; half of the second texts are another row's; nothing else is changed."""
    config, _, stream = opened(**KINDS["encoder"])
    ids, labels, hidden, seen = stream.corruption.ids, [], 0, 0
    for i in range(200):
        row, whole = stream.row(i), stream.whole(i)
        np.testing.assert_array_equal(row["segment_ids"], whole["segment_ids"])
        for segment in range(1, row["segment_ids"].max() + 1):
            places = np.flatnonzero(row["segment_ids"] == segment)
            tokens, types, mask = (row[name][places] for name in ("tokens", "token_type_ids", "loss_mask"))
            assert tokens[0] == ids.classifier
            if len(places) < objectives.SHORTEST_PAIR:
                assert not types.any() and not mask[0]
                continue
            first = types.argmax()  # the first token of the second text
            assert len(places) // 4 < first <= 3 * len(places) // 4 + 1 and types[first:].all()
            assert tokens[first - 1] == tokens[-1] == ids.document and mask[0] == 1 and not mask[[first - 1, -1]].any()
            labels.append(int(row["targets"][places[0]]))
            told = np.where(mask > 0, row["targets"][places], tokens)[1:-1]
            same = told == whole["tokens"][places][1:-1]
            assert same[: first - 2].all()
            assert same[first - 1 :].all() != labels[-1] or len(same) - first < 4, "another row's tokens, or its own"
            hidden, seen = hidden + int(mask[1:].sum()), seen + len(places) - 3
    assert 0.4 < np.mean(labels) < 0.6 and len(labels) > 200
    assert 0.14 < hidden / seen < 0.16
    again = stream.row(5)
    assert all(np.array_equal(again[name], value) for name, value in stream.row(5).items())
    held = mixture.open_mixture(config.data).held(config.data, "validation")["python"]
    assert {"token_type_ids"} <= held.row(0).keys() and held.first(3).row(1)["token_type_ids"].any()


def test_an_objective_needs_its_kind():
    for changes, words in (
        (dict(data__objective="masked"), "masked needs an encoder: add --config.model.kind=encoder"),
        (dict(model__kind="encoder"), "causal needs a transformer.* encoder takes masked or masked_words"),
        (
            dict(model__kind="encoder", data__objective="masked", model__window=(8,)),
            r"model.window = \(8,\) is read only where config.model.kind is transformer",
        ),
    ):
        with pytest.raises(UserError, match=words):
            tiny(**changes)


@pytest.mark.parametrize(("name", "pieces", "millions"), [("bert_base", 30_522, 110), ("t5_small", 32_100, 77)])
def test_a_published_size_has_its_parameters(name, pieces, millions):
    config, _ = experiment.load_config(f"experiments/{name}.py", {})
    extra = objectives.EXTRA[config.data.objective]
    assert config.data.tokenizer == f"sentencepiece:{pieces - extra}"
    graph = build(config.model, pieces, config.data.sequence_length)
    assert abs(counts.count(config, graph.declarations).parameters / millions / 1e6 - 1) < 0.005


def test_what_an_encoder_and_an_encoder_decoder_compute_is_counted():
    """Six FLOPs a matrix parameter; all pairs of both sides, and for a target its half, all of its source besides."""
    for kind, share in (("encoder", 1.0), ("encoder_decoder", 2.5), ("lstm", 0.0)):
        config = tiny(**KINDS[kind])
        found = counts.count(config, build(config.model, 512, 64).declarations)
        pairs = 12 * 64 * share * config.data.sequence_length * config.model.num_layers
        assert found.flops_per_token == 6 * found.matrix_parameters + pairs
