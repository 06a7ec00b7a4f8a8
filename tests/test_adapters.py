"""What of a model is trained: by pattern, at the rate of its layer, or in adapters: merged, kept alone, put over a base."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.nnx.traversals import flatten_mapping
from helpers import FAMILIES, ROOT, assert_same_run, batch, kill_once_saved, lines_of, tiny

from lm_jax import checkpoint, evaluate, load_model, main
from lm_jax.config import Mesh
from lm_jax.convert import description, hugging_face, run
from lm_jax.data import loader
from lm_jax.errors import UserError
from lm_jax.generate import command
from lm_jax.loss import batch_loss
from lm_jax.mesh import make_mesh
from lm_jax.model.build import build
from lm_jax.model.lora import merged
from lm_jax.plan import counts
from lm_jax.sharding import AXES
from lm_jax.train_state import fresh, make_program
from lm_jax.train_step import accumulate, compile_step, zeros
from lm_jax.trainable import matching

PIECES = 500
ENCODER = dict(model__kind="encoder", data__objective="masked", model__norm_place="post")
T5 = dict(
    FAMILIES["llama"], model__kind="encoder_decoder", data__objective="span_corruption", model__positions="relative"
)
SOME = "attention/query|mlp/(up|down)/kernel|^norm/scale"


def flat(tree) -> dict[str, np.ndarray]:
    return {"/".join(path): np.asarray(x) for path, x in flatten_mapping(tree).items()}


def rows(step: int, kind: str = "") -> dict:
    """The golden batch of a step, with what an encoder or an encoder-decoder reads beside it."""
    found = {name: jnp.asarray(x) for name, x in batch(step).items()}
    if kind == "encoder_decoder":
        found |= {f"encoder_{name}": found[name] for name in ("tokens", "segment_ids", "positions")}
    return found | {"token_type_ids": jnp.zeros_like(found["tokens"])} if kind == "encoder" else found


def trained(config, mesh_sizes=(1, 1, 1), num_steps=3):
    """(parameters at the start and after each step, losses) over golden batches on a mesh, in the config's microbatches."""
    size = int(config.train.microbatch_rows)
    mesh = make_mesh(Mesh(*mesh_sizes), jax.devices()[: int(np.prod(mesh_sizes))])
    with jax.set_mesh(mesh):
        program = make_program(config, PIECES)
        state, one_step = jax.jit(lambda: fresh(program))(), compile_step(program, mesh, one_microbatch=size == 4)
        states, losses = [flat(state.parameters)], []
        for step in range(num_steps):
            parts = [
                {name: jax.device_put(x[i : i + size], loader.layout(mesh, 1)) for name, x in rows(step).items()}
                for i in range(0, 4, size)
            ]
            state, metrics = one_step(state, len(parts), iter(parts), lambda done: False)
            losses.append(float(metrics["train/loss"]))
            states.append(flat(state.parameters))
        return states, losses


def config_of(**changes):
    fixed = dict(data__global_batch_size=4, train__microbatch_rows=4, optimizer__warmup=0, model__unroll=False)
    return tiny(**fixed | changes)


# Patterns.


def test_a_pattern_is_found_anywhere_in_a_path():
    paths = ["embedding/table", "block_0/attention/query/kernel", "block_0/attention/key/kernel", "norm/scale"]
    assert matching("k", "", paths) == paths
    assert matching("k", "attention/query|^norm", paths) == [paths[1], paths[3]]
    assert matching("k", "^table", [*paths, "table"]) == ["table"]
    with pytest.raises(UserError, match=r"config.k = 'atention/querry' is found in none of the 4 .* attention/query\b"):
        matching("k", "atention/querry", paths)
    with pytest.raises(UserError, match="no regular expression: missing"):
        matching("k", "(query", paths)


