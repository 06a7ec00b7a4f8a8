"""Sequence classification: records of a text and its label; a segment's first (or last) token asks for the label.

{"text": "a film to see twice", "label": "positive"}
"""

import math

import numpy as np

from lm_jax.config import UserError, nearest
from lm_jax.data.objectives import specials
from lm_jax.data.tokenizer import Tokenizer
from lm_jax.tasks.tables import Row
from lm_jax.tasks.task import TARGET, Encoded, Result, Task, checked_text


class OfSequence(Task):
    """A text and one target of it: what classification and regression have in common."""

    def encode(self, values: list[tuple], by: Tokenizer, room: int) -> list[Encoded]:
        """[CLS] text [SEP], or text and end of document where the last token is asked; a long text keeps its start."""
        ids = specials(by, self.config.data.objective)
        start = [] if self.asks_last else [ids.classifier]
        room -= len(start) + 1
        dtype, place = TARGET.get(self.config.model.head, np.int32), -1 if self.asks_last else 0
        found = []
        for text, (_, target) in zip(by.encode_batch([value[0] for value in values]), values, strict=True):
            tokens = np.concatenate([start, text[:room], [ids.document]]).astype(np.int32)
            targets, mask = np.zeros(len(tokens), dtype), np.zeros(len(tokens), np.float32)
            targets[place], mask[place] = target, 1
            segment = {"tokens": tokens, "targets": targets, "loss_mask": mask}
            segment |= {} if self.asks_last else {"token_type_ids": np.zeros_like(tokens)}
            found.append(Encoded(segment, len(tokens) + max(0, len(text) - room)))
        return found

    def answer(self, logits_NC: np.ndarray) -> np.ndarray:
        """The logits of the token that is asked."""
        return logits_NC[-1 if self.asks_last else 0].astype(np.float64)


class Classification(OfSequence):
    columns = ("text", "label")

    def parse(self, row: Row) -> tuple[str, int]:
        text, label = checked_text(row, "text"), row.content["label"]
        if isinstance(label, bool) or not isinstance(label, (str, int)) or str(label) not in self.labels:
            known = ", ".join(self.labels[:8]) + ", ..." * (len(self.labels) > 8)
            near = nearest(str(label), self.labels)
            raise UserError(f"{row.where}: label {label!r} is none of config.model.labels: {known}{near}")
        return text, self.labels.index(str(label))

    def count(self, values: list[tuple]) -> str:
        each = np.bincount([label for _, label in values], minlength=len(self.labels))
        order = np.argsort(-each, kind="stable")[:8]
        more = ", ..." * (len(each) > len(order))
        return f" ({', '.join(f'{self.labels[k]} {each[k]:,}' for k in sorted(order))}{more})"

    def result(self, where: str, values: tuple, segment, logits_NC: np.ndarray) -> Result:
        logits = self.answer(logits_NC)
        chosen = int(logits.argmax())
        confidence = 1 / np.exp(logits - logits[chosen]).sum()
        return Result(where, self.labels[values[1]], self.labels[chosen], float(confidence))

    def scores(self, results: tuple) -> dict[str, float]:
        counts = np.zeros((len(self.labels),) * 2)
        for result in results:
            counts[self.labels.index(result.truth), self.labels.index(result.prediction)] += 1
        return label_scores(counts)


def label_scores(confusion_CC: np.ndarray) -> dict[str, float]:
    """Accuracy, macro-F1 and Matthews correlation of counts [label, prediction].

    F1 = 2 TP / (2 TP + FP + FN) of each label that stands or is predicted, then their mean. Matthews for any number of labels
    (Gorodkin, doi:10.1016/j.compbiolchem.2004.09.006): the covariance of truth and prediction over the roots of their
    variances; 0 where one of them never changes.
    """
    counts = np.asarray(confusion_CC, np.float64)
    of_label, of_prediction, total, right = counts.sum(1), counts.sum(0), counts.sum(), np.trace(counts)
    seen = (of_label + of_prediction) > 0
    f1 = 2 * np.diag(counts)[seen] / (of_label + of_prediction)[seen]
    spread = (total**2 - (of_label**2).sum()) * (total**2 - (of_prediction**2).sum())
    together = right * total - of_label @ of_prediction
    return {
        "accuracy": float(right / max(total, 1)),
        "macro_f1": float(f1.mean()) if seen.any() else 0.0,
        "matthews": float(together / math.sqrt(spread)) if spread else 0.0,
    }
