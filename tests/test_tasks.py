"""What tasks have in common: tables of records, columns under other names, heads on decoders, values instead of labels."""

import json
import re

import numpy as np
import pytest
from helpers import RECORDS, tiny, write_table

from lm_jax import evaluate, main, metrics_file
from lm_jax.errors import UserError
from lm_jax.open_data import open_data
from lm_jax.prepare import readers
from lm_jax.tasks.regression import Regression
from lm_jax.tasks.results import Result
from lm_jax.tasks.tables import rows

DECODER = dict(
    data__packing="best_fit", data__tokenizer="bytes", data__global_batch_size=2, train__microbatch_rows=2,
    data__validation_fraction=0.2, data__test_fraction=0.0,
)  # fmt: skip
CLASSES = dict(train__task="classification", model__labels=("bad", "good"))


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_a_table_of_any_kind_gives_the_rows_of_json_lines(tmp_path, suffix):
    folders = [tmp_path / name for name in "ab"]
    records = [r | {"text": r["text"].replace("\n", " ")} for r in RECORDS] if suffix == ".tsv" else RECORDS
    for folder, kind in zip(folders, (".jsonl", suffix), strict=True):
        folder.mkdir()
        write_table(folder, kind, records)
    found = []
    for folder in folders:
        config = tiny(**DECODER | CLASSES | {"data__sources": str(folder)})
        stream = open_data(config).stream(config.data)
        found.append(stream.rows(list(range(int(stream.rows_per_epoch)))))
    for name, value in found[0].items():
        np.testing.assert_array_equal(value, found[1][name])


@pytest.mark.parametrize(
    ("names", "values", "words"),
    [
        (["text", "label", "label"], ["a", "bad", "good"], "a column stands twice in the header .'label'"),
        (["text", "text", "label"], ["a", "b", "good"], "a column stands twice in the header .'text'"),
        (["text", "label"], ["a\0b", "bad"], "row 1: holds a NUL character"),
    ],
)
def test_a_parquet_table_is_held_to_what_a_written_one_is(names, values, words, tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(
        pyarrow.Table.from_arrays([[value] for value in values], names=names), tmp_path / "train.parquet"
    )
    with pytest.raises(UserError, match=words):
        open_data(tiny(**DECODER | CLASSES | {"data__sources": str(tmp_path)}))
    (found,) = readers.records(str(tmp_path / "train.parquet"))
    assert isinstance(found, readers.Bad) and re.search(words.removeprefix("row 1: "), found.reason)


def test_columns_may_have_other_names_and_a_wrong_one_is_named(tmp_path):
    place = write_table(tmp_path, ".csv", [{"review": r["text"], "mood": r["label"]} for r in RECORDS])
    config = tiny(**DECODER | CLASSES | {"data__sources": place, "data__columns": ("review", "mood")})
    assert sum(len(records.where) for records in open_data(config).records.values()) == 30
    wrong = tiny(**DECODER | CLASSES | {"data__sources": place, "data__columns": ("reveiw", "mood")})
    with pytest.raises(UserError, match="line 2 has no column 'reveiw', only 'review', 'mood'; did you mean review"):
        open_data(wrong)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("text,label\na,bad\nb\n", "line 3: other cells than its header .1 cells, the header names 2: text, label"),
        ('text,label\n"a" b,bad\n', "line 2: "),
    ],
)
def test_a_broken_table_is_refused_with_its_line(tmp_path, text, words):
    path = tmp_path / "train.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        list(rows(path, ("text", "label")))


def test_two_files_of_a_split_are_refused(tmp_path):
    write_table(tmp_path, ".csv")
    place = write_table(tmp_path, ".jsonl")
    with pytest.raises(UserError, match="train.jsonl and train.csv: which of them"):
        open_data(tiny(**DECODER | CLASSES | {"data__sources": place}))


def test_a_decoder_is_asked_at_the_last_token_which_sees_the_text(tmp_path):
    place = write_table(tmp_path, ".jsonl")
    config = tiny(**DECODER | CLASSES | {"data__sources": place})
    stream, found = open_data(config).stream(config.data), 0
    for i in range(int(stream.rows_per_epoch)):
        row = stream.row(i)
        last = (row["segment_ids"] > 0) & (row["segment_ids"] != np.append(row["segment_ids"][1:], 0))
        np.testing.assert_array_equal(row["loss_mask"], last)
        assert (row["tokens"][last] == 256).all()
        found += row["targets"][last].sum()
    assert found == sum(r["label"] == "good" for r in RECORDS) - sum(
        v[1] for v in open_data(config).records["validation"].values
    )


PAIRS = [
    {"text": "q" * 5, "second": "s" * 7, "label": "good"},
    {"text": "q" * 9, "second": "s" * 90, "label": "bad"},
    {"text": "q" * 90, "second": "s" * 90, "label": "good"},
    {"text": "q" * 90, "second": "s" * 9, "label": "bad"},
    {"text": "q" * 90, "label": "good"},
]
# What stays of each in rows of 64: beside [CLS] and two [SEP] are 61 of two texts, or 62 of one; a decoder has no [CLS].
KEPT = [
    ("encoder", [(5, 7), (9, 52), (30, 31), (52, 9), (62, 0)]),
    ("transformer", [(5, 7), (9, 53), (31, 31), (53, 9), (63, 0)]),
]


