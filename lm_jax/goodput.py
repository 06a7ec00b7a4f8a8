"""Where the time goes: seconds by what they went into, and a profiler trace of a few steps on request."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator

import jax
from etils import epath

START_UP = ("devices", "data", "plan", "peak", "state")
TRACED_STEPS = 3


class Goodput:
    """Seconds of a process: `with goodput("data"): ...`. What nothing claims went into steps."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Inside, time is counted as `name`."""
        start = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0) + time.monotonic() - start

    def waiting(self, items: Iterator, name: str) -> Iterator:
        """`items`, the time for each counted as `name`."""
        end = object()
        while True:
            with self(name):
                item = next(items, end)
            if item is end:
                return
            yield item

    def start_up(self) -> str:
        """One line: the seconds of each part so far."""
        return "start-up: " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())

    def parts(self) -> dict[str, float]:
        """{what: seconds} since the start; `step` is what the others leave."""
        parts = {"start-up": sum(self.seconds.get(name, 0) for name in START_UP)}
        parts |= {name: seconds for name, seconds in self.seconds.items() if name not in START_UP}
        return parts | {"step": time.monotonic() - self.start - sum(parts.values())}

    def table(self) -> str:
        """One line a part: its share of the time, and its seconds. Goodput is the share of the steps."""
        parts = self.parts()
        total = sum(parts.values())
        rows = [f"  {name:<12}{100 * seconds / total:5.1f}%  {seconds:,.1f} s" for name, seconds in parts.items()]
        return "\n".join([f"goodput {100 * parts['step'] / total:.1f}%: where {total:,.0f} s went", *rows])


def traced(
    steps: Iterable[int], first: Callable[[], int], folder: epath.Path, log: Callable[[str], None]
) -> Iterator[int]:
    """`steps`, of which `TRACED_STEPS` are recorded for XProf from step number `first()` (counted from 1) on.

    It is asked before each step: 0, or a step that is over, records none.
    """
    begun = 0
    try:
        for step in steps:
            if not begun and step + 1 == first():
                jax.profiler.start_trace(str(folder))
                begun = step + 1
            yield step
            if begun and step + 1 == begun + TRACED_STEPS - 1:
                jax.profiler.stop_trace()
                log(f"trace of steps {begun} to {step + 1}: pip install xprof && xprof --logdir {folder}")
                begun = 0
    finally:
        if begun:
            jax.profiler.stop_trace()
