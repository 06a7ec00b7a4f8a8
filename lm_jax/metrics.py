"""Writes the numbers of a run: into `metrics.jsonl` (`metrics_file.py`), and once more for TensorBoard."""

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath
from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, types_pb2
from tensorboard.plugins.hparams import summary_v2 as hparams
from tensorboard.plugins.text import metadata as text_metadata
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from lm_jax.files import flush
from lm_jax.metrics_file import CHECKSUMS, FILE, checksum, cut


class Writer:
    """Appends one line a step, after removing lines of later steps: no step is missing, and none is written twice."""

    def __init__(self, workdir: epath.Path, step: int, log: Callable[[str], None] = lambda line: None):
        cut(workdir, step, log)
        self._file, self._sums = open(workdir / FILE, "ab"), open(workdir / CHECKSUMS, "ab")  # noqa: SIM115
        self._events = EventFileWriter(str(workdir / "tensorboard"))
        # From this step on readers drop what earlier files have.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._events.add_event(event_pb2.Event(step=step + 1 if step else 0, session_log=start))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """One line of numbers; a value that is not finite is null."""
        numbers = {name: float(value) for name, value in values.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        line = json.dumps({"step": step} | finite).encode()
        for file, content in ((self._file, line), (self._sums, checksum(line))):
            file.write(content + b"\n")
            file.flush()
        summary = [summary_pb2.Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._add(step, summary_pb2.Summary(value=summary))

    def text(self, step: int, name: str, text: str) -> None:
        """A text, which TensorBoard shows as Markdown under Text."""
        tensor = tensor_pb2.TensorProto(
            dtype=types_pb2.DT_STRING, string_val=[text.encode()], tensor_shape={"dim": [{"size": 1}]}
        )
        metadata = text_metadata.create_summary_metadata(display_name=name, description="")
        self._add(step, summary_pb2.Summary(value=[{"tag": name, "metadata": metadata, "tensor": tensor}]))

    def hyper_parameters(self, flat: dict[str, Any]) -> None:
        """The HParams tab, and the config as text."""
        shown = lambda value: value if isinstance(value, (bool, int, float, str)) else str(value)
        plain = {name: shown(value) for name, value in flat.items()}
        self._add(0, hparams.hparams_pb(plain))
        self.text(0, "config", "\n".join(f"    {name} = {value!r}" for name, value in flat.items()))

    def _add(self, step: int, summary: summary_pb2.Summary) -> None:
        self._events.add_event(event_pb2.Event(step=step, summary=summary))

    def flush(self) -> None:
        """Returns once all lines are on the disk."""
        flush(self._file)
        flush(self._sums)
        self._events.flush()

    def close(self) -> None:
        """Flushes and closes the files."""
        self.flush()
        self._file.close()
        self._sums.close()
        self._events.close()


class NullWriter:
    """The writer of processes that do not write: every method of `Writer` does nothing."""

    def scalars(self, *_: Any) -> None:
        """Does nothing."""

    text = hyper_parameters = flush = close = scalars


def to_host(metrics: dict) -> dict[str, float]:
    """Device scalars as floats; waits for the step that computes them."""
    return {name: float(np.asarray(value)) for name, value in metrics.items()}
