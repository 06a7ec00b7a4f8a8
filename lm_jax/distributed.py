"""Processes and devices: the compile cache, more than one process, how much work may be in flight, one run a workdir."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import signal
from collections.abc import Callable, Iterator

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from lm_jax import compile_cache
from lm_jax.config import UserError
from lm_jax.data.shards import cache_folder, is_url
from lm_jax.places import leased
from lm_jax.stop import SIGNALS

MOST_SAID = 400  # characters of what one process tells the others


def configure() -> None:
    """JAX's settings for every command: strict shapes, and programs compiled once kept for the next run, if they can be."""
    jax.config.update("jax_numpy_rank_promotion", "raise")
    with contextlib.suppress(FileNotFoundError):  # no home: no program is kept; what needs the cache says so
        compile_cache.use(os.path.join(cache_folder(), "compiled"))
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs a traceback of all that it raises


def devices() -> list[jax.Device]:
    """All devices, after joining the other processes where there are some. Raises UserError where there is none."""
    if "JAX_COORDINATOR_ADDRESS" in os.environ or "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
        number = lambda name: int(os.environ[name]) if name in os.environ else None  # unset: the cluster knows
        jax.distributed.initialize(num_processes=number("JAX_NUM_PROCESSES"), process_id=number("JAX_PROCESS_ID"))
        for taken in SIGNALS:  # JAX listens for SIGTERM too, and keeps it to itself
            signal.signal(taken, signal.getsignal(taken))
    try:
        return jax.devices()
    except RuntimeError as error:
        platforms = os.environ.get("JAX_PLATFORMS", "")
        raise UserError(f"no devices of JAX_PLATFORMS={platforms!r}: {str(error).splitlines()[0]}") from error


def leads() -> bool:
    """Whether this process is the one that writes what a run has once: log, metrics, config, and the manifest of a step."""
    return jax.process_index() == 0


def agree(number: int) -> int:
    """The leading process' number, on every process; all wait for it."""
    return int(multihost_utils.broadcast_one_to_all(np.int64(number))) if jax.process_count() > 1 else number


def share() -> tuple[int, int]:
    """(this process, how many there are), before JAX has looked for devices, too."""
    return (jax.process_index(), jax.process_count()) if jax.distributed.is_initialized() else (0, 1)


def first_answer(ask: Callable[[], str]) -> str:
    """The first answer of the processes that is not "", on every process; all ask, and wait for each other.

    An OSError of one is raised on all of them.
    """
    if share()[1] == 1:
        return ask()
    try:
        answer: tuple = (0, ask()[:MOST_SAID], "")
    except OSError as error:
        answer = (
            error.errno or errno.EIO,
            str(error.strerror or error)[:MOST_SAID],
            str(error.filename or "")[:MOST_SAID],
        )
    mine = np.zeros(8 * MOST_SAID, np.uint8)
    raw = json.dumps(answer).encode()
    mine[: len(raw)] = np.frombuffer(raw, np.uint8)
    answers = [json.loads(bytes(x).rstrip(b"\0")) for x in np.asarray(multihost_utils.process_allgather(mine))]
    for number, text, path in answers:
        if number:
            raise OSError(number, text, path)
    return next((text for _, text, _ in answers if text), "")


def settle(tree):
    """Waits for `tree` where nothing may be in flight behind it: on CPU, whose fake devices deadlock in collectives.

    On accelerators the next step is dispatched while this one runs. This function is the one place that says so.
    """
    return jax.block_until_ready(tree) if jax.default_backend() == "cpu" else tree


@contextlib.contextmanager
def workdir_lock(workdir: epath.Path, say: Callable[[str], None]) -> Iterator[None]:
    """One run a workdir: the lock, held by its leading process, dies with it. Raises UserError where another run holds it."""
    if not leads():
        yield
        return
    if is_url(workdir):
        with leased(workdir, say):
            yield
        return
    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir / "lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another run is at work in {workdir}; wait for it, stop it, or use another --workdir"
            ) from None
        yield
