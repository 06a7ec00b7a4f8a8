"""Answers of words and spans: which piece is asked, what is seen of what, what comes back as text, what users get wrong."""

import functools
import json

import jax
import numpy as np
import optax
import pytest
from helpers import tiny

from lm_jax.config import Mesh
from lm_jax.data import loader
from lm_jax.data.tokenizer import Bytes
from lm_jax.errors import UserError
from lm_jax.evaluator import Evaluator
from lm_jax.loss import batch_loss
from lm_jax.mesh import make_mesh
from lm_jax.model import task_heads
from lm_jax.model.build import build
from lm_jax.open_data import open_data
from lm_jax.tasks.questions import QuestionAnswering, best_span, windows
from lm_jax.tasks.results import Result
from lm_jax.tasks.tags import TokenClassification
from lm_jax.tasks.words import spaced, tokens_of_words, units

END = 256  # of the byte tokenizer, before and after a text
ALL = dict(
    data__packing="best_fit", data__tokenizer="bytes", data__global_batch_size=1, train__microbatch_rows=1,
    data__validation_fraction=0.0, data__test_fraction=0.0,
)  # fmt: skip
ENCODER = ALL | dict(
    model__kind="encoder", model__norm_place="post", data__objective="masked", model__num_layers=1,
)  # fmt: skip
LABELS = ("O", "B-num", "I-num")
TAGS = dict(train__task="token_classification", model__labels=LABELS)
SPANS = dict(train__task="question_answering")
WORDS = [
    {"tokens": ["a", "12", "345", "bc"], "tags": ["O", "B-num", "I-num", "O"]},
    {"tokens": ["6", "x"], "tags": ["B-num", "O"]},
]
ASKED = [
    {"question": "who?", "context": "It was Ada Lovelace, then.", "answer": "Ada Lovelace"},
    {"question": "when?", "context": "in 1843; in 1843", "answer": ["1843", "in 1843"], "start": 12},
    {"question": "why?", "context": "no one knows", "answer": ""},
]


def write(folder, records: list, name: str = "train") -> str:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (folder / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines))
    return str(folder)


def opened(folder, records: list, *settings: dict, log=lambda line: None):
    """Config, task data, and the segments of the records to train on, in their order."""
    changes = functools.reduce(dict.__or__, settings, {"data__sources": write(folder, records)})
    config = tiny(**changes)
    data = open_data(config, log)
    return config, data, [data.records["train"].segment(k) for k in range(len(data.records["train"].where))]


def ids(text: str) -> list[int]:
    return list(text.encode())


@pytest.mark.parametrize("settings", [ENCODER, ALL], ids=["encoder", "decoder"])
def test_of_every_word_one_piece_is_asked(tmp_path, settings):
    """Of an encoder the first, of a model that writes from left to right the last, which has seen all of the word."""
    _, _, segments = opened(tmp_path, WORDS, settings, TAGS)
    encoder = settings is ENCODER
    for record, segment in zip(WORDS, segments, strict=True):
        words = [ids(word) for word in spaced(tuple(record["tokens"]))]
        tokens, asked = [END] * encoder, []
        for word in words:
            asked.append(len(tokens) if encoder else len(tokens) + len(word) - 1)
            tokens += word
        assert segment["tokens"].tolist() == [*tokens, END]
        assert np.flatnonzero(segment["loss_mask"]).tolist() == asked
        assert segment["targets"][asked].tolist() == [LABELS.index(tag) for tag in record["tags"]]
        assert segment["targets"].sum() == segment["targets"][asked].sum()


def test_a_word_without_a_piece_is_asked_all_the_same():
    class Deaf(Bytes):
        special = {"[UNK]": 7}

        def encode(self, text: str) -> np.ndarray:
            return super().encode(text.replace("\u200b", ""))

    found = tokens_of_words([["a", "\u200b"], ["a"]], Deaf())
    assert [[piece.tolist() for piece in pieces] for pieces in found] == [[[97], [7]], [[97]]]


def test_words_that_do_not_fit_are_cut_and_counted(tmp_path):
    said: list[str] = []
    long = {"tokens": ["xyz"] * 20, "tags": ["O"] * 19 + ["B-num"]}
    place = tmp_path / "train.jsonl"
    _, _, segments = opened(tmp_path, [*WORDS, long], ENCODER, TAGS, log=said.append)
    assert f"train: 1 of 3 records cut to 64 tokens, the first at {place} line 3" in said
    assert segments[2]["loss_mask"].sum() == 15 and len(segments[2]["tokens"]) == 2 + 15 * 4 - 1


