"""What is not finite reaches neither parameters nor moments nor a checkpoint; float16 trains behind a scale that moves."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import KERNEL, batch, final_arrays, lines_of, tiny

from lm_jax import checkpoint, cli, evaluate, load_model, loss_scale, main, optimizer, step_folders, train
from lm_jax.config import Mesh
from lm_jax.data import loader
from lm_jax.loss_scale import all_finite, dynamic_loss_scale, skip_nonfinite
from lm_jax.mesh import make_mesh
from lm_jax.optimizer import make_optimizer
from lm_jax.train_state import fresh, make_program
from lm_jax.train_step import accumulate, compile_step


def feed(rule, gradients, state=None, parameters=None):
    """(parameters, state) after one update with each of `gradients`, numbers that a pair of parameters share."""
    parameters = {"w": jnp.array([2.0, -0.0])} if parameters is None else parameters
    state = rule.init(parameters) if state is None else state
    for gradient in gradients:
        changes, state = rule.update({"w": jnp.array([gradient, gradient / 2])}, state, parameters)
        parameters = optax.apply_updates(parameters, changes)
    return parameters, state


def same_bits(a, b) -> bool:
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in leaves)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_skipped_update_never_was(bad):
    rule = skip_nonfinite(optax.adam(0.1))
    parameters, state = feed(rule, [bad])
    assert same_bits(parameters, {"w": np.float32([2.0, -0.0])})
    found, expected = feed(rule, [3.0, bad, bad, -1.0]), feed(rule, [3.0, -1.0])
    assert same_bits(found[0], expected[0]) and same_bits(found[1].inner, expected[1].inner)
    assert (int(found[1].skipped), int(expected[1].skipped)) == (2, 0)


def test_the_scale_halves_and_doubles():
    rule = dynamic_loss_scale(optax.sgd(0.1), initial=8, largest=16, grow_after=3)
    parameters, state, found = None, None, []
    for gradient in [1.0, np.inf, 1.0, 1.0, 1.0, 1.0, np.nan, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]:
        parameters, state = feed(rule, [gradient], state, parameters)
        found.append(float(state.scale))
    assert found == [8, 4, 4, 4, 8, 8, 4, 4, 4, 8, 8, 8, 16, 16, 16, 16]
    assert int(state.skipped) == 2 and int(state.good_steps) == 0


def test_overflow_counts_towards_the_end_only_at_the_smallest_scale():
    rule = dynamic_loss_scale(optax.sgd(0.1), initial=4, largest=4)
    parameters, state, found = None, None, []
    for gradient in [np.inf, np.inf, np.inf, np.inf, 1.0, np.inf]:
        parameters, state = feed(rule, [gradient], state, parameters)
        found.append((float(state.scale), int(state.in_a_row)))
    assert found == [(2, 0), (1, 0), (1, 1), (1, 2), (1, 0), (1, 1)]


def test_a_power_of_two_changes_no_bit():
    plain = optax.sgd(0.1, momentum=0.9)  # unlike Adam's, its updates are as large as the gradient
    scaled, gradients = dynamic_loss_scale(plain, initial=1024, largest=2**24), np.random.RandomState(0).randn(20)
    found, expected = feed(scaled, gradients * 1024), feed(skip_nonfinite(plain), gradients)
    assert same_bits(found[0], expected[0])


# (settings of the optimizer, gradient, parameter): every gradient is finite, what an update would leave is not
BAD_UPDATES = {
    "beta2 of 1": (dict(beta2=1.0), 0.5, 2.0),
    "beta1 of 1": (dict(beta1=1.0), 0.5, 2.0),
    "epsilon 0, no gradient yet": (dict(epsilon=0.0), 0.0, 2.0),
    "epsilon 0, adam": (dict(name="adam", epsilon=0.0), 0.0, 2.0),
    "weight decay": (dict(weight_decay=1e39), 0.5, 2.0),
    "weight decay of a large parameter": (dict(weight_decay=1e30, learning_rate=1.0), 0.5, 1e20),
    "an update beyond float32": (dict(name="sgd", learning_rate=1e38, clip_norm=0.0), 10.0, 2.0),
    "a sum beyond float32": (dict(name="sgd", learning_rate=1e38, clip_norm=0.0), -2.0, 3e38),
    "lion": (dict(name="lion", learning_rate=1e38, weight_decay=1e3), 0.5, 2.0),
    "muon": (dict(name="muon", learning_rate=1e38, weight_decay=1e3), 0.5, 2.0),
    "muon, a sum beyond float32": (
        dict(name="muon", learning_rate=3e38, clip_norm=0.0, weight_decay=0.0),
        -1e-3,
        3.3e38,
    ),
    "adafactor": (dict(name="adafactor", learning_rate=1e38, weight_decay=1e3), 0.5, 2.0),
    "loss scale": (dict(loss_scale=1024, epsilon=0.0), 0.0, 2.0),
    "layer decay": (dict(layer_decay=0.5, weight_decay=1e39), 0.5, 2.0),
}


@pytest.mark.parametrize("name", BAD_UPDATES)
def test_an_update_that_is_not_finite_never_was(name):
    changes, gradient, parameter = BAD_UPDATES[name]
    settings = dict(schedule="constant", warmup=0, learning_rate=0.1) | changes
    config = dataclasses.replace(tiny().optimizer, **settings)
    rule = make_optimizer(config, {"w": KERNEL}, {("w",): np.float32(1.0)})
    parameters = {"w": jnp.full((1, 1), parameter)}
    start = rule.init(parameters)
    changes, state = jax.jit(rule.update)({"w": jnp.full((1, 1), gradient)}, start, parameters)
    assert np.isfinite(gradient) and same_bits(optax.apply_updates(parameters, changes), parameters)
    assert same_bits(state.inner, start.inner) and int(state.skipped) == 1 and bool(all_finite(state))


def test_adapters_without_a_gradient_yet_stay_as_they_were():
    """The first gradient of one half of an adapter is zero, as the other half is: with epsilon 0 that is zero over zero."""
    config = tiny(model__lora_rank=2, model__num_layers=1)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, epsilon=0.0))
    program = make_program(config, vocab_size=500)
    trained, frozen = program.split(jax.jit(lambda: fresh(program))().parameters)
    zeros = jax.tree.map(jnp.zeros_like, trained)
    changes, state = jax.jit(program.optimizer.update)(zeros, program.optimizer.init(trained), trained)
    assert frozen and same_bits(optax.apply_updates(trained, changes), trained) and int(state.skipped) == 1


@pytest.mark.parametrize("part", ["parameters", "mu", "average", "scale"])
def test_a_state_that_is_not_finite_is_not_saved(one_device, tmp_path, part):
    program = make_program(tiny(optimizer__ema=0.9, model__num_layers=1), vocab_size=500)
    facts = dict.fromkeys(checkpoint.FACTS, "")
    saver = checkpoint.Saver(checkpoint.epath.Path(tmp_path), program.config, facts)
    state = jax.jit(lambda: fresh(program))()
    saver.save(state, checkpoint.DataState(1, 8))
    leaves, structure = jax.tree_util.tree_flatten_with_path(state)
    spoilt = next(k for k, (path, _) in enumerate(leaves) if part in jax.tree_util.keystr(path))
    bad = [x * jnp.nan if k == spoilt else x for k, (_, x) in enumerate(leaves)]
    with pytest.raises(checkpoint.NotFinite, match="the state after step 2 is not finite"):
        saver.save(jax.tree.unflatten(structure, bad), checkpoint.DataState(2, 16))
    saver.close()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]


@pytest.fixture(scope="module")
def one_device(eight):
    mesh = make_mesh(Mesh(), eight[:1])
    with jax.set_mesh(mesh):
        yield mesh


def halves_of(whole):
    return iter([{name: jnp.asarray(x[i : i + 2]) for name, x in whole.items()} for i in (0, 2)])


def test_nan_in_a_batch_leaves_the_run_without_that_update(one_device):
    """Four steps of two microbatches, NaN in the loss mask of one row of the second."""
    config = tiny(train__microbatch_rows=2, optimizer__ema=0.9, optimizer__warmup=2, model__num_layers=1)
    program = make_program(config, vocab_size=500)
    start, one_step = jax.jit(lambda: fresh(program)), compile_step(program, one_device, one_microbatch=False)
    whole = batch(1)
    bad = whole | {"loss_mask": np.where(whole["row"][:, None] == 7, np.nan, whole["loss_mask"])}

    def run(second):
        """The last state; `second` is the batch of the second step, None leaves its update out."""
        state = start()
        for step in range(4):
            if step == 1 and second is None:
                state = state._replace(step=jnp.int32(2))
            else:
                state, found = one_step(state, 2, halves_of(second if step == 1 else batch(step)), lambda done: False)
                assert float(found["train/skipped"]) == (step > 0 and second is bad)
        return state

    found, without = run(bad), run(None)
    assert same_bits(found.parameters, without.parameters)
    assert same_bits(found.optimizer_state.inner, without.optimizer_state.inner)
    assert int(found.step) == 4 and int(found.optimizer_state.skipped) == 1
    assert not same_bits(found.parameters, run(whole).parameters)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 2e-3), ("bfloat16", 2e-2)])
def test_half_precision_stays_near_float32(one_device, dtype, tolerance):
    """Loss and gradient of a batch, the latter in relative norm; the gradient comes multiplied by the loss scale."""

    def of(dtype, scale):
        config = tiny(model__compute_dtype=dtype, optimizer__loss_scale=scale, model__num_layers=1)
        program = make_program(config, vocab_size=500)
        inputs = {name: jnp.asarray(x) for name, x in batch(0).items()}
        sums = jax.jit(lambda: accumulate(program, fresh(program), None, inputs))()
        return float(sums.loss) / scale, np.concatenate([np.ravel(x) for x in jax.tree.leaves(sums.gradients)]) / scale

    (loss, gradient), (expected, exact) = of(dtype, 64), of("float32", 1)
    np.testing.assert_allclose(loss, expected, rtol=tolerance)
    assert np.linalg.norm(gradient - exact) < tolerance * np.linalg.norm(exact)


SMOKE = [
    "--config", "experiments/quickstart.py:smoke", "--config.evaluate.prompt=", "--config.evaluate.every=0",
    "--config.optimizer.schedule=constant", "--config.optimizer.learning_rate=1e-2", "--config.checkpoint.every=8",
    "--config.mesh.data=1", "--config.model.num_layers=1",
]  # fmt: skip
OFTEN = [
    *(flag for flag in SMOKE if "checkpoint" not in flag),
    "--config.checkpoint.every=2",
    "--config.optimizer.name=sgd",
]
FLOAT16 = [*SMOKE, "--config.model.compute_dtype=float16", f"--config.optimizer.loss_scale={2**18}",
           "--config.optimizer.ema=0.5"]  # fmt: skip


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """A float16 run of 24 steps whose loss scale is far too large at first."""
    workdir = tmp_path_factory.mktemp("halves") / "run"
    assert main.main([*FLOAT16, "--config.train.num_steps=24", "--workdir", str(workdir)]) == 0
    return workdir


def test_float16_overflows_then_learns(halves):
    lines = [line for line in lines_of(halves) if "train/loss" in line]
    skipped, scales = ([int(line[f"train/{name}"]) for line in lines] for name in ("skipped", "loss_scale"))
    assert scales[0] == 2**18 and 2 <= skipped[-1] < 16
    assert all(scale == 2**18 >> before for scale, before in zip(scales[1:], skipped, strict=False))
    assert lines[-1]["train/loss"] < lines[0]["train/loss"] - 0.5
    assert all(np.isfinite(x).all() for x in final_arrays(halves))
    assert "skipped: the gradient of rows 0 to" in (halves / "log.txt").read_text()


@pytest.mark.proof
def test_float16_goes_on_to_the_bit(halves, tmp_path):
    """Stopped after 6 steps, while the scale still falls, and resumed."""
    workdir = ["--workdir", str(tmp_path / "run")]
    assert main.main([*FLOAT16, "--config.train.num_steps=6", *workdir]) == 0
    assert main.main([*FLOAT16, "--config.train.num_steps=24", *workdir]) == 0
    training = lambda place: [line for line in lines_of(place) if "train/loss" in line]
    assert json.dumps(training(tmp_path / "run")) == json.dumps(training(halves))  # as text: NaN is equal to itself
    assert same_bits(final_arrays(tmp_path / "run"), final_arrays(halves))


def test_the_average_is_the_model(halves, capsys):
    """What the run evaluated at its end is what is loaded from its checkpoint, and it is not the last parameters."""
    assert evaluate.main(["--model", str(halves)]) == 0
    found = json.loads(capsys.readouterr().out.strip().split("\n")[-1])["eval/loss"]
    expected = next(line["final/loss"] for line in lines_of(halves) if "final/loss" in line)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    located = load_model.locate(str(halves))
    with jax.set_mesh(make_mesh(Mesh(), jax.devices()[:1])):
        _, average = load_model.load_parameters(located)
        program = make_program(located.config, located.tokenizer.vocab_size)
        state, _ = checkpoint.restore(located.workdir, located.step, program)
    assert same_bits(average, state.optimizer_state.inner[-1].average) and not same_bits(average, state.parameters)


def test_nothing_but_nan_ends_the_run_and_is_not_saved(tmp_path, monkeypatch, capsys):
    block = loader.Stream.block

    def broken_from_row_40(stream, first, num):
        found = block(stream, first, num)
        broken = np.where(found["row"] >= 40, np.float32(np.nan), 1)
        return found | {"loss_mask": found["loss_mask"] * broken[:, None]}

    monkeypatch.setattr(loader.Stream, "block", broken_from_row_40)
    more = ["--config.train.num_steps=50", "--config.log.every=4"]
    workdir = tmp_path / "run"
    assert main.main([*OFTEN, *more, "--workdir", str(workdir)]) == cli.EXIT_FAULT
    said = capsys.readouterr().out
    assert "step 6 skipped: the gradient of rows 40 to 47 is not finite" in said and "steps 7 to 8 skipped" in said
    assert f"stopped: {train.MOST_IN_A_ROW} updates in a row were not finite" in said and "from step 16 " in said
    assert step_folders.complete_steps(workdir / "checkpoints")[:3] == [2, 4, 6], "the good ones are kept meanwhile"
    assert len(lines_of(workdir)) <= 6, "it went on for long"
    assert all(np.isfinite(x).all() for x in final_arrays(workdir))


@pytest.fixture
def decays_too_much(monkeypatch):
    """Every update is beyond float32, though its gradient is not."""
    plain = optax.add_decayed_weights
    monkeypatch.setattr(optimizer.optax, "add_decayed_weights", lambda decay, mask: plain(1e39, mask))


@pytest.mark.proof
def test_nothing_but_updates_that_are_not_finite_ends_the_run(tmp_path, capsys, decays_too_much):
    assert main.main([*OFTEN, "--config.train.num_steps=50", "--workdir", str(tmp_path / "run")]) == cli.EXIT_FAULT
    said = capsys.readouterr().out
    assert "skipped: the update of rows 0 to" in said and f"stopped: {train.MOST_IN_A_ROW} updates in a row" in said
    assert all(np.isfinite(x).all() for x in final_arrays(tmp_path / "run"))


def test_a_run_whose_state_is_not_finite_ends_before_it_saves(tmp_path, capsys, monkeypatch, decays_too_much):
    """The guard switched off: nothing else stands between NaN and a checkpoint."""
    monkeypatch.setattr(loss_scale, "all_finite", lambda tree: True)
    assert main.main([*OFTEN, "--config.train.num_steps=50", "--workdir", str(tmp_path / "run")]) == cli.EXIT_FAULT
    assert "stopped: the state after step 2 is not finite (inf or NaN), and is not saved" in capsys.readouterr().out
    assert not step_folders.complete_steps(tmp_path / "run" / "checkpoints")
