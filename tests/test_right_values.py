"""What a record has wrong is answered with what would be right: a value of the right name and the wrong type most of all."""

import pytest
from helpers import tiny

from lm_jax.errors import UserError
from lm_jax.tasks import TASKS
from lm_jax.tasks.conversations import messages_of
from lm_jax.tasks.tables import Row

BASE = dict(data__packing="best_fit", data__tokenizer="bytes")
ENCODER = dict(model__kind="encoder", model__norm_place="post", data__objective="masked")
SETTINGS = {
    "classification": dict(model__labels=("False", "True", "not sure")),
    "regression": {},
    "token_classification": dict(model__labels=("O", "1")),
    "question_answering": ENCODER,
    "text_to_text": {},
    "preference": {},
}
USER, SAID = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
ASKED = {"question": "q", "context": "a b 1843"}


def labelled(label) -> dict:
    return {"text": "a", "label": label}


# (task, record, what is said of it)
WRONG = [
    (
        "classification",
        labelled(False),
        'label false (no string) is none of config.model.labels: False, True, not sure; write "False"',
    ),
    (
        "classification",
        labelled("false"),
        "label 'false' is none of config.model.labels: False, True, not sure; did you mean False?",
    ),
    ("classification", labelled(" Not Sure "), "label ' Not Sure ' is none of"),
    ("classification", labelled(" Not Sure "), "did you mean not sure?"),
    (
        "classification",
        labelled(2),
        'False, True, not sure; where they are counted from 0, write "not sure"',
    ),
    (
        "classification",
        labelled(None),
        "label null is none of config.model.labels: False, True, not sure; a record has one label, a string",
    ),
    ("classification", labelled(["True"]), "label a list of 1 is none of"),
    ("classification", labelled(float("nan")), "label the number nan is none of"),
    ("classification", {"text": 3, "label": "True"}, 'the text is no string but the number 3: write "3", in quotes'),
    (
        "classification",
        {"text": True, "label": "True"},
        'the text is no string but true (no string): write "true", in quotes',
    ),
    ("classification", {"text": None, "label": "True"}, "the text is no string but null"),
    ("classification", {"text": ["a", "b"], "label": "True"}, "the text is no string but a list of 2"),
    ("classification", {"text": {"en": "a"}, "label": "True"}, "the text is no string but an object with en"),
    ("classification", {"text": " \n", "label": "True"}, "the text is empty"),
    (
        "token_classification",
        {"tokens": ["a"], "tags": [1.0]},
        'label the number 1.0 is none of config.model.labels: O, 1; write "1"',
    ),
    (
        "token_classification",
        {"tokens": ["a", 3], "tags": ["O", "O"]},
        'word 2 is no string but the number 3: write "3", in quotes',
    ),
    (
        "token_classification",
        {"tokens": 3, "tags": ["O"]},
        "the tokens are no list but the number 3; expected is one for each word",
    ),
    ("regression", {"text": "a", "value": "8,5"}, "the value '8,5' is no finite number; did you mean 8.5?"),
    ("regression", {"text": "a", "value": "1_000"}, "the value '1_000' is no finite number; did you mean 1000?"),
    ("regression", {"text": "a", "value": "\u22128.5"}, "did you mean -8.5?"),
    ("regression", {"text": "a", "value": True}, "the value true (no string) is no finite number"),
    ("regression", {"text": "a", "value": "high"}, "the value 'high' is no finite number"),
    ("regression", {"text": "a", "value": 10**400}, "is no finite number"),
    ("regression", {"text": "a", "value": "1e999"}, "the value '1e999' is no finite number"),
    ("regression", {"text": "a", "value": [1]}, "the value a list of 1 is no finite number"),
    (
        "question_answering",
        ASKED | {"answer": 1843},
        'the answer is no string but the number 1843: write "1843", in quotes',
    ),
    ("question_answering", ASKED | {"answer": {"text": ["a"]}}, "the answer is no string but an object with text"),
    ("question_answering", ASKED | {"answer": ["", "a"]}, "a list of answers holds texts that are not empty"),
    ("question_answering", ASKED | {"answer": []}, "a list of answers holds texts"),
    ("question_answering", ASKED | {"answer": "a", "start": 0.5}, "the start 0.5 is no whole number of characters"),
    ("question_answering", ASKED | {"answer": "a", "start": True}, "the start true (no string) is no finite number"),
    ("text_to_text", {"source": ["a"], "target": "b"}, "the source is no string but a list of 1"),
    ("preference", {"prompt": "a", "chosen": [SAID], "rejected": "c"}, "rejected is no list of messages"),
    (
        "preference",
        {"prompt": 3, "chosen": "b", "rejected": "c"},
        'the prompt is no string but the number 3: write "3", in quotes',
    ),
    ("instruction", {"messages": "[]"}, "but '[]'; a cell of a table cannot be one: give JSON lines"),
    (
        "instruction",
        {"messages": {"role": "user"}},
        'no list of messages {"role": "user", "content": "..."} but an object with role',
    ),
    (
        "instruction",
        {"messages": [{"from": "human", "text": "a"}]},
        'message 1 is no {"role": "user", "content": "..."} but an object with from, text',
    ),
    (
        "instruction",
        {"messages": [{"role": "USER ", "content": "a"}]},
        "role 'USER ' is none of system, user, assistant; did you mean user?",
    ),
    ("instruction", {"messages": [{"role": ["user"], "content": "a"}]}, "role ['user'] is none of"),
    (
        "instruction",
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        'its content holds an object with type: only parts {"type": "text", "text": "..."} are read',
    ),
    (
        "instruction",
        {"messages": [{"role": "user", "content": 5}]},
        'its content is no string but the number 5: write "5", in quotes',
    ),
]
RIGHT = [
    ("classification", labelled("not sure"), 2),
    ("token_classification", {"tokens": ["a"], "tags": [1]}, (1,)),
    ("token_classification", {"tokens": "a\u3000b c\x85d", "tags": "O 1"}, (0, 1)),
    ("regression", {"text": "a", "value": " 8.5e0 "}, 8.5),
    ("regression", {"text": "a", "value": 3}, 3.0),
]


def parse(task: str, record: dict):
    row = Row(record, "train.jsonl line 7")
    if task == "instruction":
        return messages_of(row)
    return TASKS[task](tiny(**BASE | {"train__task": task} | SETTINGS[task])).parse(row)


@pytest.mark.parametrize(("task", "record", "words"), WRONG, ids=[f"{w[0]} {w[2][:50]}" for w in WRONG])
def test_what_would_be_right_is_said(task, record, words):
    with pytest.raises(UserError) as error:
        parse(task, record)
    assert str(error.value).startswith("train.jsonl line 7: ") and words in str(error.value), error.value


@pytest.mark.parametrize(("task", "record", "value"), RIGHT)
def test_what_is_right_is_taken(task, record, value):
    assert parse(task, record)[1] == value