def test_scores_of_tags_are_of_whole_spans_and_of_words():
    task = TokenClassification(tiny(**ENCODER | TAGS))
    truth, guess = [["B-num", "I-num", "O"], ["O", "B-num"]], [["B-num", "O", "O"], ["O", "B-num"]]
    found = task.scores(tuple(Result("", a, b) for a, b in zip(truth, guess, strict=True)))
    assert found["span_f1"] == 0.5 and found["accuracy"] == 0.8 and next(iter(found)) == "span_f1"
    np.testing.assert_allclose(found["macro_f1"], (4 / 5 + 1 + 0) / 3)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("It's  1843.", [("It", 0, 2), ("'", 2, 3), ("s", 3, 4), ("  1843", 6, 10), (".", 10, 11)]),
        ("  中文，x ", [("  中文", 2, 4), ("，", 4, 5), ("x", 5, 6)]),
    ],
)
def test_units_are_words_and_marks_with_their_characters(text, parts):
    assert [tuple(unit) for unit in units(text)] == parts


def test_an_answer_is_found_among_the_pieces(tmp_path):
    _, data, segments = opened(tmp_path, ASKED, ENCODER, SPANS)
    for (start, stop), record, segment in zip([(7, 19), (12, 16), (0, 0)], ASKED, segments, strict=True):
        question, context = ids(record["question"]), ids(record["context"])
        assert segment["tokens"].tolist() == [END, *question, END, *context, END]
        first = len(question) + 2
        assert segment["token_type_ids"].tolist() == [0] * first + [1] * (len(context) + 1)
        assert np.flatnonzero(segment["loss_mask"]).tolist() == [0]
        targets = segment["targets"]
        begin = first + start - (record["context"][start - 1] == " ") if stop else 0  # a word has the space before it
        assert np.flatnonzero(targets & task_heads.STARTS).tolist() == [begin]
        assert np.flatnonzero(targets & task_heads.ENDS).tolist() == [first + stop - 1 if stop else 0]
        ends = [first + unit.stop - 1 for unit in units(record["context"])]
        assert np.flatnonzero(targets & task_heads.MAY_END).tolist() == [0, *ends]
        assert np.flatnonzero(targets & task_heads.MAY_START).tolist() == [0, first, *(end + 1 for end in ends[:-1])]


def test_what_is_predicted_is_a_part_of_the_context(tmp_path):
    """Logits that are sure of the right places give back the answer, whatever they say of places where none may be."""
    _, data, segments = opened(tmp_path, ASKED, ENCODER, SPANS)
    found = []
    for value, segment in zip(data.records["train"].values, segments, strict=True):
        logits = np.stack(
            [segment["targets"] & task_heads.STARTS, segment["targets"] & task_heads.ENDS], axis=1
        ).astype(float)
        logits[1] = 100.0
        found.append(data.task.result("here", value, segment, logits))
    assert [result.prediction for result in found[:2]] == ["Ada Lovelace", "1843"]
    assert [round(result.confidence, 3) for result in found] == [1, 1, 0]
    assert found[1].truth == ["1843", "in 1843"] and found[2].truth == []


def test_the_best_span_is_legal():
    logits = np.array([[9, 9], [0, 5], [4, 0], [0, 1.0]])
    starts = ends = np.array([1, 2, 3])
    assert best_span(logits, starts, ends) == (0, 0, 5.0)
    logits[1] = 0, -9  # the best end is before the best start no more
    assert best_span(logits, starts, ends) == (1, 2, 5.0)
    far = np.zeros((99, 2))
    far[0, 0] = far[98, 1] = 7.0
    begin, end, score = best_span(far, np.arange(99), np.arange(99))
    assert score == 7.0 and 0 <= end - begin < 64


