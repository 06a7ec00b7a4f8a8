"""Extractive question answering: records of a question, a context and the answer, which is a part of the context.

{"question": "Who wrote it?", "context": "It was written by Ada Lovelace in 1843.", "answer": "Ada Lovelace", "start": 18}

`start` (characters before the answer) may be left out: then the first occurrence of the answer is meant. A list of answers
has the one that is learnt first; any of them is right. An answer of "" means that the context has none: it starts and ends at
[CLS] (Rajpurkar et al., arXiv:1806.03822). Any other answer that does not stand in the context is refused.

Answers start and end at words or marks. A context that is longer than a row is cut into windows that overlap by half, each
a segment of its own; those without the whole answer learn "none". Encoders alone: a causal model would have to say where an
answer starts before it has read on.
"""

from typing import NamedTuple

import numpy as np

from lm_jax.data.objectives import specials
from lm_jax.data.tokenizer import Tokenizer
from lm_jax.errors import UserError
from lm_jax.model.task_heads import ENDS, MAY_END, MAY_START, STARTS
from lm_jax.tasks import scores
from lm_jax.tasks.results import Result
from lm_jax.tasks.segments import Encoded, for_head
from lm_jax.tasks.tables import Row
from lm_jax.tasks.task import Task, checked_number, checked_text, no_text
from lm_jax.tasks.words import Unit, tokens_of_words, units

LONGEST = 64  # tokens of an answer


class Question(NamedTuple):
    """A question and its context, or a window of that: units [first, last).

    `answers` are all that are right, none where there is none. Units [begin, end) answer it, nothing where begin = end.
    """

    context: str
    question: str
    answers: tuple[str, ...]
    begin: int
    end: int
    first: int = 0
    last: int = 0