def test_what_is_not_trained_keeps_every_bit_and_has_no_state():
    """And what is trained moves as if all were: one step, without clipping, which looks at all gradients."""
    config = config_of(
        optimizer__trainable=SOME, optimizer__clip_norm=0.0, optimizer__ema=0.9, train__microbatch_rows=2
    )
    program = make_program(config, PIECES)
    names = {"/".join(path) for path in program.trained}
    assert len(names) == 5 and "block_0/attention/query/bias" in names
    state = jax.eval_shape(lambda: fresh(program))
    sums = jax.eval_shape(lambda: zeros(program, fresh(program).parameters))
    assert {"/".join(path) for path in flatten_mapping(sums.gradients)} == names
    sizes = [x.shape for x in jax.tree.leaves(state.optimizer_state) if x.shape]
    assert sorted(sizes) == sorted(3 * [program.graph.declarations[path].shape for path in program.trained])
    (start, once, *_, end), _ = trained(config)
    assert {name for name in start if not np.array_equal(start[name], end[name])} == names
    everything = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, trainable=""))
    (_, whole), _ = trained(everything, num_steps=1)
    for name in names:
        np.testing.assert_allclose(once[name], whole[name], rtol=1e-5, atol=1e-6)


def counted(config):
    return counts.count(config, build(config.model, PIECES, 64).declarations)


def test_costs_count_what_is_trained():
    """Bytes are those of the arrays; the FLOPs of the compiled gradient shrink as counted."""

    def compiled_flops(config) -> float:
        program = make_program(config, PIECES)
        state = jax.eval_shape(lambda: fresh(program))
        gradient = jax.jit(lambda state, data: accumulate(program, state, None, data))
        return gradient.lower(state, rows(0)).compile().cost_analysis()["flops"]

    sizes = dict.fromkeys(AXES, 1)
    everything = config_of(model__unroll=True)  # a scan's body would be counted once
    of_all, flops = counted(everything), compiled_flops(everything)
    assert of_all.trained == of_all.parameters and of_all.backward
    for change, backward, dtype in ((SOME, True, "float32"), ("^norm", False, "bfloat16")):
        config = config_of(optimizer__trainable=change, optimizer__moment_dtype=dtype, model__unroll=True)
        found, program = counted(config), make_program(config, PIECES)
        assert found.trained == sum(np.prod(program.graph.declarations[path].shape) for path in program.trained)
        assert found.backward == backward
        state = jax.eval_shape(lambda program=program: fresh(program)).optimizer_state
        classes = counts.bytes_by_class(config, found, 4, sizes, accumulates=False)
        assert classes["optimizer"] == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state) if x.shape)
        assert classes["gradients"] == 4 * found.trained
        less = found.flops_per_token / of_all.flops_per_token
        np.testing.assert_allclose(compiled_flops(config) / flops, less, atol=0.05)


# Rates of layers.

HEADS, EMBEDDINGS = 0, 5
DEPTHS = {
    "gpt3_banded": {
        "norm": HEADS,
        "embedding": EMBEDDINGS,
        "positions": EMBEDDINGS,
        "block_0": (4, 2),
        "block_1": (3, 1),
    },
    "encoder": {
        **dict.fromkeys(("norm", "pooler", "transform", "transform_norm", "next_sentence", "output_bias"), HEADS),
        **dict.fromkeys(("embedding", "positions", "segments", "embedding_norm"), EMBEDDINGS),
        "block_0": (4, 3, 2, 1),
    },
}


@pytest.mark.parametrize("name", DEPTHS)
def test_layers_learn_at_their_own_rates(name):
    """Against a loop: what a layer changes by at the whole rate, times decay^depth; the parameter's decay as well."""
    changes = FAMILIES.get(name, ENCODER) | dict(model__num_layers=4, optimizer__name="sgd", optimizer__clip_norm=0.0)
    programs = [
        make_program(
            config_of(**changes, optimizer__layer_decay=decay, optimizer__trainable="query|table|norm|output"), PIECES
        )
        for decay in (0.5, 1.0)
    ]
    random = np.random.default_rng(0)
    declared, _ = programs[0].split(programs[0].graph.tree(lambda declared: declared))
    parameters = jax.tree.map(lambda declared: random.normal(size=declared.shape).astype(np.float32), declared)

    def after_one_update(program) -> dict[str, np.ndarray]:
        update = jax.jit(lambda x: program.optimizer.update(jax.tree.map(jnp.cos, x), program.optimizer.init(x), x)[0])
        return flat(update(parameters))

    found, whole = map(after_one_update, programs)
    for path in programs[0].trained:
        path_name, depths = "/".join(path), DEPTHS[name][path[0]]
        if isinstance(depths, int):
            np.testing.assert_allclose(found[path_name], whole[path_name] * 0.5**depths, rtol=1e-6)
        for layer, depth in enumerate(depths if isinstance(depths, tuple) else ()):
            np.testing.assert_allclose(found[path_name][layer], whole[path_name][layer] * 0.5**depth, rtol=1e-6)


