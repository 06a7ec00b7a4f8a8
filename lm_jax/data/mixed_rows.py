"""Several sources as one stream: from which source row i comes, and which row of that source it is, in closed form.

Nothing is drawn at random: the number of rows of each source follows its weight exactly (`Quotas`). Each source is a stream of
its own, with its own epochs.
"""

from fractions import Fraction

import numpy as np

from lm_jax.data.best_fit import BestFit
from lm_jax.data.packing import Batch, Corruption, Stream, identity, stacked
from lm_jax.knob import Weight


class Quotas:
    """How many of rows [0, i) come from each source.

    Source 0 has round(i * w0 / (w0 + w1 + ...)) of them. Of the i' rows that remain, source 1 has
    round(i' * w1 / (w1 + w2 + ...)), and so on. No count falls when i grows, so that row i is found without looking at any
    other. A weight is the exact fraction of its decimal text, or a table of (first row, weight): at each first row a stage
    begins, in which the weights are constant and rows are counted anew.
    """

    def __init__(self, weights: list[Weight]):
        tables = [((0, weight),) if isinstance(weight, float) else weight for weight in weights]
        firsts = sorted({0} | {row for table in tables for row, _ in table})
        at = lambda table, row: next((Fraction(str(w)) for first, w in reversed(table) if first <= row), Fraction(0))
        self.weights = [[at(table, first) for table in tables] for first in firsts]
        self.firsts, self._before = firsts, [[0] * len(weights)]
        self._ratios = [[self._ratio(stage, k) for k in range(len(stage))] for stage in self.weights]
        for stage in range(1, len(firsts)):
            self._before.append(self.counts(firsts[stage]))

    @staticmethod
    def _ratio(stage: list[Fraction], k: int) -> tuple[int, int]:
        """(p, q): the weight of source k over that of sources k, k + 1, ... is p / q."""
        rest = sum(stage[k:], Fraction(0))
        ratio = stage[k] / rest if rest else Fraction(0)
        return ratio.numerator, ratio.denominator

    def counts(self, i: int) -> list[int]:
        """How many of rows [0, i) are of each source."""
        # While `__init__` builds stage s, its first row still counts as the end of stage s - 1.
        stage = next(stage for stage in reversed(range(len(self._before))) if self.firsts[stage] <= i)
        remaining, found = i - self.firsts[stage], []
        for before, (p, q) in zip(self._before[stage], self._ratios[stage], strict=True):
            taken = (2 * remaining * p + q) // (2 * q)  # round(remaining * p / q)
            found.append(before + taken)
            remaining -= taken
        return found

    def shares(self, i: int) -> list[float]:
        """The share of the rows that each source has around row i."""
        stage = self.weights[max(k for k, first in enumerate(self.firsts) if first <= i)]
        return [float(weight / sum(stage)) for weight in stage]

    def locate(self, i: int) -> tuple[int, int]:
        """(source, which of its rows) that row i is: the source that has one row more once row i is counted."""
        before, after = self.counts(i), self.counts(i + 1)
        source = next(k for k in range(len(before)) if after[k] > before[k])
        return source, before[source]


class MixedRows:
    """The training stream: row i is the next row of the source that `quotas` gives for it, then corrupted."""

    def __init__(self, streams: list[Stream | BestFit], quotas: Quotas, corruption: Corruption = identity):
        self.streams, self.quotas, self.sequence_length = streams, quotas, streams[0].sequence_length
        self.rows_per_epoch, self.corruption = sum(stream.rows_per_epoch for stream in streams), corruption

    def row(self, i: int) -> Batch:
        """Row i, corrupted."""
        return self.corruption(self.whole, i, 0)

    def whole(self, i: int) -> Batch:
        """Row i as it was before the corruption."""
        source, j = self.quotas.locate(i)
        return self.streams[source].row(j) | {"row": np.uint32(i)}

    def rows(self, indices: list[int]) -> Batch:
        """These rows as [rows, T] arrays; where nothing is corrupted, those of a source are taken in one call."""
        if self.corruption is not identity:
            return stacked([self.row(i) for i in indices])
        found = np.array([self.quotas.locate(i) for i in indices])
        given = np.array(indices, np.uint32)
        parts = [np.flatnonzero(found[:, 0] == source) for source in range(len(self.streams))]
        taken = [stream.rows(found[at, 1].tolist()) for stream, at in zip(self.streams, parts, strict=True) if len(at)]
        if len(taken) == 1:
            return taken[0] | {"row": given}
        back = np.argsort(np.concatenate(parts))
        return {name: np.concatenate([part[name] for part in taken])[back] for name in taken[0]} | {"row": given}


class SkippingRows:
    """A stream without the rows in `skipped`, sorted ranges [first, last). The cursor counts only the rows that remain."""

    def __init__(self, mixed: MixedRows, skipped: tuple[tuple[int, int], ...]):
        self.mixed, self.skipped, self.sequence_length = mixed, skipped, mixed.sequence_length

    def row(self, cursor: int) -> Batch:
        """The row at a cursor."""
        return self.mixed.row(self.row_at(cursor))

    def rows(self, indices: list[int]) -> Batch:
        """The rows at these cursors as [rows, T] arrays."""
        return self.mixed.rows([self.row_at(cursor) for cursor in indices])

    def row_at(self, cursor: int) -> int:
        """The number of the row in the whole stream that stands at a cursor."""
        i = cursor
        for first, last in self.skipped:
            if i < first:
                break
            i += last - first
        return i
