"""What a run takes from the model it starts from, and from its table; what is given and is another is refused."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ROOT, lines_of, write_table
from peers import encoders
from peers import families as parity
from tokenizer_shapes import words

from lm_jax import experiment, inherited, load_model, main, run_folder
from lm_jax.config import Mesh, flatten
from lm_jax.convert import description, hugging_face, safetensors
from lm_jax.data.packing import stacked_or_padding
from lm_jax.errors import UserError
from lm_jax.loss import batch_loss
from lm_jax.mesh import make_mesh
from lm_jax.model_config import NUM_SENTINELS
from lm_jax.open_data import open_data

EIGHT = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma3", "mixtral", "olmo2")


def saved(name: str, folder: pathlib.Path) -> str:
    """The recorded model of a family as a folder, with a tokenizer of its pieces."""
    content, tensors, _ = parity.recorded(name)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(content))
    safetensors.write_folder(str(folder), tensors)
    (folder / "tokenizer.json").write_bytes(words(parity.PIECES))
    return str(folder)


def text(folder: pathlib.Path, num: int, first: int = 4) -> str:
    """Ten documents of words that such a tokenizer knows, after its `first` pieces."""
    folder.mkdir()
    random = np.random.RandomState(0)
    for k in range(10):
        drawn = random.randint(first, num, 40)
        (folder / f"{k}.txt").write_text(" ".join(f"w{word}" for word in drawn))
    return str(folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> str:
    return saved("llama", tmp_path_factory.mktemp("inherited") / "llama")


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> str:
    return text(tmp_path_factory.mktemp("texts") / "texts", parity.PIECES)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> str:
    """An experiment that says nothing of a model."""
    file = tmp_path_factory.mktemp("plain") / "plain.py"
    file.write_text(
        "from lm_jax.config import default_config\n\n\ndef get_config():\n    config = default_config()\n"
        "    config.train.num_steps, config.data.global_batch_size, config.evaluate.prompt = 1, 2, ''\n"
        "    config.optimizer.warmup, config.mesh.data = 1, 1\n    return config\n"
    )
    return str(file)


def loaded(file: str, **given):
    return experiment.load_config(file, {name.replace("__", "."): str(value) for name, value in given.items()})


@pytest.mark.parametrize("name", parity.FIRST)
def test_nothing_but_the_model_is_given_and_its_settings_are_all_there(name, plain, tmp_path):
    folder = saved(name, tmp_path / name)
    config, origins = loaded(plain, train__init_from=folder)
    there = hugging_face.read_description(folder).config
    assert description.what_it_is(config.model) == description.what_it_is(there.model)
    assert config.data.tokenizer == folder and config.data.sequence_length == 64
    assert {origins[path]["from"] for path in ("model.num_layers", *inherited.TEXT)} == {"model"}
    assert f"model.model_dim = {there.model.model_dim}" in inherited.told(config, origins)


def first_loss_here(folder: str, config) -> float:
    """The loss of the first batch of a config by the parameters of a folder, nothing of `initial_state` used."""
    described = hugging_face.read_description(folder)
    graph, stream = description.graph_of(described._replace(config=config)), open_data(config).stream(config.data)
    batch = stacked_or_padding(stream.row, 2**31, list(range(config.data.global_batch_size)))
    with jax.set_mesh(make_mesh(Mesh(), jax.devices()[:1])):
        ours = jax.tree.map(jnp.asarray, hugging_face.read_parameters(folder, described))
        found = jax.jit(lambda parameters: batch_loss(graph, parameters, batch).loss)(ours)
    return float(found) / float(batch["loss_mask"].sum())


def first_step(file: str, folder: str, texts: str, workdir: pathlib.Path, *more: str) -> dict:
    """The metrics of the first step of the command with the model and a text alone."""
    given = [f"--config.train.init_from={folder}", f"--config.data.sources={texts}", "--workdir", str(workdir)]
    assert main.main(["--config", file, *given, *more]) == 0
    return lines_of(workdir)[0]


def test_the_first_step_is_the_model_s_and_a_run_that_goes_on_keeps_what_it_took(plain, llama, texts, tmp_path, capsys):
    pytest.importorskip("tokenizers")
    line = first_step(plain, llama, texts, tmp_path / "run")
    config, _ = loaded(plain, train__init_from=llama, data__sources=texts)
    assert line["train/loss"] == pytest.approx(first_loss_here(llama, config), abs=1e-5)
    assert f"from {llama}: model.num_layers = 2, model.model_dim = 36" in capsys.readouterr().out
    kept = run_folder.read_config(load_model.epath.Path(tmp_path / "run"))
    assert kept["origins"]["model.positions"]["from"] == "model" and kept["config"]["data.tokenizer"] == llama
    again, origins = experiment.load_config(plain, {"train.init_from": f"{llama}-gone"}, str(tmp_path / "run"))
    assert origins["model.model_dim"]["from"] == "model"
    paths = [path for path in flatten(config) if path.startswith("model.")]
    paths += ["data.objective", "data.tokenizer", "data.sequence_length"]
    assert {path: flatten(again)[path] for path in paths} == {path: flatten(config)[path] for path in paths}


def test_a_context_is_lengthened_by_what_no_parameter_depends_on(plain, llama, texts, tmp_path):
    """Rows twice as long with rope scaled to them: the parameters are the model's, what they compute is the scaled model's."""
    pytest.importorskip("tokenizers")
    given = {
        "model.rotary_scaling": "(2.0, 1.0, 32.0, 64.0)",
        "model.rotary_scaling_kind": "yarn",
        "data.sequence_length": "128",
    }
    line = first_step(
        plain, llama, texts, tmp_path / "run", *[f"--config.{path}={value}" for path, value in given.items()]
    )
    config, origins = loaded(plain, train__init_from=llama, data__sources=texts, **given)
    assert {origins[path]["from"] for path in given} == {"command line"} and origins["model.rotary_base"][
        "from"
    ] == "model"
    unscaled, _ = loaded(plain, train__init_from=llama, data__sources=texts, data__sequence_length=128)
    assert line["train/loss"] == pytest.approx(first_loss_here(llama, config), abs=1e-5)
    assert line["train/loss"] != pytest.approx(first_loss_here(llama, unscaled), abs=1e-4)
    assert load_model.locate(str(tmp_path / "run")).config.model.rotary_scaling == (2.0, 1.0, 32.0, 64.0)


def losses_there(model, row: dict) -> list[float]:
    """The losses in nats of what a row asks, of each of its segments alone, by `transformers`."""
    import torch

    found, entropy = [], torch.nn.functional.cross_entropy
    side = lambda name: "encoder_segment_ids" if name.startswith("encoder_") else "segment_ids"
    for segment in range(1, int(row["segment_ids"].max()) + 1):
        own = {name: torch.tensor(x[row[side(name)] == segment]) for name, x in row.items() if x.ndim}
        ids, targets, asked = own["tokens"][None].long(), own["targets"].long(), own["loss_mask"] > 0
        with torch.no_grad():
            if "token_type_ids" in own:  # the first token asks for the next sentence
                out = model(ids, token_type_ids=own["token_type_ids"][None].long())
                found += [float(entropy(out.seq_relationship_logits[0], targets[0]))] if asked[0] else []
                logits, asked = out.prediction_logits[0], asked & (own["positions"] > 0)
            elif "encoder_tokens" in own:
                logits = model(own["encoder_tokens"][None].long(), decoder_input_ids=ids).logits[0]
            else:
                logits = model(ids).logits[0]
        found += entropy(logits, targets, reduction="none")[asked].tolist()
    return found


def saved_by_transformers(name: str, folder: pathlib.Path) -> tuple:
    """(The model in PyTorch, the ids of words) of a folder that `transformers` wrote, with a tokenizer."""
    peer, special, num = (
        encoders if name in ("bert", "t5") else parity,
        ("<|endoftext|>", "[MASK]", "[CLS]", "[SEP]"),
        0,
    )
    if name == "t5":
        special = ("<|endoftext|>", *(f"<extra_id_{k}>" for k in range(NUM_SENTINELS)))
        num = peer.PIECES + len(special)
    model = peer.reference(name, num) if num else peer.reference(name)
    model.save_pretrained(folder)
    if name == "t5":
        (folder / "config.json").write_text(json.dumps(peer.content_of(model)))
    num = num or peer.PIECES
    (folder / "tokenizer.json").write_bytes(words(num, special))
    return model, range(len(special), num)


@pytest.mark.proof
@pytest.mark.parametrize("name", [*EIGHT, "bert", "t5"])
def test_the_loss_of_the_first_step_is_that_of_transformers(name, plain, tmp_path):
    """Of eight families, BERT and T5, live: a folder that `transformers` saved, and the same tokens; no setting of the model."""
    pytest.importorskip("torch")
    model, ids = saved_by_transformers(name, folder := tmp_path / name)
    texts, short = text(tmp_path / "texts", ids.stop, ids.start), {"data.sequence_length": "64"}
    found = first_step(
        plain, str(folder), texts, tmp_path / "run", *[f"--config.{path}={x}" for path, x in short.items()]
    )
    config, _ = loaded(plain, train__init_from=folder, data__sources=texts, **short)
    stream = open_data(config).stream(config.data)
    losses = [loss for i in range(2) for loss in losses_there(model, stream.row(i))]
    assert len(losses) > (10 if name in ("bert", "t5") else 60)
    assert found["train/loss"] == pytest.approx(np.mean(losses), abs=1e-4)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(model__num_layers=3), r"config.model.num_layers = 3 is given, 2 is the model's"),
        (dict(model__norm_epsilon=1e-5), "norm_epsilon = 1e-05 is given, 1e-06 is the model's"),
        (dict(model__kind="lstm"), "config.model.kind = 'lstm' is given, 'transformer' is the model's"),
        (dict(train__init_from="nowhere/x"), "config.train.init_from nowhere/x: nowhere/x is not a run"),
    ],
)
def test_what_is_given_and_is_not_the_model_s_is_refused_with_both(given, words, plain, llama):
    with pytest.raises(UserError, match=words) as error:
        loaded(plain, **{"train__init_from": llama} | given)
    assert len(str(error.value).split("\n")) <= 5


def test_what_a_file_says_is_given_also_where_it_says_the_default(llama, tmp_path):
    head = "from lm_jax.config import default_config\n\n\ndef get_config():\n    config = default_config()\n"
    file = tmp_path / "said.py"
    file.write_text(f"{head}    config.data.sequence_length = 256\n    return config\n")
    assert loaded(str(file), train__init_from=llama)[0].data.sequence_length == 256
    file.write_text(f"{head}    config.model.update(num_layers=4)\n    return config\n")
    with pytest.raises(UserError, match="num_layers = 4 is given, 2 is the model's"):
        loaded(str(file), train__init_from=llama)


def test_rows_may_be_shorter_or_longer_where_positions_have_no_table(plain, llama, tmp_path):
    gpt2 = saved("gpt2", tmp_path / "gpt2")
    assert loaded(plain, train__init_from=llama, data__sequence_length=4096)[0].data.sequence_length == 4096
    assert loaded(plain, train__init_from=gpt2, data__sequence_length=32)[0].data.sequence_length == 32
    with pytest.raises(UserError, match="sequence_length = 65 is given, 64 is the model's"):
        loaded(plain, train__init_from=gpt2, data__sequence_length=65)
    content = json.loads(pathlib.Path(llama, "config.json").read_text()) | {"max_position_embeddings": 131_072}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert loaded(plain, train__init_from=tmp_path)[0].data.sequence_length == inherited.LONGEST_ROW


def test_dropout_and_adapters_are_of_the_run(plain, llama):
    config, _ = loaded(plain, train__init_from=llama, model__dropout=0.1, model__lora_rank=2, model__head_dim=0)
    assert config.model.dropout == 0.1 and config.model.lora_rank == 2 and config.model.head_dim == 4


def test_a_small_run_of_an_experiment_takes_the_model_as_it_is(llama):
    config, _ = loaded(str(ROOT / "experiments" / "quickstart.py:smoke"), train__init_from=llama)
    assert config.model.model_dim == 36 and config.data.tokenizer == llama and config.train.num_steps == 2


def labelled(folder, labels: list, task: str = "classification", **more):
    columns = ("text", "label") if task == "classification" else ("tokens", "tags")
    rows = [{columns[0]: f"row {k}", columns[1]: label} for k, label in enumerate(labels)]
    folder.mkdir(exist_ok=True)
    given = dict(data__sources=write_table(folder, ".jsonl", rows), train__task=task, data__packing="best_fit")
    return loaded(str(ROOT / "experiments" / "quickstart.py"), **given | more)


@pytest.mark.parametrize(
    ("task", "labels", "expected"),
    [
        ("classification", ["spam", "letter", "spam"], ("letter", "spam")),
        ("classification", [10, 9, 2], ("2", "9", "10")),
        ("token_classification", [["O", "B-x"], "B-y O"], ("B-x", "B-y", "O")),
    ],
)
def test_labels_are_those_of_the_table_where_none_are_given(task, labels, expected, tmp_path):
    config, origins = labelled(tmp_path, labels, task)
    assert config.model.labels == expected and origins["model.labels"]["from"] == "table"
    assert f"model.labels = {expected!r}" in inherited.told(config, origins)
    given, origins = labelled(tmp_path, labels, task, model__labels=expected[::-1])
    assert given.model.labels == expected[::-1] and origins["model.labels"]["from"] == "command line"


def test_labels_that_are_none_are_told(tmp_path):
    with pytest.raises(UserError, match="at least two labels apart"):
        labelled(tmp_path, ["same", "same"])
    with pytest.raises(UserError, match="more than 1,000 different values: are these labels?"):
        labelled(tmp_path, list(map(str, range(1100))))


def test_a_table_in_place_of_its_folder_is_no_want_of_labels(tmp_path):
    (tmp_path / "kinds.csv").write_text("text,label\na,b\n")
    given = dict(data__sources=str(tmp_path / "kinds.csv"), train__task="classification", data__packing="best_fit")
    with pytest.raises(UserError, match="this is a file: name its folder"):
        loaded(str(ROOT / "experiments" / "quickstart.py"), **given)
