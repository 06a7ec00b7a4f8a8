"""Heads of tasks come from `transformers` and go there: classes, tensors, names of labels, and the same answers."""

import json
import pathlib
import types

import convert_checkpoint
import jax
import numpy as np
import pytest
from exported import on_one
from helpers import FAMILIES, ROOT, tiny, write_table
from peers import families as decoders
from peers import heads as parity
from tokenizer_shapes import words

import lm_jax
from lm_jax import evaluate, experiment, initial_state, load_model, main, run_folder
from lm_jax.convert import description, gguf, heads, proof, safetensors, tensor_map
from lm_jax.errors import UserError
from lm_jax.model.build import build
from lm_jax.tasks import results
from lm_jax.terminal import Terminal
from lm_jax.train_state import make_program


@pytest.mark.parametrize("name", parity.RECORDED)
def test_a_class_gives_the_logits_that_pytorch_gave_and_is_written_again(name):
    content, tensors, expected = parity.recorded(name)
    described, ours, logits = parity.logits_here(content, tensors)
    assert np.abs(logits - expected).max() < parity.LIMIT
    assert described.config.model.labels == (parity.LABELS if name.endswith(("labels", "tags")) else ())
    if description.FAMILIES[described.family].is_written:
        again = parity.as_written(described, ours)
        assert again.content["architectures"] == content["architectures"]
        assert again.content.get("id2label", {}).keys() == content.get("id2label", {}).keys()
        mine = tensor_map.their_tensors(again, ours)
        assert mine.keys() == tensors.keys() - {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
        for key, x in mine.items():
            np.testing.assert_array_equal(x, tensors[key])


@pytest.mark.proof
@pytest.mark.parametrize("name", parity.CASES)
def test_live(name, tmp_path):
    """PyTorch beside lm_jax, now: as it was saved there, and written here and loaded there, its labels named the same."""
    pytest.importorskip("transformers")
    with jax.default_matmul_precision("highest"):
        found = parity.compare(name, str(tmp_path))
    assert max(found.values()) < parity.LIMIT, found


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(problem_type="multi_label_classification"), "'multi_label_classification' of several labels is not supported"),
        (dict(architectures=["BertForMultipleChoice"]), "'BertForMultipleChoice' is not supported; of this family are BertFor"),
        (dict(id2label={"0": "a", "2": "b"}), "does not name each of 0, 1, 2"),
        (dict(id2label={"0": "a", "1": 5}), "a name that is no string"),
        (dict(id2label={"0": "a", "1": "a"}), "each named once"),
        (dict(id2label={}, num_labels=10**12), "at least two labels apart"),
    ],
)  # fmt: skip
def test_a_head_that_is_not_understood_is_refused(changes, words):
    content, _, _ = parity.recorded("bert_labels")
    with pytest.raises(UserError, match=words):
        description.describe(content | changes, "config.json", "bytes")


def test_labels_without_names_are_numbered():
    content, _, _ = parity.recorded("bert_labels")
    left = {key: value for key, value in content.items() if key not in ("id2label", "label2id")}
    assert description.describe(left, "config.json", "bytes").config.model.labels == ("LABEL_0", "LABEL_1")


def classifier(**changes):
    given = dict(
        train__task="classification", model__labels=("a", "b", "c"), data__packing="best_fit", model__init_scale=0.3
    )
    config = tiny(**given | changes)
    graph = build(config.model, 300, config.data.sequence_length)
    return config, graph, jax.tree.map(np.asarray, jax.jit(lambda: graph.init(jax.random.key(1)))())


@on_one
def test_the_bias_of_a_decoder_s_classifier_goes_into_its_last_norm():
    """GPT-2's class has none there: with another bias of the norm it says the same."""
    config, graph, ours = classifier()
    ours["labels"]["bias"] = np.array([1.0, -2.0, 0.5], np.float32)
    described = description.description_of(config, 300)
    assert described.content["architectures"] == ["GPT2ForSequenceClassification"]
    with pytest.raises(UserError, match="has no place for: score.bias"):
        tensor_map.their_tensors(described, ours)
    leaves, told = heads.expressible(ours, config.model, ())
    tensors = tensor_map.their_tensors(described, leaves)
    assert "score.weight" in tensors and "score.bias" not in tensors and not told
    row = proof.random_row(described)
    there = tensor_map.parameters(described, tensors, "there")
    expected, found = (np.asarray(proof.heads(graph, p, row)[0]) for p in (ours, there))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_gguf_file_has_no_place_for_a_head(tmp_path):
    config, _, ours = classifier(**FAMILIES["llama"])
    described = description.description_of(config, 300)
    with pytest.raises(UserError, match="no place for the head of a task; name a folder"):
        gguf.write(str(tmp_path / "x.gguf"), described.content, tensor_map.their_tensors(described, ours), None)


