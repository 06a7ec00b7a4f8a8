"""Points of a run where it is broken on purpose: `LM_JAX_FAULT="kill@save.commit:7"` kills it there, the 7th time.

ACTION@POINT, then `:N`, at the Nth time that this process comes there (1), then `#K`, in process K alone (all).
"""

import os
import re
import signal
import sys
import time

from lm_jax.errors import UserError, nearest

SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM, "usr1": signal.SIGUSR1}
ACTIONS = (*SIGNALS, "raise", "exit", "sleep")
POINTS = {
    "start": "the devices are known",
    "restore": "a step is to be read",
    "compile": "the step is to be compiled",
    "step": "a step begins",
    "microbatch": "a microbatch that is not the last of its step is done",
    "evaluation": "a batch is evaluated",
    "save.begin": "a step is marked unfinished",
    "save.arrays": "its arrays are written",
    "save.part": "so are the hashes of each process, where there are several",
    "save.manifest": "the manifest is to be written",
    "save.mark": "it is written, the mark stands",
    "save.commit": "the mark is gone",
    "retain": "an old step is marked, and to be removed",
    "send": "a file is to be copied up to a bucket",
    "quarantine": "a broken step is to be set aside",
    "end": "all steps are saved, the last evaluation is not written",
}
_armed: tuple[str, str, int, int | None] | None = None  # action, point, the time, the process
_times = 0


def arm(given: str) -> None:
    """Reads the value of LM_JAX_FAULT, "" = none. Raises UserError for one that no run would come to."""
    global _armed, _times
    _armed, _times = None, 0
    if not given:
        return
    if not (found := re.fullmatch(r"(\w*)@([\w.]*)(?::([1-9]\d{0,8}))?(?:#(\d{1,6}))?", given, re.ASCII)):
        raise UserError(f"LM_JAX_FAULT={given[:80]!r}: expected ACTION@POINT[:TIME][#PROCESS], such as kill@step:7#1")
    action, point, time_, process = found.groups()
    for word, what, known in ((action, "action", ACTIONS), (point, "point", POINTS)):
        if word not in known:
            there = f"no {what} {word!r}{nearest(word, known)}\nthere is {', '.join(known)}"
            raise UserError(f"LM_JAX_FAULT={given[:80]!r}: {there}")
    _armed = action, point, int(time_ or 1), int(process) if process else None


def reach(point: str) -> None:
    """Called at a point: breaks the process there where that was asked for, else does nothing."""
    global _times
    if _armed is None or _armed[1] != point or _armed[3] not in (None, _process()):
        return
    _times += 1
    if _times != _armed[2]:
        return
    os.write(2, f"\nLM_JAX_FAULT: {_armed[0]} at {point}, time {_times}\n".encode())
    if _armed[0] in SIGNALS:
        os.kill(os.getpid(), SIGNALS[_armed[0]])
    elif _armed[0] == "raise":
        raise RuntimeError("LM_JAX_FAULT asked for this")
    elif _armed[0] == "exit":
        os._exit(1)
    else:
        time.sleep(3600)


def unreached() -> str:
    """What is to be said at the end of a command that was to be broken, and was not; "" otherwise."""
    if _armed is None or _times >= _armed[2] or _armed[3] not in (None, _process()):
        return ""
    return f"LM_JAX_FAULT: not broken: {_armed[1]} was reached {_times} times"


def _process() -> int:
    return sys.modules["jax"].process_index()  # every point comes after the processes have found each other
