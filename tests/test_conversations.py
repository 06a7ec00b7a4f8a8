"""Conversations and pairs as people publish them are, token by token, the rows of the same words as `messages`."""

import json

import numpy as np
import pytest
from chat_templates import chat_folder
from helpers import tiny

from lm_jax.errors import UserError
from lm_jax.open_data import open_data

SYSTEM = {"role": "system", "content": "Be short."}
USER, MORE = ({"role": "user", "content": words} for words in ("Name a colour.", "Which?\nOf paint."))
BLUE, RED = ({"role": "assistant", "content": words} for words in ("Blue.", "Red."))
TOLD = {"from": "human", "value": USER["content"]}, {"from": "gpt", "value": BLUE["content"]}


def parts(message: dict, *texts: str) -> dict:
    return message | {"content": [{"type": "text", "text": text} for text in texts]}


# (what somebody publishes, the same as messages)
SAME = {
    "text parts": ({"messages": [parts(USER, "Name ", "a colour."), parts(BLUE, "Blue.")]}, [USER, BLUE]),
    "ShareGPT": ({"conversations": TOLD, "id": "7"}, [USER, BLUE]),
    "ShareGPT, a system": ({"conversations": TOLD, "system": "Be short."}, [SYSTEM, USER, BLUE]),
    "ShareGPT, an empty system": ({"conversations": TOLD, "system": ""}, [USER, BLUE]),
    "ShareGPT's turns as messages": ({"messages": TOLD}, [USER, BLUE]),
    "messages as conversations": ({"conversations": [USER, BLUE]}, [USER, BLUE]),
    "TRL": ({"prompt": [SYSTEM, USER], "completion": [BLUE]}, [SYSTEM, USER, BLUE]),
    "TRL, several turns": ({"prompt": [USER, RED, MORE], "completion": [BLUE]}, [USER, RED, MORE, BLUE]),
    "messages win": ({"prompt": "Name a colour.", "messages": [USER, BLUE]}, [USER, BLUE]),
    "Alpaca": ({"instruction": "Name a colour.", "input": "", "output": "Blue."}, [USER, BLUE]),
    "Alpaca without input": ({"instruction": "Name a colour.", "output": "Blue."}, [USER, BLUE]),
    "Alpaca, an input": ({"instruction": "Which?", "input": "Of paint.", "output": "Red."}, [MORE, RED]),
    "Alpaca, a system": (
        {"instruction": "Name a colour.", "input": None, "output": "Blue.", "system": "Be short.", "history": []},
        [SYSTEM, USER, BLUE],
    ),
    "a weight of 1": ({"messages": [USER, BLUE | {"weight": 1}]}, [USER, BLUE]),
}
PAIR = {"prompt": [USER], "chosen": "Blue.", "rejected": "Red."}
LONGER = {"prompt": [USER, RED, MORE], "chosen": "Blue.", "rejected": "Red."}
SAME_PAIRS = {
    "answers as lists": ({"prompt": [USER], "chosen": [BLUE], "rejected": [RED]}, PAIR),
    "whole conversations": ({"chosen": [USER, BLUE], "rejected": [USER, RED]}, PAIR),
    "whole conversations, a prompt beside them": (
        {"prompt": "Name a colour.", "chosen": [USER, BLUE], "rejected": [USER, RED]},
        PAIR,
    ),
    "a text and lists": ({"prompt": "Name a colour.", "chosen": [BLUE], "rejected": [RED]}, PAIR),
    "a list and whole conversations": ({"prompt": [USER], "chosen": [USER, BLUE], "rejected": [USER, RED]}, PAIR),
    "several turns": ({"chosen": [USER, RED, MORE, BLUE], "rejected": [USER, RED, MORE, RED]}, LONGER),
    "ShareGPT's turns": ({"chosen": TOLD, "rejected": [TOLD[0], {"from": "gpt", "value": "Red."}]}, PAIR),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    return chat_folder(tmp_path_factory.mktemp("chat"))


def opened(folder, tokenizer: str, task: str, records: list, **changes):
    (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    given = dict(train__task=task, data__sources=str(folder), data__tokenizer=tokenizer, data__packing="best_fit")
    given |= dict(data__global_batch_size=1, train__microbatch_rows=1, data__sequence_length=256)
    config = tiny(**given | dict(data__validation_fraction=0.0, data__test_fraction=0.0) | changes)
    return open_data(config), config


def row(*args) -> dict:
    mixture, config = opened(*args)
    return mixture.stream(config.data).row(0)


@pytest.mark.parametrize("name", [*SAME, *SAME_PAIRS])
def test_its_rows_are_those_of_messages(name, tokenizer, tmp_path):
    task = "instruction" if name in SAME else "preference"
    theirs, ours = SAME[name] if name in SAME else SAME_PAIRS[name]
    found = row(tmp_path, tokenizer, task, [theirs])
    wanted = row(tmp_path, tokenizer, task, [{"messages": ours} if name in SAME else ours])
    assert found.keys() == wanted.keys() and found["loss_mask"].any()
    for column in wanted:
        np.testing.assert_array_equal(found[column], wanted[column])


def test_records_of_several_layouts_stand_in_one_file(tokenizer, tmp_path):
    mixture, _ = opened(tmp_path, tokenizer, "instruction", [theirs for theirs, _ in SAME.values()])
    said = [values[0] for values in mixture.records["train"].values]
    assert said == [ours for _, ours in SAME.values()]


MISTAKES = [
    ({"prompt": "a", "completion": "b"}, "prompt is a text, not a list of messages:\n--config.train.task=text_to_text"),
    ({"prompt": [USER], "completion": [USER]}, "no message is an assistant's"),
    ({"instruction": " ", "output": "b"}, "the instruction is empty"),
    ({"instruction": "a", "output": ""}, "message 2 (assistant) is empty"),
    ({"instruction": "a", "input": 3, "output": "b"}, "the input is no string but the number 3"),
    ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "has a history, which is not read"),
    ({"conversations": [{"from": "bing", "value": "a"}]}, "role 'bing' is none of system, user, assistant"),
    ({"conversations": "a", "system": "b"}, "conversations is no list of messages"),
    ({"conversations": TOLD, "system": 5}, "message 1 (system) has no text"),
    ({"messages": [parts(USER, "a") | {"content": [{"type": "image_url"}]}]}, "a part of type 'image_url'"),
    ({"messages": [USER, BLUE | {"weight": 0}]}, "message 2 has weight 0: every answer is learnt alike"),
    ({"words": [USER, BLUE]}, "conversations, or prompt with completion, or instruction with output would be read too"),
]
MISTAKEN_PAIRS = [
    ({"chosen": "a", "rejected": "b"}, "has no prompt: only two whole conversations may leave it out"),
    ({"chosen": [USER, BLUE], "rejected": [MORE, RED]}, "begin with different messages, and there is no prompt"),
    ({"prompt": "What?", "chosen": [USER, BLUE], "rejected": [USER, RED]}, "other words than the prompt 'What?'"),
    ({"prompt": [MORE], "chosen": [USER, BLUE], "rejected": [USER, RED]}, "chosen is user, assistant: one message"),
    ({"prompt": [USER], "chosen": [BLUE], "rejected": [RED, USER, RED]}, "rejected is assistant, user, assistant"),
    ({"prompt": [USER], "chosen": [RED, USER, BLUE], "rejected": [RED]}, "chosen is assistant, user, assistant"),
    ({"prompt": [USER], "chosen": [BLUE], "rejected": [BLUE]}, "are the same text 'Blue.'"),
    ({"prompt": [USER], "chosen": [BLUE], "rejected": []}, "rejected is no list of messages"),
]


@pytest.mark.parametrize(("record", "words"), MISTAKES + MISTAKEN_PAIRS)
def test_what_is_none_of_them_is_answered(record, words, tokenizer, tmp_path):
    is_pair = (record, words) in MISTAKEN_PAIRS
    right = PAIR if is_pair else {"messages": [USER, BLUE]}
    with pytest.raises(UserError) as error:
        opened(tmp_path, tokenizer, "preference" if is_pair else "instruction", [right, record])
    assert f"{tmp_path}/train.jsonl line 2" in str(error.value) and words in str(error.value)


def test_a_column_that_is_named_is_the_one_that_is_read(tokenizer, tmp_path):
    records = [{"talk": TOLD, "conversations": [USER, RED]}]
    mixture, _ = opened(tmp_path, tokenizer, "instruction", records, data__columns=("talk",))
    assert mixture.records["train"].values[0][0] == [USER, BLUE]
