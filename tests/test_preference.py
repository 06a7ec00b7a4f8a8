"""Preference tuning: rows of pairs, the loss and its gradient, the reference kept beside the run, what users get wrong."""

import json
import math

import jax
import numpy as np
import pytest
from chat_templates import chat_folder
from helpers import assert_same_run, kill_once_saved, lines_of, tiny, write_table

from lm_jax import evaluate, files, loss, main
from lm_jax.config import Mesh
from lm_jax.data import loader
from lm_jax.data.tokenizer import Bytes
from lm_jax.errors import UserError
from lm_jax.evaluator import Evaluator
from lm_jax.mesh import make_mesh
from lm_jax.model.build import build
from lm_jax.model.task_heads import label_losses
from lm_jax.open_data import open_data
from lm_jax.tasks import dpo_reference

END = 256
PAIRS = [
    {"prompt": f"{i} " + "q" * (i % 7), "chosen": "a" * (1 + i % 3), "rejected": "b" * (1 + i % 4)} for i in range(96)
]
PREFERENCE = dict(
    train__task="preference", data__packing="best_fit", data__tokenizer="bytes", data__global_batch_size=8,
    train__microbatch_rows=8, data__validation_fraction=0.2, data__test_fraction=0.0, train__dpo_beta=0.5,
)  # fmt: skip


def config_of(place, **changes):
    return tiny(**PREFERENCE | {"data__sources": str(place)} | changes)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> str:
    return write_table(tmp_path_factory.mktemp("pairs"), ".jsonl", PAIRS)


def test_a_pair_is_two_segments_of_one_row(place):
    config = config_of(place, data__validation_fraction=0.0, data__global_batch_size=1, train__microbatch_rows=1)
    stream, found = open_data(config).stream(config.data), []
    num = int(stream.rows_per_epoch)
    assert num < len(PAIRS) / 2
    for row in map(stream.row, range(num)):
        for chosen in range(1, int(row["segment_ids"].max()), 2):
            texts = []
            for segment, sign in ((chosen, 1), (chosen + 1, -1)):
                at = np.flatnonzero(row["segment_ids"] == segment)
                tokens, targets, weight = (row[name][at] for name in ("tokens", "targets", "weight"))
                np.testing.assert_array_equal(row["positions"][at], np.arange(len(at)))
                np.testing.assert_array_equal(targets, [*tokens[1:], END])
                answer = weight != 0
                assert (weight[answer] == sign * np.float32(0.5)).all() and answer[int(answer.argmax()) :].all()
                np.testing.assert_array_equal(row["loss_mask"][at], np.arange(len(at)) == (0 if sign > 0 else -1))
                text = lambda ids: bytes(ids[ids < 256].astype(np.uint8)).decode()
                texts += [text(tokens[: answer.argmax() + 1]), text(targets[answer])]
            assert texts[0] == texts[2]
            found.append({"prompt": texts[0], "chosen": texts[1], "rejected": texts[3]})
    order = lambda pair: pair["prompt"]
    assert sorted(found, key=order) == sorted(PAIRS, key=order)


def test_conversations_are_answered_in_the_chat_template(tmp_path):
    chat_folder(tmp_path)
    prompt = [{"role": r, "content": c} for r, c in (("user", "hi"), ("assistant", "yes"), ("user", "now?"))]
    place = write_table(tmp_path, ".jsonl", [{"prompt": prompt, "chosen": "soon", "rejected": "never"}])
    given = dict(data__global_batch_size=1, train__microbatch_rows=1, data__validation_fraction=0.0)
    config = config_of(place, data__tokenizer=str(tmp_path), data__sequence_length=128, **given)
    mixed = open_data(config)
    row, by = mixed.stream(config.data).row(0), mixed.tokenizer
    for sign, answer in ((1, "soon"), (-1, "never")):
        targets = row["targets"][np.sign(row["weight"]) == sign]
        assert by.decode(targets) == answer and targets[-1] == by.special["<|im_end|>"]
    assert mixed.task.chat_template


def test_a_long_prompt_loses_its_start_and_an_answer_nothing(tmp_path):
    long = {"prompt": "x" * 100 + "end", "chosen": "yes", "rejected": "no"}
    said: list[str] = []
    config = config_of(write_table(tmp_path, ".jsonl", [long] * 8), data__validation_fraction=0.0)
    row = open_data(config, said.append).stream(config.data).row(0)
    assert any(line.startswith("train: 8 of 8 records cut to 64 tokens") for line in said)
    for segment, answer in ((1, b"yes"), (2, b"no")):
        tokens = row["tokens"][row["segment_ids"] == segment]
        assert bytes(tokens.astype(np.uint8)).endswith(b"xend" + answer)


