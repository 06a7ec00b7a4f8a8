"""The file `metrics.jsonl`, one object a line, and `metrics.crc32` with a checksum of each, so that an altered number is seen."""

import json
import zlib
from collections.abc import Callable
from typing import Any

from etils import epath

from lm_jax import regular_files
from lm_jax.files import write_whole

FILE, CHECKSUMS = "metrics.jsonl", "metrics.crc32"
MOST = 2**32  # bytes of each that are read


def read(workdir: epath.Path, log: Callable[[str], None] = lambda line: None) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`, without a last one that a kill cut short.

    Logs which lines are damaged: those that cannot be read are left out, those that do not match their checksum are kept.
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
    """The values of a line, None where it is damaged: an object with a step, and numbers or null by name."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or type(values.get("step")) is not int:
        return None
    return values if all(value is None or type(value) in (int, float) for value in values.values()) else None


def checksum(line: bytes) -> bytes:
    """The line of `metrics.crc32` for a line."""
    return f"{zlib.crc32(line):08x}".encode()


def series(lines: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """(step, value) of a scalar, where it was finite."""
    return [(line["step"], line[name]) for line in lines if line.get(name) is not None]


def cut(workdir: epath.Path, step: int, log: Callable[[str], None]) -> None:
    """Removes the lines of steps after `step`, and logs it where there is no file that has those before."""
    if step and not (workdir / FILE).exists():
        log(f"{workdir / FILE} is missing: what it said of the steps up to {step:,} is lost")
    kept = [json.dumps(line).encode() for line in read(workdir, log) if line["step"] <= step]
    # The checksums first, and those of no line: a kill in between leaves lines without any, never a false alarm.
    for name, lines in ((CHECKSUMS, []), (FILE, kept), (CHECKSUMS, [checksum(line) for line in kept])):
        write_whole(workdir / name, b"".join(line + b"\n" for line in lines))
