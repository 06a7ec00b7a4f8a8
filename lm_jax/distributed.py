"""Processes and devices: the compile cache, more than one process, how much work may be in flight, one run a workdir."""

import contextlib
import dataclasses
import errno
import logging
import os
import secrets
import signal
import time
from collections.abc import Callable, Iterator

import jax
from etils import epath
from jax._src import distributed

from lm_jax import compile_cache
from lm_jax.errors import PeerError, UserError
from lm_jax.files import cache_folder, locked
from lm_jax.multihost import cluster, peers, roll_call
from lm_jax.multihost.cluster import Cluster
from lm_jax.multihost.peers import agree as agree
from lm_jax.multihost.peers import everyone as everyone
from lm_jax.regular_files import is_url
from lm_jax.remote import leased
from lm_jax.stop import SIGNALS

# Seconds in which what one process writes is to be seen by all: a network's file system keeps what it read.
TOGETHER = 5.0
LAST_WORDS = 10  # seconds that a process which ends waits for others to hear it


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
        join(joined[0])
    try:
        return jax.devices()
    except RuntimeError as error:
        platforms = os.environ.get("JAX_PLATFORMS", "")
        raise UserError(f"no devices of JAX_PLATFORMS={platforms!r}: {str(error).splitlines()[0]}") from error


def join(all_here: Joined) -> None:
    """Makes this process one of several for JAX. Signals stay ours. Raises PeerError where one that was here is gone again."""
    found = all_here.cluster
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
    peers.join(found.process, all_here.hosts, found.address, distributed.global_state.client)


def does_it_alone() -> bool:
    """Whether this process does what is the work of one, such as a conversion: in a job of several the first does, alone.

    It uses its CPU then: the accelerators of a job may start only together.
    """
    found = cluster.find()
    if found is None:
        return True
    os.environ["JAX_NUM_PROCESSES"] = "1"  # from here on this process belongs to no job
    jax.config.update("jax_platforms", "cpu")
    return found.process == 0


def join_for_last_words() -> None:
    """A process that ends before it has joined the others joins them, where they are at hand: they end with it, and know why."""
    with contextlib.suppress(UserError, PeerError):  # nobody is there, or that is what is being said
        if not joined and (found := cluster.find()):
            os.environ[roll_call.LIMIT] = str(LAST_WORDS)
            joined.append(Joined(found, roll_call.call(found)))
            join(joined[0])


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


def is_main_process() -> bool:
    """Whether this process is the one that writes what a run has once: log, metrics, config, and the manifest of a step."""
    return share()[0] == 0


def share() -> tuple[int, int]:
    """(this process, how many there are), before JAX has looked for devices, too."""
    return (jax.process_index(), jax.process_count()) if jax.distributed.is_initialized() else (0, 1)


def first_answer(ask: Callable[[], str], about: str) -> str:
    """The first answer of the processes that is not "", on every process; all ask, and wait for each other.

    An OSError of one is raised on all of them.
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


def block_on_cpu(tree):
    """Waits for `tree` where nothing may be in flight behind it: on CPU, whose fake devices deadlock in collectives.

    On accelerators the next step is dispatched while this one runs. This function is the one place that says so.
    """
    return jax.block_until_ready(tree) if jax.default_backend() == "cpu" else tree


@contextlib.contextmanager
def workdir_lock(workdir: epath.Path, log: Callable[[str], None]) -> Iterator[None]:
    """One run a workdir: the lock, held by its leading process, dies with it. Raises UserError where another run holds it."""
    if not is_main_process():
        yield
        return
    if is_url(workdir):
        with leased(workdir, log):
            yield
        return

    def busy() -> None:
        raise UserError(f"another run is at work in {workdir}; wait for it, stop it, or use another --workdir")

    workdir.mkdir(parents=True, exist_ok=True)
    with locked(workdir / "lock", busy):
        yield


def find_together(workdir: epath.Path) -> None:
    """Raises UserError on all processes where one of them has another workdir than process 0, or one that is not shared.

    Process 0 holds the lock, and writes a word into it that the others have to find: a path says nothing of what is there.
    """
    if peers.line is None:
        return
    path = workdir / "lock" / "word" if is_url(workdir) else workdir / "lock"
    word = agree(secrets.token_hex(8), "a word")
    if is_main_process():
        path.write_text(word)
    agree(None, "the word is written")
    until = time.monotonic() + TOGETHER
    while not (is_found := path.exists() and path.read_text() == word) and time.monotonic() < until:
        time.sleep(0.1)
    found = everyone([is_found, peers.line.host, os.path.abspath(workdir)], "the word is found")
    lost = [f"process {k} (host {host}): {path}" for k, (there, host, path) in enumerate(found) if not there]
    if lost:
        more = f" (+{len(lost) - 1} more)" * (len(lost) > 1)
        raise UserError(
            f"what process 0 writes into {found[0][2]} is not in the --workdir of {lost[0]}{more}\n"
            "all processes of a run need one --workdir that they share"
        )