def test_a_run_may_change_the_decay():
    """The state has the same names with and without it."""
    with_and_without = [make_program(config_of(optimizer__layer_decay=decay), PIECES) for decay in (0.5, 1.0)]
    a, b = (jax.tree.structure(jax.eval_shape(lambda p=p: fresh(p)).optimizer_state) for p in with_and_without)
    assert a == b


# Adapters.

ADAPTED = {
    "gpt2": ({}, "attention/(query|value)", 4),
    "gemma3": (FAMILIES["gemma3"], "", 28),
    "mixtral": (FAMILIES["mixtral"], "output|router", 4),
    "lstm": (FAMILIES["lstm"], "input", 2),
    "encoder": (ENCODER, "mlp|pooler", 6),
    "t5": (T5, "cross/(key|value)|mlp", 4 + 12),
}


@pytest.mark.parametrize(
    "name",
    [name if name in ("gemma3", "lstm") else pytest.param(name, marks=pytest.mark.proof) for name in ADAPTED],
)
def test_adapters_change_nothing_at_first_and_merge_away(name):
    changes, pattern, num = ADAPTED[name]
    changes = changes | dict(model__unroll=False)
    plain = tiny(**changes).model
    config = tiny(**changes, model__lora_rank=3, model__lora_alpha=6.0, model__lora_pattern=pattern).model
    bare, graph = build(plain, PIECES, 64), build(config, PIECES, 64)
    start, parameters = (jax.jit(lambda of=of: of.init(jax.random.key(0)))() for of in (bare, graph))
    new = [path for path in graph.declarations if path[-1].startswith("lora_")]
    assert len(new) == num and set(bare.declarations) == set(graph.declarations) - set(new)
    for path, x in flat(start).items():
        np.testing.assert_array_equal(x, flat(parameters)[path])
    data = rows(0, plain.kind)
    loss, bare_loss = (jax.jit(lambda p, of=of: batch_loss(of, p, data).loss) for of in (graph, bare))
    at_first = float(bare_loss(start))
    assert float(loss(parameters)) == at_first
    random = np.random.default_rng(0)
    moved = jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.float32(random.normal(size=x.shape) / 10) if path[-1].key == "lora_b" else x, parameters
    )
    whole = merged(moved, graph.declarations, config)
    assert jax.tree.structure(whole) == jax.tree.structure(start)
    np.testing.assert_allclose(float(bare_loss(whole)), float(loss(moved)), rtol=1e-5)
    assert abs(float(loss(moved)) / at_first - 1) > 1e-4
    path = new[0]  # by hand, the first of the layers
    a, b = (np.float64(flat(moved)["/".join((*path[:-1], part))][0]) for part in ("lora_a", "lora_b"))
    kernel = "/".join((*path[:-1], "kernel"))
    delta = 6 / 3 * np.tensordot(a, b, axes=1)
    np.testing.assert_allclose(flat(whole)[kernel][0] - flat(start)[kernel][0], delta, atol=1e-5)


LORA = dict(model__lora_rank=4, model__lora_pattern="attention|mlp", optimizer__ema=0.5, optimizer__learning_rate=0.02)


@pytest.fixture(scope="module")
def whole_batch():
    return trained(config_of(**LORA))


