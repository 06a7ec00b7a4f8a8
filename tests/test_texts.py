"""Texts that answer texts: what a row holds, what is cut, what is written and scored, what users get wrong."""

import json

import jax
import numpy as np
import pytest
from helpers import KINDS, tiny, write_table

from lm_jax import evaluate, load_model, main, metrics_file
from lm_jax.config import Mesh
from lm_jax.errors import UserError
from lm_jax.generate import command as generate_command
from lm_jax.loss import batch_loss
from lm_jax.mesh import make_mesh
from lm_jax.model.build import build
from lm_jax.open_data import open_data
from lm_jax.tasks import generate_answers

END = 256  # of the byte tokenizer, before and after a text
RECORDS = [
    {"source": f"{i} " + "abc"[i % 3] * (1 + 5 * i % 23), "target": "xyz"[i % 3] * (1 + 7 * i % 11)} for i in range(40)
]
TEXTS = dict(
    train__task="text_to_text", data__packing="best_fit", data__tokenizer="bytes", data__global_batch_size=2,
    train__microbatch_rows=2, data__validation_fraction=0.2, data__test_fraction=0.0,
)  # fmt: skip


def config_of(place, **changes):
    return tiny(**TEXTS | {"data__sources": str(place)} | changes)


def pairs_of(row: dict) -> list[tuple[bytes, bytes]]:
    """(what is read, what is to be written) of every segment of a row; everything else about them asserted."""
    found, reads = [], "encoder_tokens" in row
    for segment in range(1, int(row["segment_ids"].max()) + 1):
        at = np.flatnonzero(row["segment_ids"] == segment)
        tokens, targets, mask = (row[name][at] for name in ("tokens", "targets", "loss_mask"))
        np.testing.assert_array_equal(row["positions"][at], np.arange(len(at)))
        assert tokens[0] == END and targets[-1] == END and mask[-1] == 1
        np.testing.assert_array_equal(tokens[1:], targets[:-1])
        if reads:
            assert mask.all()
            there = np.flatnonzero(row["encoder_segment_ids"] == segment)
            np.testing.assert_array_equal(row["encoder_positions"][there], np.arange(len(there)))
            source = row["encoder_tokens"][there]
            assert source[0] == END
        else:
            start = int(mask.argmax())
            assert mask[start:].all() and not mask[:start].any()
            source = tokens[: start + 1]
        found.append((bytes(source[1:].astype(np.uint8)), bytes(targets[mask > 0][:-1].astype(np.uint8))))
    padding = row["segment_ids"] == 0
    assert not row["loss_mask"][padding].any() and not row["tokens"][padding].any()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_holds_every_record_once_with_its_target(tmp_path, kind):
    config = config_of(write_table(tmp_path, ".csv", RECORDS), data__validation_fraction=0.0, **KINDS[kind])
    stream = open_data(config).stream(config.data)
    after = "" if kind == "encoder_decoder" else "\n\n"
    expected = sorted(((r["source"] + after).encode(), r["target"].encode()) for r in RECORDS)
    num = int(stream.rows_per_epoch)
    assert num < 30
    for epoch in (0, 1):
        assert sorted(p for i in range(epoch * num, (epoch + 1) * num) for p in pairs_of(stream.row(i))) == expected


@pytest.mark.parametrize("kind", ["transformer", "encoder_decoder"])
def test_packed_records_have_the_loss_they_have_alone(tmp_path, kind):
    config = config_of(write_table(tmp_path, ".jsonl", RECORDS), model__init_scale=0.3, **KINDS[kind])
    ((_, rows),) = open_data(config).held(config.data, "train").items()
    whole, alone = rows.rows(list(range(rows.num_rows))), []
    for row in (rows.row(i) for i in range(rows.num_rows)):
        for segment in range(1, int(row["segment_ids"].max()) + 1):
            single = {name: np.zeros_like(x) for name, x in row.items()}
            for prefix in ("", "encoder_") if "encoder_tokens" in row else ("",):
                at = np.flatnonzero(row[f"{prefix}segment_ids"] == segment)
                for name in ("tokens", "positions", *(("targets", "loss_mask") if not prefix else ())):
                    single[prefix + name][: len(at)] = row[prefix + name][at]
                single[f"{prefix}segment_ids"][: len(at)] = 1
            alone.append(single)
    one_each = {name: np.stack([row[name] for row in alone]) for name in whole}
    graph = build(config.model, 257 + 100 * (kind == "encoder_decoder"), 64)
    with jax.set_mesh(make_mesh(Mesh(), jax.devices()[:1])):
        parameters = jax.jit(lambda: graph.init(jax.random.key(1), sharded=True))()
        loss = jax.jit(lambda batch: batch_loss(graph, parameters, batch).loss)
        np.testing.assert_allclose(loss(whole), loss(one_each), rtol=1e-5)
    assert len(alone) > len(whole["row"])


def test_any_columns_stand_in_the_prompt(tmp_path):
    records = [{"question": "who?", "passage": "she", "answer": "me"}]
    place = write_table(tmp_path, ".jsonl", records)
    given = dict(
        data__columns=("passage", "question", "answer"),
        data__prompt="{passage} | {question}=",
        data__global_batch_size=1,
    )
    config = config_of(place, train__microbatch_rows=1, data__validation_fraction=0.0, **given)
    assert pairs_of(open_data(config).stream(config.data).row(0)) == [(b"she | who?=", b"me")]