@pytest.mark.parametrize(("kind", "kept"), KEPT)
def test_of_two_texts_the_second_is_cut_first_and_has_its_own_type(tmp_path, kind, kept):
    write_table(tmp_path, ".jsonl", PAIRS)
    encoder = dict(model__kind="encoder", model__norm_place="post", data__objective="masked")
    given = DECODER | CLASSES | {"data__sources": str(tmp_path), "data__validation_fraction": 0.0}
    said: list[str] = []
    records = open_data(tiny(**given | (encoder if kind == "encoder" else {})), said.append).records["train"]
    assert any(line.startswith("train: 4 of 5 records cut to 64 tokens") for line in said)
    for k, (first, second) in enumerate(kept):
        segment, start = records.segment(k), [256] * (kind == "encoder")
        ends = [ord("s")] * second + [256] if second else []
        assert segment["tokens"].tolist() == [*start, *[ord("q")] * first, 256, *ends]
        asked = 0 if kind == "encoder" else -1
        assert segment["loss_mask"][asked] == segment["loss_mask"].sum() == 1
        assert segment["targets"][asked] == ("bad", "good").index(PAIRS[k]["label"])
        if kind == "encoder":
            assert segment["token_type_ids"].tolist() == [0] * (len(segment["tokens"]) - len(ends)) + [1] * len(ends)


def test_a_second_text_may_have_another_name_and_then_must_be_there(tmp_path):
    rows = [{"question": r["text"], "passage": r.get("second"), "answer": r["label"]} for r in PAIRS[:2]]
    given = DECODER | CLASSES | {"data__sources": write_table(tmp_path, ".csv", rows), "data__validation_fraction": 0.0}
    named = dict(data__columns=("question", "answer", "passage"))
    assert open_data(tiny(**given | named)).records["train"].values == [("q" * 5, 1, "s" * 7), ("q" * 9, 0, "s" * 90)]
    with pytest.raises(UserError, match="has no column 'pasage', only .*; did you mean passage"):
        open_data(tiny(**given | dict(data__columns=("question", "answer", "pasage"))))


def test_values_are_learnt_in_their_own_units_and_scored_in_those_of_the_records(tmp_path):
    place = write_table(tmp_path, ".jsonl", [{"text": "a" * k, "value": 100.0 + k} for k in (1, 3)])
    config = tiny(**DECODER | {"data__sources": place, "train__task": "regression", "data__validation_fraction": 0.0})
    data = open_data(config)
    records = data.records["train"]
    assert [records.segment(k)["targets"][-1] for k in (0, 1)] == [-1, 1]
    result = data.task.result("here", records.values[1], records.segment(1), np.full((5, 1), 0.5))
    assert (result.truth, result.prediction) == (103.0, 102.5)


def arguments(place: str, task: str, labels: tuple = ()) -> list[str]:
    given = DECODER | {"data__sources": place, "train__task": task, "model__labels": labels}
    given |= dict(
        train__num_steps=60,
        checkpoint__every=60,
        optimizer__learning_rate=3e-3,
        evaluate__every=0,
        data__sequence_length=64,
    )
    given |= dict(data__global_batch_size=8, train__microbatch_rows=8)
    return [f"--config.{name.replace('__', '.')}={value}" for name, value in given.items()]


@pytest.mark.proof
def test_a_value_is_learnt_and_the_command_gives_its_scores(tmp_path, capsys):
    """How many z a text has, by a decoder: better than the mean."""
    random = np.random.default_rng(0)
    texts = ["".join(random.choice(list("az"), random.integers(3, 12))) for _ in range(400)]
    place = write_table(tmp_path, ".jsonl", [{"text": t, "value": float(t.count("z"))} for t in texts])
    workdir = tmp_path / "run"
    quickstart = ["--config", "experiments/quickstart.py:smoke", "--config.mesh.data=1"]
    assert main.main([*quickstart, *arguments(place, "regression"), "--workdir", str(workdir)]) == 0
    last = [line for line in metrics_file.read(workdir) if "final/rmse" in line][-1]
    assert last["final/pearson"] > 0.5, last
    capsys.readouterr()
    assert evaluate.main(["--model", str(workdir), "--batch_size", "5"]) == 0
    found = json.loads(capsys.readouterr().out.strip().split("\n")[-1])
    np.testing.assert_allclose(found["eval/rmse"], last["final/rmse"], rtol=1e-5)


def test_scores_of_values():
    pairs = [(1.0, 1.5), (2.0, 1.0), (4.0, 5.0)]
    results = tuple(Result("", truth, guess) for truth, guess in pairs)
    scores = Regression(tiny(**DECODER | {"train__task": "regression"})).scores(results)
    truth, guess = np.array(pairs).T
    np.testing.assert_allclose(scores["rmse"], np.sqrt(2.25 / 3))
    np.testing.assert_allclose(scores["pearson"], np.corrcoef(truth, guess)[0, 1])
