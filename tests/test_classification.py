"""Finetuning to tell labels apart: rows, losses, metrics, what is taken from a pretrained model, and what users get wrong."""

import json
import pathlib
import re

import jax
import numpy as np
import pytest
from helpers import ROOT, tiny

from lm_jax import evaluate, load_model, main, metrics_file
from lm_jax.config import Mesh
from lm_jax.data import loader
from lm_jax.data.tokenizer import Bytes
from lm_jax.errors import UserError
from lm_jax.evaluator import Evaluator
from lm_jax.generate import command as generate_command
from lm_jax.loss import batch_loss
from lm_jax.mesh import make_mesh
from lm_jax.model.build import build
from lm_jax.open_data import open_data
from lm_jax.tasks import scores

LABELS = ("bad", "good", "odd")
SEPARATOR = 256  # of the byte tokenizer, before and after a text
ENCODER = dict(
    model__kind="encoder", model__norm_place="post", model__labels=LABELS, train__task="classification",
    data__objective="masked", data__packing="best_fit", data__tokenizer="bytes", data__global_batch_size=2,
    train__microbatch_rows=2,
)  # fmt: skip


def records(num: int) -> list[dict]:
    """Texts of 1 to 30 letters; which letters tells the label."""
    random = np.random.default_rng(0)
    letters = {"bad": "abc", "good": "mno", "odd": "xyz"}
    text = lambda label: "".join(random.choice(list(letters[label]), random.integers(1, 31)))
    return [{"text": f"{i} {text(LABELS[i % 3])}", "label": LABELS[i % 3]} for i in range(num)]


def write(folder, lines: list, name: str = "train") -> str:
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(folder)


def config_of(place: str, **changes):
    return tiny(**ENCODER | {"data__sources": place} | changes)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("records")
    write(folder, records(90)[:60])
    return write(folder, records(90)[60:], "validation")


def segments(row: dict) -> list[tuple[bytes, int]]:
    """(text, label) of every segment of a row, everything else about it asserted."""
    found = []
    for segment in range(1, int(row["segment_ids"].max()) + 1):
        at = np.flatnonzero(row["segment_ids"] == segment)
        tokens = row["tokens"][at]
        assert tokens[0] == tokens[-1] == SEPARATOR and (tokens[1:-1] != SEPARATOR).all()
        np.testing.assert_array_equal(row["positions"][at], np.arange(len(at)))
        np.testing.assert_array_equal(row["loss_mask"][at], [1] + [0] * (len(at) - 1))
        assert (row["targets"][at[1:]] == 0).all() and (row["token_type_ids"][at] == 0).all()
        found.append((bytes(tokens[1:-1].astype(np.uint8)), int(row["targets"][at[0]])))
    padding = row["segment_ids"] == 0
    assert (row["loss_mask"][padding] == 0).all() and (row["tokens"][padding] == 0).all()
    return found


def test_an_epoch_of_rows_holds_every_record_once_with_its_label(place):
    config = config_of(place, data__test_fraction=0.0)
    data = open_data(config)
    stream = data.stream(config.data)
    expected = sorted((r["text"].encode(), LABELS.index(r["label"])) for r in records(90)[:60])
    num = int(stream.rows_per_epoch)
    assert num < 40  # packed: several in a row
    for epoch in (0, 1):
        rows = [stream.row(i) for i in range(epoch * num, (epoch + 1) * num)]
        assert sorted(s for row in rows for s in segments(row)) == expected
    held = data.held(config.data, "validation")
    ((_, rows),) = held.items()
    expected = sorted((r["text"].encode(), LABELS.index(r["label"])) for r in records(90)[60:])
    assert sorted(s for i in range(rows.num_rows) for s in segments(rows.row(i))) == expected
    assert rows.rows([0, rows.num_rows])["loss_mask"][1].sum() == 0


def test_a_long_record_keeps_its_first_tokens_and_is_counted_or_refused(tmp_path):
    long = {"text": "begin" + "x" * 195, "label": "odd"}
    place = write(tmp_path, [*records(12), long])
    said: list[str] = []
    zero = dict(data__validation_fraction=0.0, data__test_fraction=0.0)
    config = config_of(place, **zero)
    stream = open_data(config, said.append).stream(config.data)
    assert f"train: 1 of 13 records cut to 64 tokens, the first at {place}/train.jsonl line 13" in said
    found = [s for i in range(int(stream.rows_per_epoch)) for s in segments(stream.row(i))]
    assert (b"begin" + b"x" * 57, 2) in found
    with pytest.raises(UserError, match=r"1 train records are longer than a row of 64 tokens \(the longest 202\)"):
        open_data(config_of(place, data__packing="best_fit_whole", **zero))


def test_a_text_in_train_and_in_a_held_out_split_is_reported(tmp_path):
    place = write(tmp_path, records(12))
    write(tmp_path, records(3), "test")
    said: list[str] = []
    open_data(config_of(place), said.append)
    assert any(line.startswith("3 test texts are also in train, the first at") for line in said)