@pytest.mark.parametrize("kind", ["transformer", "encoder_decoder"])
def test_a_long_source_loses_its_end_and_is_counted_or_refused(tmp_path, kind):
    record = {"source": "begin" + "é" * 60, "target": "the target"}
    place = write_table(tmp_path, ".jsonl", [record, *RECORDS[:4]])
    said: list[str] = []
    config = config_of(place, data__prompt="<{source}>", data__validation_fraction=0.0, **KINDS[kind])
    stream = open_data(config, said.append).stream(config.data)
    assert f"train: 1 of 5 records cut to 64 tokens, the first at {place}/train.jsonl line 1" in said
    found = [p for i in range(int(stream.rows_per_epoch)) for p in pairs_of(stream.row(i))]
    [(source, _)] = [pair for pair in found if pair[1] == b"the target"]
    room = 63 - 7 - len("the target") * (kind == "transformer")  # <begin> and the mark at the start
    assert source.decode() == "<begin" + "é" * (room // 2) + ">"
    with pytest.raises(UserError, match="1 train records are longer than a row of 64 tokens"):
        open_data(config_of(place, data__packing="best_fit_whole", **KINDS[kind]))


MISTAKES = [
    ({"source": " ", "target": "a"}, "the source is empty"),
    ({"source": "a", "target": ""}, "the target is empty"),
    ({"source": 3, "target": "a"}, "the source is no string"),
    ({"source": "a", "Targte": "b"}, "has no column 'target', only 'source', 'Targte'; did you mean Targte?"),
    (
        {"source": "a", "target": "b" * 64},
        "the target has 64 tokens, which leaves no room for its prompt in a row of 64",
    ),
    ({"source": "a", "target": "b" * 61}, "the target has 61 tokens, which leaves no room"),
]


@pytest.mark.parametrize(("record", "words"), MISTAKES)
def test_what_users_get_wrong_is_said_with_file_and_line(tmp_path, record, words):
    place = write_table(tmp_path, ".jsonl", [*RECORDS[:2], record])
    with pytest.raises(UserError) as error:
        open_data(config_of(place))
    assert f"{place}/train.jsonl line 3" in str(error.value) and words in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(data__prompt="Summarise:"), "names no column"),
        (dict(data__prompt="{source} {target}"), "shows the target itself"),
        (dict(data__columns=("a",)), r"text_to_text has 2: \('source', 'target'\)"),
        (dict(model__kind="encoder", data__objective="masked"), "needs a model of kind encoder_decoder or transformer"),
        (
            dict(train__task="", evaluate__metrics="summaries"),
            "metrics = .* is read only where config.train.task is text_to_text or instruction",
        ),
        (
            dict(train__task="", data__prompt="{source}", data__packing="split"),
            "prompt = .* is read only where config.train.task is text_to_text",
        ),
        (dict(model__labels=("a", "b")), "labels = .* is read only where"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(tmp_path, changes, words):
    place = write_table(tmp_path, ".jsonl", RECORDS)
    with pytest.raises(UserError, match=words):
        open_data(config_of(place, **changes))


def arguments(place: str, workdir, *more: str) -> list[str]:
    given = TEXTS | {
        "data__sources": place,
        "evaluate__every": 0,
        "data__global_batch_size": 8,
        "train__microbatch_rows": 8,
    }
    flags = [f"--config.{name.replace('__', '.')}={value}" for name, value in given.items()]
    return ["--config", "experiments/quickstart.py:smoke", *flags, "--workdir", str(workdir), *more]


@pytest.mark.parametrize("kind", ["transformer", pytest.param("encoder_decoder", marks=pytest.mark.proof)])
def test_it_learns_to_copy_and_is_scored_by_what_it_writes(tmp_path, kind, capsys):
    """A text of one of two letters is answered by the other letter; what is written does not depend on the batch."""
    pairs = [("ab"[i % 2], "xy"[i % 2]) for i in range(256)]
    records = [{"source": f"{i} {a}", "target": b} for i, (a, b) in enumerate(pairs)]
    place = write_table(tmp_path, ".jsonl", records)
    kinds = [f"--config.{name.replace('__', '.')}={value}" for name, value in KINDS[kind].items()]
    steps = [
        "--config.train.num_steps=60",
        "--config.checkpoint.every=60",
        "--config.optimizer.learning_rate=3e-3",
        "--config.evaluate.metrics=answers",
        "--config.data.prompt={source}=",
    ]
    assert main.main(arguments(place, tmp_path / "run", *kinds, *steps)) == 0
    last = [line for line in metrics_file.read(tmp_path / "run") if "final/exact_match" in line][-1]
    assert last["final/exact_match"] > 0.9
    capsys.readouterr()
    assert evaluate.main(["--model", str(tmp_path / "run")]) == 0
    found = json.loads(capsys.readouterr().out.strip().split("\n")[-1])
    assert found["eval/exact_match"] == last["final/exact_match"] and found["records"] == found["documents"]
    assert generate_command.main(["--model", str(tmp_path / "run"), "--prompt", "1 a=", "--max_new_tokens", "2"]) == 0
    assert "taught with config.data.prompt = '{source}='" in "".join(capsys.readouterr())
    located = load_model.locate(str(tmp_path / "run"))
    mixed = open_data(located.config)
    with jax.set_mesh(make_mesh(Mesh(), jax.devices()[:1])):
        graph, parameters = load_model.load_parameters(located)
        results = generate_answers.written(graph, parameters, mixed, "validation", 3)
        beams = generate_answers.written(graph, parameters, mixed, "validation", 3, beams=3)
    assert [r.record for r in results] == mixed.records["validation"].where[:3]
    assert [r.truth for r in results] == [values[1] for values in mixed.records["validation"].values[:3]]
    assert [r.prediction for r in results] == [r.prediction for r in beams] == [r.truth for r in results]
