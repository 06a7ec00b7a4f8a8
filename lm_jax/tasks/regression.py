"""Sequence regression: records of a text (or two) and a number, learnt by squared error; the first or last token is asked.

{"text": "a film to see twice", "value": 8.5}

Learnt is how far a value is from the mean of the records to train on, in units of their standard deviation: else an output that
starts near 0 would first have to find the mean. Scores are in the units of the records.
"""

import numpy as np

from lm_jax.tasks import scores
from lm_jax.tasks.classification import OfSequence, second_text
from lm_jax.tasks.results import Result
from lm_jax.tasks.tables import Row
from lm_jax.tasks.task import checked_number, checked_text


class Regression(OfSequence):
    """Sequence regression: one number for a text or a pair of texts."""

    kind = "numbers"
    columns = ("text", "value")
    mean, deviation = 0.0, 1.0

    def look(self, values: list[tuple]) -> None:
        """Keeps the mean and the standard deviation of the training values, to standardise targets."""
        numbers = np.array([value[1] for value in values])
        self.mean, self.deviation = float(numbers.mean()), float(numbers.std()) or 1.0

    @property
    def facts(self) -> dict[str, list[float]]:
        """{"values": [mean, standard deviation]} of the training values."""
        return {"values": [self.mean, self.deviation]}

    def target(self, values: tuple) -> float:
        """The standardised value: its distance from the training mean in standard deviations."""
        return (values[1] - self.mean) / self.deviation

    def parse(self, row: Row) -> tuple[str, float, str]:
        """(text, number, second text or "") of a record. Raises UserError."""
        return checked_text(row, "text"), checked_number(row, "value"), second_text(row)

    def count(self, values: list[tuple]) -> str:
        """Mean and standard deviation of the values, for the log."""
        numbers = np.array([value[1] for value in values])
        return f" (mean {numbers.mean():.3g}, standard deviation {numbers.std():.3g})" if len(numbers) else ""

    def result(self, where: str, values: tuple, segment, logits_NC: np.ndarray) -> Result:
        """The predicted number, in the units of the records."""
        return Result(where, values[1], float(self.answer(logits_NC)[0]) * self.deviation + self.mean)

    @property
    def measures(self) -> tuple[str, ...]:
        """The names of its `scores`."""
        return "rmse", "pearson"

    def scores(self, results: tuple) -> dict[str, float]:
        """Root mean squared error and Pearson's correlation (0 where truths or predictions are all equal)."""
        measures = scores.numbers([result.truth for result in results], [result.prediction for result in results])
        return {name: measures[name].value(len(results)) for name in ("rmse", "pearson")}