MISTAKES = [
    ({"prompt": "a", "chosen": "b", "rejected": "b "}, "chosen and rejected are the same text 'b'"),
    ({"prompt": "a", "chosen": "", "rejected": "b"}, "the chosen is empty"),
    ({"prompt": "a", "chosen": "b", "rejected": 1}, "the rejected is no string"),
    ({"prompt": " ", "chosen": "b", "rejected": "c"}, "the prompt is empty"),
    ({"prompt": "a", "chosen": "b", "reject": "c"}, "has no column 'rejected', only 'prompt', 'chosen', 'reject'"),
    ({"prompt": "a", "chosen": "b" * 40, "rejected": "c" * 40}, "the two answers leave no room for their prompt"),
    ({"prompt": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c"}, "needs a chat template"),
    ({"prompt": [{"role": "assistant", "content": "a"}], "chosen": "b", "rejected": "c"}, "before anybody has said"),
]


@pytest.mark.parametrize(("record", "words"), MISTAKES)
def test_what_users_get_wrong_is_said(tmp_path, record, words):
    place = write_table(tmp_path, ".jsonl", [*PAIRS[:2], record])
    with pytest.raises(UserError) as error:
        open_data(config_of(place))
    assert words in str(error.value) and ("line 3" in str(error.value) or "template" in words)


@pytest.fixture(scope="module")
def model(place):
    config = config_of(place, model__init_scale=0.3)
    mixed = open_data(config)
    return config, mixed, build(config.model, 257, 64)


def parameters_of(graph, key: int = 1):
    return jax.jit(lambda: graph.init(jax.random.key(key), sharded=True))()


def log_probabilities(graph, parameters, texts: list[tuple[str, str]]) -> list[float]:
    """log pi(answer and its end | prompt) of each text alone in a row, from the logits."""
    ids, mask = np.zeros((len(texts), 32), np.int32), np.zeros((len(texts), 32), np.float32)
    for k, (prompt, answer) in enumerate(texts):
        text = [END, *prompt.encode(), *answer.encode(), END]
        ids[k, : len(text)] = text
        mask[k, len(prompt.encode()) : len(text) - 1] = 1
    batch = {"tokens": ids, "positions": np.arange(32)[None] + 0 * ids, "segment_ids": np.ones_like(ids)}

    @jax.jit
    def of(parameters, batch, targets, mask):
        module = graph.module(parameters)
        return -(label_losses(module.logits(module.read(batch).hidden_BTD), targets) * mask).sum(-1)

    return np.asarray(of(parameters, batch, np.roll(ids, -1, 1), mask)).tolist()


def test_the_loss_is_that_of_the_paper(model):
    """Pairs one by one, each text alone: -log sigmoid(beta (log pi(c)/ref(c) - log pi(r)/ref(r))), and the metrics of it."""
    config, mixed, graph = model
    with jax.set_mesh(make_mesh(Mesh(), jax.devices()[:1])):
        first, now = parameters_of(graph, 1), parameters_of(graph, 2)
        evaluator = Evaluator(graph, make_mesh(Mesh(), jax.devices()[:1]), Bytes(), 4)
        margins = dpo_reference.margins(mixed, config, "validation", first, evaluator)
        columns, split = mixed.records["validation"].columns, mixed.records["validation"].split
        columns["reference"][split.offsets[:-1]] = margins
        ((_, rows),) = mixed.held(config.data, "validation").items()
        found = evaluator(now, rows)
        columns["reference"][:] = 0
        where, values = mixed.records["validation"].where, mixed.records["validation"].values
        texts = [(value[0], value[k]) for k in (1, 2) for value in values]
        of_now, of_first = (np.reshape(log_probabilities(graph, p, texts), (2, -1)) for p in (now, first))
    margins = 0.5 * ((of_now[0] - of_first[0]) - (of_now[1] - of_first[1]))
    expected = dict(zip(where, margins.tolist(), strict=True))
    np.testing.assert_allclose(
        [r.prediction for r in found.results], [expected[r.record] for r in found.results], atol=2e-4
    )
    losses = [math.log1p(math.exp(-margin)) for margin in expected.values()]
    np.testing.assert_allclose(found.loss, sum(losses), rtol=1e-4)
    assert found.tokens == len(expected) > 3
    scores = mixed.task.scores(found.results)
    np.testing.assert_allclose(scores["accuracy"], np.mean([m > 0 for m in expected.values()]))
    np.testing.assert_allclose(scores["margin"], np.mean(list(expected.values())), atol=2e-4)


def answered(graph, parameters, batch):
    """Mean log-probability of a target of the chosen and of the rejected answers."""
    module = graph.module(parameters)
    log_BT = -loss.token_losses(module.logits(module.read(batch).hidden_BTD), batch["targets"])
    of = lambda is_own: (log_BT * is_own).sum() / is_own.sum()
    return of(batch["weight"] > 0), of(batch["weight"] < 0)


def test_it_starts_at_ln_2_and_a_step_goes_the_right_way_on_any_mesh(model):
    """On one device and on 2 x 2 x 2: the same loss and gradient; chosen answers rise, rejected ones fall."""
    config, mixed, graph = model
    columns, split = mixed.records["train"].columns, mixed.records["train"].split
    found = []
    for mesh in (Mesh(), Mesh(data=-1, fsdp=2, tensor=2)):
        mesh = make_mesh(mesh, jax.devices()[: 8 if found else 1])
        with jax.set_mesh(mesh):
            parameters = parameters_of(graph)
            evaluator = Evaluator(graph, mesh, Bytes(), 8)
            columns["reference"][split.offsets[:-1]] = dpo_reference.margins(
                mixed, config, "train", parameters, evaluator
            )
            batch = next(loader.batches(mixed.stream(config.data), mesh, 0, 1, 8))
            columns["reference"][:] = 0
            of = lambda p, batch=batch: loss.batch_loss(graph, p, batch).loss / batch["loss_mask"].sum()
            value, gradient = jax.jit(jax.value_and_grad(of))(parameters)
            np.testing.assert_allclose(value, np.log(2), rtol=3e-6)
            moved = jax.tree.map(lambda x, g: x - 1e-3 * g, parameters, gradient)
            before, after = (jax.jit(lambda p, batch=batch: answered(graph, p, batch))(p) for p in (parameters, moved))
            assert after[0] > before[0] and after[1] < before[1]
        found.append([np.asarray(value), *map(np.asarray, jax.tree.leaves(gradient))])
    for alone, sharded in zip(*found, strict=True):
        np.testing.assert_allclose(sharded, alone, rtol=1e-5, atol=1e-4)


def arguments(place: str, workdir) -> list[str]:
    given = PREFERENCE | {"data__sources": place, "train__num_steps": 12, "checkpoint__every": 4, "evaluate__every": 0}
    given |= {"model__num_layers": 1, "mesh__data": 1}
    flags = [f"--config.{name.replace('__', '.')}={value}" for name, value in given.items()]
    return ["--config", "experiments/quickstart.py:smoke", *flags, "--config.optimizer.learning_rate=3e-3",
            "--workdir", str(workdir)]  # fmt: skip


def test_a_run_prefers_and_a_killed_one_goes_on_to_the_bit(place, tmp_path, capsys):
    assert main.main(arguments(place, tmp_path / "whole")) == 0
    lines = lines_of(tmp_path / "whole")
    first = next(line for line in lines if "train/loss" in line)
    assert first["step"] == 1
    np.testing.assert_allclose(first["train/loss"], np.log(2), rtol=3e-6)
    last = [line for line in lines if "final/accuracy" in line][-1]
    assert last["final/accuracy"] == 1 and last["final/margin"] > 0.5
    line = arguments(place, tmp_path / "killed")
    kill_once_saved(line)
    kept = (tmp_path / "killed" / files.REFERENCE).read_bytes()
    (tmp_path / "killed" / files.REFERENCE).unlink()
    with pytest.raises(UserError, match="reference.npz is missing; put it back"):
        main.main(line)
    (tmp_path / "killed" / files.REFERENCE).write_bytes(kept)
    assert main.main(line) == 0
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    capsys.readouterr()
    assert evaluate.main(["--model", str(tmp_path / "whole")]) == 0
    found = json.loads(capsys.readouterr().out.strip().split("\n")[-1])
    assert found["eval/accuracy"] == last["final/accuracy"]
    np.testing.assert_allclose(found["eval/margin"], last["final/margin"], rtol=1e-4)
