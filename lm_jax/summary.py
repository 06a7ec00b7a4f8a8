"""The last line of a command on request (`--json`): one JSON object that says what came out, and why it ended, however it did."""

import contextlib
import json
import os
import resource
import time
from collections.abc import Iterator
from typing import Any

from lm_jax import faults, metrics_file, stop
from lm_jax.config import Config, flatten
from lm_jax.distributed import is_main_process
from lm_jax.errors import PeerError, UserError, plain_lines
from lm_jax.files import seal
from lm_jax.open_run import Run
from lm_jax.start import Opening
from lm_jax.stop import EXIT_FAULT, EXIT_PREEMPTED

LOSSES = ("final/loss", "eval/loss")  # the first that a run has
BITS = ("final/bits_per_byte", "eval/bits_per_byte")


class Summary:
    """What is known of a run so far; `say` prints it, once. Of several processes the first one does."""

    def __init__(self) -> None:
        self.start, self.said, self.dry_run = time.monotonic(), False, False
        self.config: Config | None = None  # as it was given: nothing that the devices decide
        self.opening: Opening | None = None
        self.run: Run | None = None
        self.trouble = ""  # for which a run gave up
        self.results: dict[str, Any] = {}  # of a command that trains nothing

    @contextlib.contextmanager
    def at_the_end(self) -> Iterator["Summary"]:
        """Inside, whatever ends the process is summed up: an error, or a signal with which it leaves at once."""
        stop.farewells.append(self.leaving)
        try:
            yield self
        except BaseException as error:
            self.say(*reason_of(error))
            raise
        finally:
            stop.farewells.remove(self.leaving)

    def leaving(self, code: int) -> None:
        """Called by a thread, before it ends the process."""
        line = self.line(code, "signal")
        os.write(1, (line + "\n" * bool(line)).encode())  # the main thread may hold what `print` waits for

    def done(self, code: int) -> int:
        """A run returned its exit code."""
        reason = self.trouble or ("signal" if code == EXIT_PREEMPTED else self.run.ended if self.run else "")
        self.say(code, reason or ("dry run" if self.dry_run else "finished before"))
        return code

    def say(self, code: int, reason: str) -> None:
        """Prints the line."""
        if line := self.line(code, reason):
            print(line, flush=True)

    def line(self, code: int, reason: str) -> str:
        """The line, "" where it was said before, or another process says it."""
        if self.said or not is_main_process():
            return ""
        self.said = True
        return json.dumps({"exit_code": code, "exit_reason": reason} | self.facts())

    def facts(self) -> dict[str, Any]:
        """What came out: losses in nats a token, null where there is none; seconds of this process, tokens of the whole run."""
        found: dict[str, Any] = {
            "seconds": round(time.monotonic() - self.start, 3),
            "peak_bytes": peak_bytes(self.opening),
        }
        if self.config:
            found["config_hash"] = seal(list(flatten(self.config).items()))[:16]
        if self.opening:
            opening, data = self.opening, self.run.data if self.run else self.opening.expected
            found |= {"workdir": str(opening.workdir), "step": data.step}
            found["tokens"] = data.cursor * opening.plan.config.data.sequence_length
            if data.seconds:
                found["train_seconds"] = round(data.seconds, 3)
            lines = [line for line in metrics_file.read(opening.mirror.folder) if line["step"] <= data.step]
            found |= {
                "loss": last(lines, LOSSES),
                "bits_per_byte": last(lines, BITS),
                "train_loss": last(lines, ("train/loss",)),
            }
        return found | self.results


def last(lines: list[dict[str, Any]], names: tuple[str, ...]) -> float | None:
    """The last value of the first of these numbers that any line has."""
    return next((line[name] for name in names for line in reversed(lines) if name in line), None)


def peak_bytes(opening: Opening | None) -> int:
    """The most bytes that a device of this process has held; on CPUs the most memory that the process had."""
    told = [device.memory_stats() or {} for device in opening.plan.mesh.local_devices] if opening else []
    most = max((int(stats.get("peak_bytes_in_use", 0)) for stats in told), default=0)
    return most or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def reason_of(error: BaseException) -> tuple[int, str]:
    """(exit code, reason) of what a command raised, as `cli.exit_code` has it."""
    if isinstance(error, UserError):
        return faults.EXIT_USER, f"mistake: {error}"
    if isinstance(error, PeerError):
        return EXIT_FAULT, f"peer: {plain_lines(str(error))}"
    if found := faults.described(error):
        return found[0], f"machine: {found[1]}"
    return EXIT_FAULT, f"fault: {type(error).__name__}: {faults.first_line(error)}"
