"""Processes and devices: the compile cache, more than one process, how much work may be in flight, one run a workdir."""

import contextlib
import dataclasses
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

from lm_jax import cluster, compile_cache, roll_call
from lm_jax.cluster import Cluster
from lm_jax.config import PeerError, UserError
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


@dataclasses.dataclass(frozen=True)
class Joined:
    """The job that this process has joined, and the host of each of its processes."""

    cluster: Cluster
    hosts: list[str]


joined: list[Joined] = []  # empty where this process is alone


def devices() -> list[jax.Device]:
    """All devices, after joining the other processes where there are some.

    Raises UserError where there is no device, and PeerError where a process of the job does not come.
    """
    if not joined and (found := cluster.find()):
        joined.append(Joined(found, roll_call.call(found)))
        join(found)
    try:
        return jax.devices()
    except RuntimeError as error:
        platforms = os.environ.get("JAX_PLATFORMS", "")
        raise UserError(f"no devices of JAX_PLATFORMS={platforms!r}: {str(error).splitlines()[0]}") from error


def join(found: Cluster) -> None:
    """Makes this process one of several for JAX. Signals stay ours. Raises PeerError where one that was here is gone again."""
    try:
        jax.distributed.initialize(
            found.address,
            found.num_processes,
            found.process,
            local_device_ids=found.local_device,
            cluster_detection_method="deactivate",  # it is known already
            initialization_timeout=int(roll_call.limit()),
            partition_index=found.slice_index if found.num_slices > 1 else None,
        )
    except RuntimeError as error:
        raise PeerError(
            f"all {found.num_processes} processes were here ({found.where}), and then JAX could not join them at "
            f"{found.address}: {str(error).splitlines()[0][:300]}\nstart all of them again"
        ) from error
    for taken in SIGNALS:  # JAX listens for SIGTERM too, and keeps it to itself
        signal.signal(taken, signal.getsignal(taken))


def own(here: list[jax.Device]) -> jax.Device:
    """A device of this process. Of others' devices only kind, platform and numbers may be asked: JAX raises for the rest."""
    return next(device for device in here if device.process_index == jax.process_index())


def described(num_devices: int) -> str:
    """ "4 processes on 2 hosts, 2 slices, 16 devices (Cloud TPU)", "" where a process is alone."""
    if not joined:
        return ""
    one, hosts = joined[0].cluster, len(set(joined[0].hosts))
    slices = f", {one.num_slices} slices" * (one.num_slices > 1)
    on = f"{hosts} host{'s' * (hosts > 1)}"
    return f"{one.num_processes} processes on {on}{slices}, {num_devices} devices ({one.where})"


def leads() -> bool:
    """Whether this process is the one that writes what a run has once: log, metrics, config, and the manifest of a step."""
    return jax.process_index() == 0


def agree(number: int) -> int:
    """The leading process' number, on every process; all wait for it."""
    return int(multihost_utils.broadcast_one_to_all(np.int64(number))) if share()[1] > 1 else number


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
    mine = np.zeros(32 * MOST_SAID, np.uint8)  # JSON says a character in at most 12 bytes
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