@on_one
@pytest.mark.parametrize(("family", "mean"), [("gpt2", 5.0), ("llama", 0.0)])
def test_a_regression_answers_in_the_units_of_its_records(family, mean):
    """5 + 3 x; a Llama has no bias to put the mean into, and that is said."""
    config, graph, ours = classifier(**FAMILIES[family], train__task="regression", model__labels=())
    described = description.description_of(config, 300)
    assert described.content["problem_type"] == "regression" and described.content["id2label"] == {"0": "value"}
    leaves, told = heads.expressible(ours, config.model, (5.0, 3.0))
    assert ("add 5 to what it answers" in told) == (family == "llama")
    assert "in deviations from that mean" in heads.expressible(ours, config.model, ())[1]
    there = tensor_map.parameters(described, tensor_map.their_tensors(described, leaves), "there")
    row = proof.random_row(described)
    expected, found = (np.asarray(proof.heads(graph, p, row)[0]) for p in (ours, there))
    np.testing.assert_allclose(found, mean + 3 * expected, atol=1e-4)


def finetuned(folder: pathlib.Path, recorded: tuple, pieces: int) -> pathlib.Path:
    """A small model that is there becomes a classifier of a table: by the model and the table alone. The run beside both."""
    content, tensors, _ = recorded
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text(json.dumps(content))
    safetensors.write_folder(str(folder / "model"), tensors)
    (folder / "model" / "tokenizer.json").write_bytes(words(pieces))
    records = [{"text": text, "label": "rise" if "w10" in text.split() else "été, fall"} for text in texts()]
    (folder / "records").mkdir()
    write_table(folder / "records", ".jsonl", records)
    given = [
        f"train.init_from={folder / 'model'}", f"data.sources={folder / 'records'}", "train.num_steps=24", "mesh.data=1",
        "optimizer.learning_rate=1e-2", "model.dropout=0", "data.test_fraction=0.2",
    ]  # fmt: skip
    line = ["--config", str(ROOT / "experiments" / "finetune.py:classification"), "--workdir", str(folder / "run")]
    assert main.main([*line, *(f"--config.{one}" for one in given)]) == 0
    assert evaluate.main(["--model", str(folder / "run"), "--split", "test"]) == 0
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> pathlib.Path:
    """A BERT, finetuned, and as the folder that it leaves in."""
    pytest.importorskip("tokenizers")
    folder = finetuned(tmp_path_factory.mktemp("heads") / "bert", parity.recorded("bert_masked"), parity.PIECES)
    assert convert_checkpoint.main([str(folder / "run"), str(folder / "out"), "--unproven"]) == 0
    return folder


def texts() -> list[str]:
    """Texts of a few words, of which one decides the label."""
    random = np.random.RandomState(0)
    word = lambda: f"w{random.randint(12, parity.PIECES)}"
    return [f"{word()} {word()} {('w10', 'w11')[k % 2]} {word()}" for k in range(160)]


def test_a_classifier_is_trained_by_the_model_and_the_table_alone_and_leaves_with_its_labels(trained):
    said = (trained / "run" / "log.txt").read_text()
    assert "initialised: labels/bias, labels/kernel, pooler/bias, pooler/kernel" in said, "a folder without a pooler"
    assert f"from {trained / 'records'}: model.labels = ('rise', 'été, fall')" in said
    run = run_folder.read_config(load_model.epath.Path(trained / "run"))
    assert run["config"]["model.labels"] == ["rise", "été, fall"] and run["origins"]["model.labels"]["from"] == "table"
    content = json.loads((trained / "out" / "config.json").read_text())
    assert content["architectures"] == ["BertForSequenceClassification"]
    assert content["id2label"] == {"0": "rise", "1": "été, fall"}
    kind, answers = results.read(load_model.epath.Path(trained / "run"), "test")
    assert kind == "labels" and np.mean([one.truth == one.prediction for one in answers]) > 0.9
    found = load_model.locate(str(trained / "out"))
    assert found.config.train.task == "classification" and found.config.model.labels == ("rise", "été, fall")


