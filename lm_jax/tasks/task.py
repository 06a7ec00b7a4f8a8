"""What a task is: it turns records into segments with targets, and what a model answers into results and their scores."""

from typing import Any, NamedTuple

import numpy as np

from lm_jax.config import Config, UserError, nearest
from lm_jax.data.tokenizer import Tokenizer
from lm_jax.tasks.tables import Row

Segment = dict[str, np.ndarray]  # [n] each: tokens, targets, loss_mask, and what else a row of the task has
TARGET = {"value": np.float32}  # other heads: int32


class Result(NamedTuple):
    """What a model made of one record."""

    record: str  # file and line
    truth: Any
    prediction: Any
    confidence: float = 0.0  # probability of the prediction, where the model has one


class Encoded(NamedTuple):
    segment: Segment
    whole: int  # tokens that the record has; the segment holds fewer where it was cut
    first: int = 0  # of its tokens, those of a segment of their own; 0 = all are one
    unlearnt: int = 0  # of its answers, those that are read and not learnt


class Task:
    """One task; a subclass each. `columns` are the names that its records have, and `optional` those that they may have, as
    `data.columns` may rename them."""

    columns: tuple[str, ...]
    optional: tuple[str, ...] = ()
    kind = ""  # of its results, in lm_jax/tasks/scores.py
    writes = False  # whether its answers are texts that a model writes
    chat_template: Any = None  # chat.Template in which it writes conversations
    compares = False  # whether its loss compares a model with the first parameters

    def __init__(self, config: Config):
        self.config, self.labels = config, config.model.labels
        given = config.data.columns
        fewest, most = len(self.columns), len(self.columns) + len(self.optional)
        if given and not fewest <= len(given) <= most:
            further = f", and perhaps {', '.join(self.optional)}" if self.optional else ""
            raise UserError(f"config.data.columns = {given}: {config.train.task} has {fewest}: {self.columns}{further}")
        self.names = given or self.columns

    def parse(self, row: Row) -> tuple:
        """The checked values of a row's columns. Raises UserError that says where."""
        raise NotImplementedError

    def text(self, values: tuple) -> str:
        """What of a record decides its split, and must not stand in two."""
        return values[0]

    def look(self, values: list[tuple]) -> None:
        """What a task has to know of the records to train on before it reads an answer."""

    def spread(self, found: list[tuple[str, tuple]], by: Tokenizer, room: int) -> list[tuple[str, tuple]]:
        """Records (file and line, values) of which one may need several segments, as one for each; `joined` undoes it."""
        return found

    def texts(self, values: tuple) -> tuple[str, ...]:
        """All texts of a record, for a tokenizer to be trained on."""
        return (self.text(values),)

    def encode(self, values: list[tuple], by: Tokenizer, room: int) -> list[Encoded]:
        """Records -> segments of at most `room` tokens."""
        raise NotImplementedError

    def result(self, where: str, values: tuple, segment: Segment, logits_NC: np.ndarray) -> Result:
        """What the logits of a record's segment say."""
        raise NotImplementedError

    def joined(self, results: tuple) -> tuple:
        """Results of segments -> one of each record."""
        return results

    def question(self, values: tuple, by: Tokenizer, room: int) -> np.ndarray:
        """The ids, at most `room`, after which a model writes its answer."""
        raise NotImplementedError

    def truth(self, values: tuple) -> str:
        """The answer that a record has."""
        raise NotImplementedError

    def written(self, where: str, values: tuple, text: str) -> Result:
        """What a model wrote for a record, without the white space around it."""
        return Result(where, self.truth(values).strip(), text.strip())

    def ends(self, by: Tokenizer) -> tuple[int, ...]:
        """The pieces of which any ends an answer."""
        return (by.document_id,)

    def scores(self, results: tuple) -> dict[str, float]:
        """The task's metrics, the first of which is what one looks at; none where texts are written (lm_jax/answers.py)."""
        return {}

    def kept(self, results: tuple) -> tuple[str, tuple]:
        """What is kept of results, record by record: their kind (lm_jax/tasks/scores.py; "" = nothing) and themselves."""
        return self.kind, results

    def count(self, values: list[tuple]) -> str:
        """What there is of each label, for the log; may be empty."""
        return ""

    @property
    def asks_last(self) -> bool:
        """Whether the last token of a segment sees all of it, and not the first."""
        return self.config.model.kind != "encoder"


def checked_text(row: Row, column: str) -> str:
    """A string with something in it. Raises UserError."""
    text = row.content[column]
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{row.where}: the {column} is {'empty' if isinstance(text, str) else 'no string'}")
    return text


def label_id(row: Row, label: Any, labels: tuple[str, ...]) -> int:
    """The place of a record's label in the set of them. Raises UserError."""
    if isinstance(label, bool) or not isinstance(label, (str, int)) or str(label) not in labels:
        known = ", ".join(labels[:8]) + ", ..." * (len(labels) > 8)
        raise UserError(
            f"{row.where}: label {label!r} is none of config.model.labels: {known}{nearest(str(label), labels)}"
        )
    return labels.index(str(label))


def counted(labels: tuple[str, ...], ids: list[int]) -> str:
    """How often the most frequent labels stand there, in their order."""
    each = np.bincount(np.array(ids, int), minlength=len(labels))
    order = np.argsort(-each, kind="stable")[:8]
    more = ", ..." * (len(each) > len(order))
    return f" ({', '.join(f'{labels[k]} {each[k]:,}' for k in sorted(order))}{more})"