def test_windows_overlap_and_miss_nothing():
    assert windows([1] * 10, 10) == [(0, 10)]
    assert windows([1] * 10, 6) == [(0, 6), (3, 9), (6, 10)]
    assert windows([2, 9, 2], 4) == [(0, 1), (1, 2), (2, 3)]
    random = np.random.default_rng(0)
    for _ in range(50):
        sizes, room = random.integers(1, 5, random.integers(1, 60)).tolist(), int(random.integers(8, 30))
        found = windows(sizes, room)
        assert all(sum(sizes[a:b]) <= room for a, b in found) and (found[0][0], found[-1][1]) == (0, len(sizes))
        for k in range(len(sizes)):  # whatever is at most a fourth of the room long is whole in one of them
            stop = k + 1
            while stop < len(sizes) and sum(sizes[k : stop + 1]) <= room // 4:
                stop += 1
            assert any(a <= k and stop <= b for a, b in found)


def test_a_long_context_is_seen_through_windows_and_answered_once(tmp_path):
    context = " ".join(f"w{k:02}" for k in range(40))  # 159 characters, rows of 64
    records = [{"question": "q", "context": context, "answer": "w20 w21"}, ASKED[0]]
    said: list[str] = []
    _, data, segments = opened(tmp_path, records, ENCODER, SPANS, log=said.append)
    assert f"train: 2 records in {len(segments)} overlapping windows of up to 64 tokens" in said
    assert len(segments) == 6 and not any("cut" in line for line in said)
    answered = [bool(segment["targets"][0] & task_heads.STARTS) for segment in segments[:-1]]
    assert answered.count(False) >= 1
    results = [Result("a", ["x"], "low", 0.2), Result("b", [], "no", 0.1), Result("a", ["x"], "x", 0.4)]
    joined = data.task.joined(tuple(results))
    assert [(r.record, r.prediction) for r in joined] == [("a", "x"), ("b", "no")]
    data.task.has_unanswered = True  # then what is less probable than no answer is none
    assert [r.prediction for r in data.task.joined(tuple(results))] == ["", ""]


def test_scores_of_answers_are_the_best_of_those_that_are_right():
    task = QuestionAnswering(tiny(**ENCODER | SPANS))
    pairs = [(["the Ada", "Ada Lovelace"], "ada lovelace!"), ([], ""), (["1843"], "in 1843"), ([], "x")]
    found = task.scores(tuple(Result("", a, b) for a, b in pairs))
    np.testing.assert_allclose([found["exact_match"], found["f1"]], [0.5, (1 + 1 + 2 / 3) / 4])


def test_the_loss_of_a_span_is_of_its_segment_alone(tmp_path):
    """Packed rows, on one device and on eight: as much as each segment alone, by its own formula."""
    config, data, _ = opened(tmp_path, ASKED * 8, ENCODER, SPANS, dict(data__sequence_length=96))
    stream = data.stream(config.data)
    batch = stream.rows(list(range(8)))
    assert batch["segment_ids"].max() > 1
    logits = np.random.default_rng(0).normal(size=(8, 96, 2)).astype(np.float32)
    expected = []
    for b, t in zip(*np.nonzero(batch["loss_mask"]), strict=True):
        own = batch["segment_ids"][b] == batch["segment_ids"][b, t]
        of = lambda bit, b=b, own=own: own & (batch["targets"][b] & bit > 0)
        parts = []
        for k, (may, does) in enumerate(
            ((task_heads.MAY_START, task_heads.STARTS), (task_heads.MAY_END, task_heads.ENDS))
        ):
            (answer,) = logits[b, of(does), k]
            parts.append(np.log(np.exp(logits[b, of(may), k].astype(float)).sum()) - answer)
        expected.append(np.mean(parts))
    for num in (1, 8):
        mesh = make_mesh(Mesh(), jax.devices()[:num])
        with jax.set_mesh(mesh):
            spread = loader.layout(mesh, 1)
            on_mesh = {name: jax.device_put(x, spread) for name, x in batch.items()}
            found = jax.jit(lambda x, rows: task_heads.losses("spans", x, rows))(
                jax.device_put(logits, spread), on_mesh
            )
        np.testing.assert_allclose(np.asarray(found)[batch["loss_mask"] > 0], expected, rtol=1e-5)