@pytest.mark.proof
def test_adapters_on_a_mesh_are_those_of_one_device(whole_batch):
    (start, *_, end), losses = whole_batch
    (sharded_start, *_, sharded_end), sharded_losses = trained(config_of(**LORA), (1, 2, 2))
    np.testing.assert_allclose(sharded_losses, losses, rtol=1e-5)
    for name, x in start.items():
        np.testing.assert_array_equal(sharded_start[name], x)
        np.testing.assert_allclose(sharded_end[name], end[name], rtol=1e-4, atol=1e-5)
        assert np.array_equal(x, end[name]) == np.array_equal(x, sharded_end[name]) == ("lora_" not in name), name


def test_adapters_lie_as_their_base_does():
    declarations = build(config_of(**LORA).model, PIECES, 64).declarations
    adapters = [path for path in declarations if path[-1].startswith("lora_")]
    assert len(adapters) == 12
    for path in adapters:
        of = declarations[(*path[:-1], "kernel")]
        side = of.inputs if path[-1] == "lora_a" else of.outputs
        axes = [axis for axis in declarations[path].axes if axis not in ("layers", "rank")]
        assert axes == [of.axes[dim] for dim in side] and of.layers == declarations[path].layers


@pytest.mark.proof
def test_accumulated_gradients_of_adapters_are_those_of_the_whole_batch(whole_batch):
    states, losses = trained(config_of(**LORA, train__microbatch_rows=1))
    np.testing.assert_allclose(losses, whole_batch[1], rtol=1e-5)
    for name, x in whole_batch[0][-1].items():
        np.testing.assert_allclose(states[-1][name], x, rtol=1e-4, atol=1e-5)


def test_heads_and_adapters_are_what_trains_unless_told_otherwise():
    labels = dict(model__labels=("a", "b"), train__task="classification", data__packing="best_fit")
    names = lambda **more: {
        "/".join(path)
        for path in make_program(config_of(**ENCODER, **labels, model__lora_rank=2, **more), PIECES).trained
    }
    adapters = {f"block_0/attention/{which}/lora_{part}" for which in ("query", "value") for part in "ab"}
    heads = {f"{head}/{part}" for head in ("labels", "pooler") for part in ("kernel", "bias")}
    assert names() == adapters | heads
    assert names(optimizer__trainable="lora_b") == {name for name in adapters if name.endswith("b")}


# Runs.


