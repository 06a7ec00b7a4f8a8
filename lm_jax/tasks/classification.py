"""Sequence classification: records of a text, or two, and the label; a segment's first (or last) token asks for the label.

{"text": "a film to see twice", "label": "positive"}
{"text": "is it shown in colour", "second": "The film was made in 1926 ...", "label": "no"}
"""

import numpy as np

from lm_jax.data.objectives import specials
from lm_jax.data.tokenizer import Tokenizer
from lm_jax.tasks import scores
from lm_jax.tasks.results import Result
from lm_jax.tasks.segments import Encoded, for_head
from lm_jax.tasks.tables import Row
from lm_jax.tasks.task import Task, checked_text, counted, label_id, plain


class OfSequence(Task):
    """What classification and regression share: a text, or a pair of texts, with one target."""

    optional = ("second",)

    def text(self, values: tuple) -> str:
        """Both texts of a record, joined by a newline."""
        return "\n".join(filter(None, (values[0], values[2])))

    def encode(self, values: list[tuple], tokenizer: Tokenizer, room: int) -> list[Encoded]:
        """[CLS] text [SEP] second [SEP]; where the last token is asked, each text and the end of a document.

        Of two texts that are too long the second is cut, and the first where it alone has more than half of the room; every
        text keeps its start.
        """
        ids = specials(tokenizer, self.config.data.objective)
        start = [] if self.asks_last else [ids.classifier]
        dtype = np.float32 if self.config.model.head == "value" else np.int32
        firsts, seconds = (tokenizer.encode_batch([value[k] for value in values]) for k in (0, 2))
        found = []
        for first, second, value in zip(firsts, seconds, values, strict=True):
            is_pair = bool(value[2])
            remaining = room - len(start) - (2 if is_pair else 1)
            cut = first[: max(remaining // 2, remaining - len(second)) if is_pair else remaining]
            ends = (
                np.concatenate([second[: remaining - len(cut)], [ids.document]]) if is_pair else np.zeros(0, np.int32)
            )
            tokens = np.concatenate([start, cut, [ids.document], ends]).astype(np.int32)
            asked, border = (-1, None) if self.asks_last else (0, len(tokens) - len(ends))
            segment = for_head(tokens, asked, self.target(value), dtype, border)
            whole = len(start) + len(first) + 1 + (len(second) + 1 if is_pair else 0)
            found.append(Encoded(segment, whole))
        return found

    def target(self, values: tuple) -> float:
        """The target that the head has to predict for a record."""
        return values[1]

    def answer(self, logits_NC: np.ndarray) -> np.ndarray:
        """float64 [C]: the logits of the token that predicts, the first or the last one."""
        return logits_NC[-1 if self.asks_last else 0].astype(np.float64)


class Classification(OfSequence):
    """Sequence classification: one label for a text or a pair of texts."""

    kind = "labels"
    columns = ("text", "label")

    def parse(self, row: Row) -> tuple[str, int, str]:
        """(text, label id, second text or "") of a record. Raises UserError."""
        return checked_text(row, "text"), label_id(row, row.content["label"], self.labels), second_text(row)

    def count(self, values: list[tuple]) -> str:
        """How many records each of the most frequent labels has, and what one label for all would be scored."""
        ids = [value[1] for value in values]
        most = np.bincount(np.array(ids, int), minlength=len(self.labels))
        all_alike = (
            f"; {plain(self.labels[most.argmax()])} for all: accuracy {most.max() / len(ids):.3f})" if ids else ")"
        )
        return counted(self.labels, ids).removesuffix(")") + all_alike

    def result(self, where: str, values: tuple, segment, logits_NC: np.ndarray) -> Result:
        """The label with the largest logit, and its softmax probability as the confidence."""
        logits = self.answer(logits_NC)
        chosen = int(logits.argmax())
        confidence = 1 / np.exp(logits - logits[chosen]).sum()
        return Result(where, self.labels[values[1]], self.labels[chosen], float(confidence))

    @property
    def measures(self) -> tuple[str, ...]:
        """The names of its `scores`."""
        return "accuracy", "macro_f1", "matthews"

    def scores(self, results: tuple) -> dict[str, float]:
        """Accuracy, macro-F1 and Matthews correlation."""
        truths, predictions = ([getattr(result, name) for result in results] for name in ("truth", "prediction"))
        return scores.values(scores.labels(truths, predictions), len(results))


def second_text(row: Row) -> str:
    """The second text of a record, "" where it has none. Raises UserError."""
    return checked_text(row, "second") if row.content.get("second") is not None else ""
