"""What a person sees: lines, progress with the time that remains, the header, a small curve."""

import math
import os
import shutil
import sys
import time
from typing import IO

import jax
from etils import epath

from lm_jax import decide, job
from lm_jax.config import Config
from lm_jax.data.mixed_rows import Quotas
from lm_jax.data.mixture import Mixture
from lm_jax.plan import counts as costs
from lm_jax.plan.devices import DEVICES, device_name, has_bfloat16
from lm_jax.run_plan import Plan

QUIET_SECONDS = 10  # between progress lines where the output is not a terminal


class Terminal:
    """Prints lines, and keeps them in a log file once there is one. Progress overwrites itself on a terminal."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self._log: IO[str] | None = None
        self._kept: list[str] = []
        self._last_progress = 0.0
        self._open_line = False
        self._live = sys.stdout.isatty()
        self.silent = False  # for all processes of a run but one

    def log_to(self, path: epath.Path) -> None:
        """Writes all lines so far, and those to come, into a log file."""
        self._log = open(path, "a")  # noqa: SIM115  (open for the life of the run)
        for line in self._kept:
            self._keep(line)

    def close(self) -> None:
        """The run is over, and so is its log."""
        if self._log is not None:
            self._log.close()
            self._log = None

    def __call__(self, text: str = "") -> None:
        """Prints lines."""
        if self.silent:
            return
        if self._open_line:
            sys.stdout.write("\r\x1b[K")
            self._open_line = False
        self._last_progress = time.monotonic()
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
        for line in text.split("\n"):
            self._keep(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}")

    def _keep(self, line: str) -> None:
        if self._log is None:
            self._kept.append(line)
        else:
            self._log.write(line + "\n")
            self._log.flush()

    def progress(self, text: str) -> None:
        """A state that will be overwritten: on a terminal five times a second, elsewhere a line now and then."""
        now = time.monotonic()
        if self.silent or now - self._last_progress < (0.2 if self._live else QUIET_SECONDS):
            return
        self._last_progress = now
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            sys.stdout.write("\r\x1b[K" + text[:width])
            self._open_line = True
        else:
            sys.stdout.write(text + "\n")
        sys.stdout.flush()


def header(plan: Plan, name: str, mixed: Mixture, device: jax.Device, flops_here: float) -> str:
    """What will be trained, on what, how long it takes here and elsewhere, and whether it fits.

    `device` is one of this process, `flops_here` the peak FLOP/s of all devices, 0 where it is not known.
    """
    config, counted, ramp = plan.config, plan.counted, plan.ramp
    on_cpu, num_devices = device.platform == "cpu", math.prod(plan.sizes.values())
    flops_a_second = flops_here * (0.6 if on_cpu else costs.TYPICAL_MFU)
    tokens, flops, amount = consumed(plan, flops_a_second)
    parameters = f"{costs.short(counted.parameters)} parameters"
    if counted.trained < counted.parameters:
        parameters += f", {costs.short(counted.trained)} of them trained"
    lines = [
        f"{name} · {parameters} · {amount}",
        *data_lines(config, mixed, tokens),
    ]
    if decided := decide.told(config, plan.decided, device.platform, has_bfloat16(device), plan.sizes["context"]):
        lines.append(decided)
    if together := job.described(num_devices):
        lines.append(together)
    num_units = len(os.sched_getaffinity(0)) if on_cpu else num_devices
    what = f"{device_name(device)} x{num_units}"
    seconds = flops / flops_a_second if flops_here else plan.seconds
    mine = f"this machine: {what}, about {costs.duration(seconds)}" if flops_here else f"{what}, time unknown"
    others = [("v5e-8", 8 * DEVICES["v5e"].peak["bfloat16"]), ("H200", DEVICES["H200"].peak["bfloat16"])]
    times = [f"{other}: {costs.duration(flops / (peak * costs.TYPICAL_MFU))}" for other, peak in others]
    lines.append(" · ".join([mine, *times]))
    classes = plan.memory
    gib, memory = sum(classes.values()) / 2**30, costs.device_memory(device) / 2**30
    verdict = "fits" if gib <= memory else "does not fit"
    parts = ", ".join(f"{name} {size / 2**30:.2g}" for name, size in classes.items())
    batch = f"{ramp.smallest}-{ramp.largest}" if len(ramp.stages) > 1 else f"{ramp.smallest}"
    rows = f"microbatch {plan.microbatch} of {batch} rows"
    lines.append(f"{verdict}: {gib:.2g} of {memory:.0f} GiB a device ({parts}); {rows}")
    warmup = int(config.optimizer.warmup)
    if warmup >= plan.num_steps > 1:
        lines.append(
            f"config.optimizer.warmup is {warmup:,} steps of {plan.num_steps:,}: the rate "
            f"ends at {plan.num_steps / warmup:.0%} of config.optimizer.learning_rate"
        )
    if on_cpu and seconds > 86400:
        lines.append("on this machine try: python -m lm_jax.main      (quickstart, 3 minutes)")
    return "\n".join(lines)


def consumed(plan: Plan, flops_a_second: float) -> tuple[float, float, str]:
    """(tokens, FLOPs, both in words) of a run; where its length is a time, what is expected of it here."""
    tokens, flops = costs.total_flops(plan.config, plan.counted, plan.ramp)
    if plan.seconds:
        flops = plan.seconds * flops_a_second
        tokens = flops / plan.counted.flops_per_token
    words = f"{costs.short(tokens)} tokens = {flops:.1e} FLOP".replace("e+", "e")
    return tokens, flops, plan.length + f", about {words}" * bool(flops) if plan.seconds else words


def data_lines(config: Config, mixed: Mixture, tokens: float) -> list[str]:
    """One line a source: its tokens, its share of the rows, and how often it is seen."""
    num_rows = int(tokens / config.data.sequence_length)
    counts, lines = Quotas([weight for _, weight in config.data.sources]).counts(num_rows), []
    for source, corpus, rows in zip(mixed.sources, mixed.corpora.values(), counts, strict=True):
        size = corpus.manifest["counts"]["train"]["tokens"]
        epochs = rows * config.data.sequence_length / max(1, size)
        share = f"{100 * rows / max(1, num_rows):.1f}% of the rows, " * (len(counts) > 1)
        short_of_data = " (fine to try, not to train)" if epochs > 100 else ""
        name = "embedded corpus" if source == "python" else source
        lines.append(f"data: {name}, {costs.short(size)} tokens, {share}{epochs:,.1f} epochs{short_of_data}")
    return lines


def curve(points: list[tuple[int, float]], title: str, width: int = 60, height: int = 8) -> str:
    """(step, value) as dots: a small plot for a terminal."""
    points = [point for point in points if math.isfinite(point[1])]
    if len(points) < 2:
        return ""
    low, high = min(value for _, value in points), max(value for _, value in points)
    last = points[-1][0]
    grid = [[" "] * width for _ in range(height)]
    for step, value in points:
        column = min(width - 1, int(step / last * (width - 1)))
        row = round((high - value) / max(high - low, 1e-9) * (height - 1))
        grid[row][column] = "•"
    labels = [f"{high:6.2f}", *["      "] * (height - 2), f"{low:6.2f}"]
    lines = [f"{label} |{''.join(row).rstrip()}" for label, row in zip(labels, grid, strict=True)]
    return "\n".join([title, *lines, f"       +{'-' * width} step {last:,}"])
