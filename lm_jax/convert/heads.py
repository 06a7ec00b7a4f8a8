"""Heads of tasks: which class of `transformers` has one, what its config.json says of the labels, and what it cannot hold.

A classifier of a decoder there has no bias (`score`). Ours is added to the bias of the last norm, whose output only the head
reads: W (x + d) = W x + b for the d of least length with W d = b. A model without such a bias keeps it out, or is refused.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from lm_jax.config import Model
from lm_jax.convert.families import Family, Head
from lm_jax.errors import UserError
from lm_jax.knob import LONGEST_TUPLE
from lm_jax.model_config import TASKS

Content = dict[str, Any]  # of a config.json
TASK_CLASSES = ("SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice")
VALUE = "value"  # the name of a regression's only label


def class_name(content: Content) -> str:
    """The class that a config.json names, "" where it names none."""
    said = content.get("architectures")
    return str(said[0]) if isinstance(said, list) and said else ""


def of_class(family: Family, content: Content) -> tuple[str, Head | None]:
    """(our name of the head, the head) of the class that a config.json names; ("", None) where it is the family's own."""
    name = class_name(content)
    found = {ours: head for ours, head in family.heads.items() if head.architecture == name}
    if "value" in found and not _is_regression(content):
        found = {ours: head for ours, head in found.items() if ours != "value"}
    return list(found.items())[-1] if found else ("", None)


def read(family: Family, content: Content, where: str, config: ConfigDict) -> None:
    """Sets head, labels and task in a config, as a config.json says. Raises UserError for what is not supported."""
    ours, head = of_class(family, content)
    if head is None and (name := class_name(content)).endswith(TASK_CLASSES):
        known = ", ".join({head.architecture: None for head in family.heads.values()}) or "none"
        raise UserError(f"{where}: architectures = {name!r} is not supported; of this family are {known}")
    if not ours:
        return
    kind = content.get("problem_type")
    if kind == "multi_label_classification" or (kind == "regression" and ours != "value"):
        raise UserError(f"{where}: problem_type = {kind!r} of several labels is not supported: a text has one here")
    config.train.task = next(task for task, (name, _) in TASKS.items() if name == ours)
    config.data.packing = "best_fit"
    if ours in ("labels", "tags"):
        config.model.labels = labels(content, where)


def _is_regression(content: Content) -> bool:
    """Whether a classifier gives one number, as `transformers` decides it."""
    names = content.get("id2label")
    num = len(names) if isinstance(names, dict) else content.get("num_labels", 2)
    return num == 1 and content.get("problem_type") in (None, "regression")


def labels(content: Content, where: str) -> tuple[str, ...]:
    """The names of the labels in the order of their ids; LABEL_0, LABEL_1 where none are given. Raises UserError."""
    num = content.get("num_labels", 2)
    num = num if type(num) is int and 0 < num <= LONGEST_TUPLE else 0
    names = content.get("id2label") or {str(i): f"LABEL_{i}" for i in range(num)}
    if not isinstance(names, dict) or {*map(str, names)} != {str(i) for i in range(len(names))}:
        raise UserError(f"{where}: id2label = {str(names)[:60]} does not name each of 0, 1, 2 ... once")
    by_id = {str(i): name for i, name in names.items()}
    found = tuple(by_id[str(i)] for i in range(len(by_id)))
    if not all(isinstance(name, str) for name in found):
        raise UserError(f"{where}: id2label has a name that is no string")
    return found


def written(family: Family, model: Model) -> Content:
    """The fields of config.json for a model with a head; {} of one without, or where the family has no such class."""
    head = family.heads.get(model.head)
    if not model.head or head is None:
        return {}
    names = {"value": (VALUE,)}.get(model.head, model.labels)
    fields: Content = {"architectures": [head.architecture]}
    fields |= {"problem_type": "regression"} if model.head == "value" else {}
    fields |= {"problem_type": "single_label_classification"} if model.head == "labels" else {}
    if names:
        fields["id2label"] = {str(i): name for i, name in enumerate(names)}
        fields["label2id"] = {name: i for i, name in enumerate(names)}
    return fields


def without_unused(family: Family, content: Content, parameters: dict) -> Content:
    """The config.json of an encoder for which nothing but masked tokens was learnt: the class that has no other head."""
    alone = family.heads.get("")
    others = [parameters[name]["kernel"] for name in ("pooler", "next_sentence") if name in parameters]
    if alone is None or len(others) < 2 or any(np.any(np.asarray(x)) for x in others):
        return content
    return content | {"architectures": [alone.architecture]}


def expressible(parameters: dict, model: Model, values: Sequence[float]) -> tuple[dict, str]:
    """(parameters of a model with a head as its class has them, what is then to be known of its answers: "" = nothing).

    `values` is (mean, standard deviation) of what a regression learnt from, () of another: there it answers in the records'
    own units.
    """
    if model.head not in ("labels", "value"):
        return parameters, ""
    head, norm, told = dict(parameters["labels"]), dict(parameters.get("norm", {})), ""
    is_decoder = model.kind != "encoder"
    if model.head == "value" and not values:
        told = (
            "nobody says the mean and the deviation that it was trained with: it answers in deviations from that mean"
        )
    elif model.head == "value":
        mean, deviation = values
        head = {name: np.asarray(x, np.float64) * deviation for name, x in head.items()}
        if "bias" in head and (not is_decoder or "bias" in norm):
            head["bias"] = head["bias"] + mean
        else:
            told = f"its class has no bias: add {mean:.6g} to what it answers"
    if is_decoder and "bias" in head and "bias" in norm:
        kernel = np.asarray(head["kernel"], np.float64)
        added = np.linalg.lstsq(kernel.T, np.asarray(head["bias"], np.float64))[0]
        norm["bias"] = (np.asarray(norm["bias"], np.float64) + added).astype(np.float32)
        head["bias"] = np.zeros_like(head["bias"])
    head = {name: np.asarray(x, np.float32) for name, x in head.items()}
    return parameters | {"labels": head} | ({"norm": norm} if norm else {}), told