@on_one
@pytest.mark.parametrize("labels", [(), ("fall", "rise")])
def test_a_classifier_that_is_there_keeps_its_head_where_the_labels_are_its_own(labels, trained, tmp_path, capsys):
    """Of other labels as many begin a new one. The order of labels is the model's, whatever the table has."""
    (tmp_path / "records").mkdir()
    records = [{"text": "w20", "label": label} for label in ("été, fall", "rise")]
    given = {
        "train.init_from": str(trained / "out"),
        "data.sources": write_table(tmp_path / "records", ".jsonl", records),
    }
    given |= {"model.labels": str(labels)} if labels else {}
    config, origins = experiment.load_config(str(ROOT / "experiments" / "finetune.py:classification"), given)
    assert config.model.labels == (labels or ("rise", "été, fall"))
    assert origins["model.labels"]["from"] == ("command line" if labels else "model")
    program = make_program(config, parity.PIECES)
    mixed = types.SimpleNamespace(tokenizer=load_model.locate(str(trained / "out")).tokenizer)
    source = initial_state.find_init(program, mixed, Terminal())
    state, _ = initial_state.starting_point(program, load_model.epath.Path(tmp_path), source, Terminal())
    theirs = load_model.load_parameters(source)[1]
    assert np.array_equal(state.parameters["labels"]["kernel"], theirs["labels"]["kernel"]) == (not labels)
    assert ("left behind: labels/bias, labels/kernel" in capsys.readouterr().out) == bool(labels)


@on_one
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_from_python_a_classifier_says_of_a_text_what_evaluate_says(name, trained, tmp_path, capsys):
    """Label and probability, of the run and of the folder that it leaves in; of that, evaluate asks for records."""
    folder = trained if name == "bert" else finetuned(tmp_path / name, decoders.recorded(name), decoders.PIECES)
    if name != "bert":
        assert convert_checkpoint.main([str(folder / "run"), str(folder / "out"), "--unproven"]) == 0
    answers = results.read(load_model.epath.Path(folder / "run"), "test")[1]
    records = (folder / "records" / "train.jsonl").read_text().split("\n")
    for model in ("run", "out"):
        loaded = lm_jax.load(folder / model)
        for one in answers[:5]:
            found = loaded.predict(json.loads(records[int(one.record.rsplit(" ", 1)[1]) - 1])["text"])
            assert max(found, key=found.get) == one.prediction and sum(found.values()) == pytest.approx(1)
            assert found[one.prediction] == pytest.approx(one.confidence, abs=1e-4)
    with pytest.raises(UserError, match="names no records: say --sources FOLDER"):
        evaluate.main(["--model", str(folder / "out")])
    capsys.readouterr()
    for model, sources in (("run", []), ("out", ["--sources", str(folder / "records")])):
        evaluate.main(["--model", str(folder / model), "--split", "test", *sources])
    one, other = (json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{"))
    assert one["eval/accuracy"] == other["eval/accuracy"] == 1.0 and other["documents"] > 0


@pytest.mark.proof
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_a_classifier_answers_the_same_in_a_pipeline_of_transformers(name, trained, tmp_path, capsys):
    """Live: proven as it is written; labels and probabilities of every text of the test."""
    transformers = pytest.importorskip("transformers")
    folder = trained if name == "bert" else finetuned(tmp_path / name, decoders.recorded(name), decoders.PIECES)
    assert convert_checkpoint.main([str(folder / "run"), str(tmp_path / "out")]) == 0
    assert "texts have the same ids" in capsys.readouterr().out
    answers = results.read(load_model.epath.Path(folder / "run"), "test")[1]
    records = (folder / "records" / "train.jsonl").read_text().split("\n")
    told = [json.loads(records[int(one.record.rsplit(" ", 1)[1]) - 1])["text"] for one in answers]
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    pipeline = transformers.pipeline("text-classification", model=str(tmp_path / "out"), tokenizer=tokenizer)
    for one, found in zip(answers, pipeline(told), strict=True):
        assert found["label"] == one.prediction and found["score"] == pytest.approx(one.confidence, abs=1e-4)
