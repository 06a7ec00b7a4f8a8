"""Parts of one's own: what an experiment file replaces trains, is recorded, and is taken again only with the same file."""

import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import ROOT, batch, tiny
from one_process import performed

from lm_jax import experiment, load_model, parts, run_folder
from lm_jax.config import Mesh
from lm_jax.errors import UserError
from lm_jax.loss import SMALL, token_losses
from lm_jax.mesh import make_mesh
from lm_jax.model.attention import Context
from lm_jax.parts import Parts
from lm_jax.train_state import fresh, make_program
from lm_jax.train_step import accumulate

EXAMPLES = {"parallel_attention": "block", "label_smoothing": "loss", "ademamix": "optimizer"}
# All three examples in one file of a user's.
OWN = """
import sys
sys.path.insert(0, {experiments!r})
import ademamix, label_smoothing, parallel_attention
from lm_jax.parts import Parts

get_config = label_smoothing.get_config

class Mine(parallel_attention.Parallel):
    pass

def mine(logits, targets):
    return label_smoothing.smoothed(logits, targets)

def rule(config, declared):
    return ademamix.ademamix(config, declared)

def get_parts():
    return Parts(block=Mine, loss=mine, optimizer=rule)
"""


def commands(file: str, run: str) -> dict[str, list[str]]:
    train = ["-m", "lm_jax.main", "--config", f"{file}:smoke", "--workdir", run, "--config.evaluate.num_rows=8"]
    model = ["--model", run, "--parts", file]
    return {
        "trains": [*train, "--config.train.num_steps=1"],
        "resumes": [*train, "--config.train.num_steps=2"],
        "generates": ["-m", "lm_jax.generate", *model, "--prompt", "class", "--max_new_tokens=4"],
        "evaluates": ["-m", "lm_jax.evaluate", *model, "--batch_size=64"],
    }


