"""Numbers of a run: `metrics.jsonl` is the truth, TensorBoard the view."""

import json
import os
from typing import Any

import numpy as np
from etils import epath
from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, types_pb2
from tensorboard.plugins.hparams import summary_v2 as hparams
from tensorboard.plugins.text import metadata as text_metadata
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from lm_jax import files
from lm_jax.data.shards import flush


def read(workdir: epath.Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`; a last line that a kill cut short does not count."""
    path = workdir / "metrics.jsonl"
    lines = files.read_bytes(path).decode().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def series(lines: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """(step, value) of a scalar."""
    return [(line["step"], line[name]) for line in lines if name in line]


class Writer:
    """Appends one line a step, after cutting off what a lost future wrote: no hole, no step twice."""

    def __init__(self, workdir: epath.Path, step: int):
        kept = [line for line in read(workdir) if line["step"] <= step] if step else []
        text = "".join(json.dumps(line) + "\n" for line in kept)
        draft = workdir / "metrics.jsonl.draft"
        draft.write_text(text)
        os.replace(draft, workdir / "metrics.jsonl")
        self._file = open(workdir / "metrics.jsonl", "a")  # noqa: SIM115  (closed by `close`)
        self._events = EventFileWriter(str(workdir / "tensorboard"))
        start = event_pb2.SessionLog(
            status=event_pb2.SessionLog.START
        )  # readers drop what earlier files say from here on
        self._events.add_event(event_pb2.Event(step=step + 1 if step else 0, session_log=start))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        line = {"step": step} | {name: float(value) for name, value in values.items()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        summary = [summary_pb2.Summary.Value(tag=name, simple_value=line[name]) for name in values]
        self._add(step, summary_pb2.Summary(value=summary))

    def text(self, step: int, name: str, text: str) -> None:
        """Shown as Markdown under TensorBoard's Text."""
        tensor = tensor_pb2.TensorProto(
            dtype=types_pb2.DT_STRING, string_val=[text.encode()], tensor_shape={"dim": [{"size": 1}]}
        )
        metadata = text_metadata.create_summary_metadata(display_name=name, description="")
        self._add(step, summary_pb2.Summary(value=[{"tag": name, "metadata": metadata, "tensor": tensor}]))

    def hyper_parameters(self, flat: dict[str, Any]) -> None:
        """The HParams tab, and the config as text."""
        plain = {
            name: value if isinstance(value, (bool, int, float, str)) else str(value) for name, value in flat.items()
        }
        self._add(0, hparams.hparams_pb(plain))
        self.text(0, "config", "\n".join(f"    {name} = {value!r}" for name, value in flat.items()))

    def _add(self, step: int, summary: summary_pb2.Summary) -> None:
        self._events.add_event(event_pb2.Event(step=step, summary=summary))

    def flush(self) -> None:
        flush(self._file)
        self._events.flush()

    def close(self) -> None:
        self.flush()
        self._file.close()
        self._events.close()


class Nowhere:
    """What the processes of a run that do not lead write to."""

    def scalars(self, step: int, values: dict[str, float]) -> None: ...

    def text(self, step: int, name: str, text: str) -> None: ...

    def hyper_parameters(self, flat: dict[str, Any]) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


def to_host(metrics: dict) -> dict[str, float]:
    """Device scalars as floats: waits for the step that made them."""
    return {name: float(np.asarray(value)) for name, value in metrics.items()}
