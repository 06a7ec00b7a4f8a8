"""What a task is: it turns records into segments with targets, and what a model answers into results and their scores."""

import json
import math
import re
from typing import Any

import numpy as np

from lm_jax.config import Config
from lm_jax.data.lines import described
from lm_jax.data.tokenizer import Tokenizer
from lm_jax.errors import UserError
from lm_jax.generate.chat_template import Template, files_of, shown
from lm_jax.tasks.results import Result
from lm_jax.tasks.segments import Encoded, Segment
from lm_jax.tasks.tables import Row, like


class Task:
    """One task; a subclass each.

    `columns` are the names that its records have, and `optional` those that they may have, as `data.columns` may rename
    them. Where it renames none, a record may have one of `other_columns` instead, and `parse` gets it whole.
    """

    columns: tuple[str, ...]
    optional: tuple[str, ...] = ()
    other_columns: tuple[tuple[str, ...], ...] = ()
    kind = ""  # of its results, in lm_jax/tasks/scores.py
    writes = False  # whether its answers are texts that a model writes
    chat_template: Template | None = None  # in which it writes conversations
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
        """The text that decides the split of a record: records with equal texts are in one split."""
        return values[0]

    def look(self, values: list[tuple]) -> None:
        """Takes from the training records what the task has to know before it encodes any."""

    def spread(self, found: list[tuple[str, tuple]], tokenizer: Tokenizer, room: int) -> list[tuple[str, tuple]]:
        """Splits records that need several segments, (where, values) for each segment; `joined` undoes it."""
        return found

    def texts(self, values: tuple) -> tuple[str, ...]:
        """All texts of a record, to train a tokenizer on."""
        return (self.text(values),)

    def encode(self, values: list[tuple], tokenizer: Tokenizer, room: int) -> list[Encoded]:
        """Encodes records as segments of at most `room` tokens."""
        raise NotImplementedError

    def result(self, where: str, values: tuple, segment: Segment, logits_NC: np.ndarray) -> Result:
        """The result of a record's segment, from its logits [N, C]."""
        raise NotImplementedError

    def joined(self, results: tuple) -> tuple:
        """One result a record, from the results of its segments."""
        return results

    def question(self, values: tuple, tokenizer: Tokenizer, room: int) -> np.ndarray:
        """The ids, at most `room`, after which a model writes its answer."""
        raise NotImplementedError

    def truth(self, values: tuple) -> str:
        """The right answer of a record, as text."""
        raise NotImplementedError

    def written(self, where: str, values: tuple, text: str) -> Result:
        """The result of a text that a model generated, without surrounding white space."""
        return Result(where, self.truth(values).strip(), text.strip())

    def ends(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """The token ids of which any ends an answer."""
        return (tokenizer.document_id,)

    def files(self, tokenizer: Tokenizer) -> dict[str, bytes]:
        """What a run keeps of the task, by file name: its chat template, which a conversation with the model needs."""
        return files_of(shown(self.chat_template, tokenizer)) if self.chat_template else {}

    @property
    def facts(self) -> dict[str, Any]:
        """What config.json keeps of the records beside their hashes: what answers are to be read with."""
        return {}

    @property
    def measures(self) -> tuple[str, ...]:
        """The names of its `scores`."""
        return ()

    def scores(self, results: tuple) -> dict[str, float]:
        """The task's metrics, the first of which is what one looks at; none where texts are written (`generate_answers.py`)."""
        return {}

    def kept(self, results: tuple) -> tuple[str, tuple]:
        """(kind, results) that are saved record by record: kinds are in lm_jax/tasks/scores.py, "" saves nothing."""
        return self.kind, results

    def count(self, values: list[tuple]) -> str:
        """How many records each label has, for the log; may be ""."""
        return ""

    @property
    def asks_last(self) -> bool:
        """Whether the last token of a segment sees all of it, and not the first."""
        return self.config.model.kind != "encoder"


def checked_text(row: Row, column: str) -> str:
    """A string with something in it. Raises UserError."""
    text = row.content[column]
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{row.where}: the {column} is {no_text(text)}")
    return text


def no_text(value: Any) -> str:
    """What a column holds instead of a text, and how it would be one."""
    if isinstance(value, str):
        return "empty"
    quoted = f': write "{json.dumps(value)}", in quotes' if isinstance(value, (int, float)) else ""
    return f"no string but {described(value)}{quoted}"


def label_id(row: Row, label: Any, labels: tuple[str, ...]) -> int:
    """The index of a record's label in the set of labels. Raises UserError."""
    text = str(label) if isinstance(label, (str, int)) and not isinstance(label, bool) else None
    if text in labels:
        return labels.index(text)
    shown = repr(label[:60]) if isinstance(label, str) else described(label)
    known = ", ".join(plain(name) for name in labels[:8]) + ", ..." * (len(labels) > 8)
    raise UserError(f"{row.where}: label {shown} is none of config.model.labels: {known}{right_label(label, labels)}")


def plain(label: str) -> str:
    """A label as a message shows it: in quotes where one would not see what it is."""
    return label if label.strip() == label and label.isprintable() and "," not in label else repr(label)


def right_label(label: Any, labels: tuple[str, ...]) -> str:
    """What would be right instead of a label that is none, "" where nothing is near."""
    if isinstance(label, str):
        close = like(label.strip(), labels)
        return f"; did you mean {plain(close[0])}?" if close else ""
    if isinstance(label, (bool, float)):
        forms = (
            str(label),
            json.dumps(label),
            f"{label:g}",
            str(int(label)) if label == label and abs(label) < 1e15 else "",
        )
        form = next((form for form in forms if form in labels), "")
        return f'; write "{form}", in quotes' if form else "; a label is a string"
    if isinstance(label, int) and 0 <= label < len(labels):
        return f'; where they are counted from 0, write "{labels[label]}"'
    return "; a record has one label, a string" if label is None or isinstance(label, (list, dict)) else ""


NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def checked_number(row: Row, column: str) -> float:
    """A finite number, or the text of one as a table has it. Raises UserError."""
    value = row.content[column]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    is_text = isinstance(value, str) and NUMBER.fullmatch(value.strip())
    try:
        number = float(value) if is_number or is_text else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        text = value.strip().replace("\u2212", "-").replace(",", ".").replace("_", "") if isinstance(value, str) else ""
        near = f"; did you mean {text}?" if NUMBER.fullmatch(text) and math.isfinite(float(text)) else ""
        shown = repr(value[:60]) if isinstance(value, str) else described(value)
        raise UserError(f"{row.where}: the {column} {shown} is no finite number{near}")
    return number


def counted(labels: tuple[str, ...], ids: list[int]) -> str:
    """How often the most frequent labels stand there, in their order."""
    each = np.bincount(np.array(ids, int), minlength=len(labels))
    order = np.argsort(-each, kind="stable")[:8]
    more = ", ..." * (len(each) > len(order))
    return f" ({', '.join(f'{labels[k]} {each[k]:,}' for k in sorted(order))}{more})"