def assert_all_is_done(found: dict[str, dict], file: str, run: str) -> None:
    assert {name: one["code"] for name, one in found.items()} == dict.fromkeys(found, 0), found
    assert "resumed at step 1" in found["resumes"]["output"]
    assert f"--model {run} --parts {file} --prompt class" in found["resumes"]["output"]
    assert '"step": 2' in found["evaluates"]["output"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a user's file and a run of it, and what was done there, by name."""
    folder = tmp_path_factory.mktemp("parts")
    (folder / "mine.py").write_text(OWN.format(experiments=str(ROOT / "experiments")))
    asked = commands("mine.py", "run")
    changed = "open('mine.py', 'a').write('open(\"executed\", \"w\")\\n')"
    asked |= {
        "without": ["-m", "lm_jax.generate", "--model", "run", "--prompt", "x"],
        "exports": [str(ROOT / "tools" / "convert_checkpoint.py"), "run", "out", "--parts", "mine.py"],
        "card": [str(ROOT / "tools" / "model_card.py"), "--model", "run", "--parts", "mine.py"],
        "changes": ["-c", f"import shutil; shutil.copy('mine.py', 'kept.py'); {changed}"],
        "other": ["-m", "lm_jax.generate", "--model", "run", "--parts", "mine.py", "--prompt", "x"],
        "other evaluates": ["-m", "lm_jax.evaluate", "--model", "run", "--parts", "mine.py"],
        "other exports": [str(ROOT / "tools" / "convert_checkpoint.py"), "run", "out", "--parts", "mine.py"],
        "is it executed": ["-c", "import os, sys; sys.exit(os.path.exists('executed'))"],
        "other resumes": asked["resumes"],
        "ordinary resumes": ["-m", "lm_jax.main", "--config", str(ROOT / "experiments/quickstart.py:smoke"), "--workdir", "run"],
    }  # fmt: skip
    return folder, dict(zip(asked, performed(list(asked.values()), folder), strict=True))


def test_a_users_file_trains_resumes_generates_and_evaluates(folder):
    found = folder[1]
    assert_all_is_done({name: found[name] for name in commands("", "")}, "mine.py", "run")


@pytest.mark.proof
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_trains_resumes_generates_and_evaluates(name, tmp_path):
    file, asked = str(ROOT / "experiments" / f"{name}.py"), commands(str(ROOT / "experiments" / f"{name}.py"), "run")
    assert_all_is_done(dict(zip(asked, performed(list(asked.values()), tmp_path), strict=True)), file, "run")


def test_a_run_keeps_which_file_it_was(folder):
    place, found = folder
    kept = run_folder.read_config(place / "run")["parts"]
    assert (kept["path"], kept["replaced"]) == ("mine.py", ["block", "loss", "optimizer"])
    assert kept["sha256"] == parts.file_hash(place / "kept.py")["sha256"]
    assert f"| block and loss and optimizer of | mine.py, sha256 {kept['sha256']} |" in found["card"]["output"]


def test_nothing_is_executed_because_a_run_names_it(folder):
    """Without the file, and with another one of the same name: refused, in a few lines that say which is needed."""
    place, found = folder
    digest = run_folder.read_config(place / "run")["parts"]["sha256"]
    for name in ("without", "other", "other evaluates", "other exports", "other resumes", "ordinary resumes"):
        assert found[name]["code"] == 2 and len(found[name]["output"].strip().split("\n")) <= 5, found[name]
        assert f"mine.py (sha256 {digest})" in found[name]["output"], found[name]
    assert "is not executed" in found["other"]["output"] and found["is it executed"]["code"] == 0
    assert "say --parts mine.py" in found["without"]["output"]
    assert "or use another --workdir" in found["other resumes"]["output"]
    assert "here the ordinary ones" in found["ordinary resumes"]["output"]


def test_no_family_has_a_users_block(folder):
    assert folder[1]["exports"]["code"] == 2
    assert "run has the block of mine.py, which no family of transformers has" in folder[1]["exports"]["output"]


def test_a_file_that_no_run_needs_is_refused(finished):
    with pytest.raises(UserError, match="trained with the ordinary parts; leave it out"):
        flags = load_model.argparse.Namespace(model=str(finished), parts="mine.py")
        load_model.of_flags(flags, print)


def test_a_run_starts_from_one_with_another_block_only_with_the_same_file(folder):
    recorded = run_folder.read_config(folder[0] / "run")["parts"]
    mine = Parts(path="mine.py", sha256=recorded["sha256"])
    assert parts.of_source(recorded, mine, "run") is mine
    assert parts.of_source(recorded | {"replaced": ["loss"]}, parts.ORDINARY, "run") is parts.ORDINARY
    with pytest.raises(UserError, match="from mine import get_parts"):
        parts.of_source(recorded, parts.ORDINARY, "run")


def example(name: str) -> Parts:
    return parts.of_experiment(f"experiments/{name}.py")


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_replaces_one_part(name):
    assert example(name).replaced == [EXAMPLES[name]]
    assert (
        experiment.load_config(f"experiments/{name}.py", {})[0]
        == experiment.load_config("experiments/quickstart.py:gpt3", {})[0]
    )


REFUSED = {
    "Parts(block=int)": "expected a class over lm_jax.model.transformer.Block",
    "Parts(loss=3)": "loss of get_parts() is int; expected a function",
    "Parts(loss=token_losses2)": "is defined in other; define it in the file itself",
    "{}": "get_parts() returned dict",
    "Parts(blok=1)": "mine.py line 4: TypeError",
}


@pytest.mark.parametrize("value", REFUSED)
def test_what_is_no_part_is_refused_by_name(value, tmp_path):
    (tmp_path / "other.py").write_text("def token_losses2(a, b): return a\n")
    header = "from lm_jax.parts import Parts\nfrom other import token_losses2\n"
    (tmp_path / "mine.py").write_text(f"{header}def get_parts():\n    return {value}\n")
    with pytest.raises(UserError) as error:
        parts.of_experiment(str(tmp_path / "mine.py"))
    assert REFUSED[value] in str(error.value)


UNREAD = {
    "block": (dict(model__kind="lstm"), "config.model.kind = lstm has none"),
    "loss": (dict(train__task="preference", data__packing="best_fit"), "config.train.task = preference has its own"),
    "optimizer": (dict(optimizer__name="lion"), "config.optimizer.name = lion is not read"),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_part_that_nothing_reads_is_refused(name):
    changes, message = UNREAD[EXAMPLES[name]]
    parts.check_parts(tiny(), example(name))
    with pytest.raises(UserError, match=re.escape(message)):
        parts.check_parts(tiny(**changes), example(name))


def test_a_block_with_a_fault_is_answered_by_its_line(tmp_path, monkeypatch):
    shutil.copy(ROOT / "experiments" / "quickstart.py", tmp_path)
    text = (ROOT / "experiments" / "parallel_attention.py").read_text()
    (tmp_path / "mine.py").write_text(text.replace("return x_BTD + ", "return x_BTD[:, 1:] + "))
    from lm_jax import main

    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"mine.py line \d+: TypeError: "):
        main.main(["--config", "mine.py:smoke", "--config.mesh.data=1", "--dry_run"])


# What the parts compute


@pytest.fixture
def one(eight):
    with jax.set_mesh(make_mesh(Mesh(), eight[:1])):
        yield


def test_the_parallel_block_is_its_formula_and_writes_what_it_reads(one):
    """One layer: x + attention(norm(x)) + mlp(norm(x)); with a cache the same, token by token."""
    program = make_program(tiny(model__num_layers=1), 500, parts=example("parallel_attention"))
    parameters = program.graph.init(program.root)
    assert ("block_0", "mlp_norm", "scale") not in program.graph.declarations
    model, tokens = program.graph.module(parameters), jnp.asarray(batch(0)["tokens"][:1, :8])
    context = Context(jnp.arange(8)[None], jnp.ones((1, 8), jnp.int32))
    whole, _ = model(tokens, context)
    one_layer = jax.tree.map(lambda x: x[0], parameters["block_0"])
    block = program.graph.module(parameters).block_0
    state = parts_of(block, one_layer)
    x = model.embed(tokens, context.positions)
    normed = state.attention_norm(x)
    expected = model.norm(x + state.attention(normed, context, None, None)[0] + state.mlp(normed))
    np.testing.assert_allclose(whole, expected, rtol=1e-5, atol=1e-6)
    caches = program.graph.empty_caches(1, 8)
    for i in range(8):
        at = Context(context.positions[:, i : i + 1], context.segment_ids[:, i : i + 1])
        hidden, caches = model(tokens[:, i : i + 1], at, None, caches)
        np.testing.assert_allclose(hidden[:, 0], whole[:, i], rtol=1e-4, atol=1e-5)


def parts_of(block, parameters):
    from lm_jax.model.layers import merge, split

    return merge(split(block)[0], parameters)


def smoothed_by_optax(logits, targets, num):
    labels = optax.smooth_labels(jax.nn.one_hot(targets, num), 0.1)
    return optax.softmax_cross_entropy(logits[..., :num], labels)


@pytest.mark.parametrize("z_loss, small", ((0.0, SMALL), (1e-3, 1)))
def test_the_smoothed_loss_is_minimised_and_cross_entropy_reported(one, z_loss, small, monkeypatch):
    """Also in chunks, with the same gradient: a sum over tokens, each for itself."""
    monkeypatch.setattr("lm_jax.loss.SMALL", small)
    program = make_program(tiny(train__z_loss=z_loss, model__num_layers=1), 500, parts=example("label_smoothing"))
    rows = {name: jnp.asarray(x) for name, x in batch(0).items()}

    def theirs(parameters):
        model = program.graph.module(parameters)
        logits = model.logits(model.read(rows).hidden_BTD)
        log_total = jax.nn.logsumexp(logits, axis=-1)
        each = smoothed_by_optax(logits, rows["targets"], 500) + z_loss * log_total**2
        return (each * rows["loss_mask"]).sum(), (token_losses(logits, rows["targets"]) * rows["loss_mask"]).sum()

    state = jax.jit(lambda: fresh(program))()
    expected = jax.jit(jax.value_and_grad(theirs, has_aux=True))(state.parameters)
    sums = jax.jit(lambda state: accumulate(program, state, None, rows))(state)
    np.testing.assert_allclose(sums.loss, expected[0][1], rtol=1e-5)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    jax.tree.map(close, sums.gradients, expected[1])
    bare = jax.jit(jax.grad(lambda parameters: theirs(parameters)[1]))(state.parameters)
    assert max(jax.tree.leaves(jax.tree.map(lambda a, b: float(abs(a - b).max()), bare, expected[1]))) > 0.1


def test_the_rule_of_optax_stands_between_clip_and_decay(one):
    """The updates of a chain that is written in Optax alone."""
    own = example("ademamix")
    config = tiny(
        optimizer__warmup=0,
        optimizer__schedule="constant",
        optimizer__learning_rate=0.1,
        optimizer__clip_norm=0.0,
        model__num_layers=1,
    )
    program = make_program(config, 500, parts=own)
    mask = program.graph.tree(lambda declared: bool(declared.inputs and declared.outputs))
    rule = optax.contrib.scale_by_ademamix(config.optimizer.beta1, config.optimizer.beta2, 0.999, 5.0)
    chain = optax.chain(rule, optax.add_decayed_weights(config.optimizer.weight_decay, mask), optax.scale(-0.1))

    @jax.jit
    def both():
        trained = program.split(fresh(program).parameters)[0]
        gradients = jax.tree.map(jnp.sin, trained)
        of = lambda rule: rule.update(gradients, rule.init(trained), trained)[0]
        return of(program.optimizer), of(chain)

    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    jax.tree.map(close, *both())
