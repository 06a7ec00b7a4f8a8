"""Processes and devices: JAX's settings, who writes, how processes decide together, how much work may be in flight."""

import contextlib
import errno
import logging
import os
from collections.abc import Callable
from typing import TypeVar

import jax

from lm_jax import compile_cache, job
from lm_jax.errors import UserError
from lm_jax.files import cache_folder
from lm_jax.multihost.peers import agree as agree
from lm_jax.multihost.peers import everyone as everyone

Tree = TypeVar("Tree")  # of arrays


def configure(strict: bool = True) -> None:
    """JAX's settings: a cache of compiled programs where there is a folder for it; of a command (`strict`) strict shapes, too."""
    jax.config.update("jax_numpy_rank_promotion", "raise" if strict else jax.config.values["jax_numpy_rank_promotion"])
    with contextlib.suppress(FileNotFoundError):  # no home: no program is kept; what needs the cache says so
        compile_cache.use(os.path.join(cache_folder(), "compiled"))
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs a traceback of all that it raises


def devices() -> list[jax.Device]:
    """All devices, after joining the other processes of the job where there are some.

    Raises UserError where there is no device, and PeerError where a process of the job does not come.
    """
    job.join()
    try:
        return jax.devices()
    except RuntimeError as error:
        platforms = os.environ.get("JAX_PLATFORMS", "")
        raise UserError(f"no devices of JAX_PLATFORMS={platforms!r}: {str(error).splitlines()[0]}") from error


def own(here: list[jax.Device]) -> jax.Device:
    """A device of this process; of other processes' devices JAX tells only kind, platform and numbers."""
    return next(device for device in here if device.process_index == jax.process_index())


def is_main_process() -> bool:
    """Whether this process writes what a run has once: log, metrics, config, and the manifest of a step."""
    return share()[0] == 0


def share() -> tuple[int, int]:
    """(index of this process, number of processes); it can be asked before JAX has looked for devices."""
    return (jax.process_index(), jax.process_count()) if jax.distributed.is_initialized() else (0, 1)


def first_answer(ask: Callable[[], str], about: str) -> str:
    """The first answer of the processes that is not "", on every process: all call `ask`, and wait for each other.

    An OSError that one of them raises is raised on all. `about` names the question where a process does not come.
    """
    if share()[1] == 1:
        return ask()
    try:
        answer = [0, ask(), ""]
    except OSError as error:
        answer = [error.errno or errno.EIO, str(error.strerror or error), str(error.filename or "")]
    answers = everyone(answer, about)
    for number, text, path in answers:
        if number:
            raise OSError(number, text, path)
    return next((text for _, text, _ in answers if text), "")


def in_flight() -> int:
    """Steps that run while the next one is dispatched."""
    return 0 if jax.default_backend() == "cpu" else 1


def block_on_cpu(tree: Tree) -> Tree:
    """Waits for the arrays of `tree` on a CPU, whose fake devices deadlock where several steps are in flight.

    On accelerators the next step is dispatched while this one runs. No other place decides that.
    """
    return tree if in_flight() else jax.block_until_ready(tree)
