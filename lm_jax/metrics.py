"""Numbers of a run: `metrics.jsonl` is the truth, TensorBoard the view.

`metrics.crc32` has a checksum for every line of it, so that an altered number is seen. A value that is not finite is null.
"""

import json
import math
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath
from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, types_pb2
from tensorboard.plugins.hparams import summary_v2 as hparams
from tensorboard.plugins.text import metadata as text_metadata
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from lm_jax import regular_files
from lm_jax.files import flush, write_whole

FILE, CHECKSUMS = "metrics.jsonl", "metrics.crc32"
MOST = 2**32  # bytes of them


def read(workdir: epath.Path, log: Callable[[str], None] = lambda line: None) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`; a last line that a kill cut short does not count.

    Says which lines are damaged: those that cannot be read are left out, those that do not have their checksum are kept.
    """
    path, beside = workdir / FILE, workdir / CHECKSUMS
    raw = regular_files.read_bytes(path, MOST).split(b"\n")[:-1] if path.exists() else []
    sums: list[bytes] = regular_files.read_bytes(beside, MOST).split(b"\n")[:-1] if beside.exists() else []
    found, lost, altered = [], [], []
    for number, line in enumerate(raw, 1):
        values = values_of(line)
        if values is None:
            lost.append(number)
            continue
        if number <= len(sums) and sums[number - 1] != checksum(line):
            altered.append(number)
        found.append(values)
    if len(raw) < len(sums):
        log(f"{path}: the last {len(sums) - len(raw)} of its lines are lost")
    for numbers, what in ((lost, "lost: it cannot be read"), (altered, "altered: its numbers may be wrong")):
        more = f" (+{len(numbers) - 3} more)" * (len(numbers) > 3)
        if numbers:
            log(f"{path}: line {', '.join(map(str, numbers[:3]))}{more} {what}")
    return found


def values_of(line: bytes) -> dict[str, Any] | None:
    """What a line says, None where it is damaged: an object with a step, and numbers or null by name."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or type(values.get("step")) is not int:
        return None
    return values if all(value is None or type(value) in (int, float) for value in values.values()) else None


def checksum(line: bytes) -> bytes:
    return f"{zlib.crc32(line):08x}".encode()


def series(lines: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """(step, value) of a scalar, where it was finite."""
    return [(line["step"], line[name]) for line in lines if line.get(name) is not None]


class Writer:
    """Appends one line a step, after cutting off what a lost future wrote: no hole, no step twice."""

    def __init__(self, workdir: epath.Path, step: int, log: Callable[[str], None] = lambda line: None):
        if step and not (workdir / FILE).exists():
            log(f"{workdir / FILE} is missing: what it said of the steps up to {step:,} is lost")
        kept = [json.dumps(line).encode() for line in read(workdir, log) if line["step"] <= step]
        # The checksums first, and those of no line: a kill in between leaves lines without any, never a false alarm.
        for name, lines in ((CHECKSUMS, []), (FILE, kept), (CHECKSUMS, [checksum(line) for line in kept])):
            write_whole(workdir / name, b"".join(line + b"\n" for line in lines))
        self._file = open(workdir / FILE, "ab")  # noqa: SIM115  (closed by `close`)
        self._sums = open(workdir / CHECKSUMS, "ab")  # noqa: SIM115
        self._events = EventFileWriter(str(workdir / "tensorboard"))
        start = event_pb2.SessionLog(
            status=event_pb2.SessionLog.START
        )  # readers drop what earlier files say from here on
        self._events.add_event(event_pb2.Event(step=step + 1 if step else 0, session_log=start))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        numbers = {name: float(value) for name, value in values.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        line = json.dumps({"step": step} | finite).encode()
        for file, content in ((self._file, line), (self._sums, checksum(line))):
            file.write(content + b"\n")
            file.flush()
        summary = [summary_pb2.Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
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
        flush(self._sums)
        self._events.flush()

    def close(self) -> None:
        self.flush()
        self._file.close()
        self._sums.close()
        self._events.close()


class NullWriter:
    """What the processes of a run that do not lead write to."""

    def scalars(self, step: int, values: dict[str, float]) -> None: ...

    def text(self, step: int, name: str, text: str) -> None: ...

    def hyper_parameters(self, flat: dict[str, Any]) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


def to_host(metrics: dict) -> dict[str, float]:
    """Device scalars as floats: waits for the step that made them."""
    return {name: float(np.asarray(value)) for name, value in metrics.items()}
