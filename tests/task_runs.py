"""A small run of each task: the command, and the records that it learns from."""

from chat_templates import chat_folder
from helpers import KINDS, write_table

LETTERS = [("ab"[i % 2], "xy"[i % 2]) for i in range(400)]
ENCODER = dict(model__kind="encoder", model__norm_place="post", data__objective="masked")
TASKS = {
    "classification": (
        dict(ENCODER, model__labels=("x", "y")),
        [{"text": f"{i} {a}", "label": b} for i, (a, b) in enumerate(LETTERS)],
    ),
    "regression": ({}, [{"text": f"{i} {a}", "value": float(i)} for i, (a, _) in enumerate(LETTERS)]),
    "token_classification": (
        dict(ENCODER, model__labels=("O", "B-x")),
        [{"tokens": [str(i), a], "tags": ["O", "B-x" if a == "a" else "O"]} for i, (a, _) in enumerate(LETTERS)],
    ),
    "question_answering": (
        ENCODER,
        [{"question": a, "context": f"{i} {a} {b}", "answer": b} for i, (a, b) in enumerate(LETTERS)],
    ),
    "text_to_text": (
        dict(evaluate__metrics="answers"),
        [{"source": f"{i} {a}", "target": b} for i, (a, b) in enumerate(LETTERS)],
    ),
    "instruction": (
        {},
        [
            {"messages": [{"role": "user", "content": f"{i} {a}"}, {"role": "assistant", "content": b}]}
            for i, (a, b) in enumerate(LETTERS)
        ],
    ),
    "preference": (
        {},
        [{"prompt": f"{i} {a}", "chosen": b, "rejected": a} for i, (a, b) in enumerate(LETTERS)],
    ),
}
CASES = {name: (name, *given) for name, given in TASKS.items()} | {
    "encoder_decoder": ("text_to_text", dict(TASKS["text_to_text"][0], **KINDS["encoder_decoder"]), TASKS["text_to_text"][1])
}  # fmt: skip


def line_of(folder, case: str) -> list[str]:
    """The command of a small run of a case: dropout, two microbatches a step, a checkpoint every two steps."""
    task, changes, records = CASES[case]
    given = dict(
        train__task=task, train__num_steps=8, train__microbatch_rows=8, checkpoint__every=2, evaluate__every=4,
        evaluate__num_rows=8, evaluate__prompt="", data__global_batch_size=16, data__sequence_length=64, model__dropout=0.1,
        data__sources=write_table(folder, ".jsonl", records), data__packing="best_fit", data__tokenizer="bytes",
        data__validation_fraction=0.2, data__test_fraction=0.0,
    ) | changes  # fmt: skip
    if task == "instruction":
        given["data__tokenizer"] = chat_folder(folder)
    flags = [f"--config.{name.replace('__', '.')}={value}" for name, value in given.items()]
    return ["--config", "experiments/quickstart.py:smoke", *flags]