def learnt(config, data, steps: int = 60, rate: float = 3e-3) -> tuple[tuple, dict[str, float]]:
    """Results and scores of the validation split after some steps on all records at once."""
    graph = build(config.model, 258, config.data.sequence_length)
    stream = data.stream(config.data)
    batch = stream.rows(list(range(int(stream.rows_per_epoch))))
    mesh = make_mesh(Mesh(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        parameters = jax.jit(lambda: graph.init(jax.random.key(0), sharded=True))()
        rule = optax.adam(rate)
        loss = lambda p, rows: batch_loss(graph, p, rows).loss / batch["loss_mask"].sum()

        @jax.jit
        def step(p, state, rows):
            changes, state = rule.update(jax.grad(loss)(p, rows), state)
            return optax.apply_updates(p, changes), state

        state = jax.jit(rule.init)(parameters)
        for _ in range(steps):
            parameters, state = step(parameters, state, batch)
        ((_, held),) = data.held(config.data, "validation").items()
        totals = Evaluator(graph, mesh, Bytes(), 4)(parameters, held)
    return totals.results, data.task.scores(totals.results)


def sentences(num: int) -> list[list[str]]:
    random = np.random.default_rng(0)
    word = lambda: "".join(random.choice(list("abcd"), 3))
    number = lambda: str(random.integers(10, 1000))
    return [[word(), word(), number(), word()][random.integers(0, 2) :] + [word()] for _ in range(num)]


def test_tags_are_learnt(tmp_path):
    records = [
        {"tokens": words, "tags": ["B-num" if word.isdigit() else "O" for word in words]} for words in sentences(80)
    ]
    write(tmp_path, records[60:], "validation")
    config, data, _ = opened(tmp_path, records[:60], ENCODER, TAGS)
    _, scores = learnt(config, data)
    assert scores["span_f1"] > 0.9


def test_answers_are_learnt_and_so_is_that_there_is_none(tmp_path):
    records = []
    for k, words in enumerate(sentences(120)):
        (number,) = (word for word in words if word.isdigit())
        words = words if k % 3 else [word for word in words if word != number]
        words = words if k % 8 else words + ["dddd"] * 14  # two windows
        records.append({"question": "n", "context": " ".join(words), "answer": number if k % 3 else ""})
    write(tmp_path, records[90:], "validation")
    config, data, _ = opened(tmp_path, records[:90], ENCODER, SPANS)
    results, scores = learnt(config, data, 120)
    assert len(data.records["validation"].where) == 33 and len(results) == len({r.record for r in results}) == 30
    assert scores["exact_match"] > 0.9


MISTAKES = [
    (TAGS, '{"tokens": ["a", "b"], "tags": ["O"]}', "2 words and 1 tags; each word has one"),
    (TAGS, '{"tokens": ["a"], "tags": ["B-nun"]}', "label 'B-nun' is none of config.model.labels: O, B-num, I-num; did"),
    (TAGS, '{"tokens": [], "tags": []}', "the tokens are empty"),
    (TAGS, '{"tokens": {"a": 1}, "tags": []}', "the tokens are no list"),
    (TAGS, '{"tokens": ["a", " "], "tags": ["O", "O"]}', "word 2 is empty"),
    (TAGS, '{"words": ["a"], "tags": ["O"]}', "has no column 'tokens', only 'words', 'tags'"),
    (SPANS, '{"question": "q", "context": "a b", "answer": "c"}', "the answer 'c' does not stand in the context"),
    (SPANS, '{"question": "q", "context": "a b", "answer": "b", "start": 1}', "stands no 'b'; it stands at 2"),
    (SPANS, '{"question": "q", "context": "a b", "answer": "b", "start": "x"}', "the start 'x' is no finite number"),
    (SPANS, '{"question": "q", "context": "a b", "answer": 3}', "the answer is no string"),
    (SPANS, '{"question": " ", "context": "a b", "answer": "a"}', "the question is empty"),
    (SPANS, '{"question": "q", "contxt": "a b", "answer": "a"}', "; did you mean contxt?"),
    (SPANS, json.dumps({"question": "q", "context": "a " * 90, "answer": "a " * 80 + "a"}), "is longer than what a row has"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "line", "words"), MISTAKES)
def test_what_users_get_wrong_is_said_with_file_and_line(tmp_path, settings, line, words):
    with pytest.raises(UserError) as error:
        opened(tmp_path, [(WORDS if settings is TAGS else ASKED)[0], line], ENCODER, settings)
    assert f"{tmp_path}/train.jsonl line 2" in str(error.value) and words in str(error.value)


def test_a_decoder_is_asked_for_no_spans():
    with pytest.raises(UserError, match="question_answering needs a model of kind encoder, not transformer"):
        tiny(**ALL | SPANS)