@pytest.fixture(scope="module")
def model(place):
    """Weights so large that what a record sees changes its label."""
    config = config_of(place, model__init_scale=0.3)
    graph = build(config.model, 258, 64)
    mesh = make_mesh(Mesh(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        parameters = jax.jit(lambda: graph.init(jax.random.key(1), sharded=True))()
    return graph, mesh, parameters


def test_packed_records_have_the_loss_they_have_alone(place, model):
    graph, mesh, parameters = model
    config = config_of(place)
    ((_, rows),) = open_data(config).held(config.data, "validation").items()
    whole = rows.rows(list(range(rows.num_rows)))
    alone = []
    for row in (rows.row(i) for i in range(rows.num_rows)):
        for segment in range(1, int(row["segment_ids"].max()) + 1):
            at = np.flatnonzero(row["segment_ids"] == segment)
            single = {name: np.zeros_like(x) for name, x in row.items()}
            for name in row.keys() - {"row"}:
                single[name][: len(at)] = row[name][at]
            single["segment_ids"][: len(at)] = 1
            alone.append(single)
    one_each = {name: np.stack([row[name] for row in alone]) for name in whole}
    with jax.set_mesh(mesh):
        loss = jax.jit(lambda batch: batch_loss(graph, parameters, batch).loss)
        np.testing.assert_allclose(loss(whole), loss(one_each), rtol=1e-5)
    assert len(alone) == 30 == whole["loss_mask"].sum()


@pytest.mark.parametrize(("devices", "size"), [pytest.param(1, 1, marks=pytest.mark.proof), (1, 5), (8, 8)])
def test_evaluation_counts_every_record_whatever_the_batch_and_devices(place, model, devices, size):
    graph, _, parameters = model
    config = config_of(place)
    ((_, rows),) = open_data(config).held(config.data, "validation").items()
    mesh = make_mesh(Mesh(), jax.devices()[:devices])
    with jax.set_mesh(mesh):
        here = jax.jit(lambda: graph.init(jax.random.key(1), sharded=True))()
        found = Evaluator(graph, mesh, Bytes(), size)(here, rows)
        batch = next(loader.batches(rows, mesh, 0, 1, 8 * rows.num_rows))
        logits = np.asarray(jax.jit(lambda p, b: graph.module(p).read(b).labels_BTC)(here, batch), np.float64)
    assert found.tokens == len(found.results) == 30
    asked = np.asarray(batch["loss_mask"]) > 0
    truth, chosen = np.asarray(batch["targets"])[asked], logits[asked].argmax(-1)
    assert [r.truth for r in found.results] == [LABELS[k] for k in truth]
    assert [r.prediction for r in found.results] == [LABELS[k] for k in chosen]
    assert len({r.record for r in found.results}) == 30
    losses = np.log(np.exp(logits[asked]).sum(-1)) - logits[asked][np.arange(30), truth]
    np.testing.assert_allclose(found.loss, losses.sum(), rtol=1e-5)


# Of pairs (label, prediction); the numbers are scikit-learn's accuracy_score, f1_score(average="macro"), matthews_corrcoef.
SCORED = [
    ([0, 1, 2, 0, 1, 2], [0, 2, 1, 0, 0, 1], (1 / 3, 4 / 15, 0.0)),
    ([1, 1, 1, 0], [1, 0, 1, 1], (0.5, 1 / 3, -1 / 3)),
    ([0, 0, 1, 1, 2, 2, 2, 0], [0, 1, 1, 1, 2, 0, 2, 0], (0.75, 34 / 45, 9 / 14)),
    ([1, 1, 1], [1, 1, 1], (1.0, 1.0, 0.0)),
]


@pytest.mark.parametrize(("truth", "predicted", "expected"), SCORED)
def test_metrics_are_those_of_scikit_learn(truth, predicted, expected):
    found = scores.values(scores.labels(truth, predicted), len(truth))
    np.testing.assert_allclose([found[k] for k in ("accuracy", "macro_f1", "matthews")], expected, atol=1e-12)


MISTAKES = [
    (
        '{"text": "a", "label": "godo"}',
        "label 'godo' is none of config.model.labels: bad, good, odd; did you mean good?",
    ),
    ('{"text": " ", "label": "good"}', "the text is empty"),
    ('{"text": 3, "label": "good"}', "the text is no string"),
    ('{"Txt": "a", "label": "good"}', "has no column 'text', only 'Txt', 'label'; did you mean Txt?"),
    ('{"text": "a", "labels": "good"}', "has no column 'label', only 'text', 'labels'; did you mean labels?"),
    ("text,label", "no JSON object (Expecting value, column 1;"),
    ('{"text": "a", "label": null}', "label null is none of"),
    ('{"text": "a", "second": "", "label": "good"}', "the second is empty"),
]


@pytest.mark.parametrize(("line", "words"), MISTAKES)
def test_what_users_get_wrong_is_said_with_file_and_line(tmp_path, line, words):
    place = write(tmp_path, [*records(2), line])
    with pytest.raises(UserError) as error:
        open_data(config_of(place))
    assert f"{place}/train.jsonl line 3" in str(error.value) and words in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(model__labels=()), "at least two labels"),
        (dict(model__labels=("a", "a")), "each named once"),
        (dict(train__task=""), "labels = .* is read only where config.train.task is classification"),
        (dict(data__packing="split"), "would part records"),
        (
            dict(model__kind="encoder_decoder", data__objective="span_corruption"),
            "needs a model of kind encoder or transformer or rnn or gru or lstm, not encoder_decoder",
        ),
        (dict(train__task="regression"), "labels = .* is read only where"),
        (dict(data__columns=("a",)), None),
    ],
)
def test_a_task_that_does_not_fit_is_refused(changes, words):
    if words is None:  # what the task itself knows
        with pytest.raises(UserError, match=r"classification has 2: \('text', 'label'\), and perhaps second"):
            open_data(config_of("x", **changes))
        return
    with pytest.raises(UserError, match=words):
        config_of("x", **changes)


