"""Writes the numbers of a run: into `metrics.jsonl` (`metrics_file.py`), and once more for those who look (`trackers.py`)."""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from etils import epath

from lm_jax.files import flush
from lm_jax.metrics_file import CHECKSUMS, FILE, checksum, cut
from lm_jax.trackers import TensorBoard, Trackers


class Writer:
    """Appends one line a step, after removing lines of later steps: no step is missing, and none is written twice."""

    def __init__(
        self,
        workdir: epath.Path,
        step: int,
        log: Callable[[str], None] = lambda line: None,
        names: tuple[str, ...] = ("tensorboard",),
        title: str = "",
        flat: dict[str, Any] | None = None,
    ):
        """`names` of trackers, in which the run is called `title` and has the flat config `flat`."""
        cut(workdir, step, log)
        self._file, self._sums = open(workdir / FILE, "ab"), open(workdir / CHECKSUMS, "ab")  # noqa: SIM115
        self._board = TensorBoard(workdir, step, title) if {"tensorboard", "histograms"} & {*names} else NullWriter()
        self._trackers, self._flat = Trackers(names, workdir, title, flat or {}, log), flat or {}

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """One line of numbers; a value that is not finite is null."""
        numbers = {name: float(value) for name, value in values.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        line = json.dumps({"step": step} | finite).encode()
        for file, content in ((self._file, line), (self._sums, checksum(line))):
            file.write(content + b"\n")
            file.flush()
        self._board.scalars(step, numbers)
        self._trackers.scalars(step, numbers)

    def text(self, step: int, name: str, text: str) -> None:
        """A text, such as a sample."""
        self._board.text(step, name, text)
        self._trackers.text(step, name, text)

    def histograms(self, step: int, found: Mapping[str, Any]) -> None:
        """Histograms by name (`update_histograms.Histogram`): TensorBoard alone has them."""
        self._board.histograms(step, found)

    def hyper_parameters(self) -> None:
        """TensorBoard's HParams tab, and the config as text; trackers have it from the start."""
        self._board.hyper_parameters(self._flat)
        self._board.text(0, "config", "\n".join(f"    {name} = {value!r}" for name, value in self._flat.items()))

    def flush(self) -> None:
        """Returns once all lines are on the disk."""
        flush(self._file)
        flush(self._sums)
        self._board.flush()

    def close(self) -> None:
        """Flushes and closes the files."""
        self.flush()
        self._file.close()
        self._sums.close()
        self._board.close()
        self._trackers.close()


class NullWriter:
    """The writer of processes that do not write: every method of `Writer` does nothing."""

    def scalars(self, *_: Any) -> None:
        """Does nothing."""

    text = histograms = hyper_parameters = flush = close = scalars


def to_host(metrics: dict) -> dict[str, float]:
    """Device scalars as floats; waits for the step that computes them."""
    return {name: float(np.asarray(value)) for name, value in metrics.items()}
