"""Token classification: records of words and a tag of each; of every word one token is asked, the first (or last) one.

{"tokens": ["Ada", "Lovelace", "wrote", "it"], "tags": ["B-person", "I-person", "O", "O"]}

In a table both are strings with a space between words. A word without a token stands as one unknown token and keeps its
tag. A record that is too long keeps the words that fit; only these are scored.
"""

import itertools

import numpy as np

from lm_jax.data.lines import described
from lm_jax.data.objectives import specials
from lm_jax.data.tokenizer import Tokenizer
from lm_jax.errors import UserError
from lm_jax.tasks import scores
from lm_jax.tasks.results import Result
from lm_jax.tasks.segments import Encoded, for_head
from lm_jax.tasks.tables import SPACED, Row
from lm_jax.tasks.task import Task, counted, label_id, no_text
from lm_jax.tasks.words import spaced, tokens_of_words


class TokenClassification(Task):
    """Token classification: one tag for each word."""

    columns = ("tokens", "tags")

    def parse(self, row: Row) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """(words, tag ids) of a record, equally many. Raises UserError."""
        words, tags = (listed(row, column) for column in self.columns)
        if len(words) != len(tags):
            raise UserError(f"{row.where}: {len(words)} words and {len(tags)} tags; each word has one")
        for k, word in enumerate(words, 1):
            if not isinstance(word, str) or not word.strip():
                raise UserError(f"{row.where}: word {k} is {no_text(word)}")
        return tuple(words), tuple(label_id(row, tag, self.labels) for tag in tags)

    def text(self, values: tuple) -> str:
        """The words, joined by spaces."""
        return " ".join(values[0])

    def count(self, values: list[tuple]) -> str:
        """How many words each of the most frequent tags has."""
        return counted(self.labels, [tag for _, tags in values for tag in tags])

    def encode(self, values: list[tuple], tokenizer: Tokenizer, room: int) -> list[Encoded]:
        """[CLS] words [SEP], or words and end of document; loss_mask is 1 at one token of each word."""
        ids = specials(tokenizer, self.config.data.objective)
        start = [] if self.asks_last else [ids.classifier]
        room -= len(start) + 1
        found = []
        texts = tokens_of_words([spaced(words) for words, _ in values], tokenizer)
        for word_tokens, (_, tags) in zip(texts, values, strict=True):
            ends = np.cumsum([len(each) for each in word_tokens])
            num = max(
                1, int(np.searchsorted(ends, room, side="right"))
            )  # of a word longer than a row the start is kept
            kept = np.concatenate(word_tokens[:num])[:room]
            starts = ends - [len(each) for each in word_tokens]
            asked = np.minimum(ends[:num], room) - 1 if self.asks_last else starts[:num]
            tokens = np.concatenate([start, kept, [ids.document]]).astype(np.int32)
            second = None if self.asks_last else len(tokens)
            segment = for_head(tokens, len(start) + asked, tags[:num], second=second)
            found.append(Encoded(segment, len(tokens) + int(ends[-1]) - len(kept)))
        return found

    def result(self, where: str, values: tuple, segment, logits_NC: np.ndarray) -> Result:
        """The tag with the largest logit for each word that fits into the row."""
        asked = segment["loss_mask"] > 0
        truth, chosen = segment["targets"][asked], logits_NC[asked].argmax(-1)
        return Result(where, [self.labels[k] for k in truth], [self.labels[k] for k in chosen])

    @property
    def measures(self) -> tuple[str, ...]:
        """The names of its `scores`."""
        of_words = ("accuracy", "macro_f1", "matthews")
        return (
            (*(f"span_{name}" for name in ("f1", "precision", "recall")), *of_words)
            if are_spans(self.labels)
            else of_words
        )

    def scores(self, results: tuple) -> dict[str, float]:
        """Accuracy, macro-F1 and Matthews of words; before these, where tags are BIO, F1 of whole spans."""
        truths, predictions = ([getattr(result, name) for result in results] for name in ("truth", "prediction"))
        spans = scores.spans(truths, predictions) if are_spans(self.labels) else {}
        found = {f"span_{name}": value for name, value in scores.values(spans, len(results)).items()}
        of_words = [list(itertools.chain.from_iterable(tags)) for tags in (truths, predictions)]
        return found | scores.values(scores.labels(*of_words), len(of_words[0]))

    def kept(self, results: tuple) -> tuple[str, tuple]:
        """One result a record with its spans where tags are BIO, else one result a word."""
        if are_spans(self.labels):
            return "spans", results
        of_word = lambda r, k: Result(f"{r.record} word {k + 1}", r.truth[k], r.prediction[k])
        return "labels", tuple(of_word(result, k) for result in results for k in range(len(result.truth)))


def are_spans(labels: tuple[str, ...]) -> bool:
    """Whether tags mark spans: O outside, B-kind at a start, I-kind inside."""
    return "O" in labels and all(label == "O" or label[:2] in ("B-", "I-") for label in labels)


def listed(row: Row, column: str) -> list:
    """The list in a column; a string is split at spaces. Raises UserError."""
    found = row.content[column]
    found = SPACED.findall(found) if isinstance(found, str) else found
    if not isinstance(found, list) or not found:
        what = "empty" if found == [] else f"no list but {described(found)}"
        raise UserError(f"{row.where}: the {column} are {what}; expected is one for each word")
    return found