def arguments(place: str) -> list[str]:
    return [
        "--config", str(ROOT / "experiments" / "finetune_reviews.py:smoke"), f"--config.data.sources={place}",
        "--config.data.tokenizer=bytes", f"--config.model.labels={LABELS}", "--config.checkpoint.every=40",
        "--config.data.global_batch_size=4", "--config.train.microbatch_rows=2", "--config.evaluate.every=20",
        "--config.optimizer.learning_rate=3e-3",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(place, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "run"
    more = ["--config.train.num_steps=40", "--config.mesh.data=1", "--config.model.num_layers=1"]
    assert main.main([*arguments(place), *more, "--workdir", str(workdir)]) == 0
    return workdir


def test_it_learns_and_the_command_evaluates(trained, capsys):
    last = [line for line in metrics_file.read(trained) if "final/accuracy" in line][-1]
    assert last["final/accuracy"] > 0.9 and "final/perplexity" not in last
    said = (trained / "log.txt").read_text()
    assert not any(words in said for words in ("sample at step 0", "gzip -9", "lm_jax.generate")), "it writes no text"
    assert re.search(r"validation: 30 records \(.*; .* for all: accuracy 0\.\d{3}\)", said)
    with pytest.raises(UserError, match=r"writes no text\n.*\n.*lm_jax\.load\('.*run'\)\.predict\(TEXT\)"):
        generate_command.main(["--model", str(trained), "--prompt", "a"])
    capsys.readouterr()
    assert evaluate.main(["--model", str(trained), "--split", "validation", "--batch_size", "3"]) == 0
    found = json.loads(capsys.readouterr().out.strip().split("\n")[-1])
    assert found["documents"] == 30 and found["eval/accuracy"] == last["final/accuracy"]
    np.testing.assert_allclose(found["eval/matthews"], last["final/matthews"], rtol=1e-6)


def test_init_from_takes_all_but_the_head_and_says_so(place, tmp_path, capsys):
    """From a run that hid tokens: equal parameters but for the heads; shorter rows take the first places."""
    pretraining = ["--config.train.task=", "--config.model.labels=()", "--config.evaluate.every=0"]
    once = [
        f"--config.{x}"
        for x in (
            "train.num_steps=1",
            "optimizer.learning_rate=0.0",
            "mesh.data=1",
            "model.num_layers=1",
            "optimizer.name=lion",
        )
    ]
    given = [
        a for a in arguments(place) if not a.startswith(("--config.optimizer", "--config.model", "--config.evaluate"))
    ]
    first, second, text = tmp_path / "first", tmp_path / "second", tmp_path / "text"
    text.mkdir()
    for number, line in enumerate((pathlib.Path(place) / "train.jsonl").read_text().split("\n")):
        (text / f"{number}.txt").write_text(line)
    pretraining.append(f"--config.data.sources={text}")
    before = [a for a in given if not a.startswith("--config.data.sources")]
    assert main.main([*before, *pretraining, *once, "--workdir", str(first)]) == 0
    more = [f"--config.model.labels={LABELS}", f"--config.train.init_from={first}", "--config.data.sequence_length=48"]
    capsys.readouterr()
    assert main.main([*given, *more, *once, "--workdir", str(second)]) == 0
    said = capsys.readouterr().out
    assert "left behind: next_sentence/bias" in said and "initialised: labels/bias, labels/kernel" in said
    with jax.set_mesh(make_mesh(Mesh(), jax.devices()[:1])):
        old, new = (load_model.load_parameters(load_model.locate(str(run)))[1] for run in (first, second))
    np.testing.assert_array_equal(new["positions"]["table"], old["positions"]["table"][:48])
    shared = set(old) & set(new) - {"positions"}
    assert {"embedding", "segments", "block_0", "pooler", "embedding_norm"} <= shared
    for name in shared:
        for a, b in zip(jax.tree.leaves(old[name]), jax.tree.leaves(new[name]), strict=True):
            np.testing.assert_array_equal(a, b)
    assert np.abs(new["labels"]["kernel"]).max() > 0
