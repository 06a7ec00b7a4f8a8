"""`lm_jax.load` and `lm_jax.run`, the notebook, and what importing lm_jax costs."""

import os
import signal
import subprocess
import sys
import threading

import jax
import nbclient
import nbformat
import numpy as np
import pytest
from etils import epath
from exported import leaving, on_one
from helpers import LIMIT, ROOT, lines_of, tiny
from jax.sharding import AxisType

import lm_jax
from lm_jax import experiment, from_python, load_model, mesh
from lm_jax.config import Mesh
from lm_jax.convert import export
from lm_jax.errors import UserError
from lm_jax.generate.command import main as generate

TEXT = "import os\nimport sys\n\ndef main():\n"


@pytest.fixture(scope="module")
def model(finished):
    return lm_jax.load(finished)


def test_eight_devices_are_visible_and_one_has_the_model(model, eight):
    assert {x.sharding.device_set == {eight[0]} for x in jax.tree.leaves(model.parameters)} == {True}
    assert "step 2" in repr(model) and "1 devices" in repr(model)
    assert model.config == load_model.locate(model.workdir).config


def test_loss_and_logits_are_those_of_the_module(model):
    """Computed from the module as training computes them, in one row without padding."""
    ids = model.ids(TEXT)
    assert ids[0] == model.tokenizer.document_id and model.tokenizer.decode(ids[1:]) == TEXT
    with jax.set_mesh(model.mesh):
        batch = {
            "tokens": ids[None],
            "positions": np.arange(len(ids))[None],
            "segment_ids": np.ones((1, len(ids)), int),
        }
        module = model.model.module(model.parameters)
        expected = module.logits(module.read(jax.tree.map(jax.numpy.asarray, batch)).hidden_BTD)[0]
        losses = -jax.nn.log_softmax(expected)[np.arange(len(ids) - 1), ids[1:]]
    assert model.logits(TEXT).shape == (len(ids), model.tokenizer.vocab_size)
    np.testing.assert_allclose(model.logits(TEXT), expected[:, : model.tokenizer.vocab_size], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(model.logits(ids), model.logits(TEXT))
    assert model.loss(TEXT) == pytest.approx(float(losses.mean()), rel=1e-5)


def test_a_text_longer_than_the_model_sees_has_a_loss_and_no_logits(model):
    ids = model.ids(TEXT * 40)
    sees = model.model.sequence_length
    parts = [model.loss(ids[start : start + sees + 1]) for start in range(0, len(ids) - 1, sees)]
    sizes = [min(sees, len(ids) - 1 - start) for start in range(0, len(ids) - 1, sees)]
    assert len(parts) > 2 and model.loss(ids) == pytest.approx(np.average(parts, weights=sizes), rel=1e-5)
    with pytest.raises(UserError, match=f"{len(ids)} tokens, and .* sees from 1 to {sees}"):
        model.logits(ids)


def test_it_writes_what_the_command_writes(model, capsys):
    assert generate(["--model", model.workdir, "--prompt", "class", "--max_new_tokens=9", "--seed=3"]) == 0
    told = capsys.readouterr().out
    assert model.generate("class", 9, seed=3) == told.removeprefix("class").removesuffix("\n")
    assert model.generate(["class"], 9, seed=3) == [model.generate("class", 9, seed=3)]


@pytest.mark.parametrize("shape, axes", [((2, 4), ("tensor", "fsdp")), ((8,), ("data",))])
def test_on_a_mesh_that_is_set_it_answers_the_same(model, finished, shape, axes):
    with jax.set_mesh(jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * len(shape))):
        spread = lm_jax.load(f"{finished}@2")
        assert spread.mesh.size == 8 and dict(spread.mesh.shape)[axes[0]] == shape[0]
        np.testing.assert_allclose(spread.logits(TEXT), model.logits(TEXT), rtol=1e-4, atol=1e-5)
    assert spread.loss(TEXT) == pytest.approx(model.loss(TEXT), rel=1e-5)
    assert spread.generate("class", 8, temperature=0) == model.generate("class", 8, temperature=0)
    split = [len(x.sharding.device_set) / x.sharding.num_devices for x in jax.tree.leaves(spread.parameters)]
    assert set(split) == {1.0}
    table = spread.parameters["embedding"]["table"]
    assert table.sharding.shard_shape(table.shape)[0] == table.shape[0] // (2 if "tensor" in axes else 1)


def test_a_mesh_may_be_given_and_must_have_axes_that_are_known(finished, eight):
    given = mesh.make_mesh(Mesh(fsdp=2, data=1), eight[:2])
    assert lm_jax.load(finished, mesh=given).mesh == given
    with pytest.raises(
        UserError, match="the mesh has an axis 'model'; lm_jax knows data, fsdp, expert, context, tensor"
    ):
        lm_jax.load(finished, mesh=jax.make_mesh((8,), ("model",)))
    with pytest.raises(UserError, match="model.num_heads = 4 does not divide over mesh axis tensor = 8"):
        lm_jax.load(finished, mesh=jax.make_mesh((8,), ("tensor",)))


