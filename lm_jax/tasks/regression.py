"""Sequence regression: records of a text and a number, learnt by squared error; a segment's first (or last) token is asked.

{"text": "a film to see twice", "value": 8.5}
"""

import math

import numpy as np

from lm_jax.config import UserError
from lm_jax.tasks.classification import OfSequence
from lm_jax.tasks.tables import Row
from lm_jax.tasks.task import Result, checked_text


class Regression(OfSequence):
    columns = ("text", "value")

    def parse(self, row: Row) -> tuple[str, float]:
        text, value = checked_text(row, "text"), row.content["value"]
        try:
            number = float("nan") if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = float("nan")
        if not math.isfinite(number):
            raise UserError(f"{row.where}: the value {value!r} is no finite number")
        return text, number

    def count(self, values: list[tuple]) -> str:
        numbers = np.array([value for _, value in values])
        return f" (mean {numbers.mean():.3g}, standard deviation {numbers.std():.3g})" if len(numbers) else ""

    def result(self, where: str, values: tuple, segment, logits_NC: np.ndarray) -> Result:
        return Result(where, values[1], float(self.answer(logits_NC)[0]))

    def scores(self, results: tuple) -> dict[str, float]:
        """Root of the mean squared error; Pearson's correlation, 0 where one of both never changes."""
        truth, guess = (np.array([getattr(r, name) for r in results]) for name in ("truth", "prediction"))
        rmse = float(np.sqrt(np.mean((truth - guess) ** 2)))
        spread = truth.std() * guess.std()
        pearson = float(np.mean((truth - truth.mean()) * (guess - guess.mean())) / spread) if spread else 0.0
        return {"rmse": rmse, "pearson": pearson}