class QuestionAnswering(Task):
    """Extractive question answering: the answer is a span of the context."""

    kind = "answers"
    columns = ("question", "context", "answer")
    optional = ("start",)
    has_unanswered = False  # whether a record to train on has no answer

    def parse(self, row: Row) -> Question:
        """The question, its context and its answers as a `Question`. Raises UserError."""
        question, context = checked_text(row, "question"), checked_text(row, "context")
        answers = row.content["answer"]
        answers = answers if isinstance(answers, list) else [answers]
        if wrong := [answer for answer in answers if not isinstance(answer, str)]:
            raise UserError(f"{row.where}: the answer is {no_text(wrong[0])} (nor a list of strings)")
        if not answers or (len(answers) > 1 and not all(answer.strip() for answer in answers)):
            raise UserError(
                f'{row.where}: a list of answers holds texts that are not empty; "" alone means that there is none'
            )
        answer = answers[0]
        if not answer.strip():
            return Question(context, question, (), 0, 0)
        start = found_at(row, context, answer)
        whole = units(context)
        begin = next(k for k, unit in enumerate(whole) if unit.stop > start)
        end = next((k for k, unit in enumerate(whole) if unit.start >= start + len(answer)), len(whole))
        if begin >= end:
            raise UserError(f"{row.where}: the answer {answer!r} has no word")
        return Question(context, question, tuple(answers), begin, end)

    def texts(self, values) -> tuple[str, ...]:
        """The context and the question."""
        return values.context, values.question

    def look(self, values: list) -> None:
        """Keeps whether any training record has no answer."""
        self.has_unanswered = any(not value.answers for value in values)

    def count(self, values: list) -> str:
        """How many records have no answer, for the log."""
        without = sum(not value.answers for value in values)
        return f" ({without:,} without an answer)" if without else ""

    def spread(self, found: list, tokenizer: Tokenizer, room: int) -> list:
        """Each record as its windows. Raises UserError where no window holds the whole answer."""
        asked, contexts = self._tokens([value for _, value in found], tokenizer, room)
        spread = []
        for (where, value), question, unit_tokens in zip(found, asked, contexts, strict=True):
            remaining = room - 3 - min(len(question), room // 4)
            parts = [
                value._replace(first=a, last=b) for a, b in windows([len(each) for each in unit_tokens], remaining)
            ]
            if value.answers and not any(holds(window) for window in parts):
                raise UserError(
                    f"{where}: the answer is longer than what a row has room for: raise config.data.sequence_length"
                )
            spread += [(where, window) for window in parts]
        return spread

    def encode(self, values: list, tokenizer: Tokenizer, room: int) -> list[Encoded]:
        """[CLS] question [SEP] window [SEP]; a question keeps its start, up to a quarter of a row."""
        ids = specials(tokenizer, self.config.data.objective)
        found = []
        for value, question, unit_tokens in zip(values, *self._tokens(values, tokenizer, room), strict=True):
            kept, sizes = question[: room // 4], [len(each) for each in unit_tokens[value.first : value.last]]
            context = np.concatenate(unit_tokens[value.first : value.last])[: room - 3 - len(kept)]
            tokens = np.concatenate([[ids.classifier], kept, [ids.document], context, [ids.document]]).astype(np.int32)
            stops = np.minimum(np.cumsum(sizes), len(context)) + len(kept) + 2
            starts = np.concatenate([[len(kept) + 2], stops[:-1]])
            segment = for_head(tokens, 0, MAY_START | MAY_END, second=len(kept) + 2)
            targets = segment["targets"]
            targets[starts] |= MAY_START
            targets[stops - 1] |= MAY_END
            begin, end = (
                (starts[value.begin - value.first], stops[value.end - value.first - 1] - 1) if holds(value) else (0, 0)
            )
            targets[begin] |= STARTS
            targets[end] |= ENDS
            found.append(Encoded(segment, len(tokens) + len(question) - len(kept)))
        return found

    def _tokens(self, values: list, tokenizer: Tokenizer, room: int) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
        """Token ids of each question, and of each unit of each context."""
        texts = [[unit.text for unit in units(value.context)] for value in values]
        return tokenizer.encode_batch([value.question for value in values]), tokens_of_words(texts, tokenizer)

    def result(self, where: str, values, segment, logits_NC: np.ndarray) -> Result:
        """The best answer in a window, and its probability against "no answer"."""
        starts, ends = (np.flatnonzero(segment["targets"] & bit)[1:] for bit in (MAY_START, MAY_END))
        begin, end, score = best_span(logits_NC.astype(np.float64), starts, ends)
        whole: list[Unit] = units(values.context)[values.first : values.last]
        text = values.context[whole[begin].start : whole[end].stop]
        none = float(logits_NC[0].sum())
        return Result(where, list(values.answers), text, float(1 / (1 + np.exp(none - score))))

    def joined(self, results: tuple) -> tuple:
        """One result a record: the most probable answer of its windows.

        It is "" where no answer is more probable, and training records without an answer were seen.
        """
        best: dict[str, Result] = {}
        for result in results:
            if result.record not in best or result.confidence > best[result.record].confidence:
                best[result.record] = result
        none = lambda result: self.has_unanswered and result.confidence < 0.5
        return tuple(result._replace(prediction="") if none(result) else result for result in best.values())

    @property
    def measures(self) -> tuple[str, ...]:
        """The names of its `scores`."""
        return "f1", "exact_match"

    def scores(self, results: tuple) -> dict[str, float]:
        """Token F1 and exact match, by SQuAD's normalisation."""
        measures = scores.answers([result.truth for result in results], [result.prediction for result in results])
        return scores.values(measures, len(results))


def found_at(row: Row, context: str, answer: str) -> int:
    """How many characters are before the answer. Raises UserError where it is not in the context, or not there."""
    start = row.content.get("start")
    if start is None:
        if (found := context.find(answer)) < 0:
            raise UserError(
                f'{row.where}: the answer {answer[:60]!r} does not stand in the context ("" means: it has none)'
            )
        return found
    number = checked_number(row, "start")
    if number != int(number):
        raise UserError(f"{row.where}: the start {start!r} is no whole number of characters")
    start = int(number)
    if start < 0 or context[start : start + len(answer)] != answer:
        near = f"; it stands at {found}" if (found := context.find(answer)) >= 0 else ""
        raise UserError(f"{row.where}: at character {start} of the context stands no {answer[:60]!r}{near}")
    return start


def holds(window: Question) -> bool:
    """Whether the whole answer is in the window."""
    return window.begin < window.end and window.first <= window.begin and window.end <= window.last


def windows(sizes: list[int], room: int) -> list[tuple[int, int]]:
    """Units [first, last) of these sizes in windows of at most `room` tokens, the next from the middle of one on.

    A unit that is longer than the room has a window of its own.
    """
    offsets, found, first = np.concatenate([[0], np.cumsum(sizes)]), [], 0
    while True:
        last = max(first + 1, int(np.searchsorted(offsets, offsets[first] + room, side="right")) - 1)
        found.append((first, last))
        if last >= len(sizes):
            return found
        first = min(last, max(first + 1, int(np.searchsorted(offsets, offsets[first] + room // 2))))


def best_span(logits_N2: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> tuple[int, int, float]:
    """(k, l, score): the span from the k-th start to the l-th end with the largest sum, 1 to LONGEST tokens long."""
    sizes = ends[None, :] - starts[:, None] + 1
    score = logits_N2[starts, 0][:, None] + logits_N2[ends, 1][None, :]
    score = np.where((sizes >= 1) & ((sizes <= LONGEST) | np.eye(len(starts), dtype=bool)), score, -np.inf)
    k, end = np.unravel_index(int(score.argmax()), score.shape)
    return int(k), int(end), float(score[k, end])