KINDS = {
    "encoder": (dict(model__kind="encoder", data__objective="masked"), 0),
    "labels": (dict(train__task="classification", model__labels=("a", "b", "c"), data__packing="best_fit"), 3),
    "encoder_decoder": (dict(model__kind="encoder_decoder", data__objective="span_corruption"), 0),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_kind_of_model_cannot_say_is_refused_by_name(kind, corpus, eight, tmp_path, monkeypatch):
    """Logits of a head are [T, C]; an encoder's are of each place; only what predicts the next token has a loss."""
    changes, num = KINDS[kind]
    found = load_model.ModelRef(epath.Path(tmp_path), 0, tiny(**changes, model__num_layers=1), corpus.tokenizer)
    graph = load_model.graph_of(found)
    monkeypatch.setattr(load_model, "load_parameters", lambda found: (graph, graph.init(jax.random.key(0))))
    model = from_python.LoadedModel(found, mesh.make_mesh(Mesh(), eight[:1]))
    with pytest.raises(UserError, match="does not predict the next token"):
        model.loss(TEXT)
    if kind == "encoder_decoder":
        with pytest.raises(UserError, match="reads a text and writes another one"):
            model.logits(TEXT)
        return
    ids = model.ids(TEXT)
    assert model.logits(TEXT).shape == (len(ids), num or found.vocab_size)
    if kind == "encoder":
        assert ids[-1] == corpus.tokenizer.document_id and model.tokenizer.decode(ids[1:-1]) == TEXT
    with pytest.raises(UserError, match="writes no text"):
        model.generate("x")


def test_a_hugging_face_folder_is_loaded(tmp_path):
    """A small Llama: its arrays, and a loss that is the mean over its own logits."""
    model = leaving()
    on_one(export.write_folder)(str(tmp_path / "llama"), model, lambda folder, tensors, exported: None, print)
    found = lm_jax.load(tmp_path / "llama")
    jax.tree.map(np.testing.assert_array_equal, found.parameters["block_0"], model.parameters["block_0"])
    ids, log_TV = found.ids(TEXT), jax.nn.log_softmax(found.logits(TEXT))
    losses = -log_TV[np.arange(len(ids) - 1), ids[1:]]
    assert found.loss(TEXT) == pytest.approx(float(losses.mean()), rel=1e-5)
    assert isinstance(found.generate(TEXT, 4), str)


def test_what_is_no_model_is_refused_as_the_commands_refuse_it(finished, tmp_path):
    with pytest.raises(UserError, match="is not a run"):
        lm_jax.load(tmp_path)
    with pytest.raises(UserError, match="trained with the ordinary parts; leave it out"):
        lm_jax.load(finished, parts="mine.py")


def test_a_config_dict_trains_to_the_bit_as_its_file(finished, tmp_path, capsys):
    """And is found finished when it is run again."""
    config = experiment.experiment_config(str(ROOT / "experiments" / "quickstart.py:smoke"))
    found = lm_jax.run(config, {"mesh.data": 1}, workdir=tmp_path / "run")
    assert lines_of(found.workdir) == lines_of(finished)
    assert found.finished and found.metrics["final/loss"] == found.series("final/loss")[-1][1]
    told = capsys.readouterr().out
    assert "notebook · " in told and "longer" not in told and "generate" in told
    again = lm_jax.run(config, {"mesh.data": "1"}, workdir=tmp_path / "run")
    assert again == found and "this run is finished" in capsys.readouterr().out


def test_what_run_does_not_know_is_refused(tmp_path):
    for overrides, message in (({"train.num_step": 1}, "num_steps"), ({"train.num_steps": -1}, "num_steps")):
        with pytest.raises(UserError, match=message):
            lm_jax.run("experiments/quickstart.py:smoke", overrides, workdir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_first_interrupt_asks_to_stop_and_the_second_is_one(capfd):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), from_python._interruptible() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before and "the run is saved" in capfd.readouterr().err
    thread = threading.Thread(
        target=lambda: from_python._interruptible().__enter__()
    )  # handles no signal, and needs none
    thread.start()
    thread.join()


def test_lm_jax_is_cheap_to_import_and_says_what_it_has():
    script = (
        "import sys, lm_jax; assert not {'jax', 'flax', 'numpy'} & set(sys.modules); print(lm_jax.load, lm_jax.run)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=LIMIT)
    assert result.returncode == 0 and "function load" in result.stdout and "function run" in result.stdout, (
        result.stderr
    )
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = lm_jax.lod
    assert (ROOT / "lm_jax" / "py.typed").exists()


def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "docs" / "from_python.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=LIMIT, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert "runs/tiny" in str(outputs) and (tmp_path / "runs" / "tiny" / "metrics.jsonl").exists()