def arguments(base, workdir, *more: str) -> list[str]:
    return [
        "--config", str(ROOT / "experiments" / "quickstart.py:smoke"), "--workdir", str(workdir), "--config.mesh.data=1",
        f"--config.train.init_from={base}", "--config.train.num_steps=6", "--config.checkpoint.every=2",
        "--config.train.microbatch_rows=4", "--config.evaluate.prompt=", "--config.optimizer.learning_rate=0.05",
        "--config.model.lora_rank=4", "--config.optimizer.ema=0.5", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def adapted(finished, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("adapted") / "run"
    assert main.main(arguments(finished, workdir)) == 0
    return workdir


@pytest.fixture(scope="module")
def one_device():
    return make_mesh(Mesh(), jax.devices()[:1])


def loaded(place, mesh):
    with jax.set_mesh(mesh):
        graph, parameters = load_model.load_parameters(load_model.locate(str(place)))
        return graph, flat(parameters)


def test_a_run_trains_adapters_over_its_base_and_says_how_many(adapted, finished, one_device):
    log = (adapted / "log.txt").read_text()
    assert "parameters, 2k of them trained" in log and "initialised: block_0/attention/query/lora_a" in log
    with jax.set_mesh(one_device):
        _, parameters = load_model.load_as_trained(load_model.locate(str(adapted)))
    base = loaded(finished, one_device)[1]
    for name, x in base.items():
        np.testing.assert_array_equal(flat(parameters)[name], x)
    assert all(np.abs(x).max() > 0 for name, x in flat(parameters).items() if name.endswith("lora_b"))


@pytest.mark.proof
def test_a_killed_run_goes_on_to_the_bit(adapted, finished, tmp_path):
    line = arguments(finished, tmp_path / "run")
    kill_once_saved(line)
    assert main.main(line) == 0 and "resumed at step" in (tmp_path / "run" / "log.txt").read_text()
    assert_same_run(tmp_path / "run", adapted)


def test_another_pattern_on_resume_is_refused(adapted, finished):
    for change, words in (
        ("--config.optimizer.trainable=lora_b", "config.optimizer.trainable: .* there, 'lora_b' here"),
        ("--config.model.lora_pattern=query", "config.model.lora_pattern: .* there, 'query' here"),
    ):
        with pytest.raises(UserError, match=words):
            main.main(arguments(finished, adapted, change))


@pytest.fixture(scope="module")
def alone(adapted, finished, one_device, tmp_path_factory):
    """Only what was trained, in a folder that names its base."""
    folder = tmp_path_factory.mktemp("alone") / "part"
    found, base = (load_model.locate(str(place)) for place in (adapted, finished))
    with jax.set_mesh(one_device):
        run.write_part(checkpoint.epath.Path(folder), found, base)
    return folder


def size(folder) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_adapters_alone_over_their_base_are_the_model(adapted, alone, finished, one_device, tmp_path, capsys):
    assert size(alone / "checkpoints") < size(finished / "checkpoints" / "2" / "parameters") / 5
    expected = loaded(adapted, one_device)[1]
    graph, found = loaded(alone, one_device)
    assert found.keys() == expected.keys() == loaded(finished, one_device)[1].keys()
    for name, x in found.items():
        np.testing.assert_array_equal(x, expected[name])
    assert any(not np.array_equal(x, loaded(finished, one_device)[1][name]) for name, x in found.items())
    capsys.readouterr()
    assert command.main(["--model", str(alone), "--prompt", "class", "--max_new_tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("class")
    assert evaluate.main(["--model", str(alone)]) == 0
    result = json.loads(capsys.readouterr().out.strip().split("\n")[-1])
    final = [line["final/loss"] for line in lines_of(adapted) if "final/loss" in line]
    np.testing.assert_allclose(result["eval/loss"], final, rtol=1e-5)
    plain = [argument for argument in arguments(alone, tmp_path / "next", "--dry_run") if "lora" not in argument]
    assert main.main(plain) == 0  # as what a run starts from


def test_a_model_with_adapters_is_exported_merged(tmp_path):
    config = tiny(**FAMILIES["llama"], model__lora_rank=3)
    graph = build(config.model, PIECES, 64)
    ours = merged(jax.jit(lambda: graph.init(jax.random.key(0)))(), graph.declarations, config.model)
    hugging_face.write(str(tmp_path / "out"), description.description_of(config, PIECES), ours, {})
    there = hugging_face.read_parameters(str(tmp_path / "out"), hugging_face.read_description(str(tmp_path / "out")))
    assert flat(there).keys() == flat(ours).keys()
    query = "block_0/attention/query/kernel"
    np.testing.assert_array_equal(flat(there)[query], flat(ours)[query])


def test_a_base_that_is_not_what_it_was_is_refused(adapted, alone, finished, one_device, tmp_path, monkeypatch):
    content = json.loads((alone / "config.json").read_text())
    assert content["base"]["place"] == f"{finished}@2"
    for change, words in (
        ({"hash": "0" * 64}, "was trained over another model than"),
        ({"place": str(tmp_path / "nowhere")}, "needs its base: .* is not a run"),
    ):
        folder = tmp_path / next(iter(change))
        folder.mkdir()
        for path in alone.iterdir():
            if path.name != "config.json":
                (folder / path.name).symlink_to(path)
        (folder / "config.json").write_text(json.dumps(content | {"base": content["base"] | change}))
        with pytest.raises(UserError, match=words):
            load_model.locate(str(folder))
    found, base = (load_model.locate(str(place)) for place in (adapted, finished))
    with jax.set_mesh(one_device):
        moved = lambda base, frozen: jax.tree.map(lambda x: x + 1, under(base, frozen))
        under = load_model.frozen_from_base
        monkeypatch.setattr(load_model, "frozen_from_base", moved)
        with pytest.raises(
            UserError, match=r"was not trained over .*@2: \d+ of the \d+ parameters that were not trained"
        ):
            run.trained_part(found, base)
        with pytest.raises(UserError, match="all of .* was trained"):
            run.trained_part(base, base)
