"""The job of several processes that this process belongs to: joined where there is one, and described."""

import contextlib
import dataclasses
import os
import signal

import jax
from jax._src import distributed

from lm_jax.errors import PeerError, UserError
from lm_jax.multihost import cluster, peers, roll_call
from lm_jax.multihost.cluster import Cluster
from lm_jax.stop import TAKEN

LAST_WORDS = 10  # seconds that a process which ends waits for the others to hear why


@dataclasses.dataclass(frozen=True)
class Job:
    """The job that this process has joined, and the host of each of its processes."""

    cluster: Cluster
    hosts: list[str]


joined: list[Job] = []  # empty where this process is alone


def join(patience: int = 0) -> None:
    """Joins the other processes of the job, where there is one and that is not done yet; signals stay ours.

    `patience`: seconds to wait for them (0: as usual). Raises UserError or PeerError where a process does not come, or is
    gone again before JAX has joined it.
    """
    if joined or not (found := cluster.find()):
        return
    if patience:
        os.environ[roll_call.LIMIT] = str(patience)
    joined.append(Job(found, roll_call.call(found)))
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
    for taken in TAKEN:  # JAX listens for SIGTERM too, and keeps it to itself
        signal.signal(taken, signal.getsignal(taken))
    peers.join(found.process, joined[0].hosts, found.address, distributed.global_state.client)


def join_for_last_words() -> None:
    """Joins the others from a process that ends before it has: they end with it, and know why."""
    with contextlib.suppress(UserError, PeerError):  # nobody is there, or that is the error of this process
        join(LAST_WORDS)


def does_it_alone() -> bool:
    """Whether this process does what one process has to do, such as a conversion: in a job the first one does.

    It uses its CPU then: the accelerators of a job may start only together.
    """
    found = cluster.find()
    if found is None:
        return True
    os.environ["JAX_NUM_PROCESSES"] = "1"  # from here on this process belongs to no job
    jax.config.update("jax_platforms", "cpu")
    return found.process == 0


def described(num_devices: int) -> str:
    """Such as "4 processes on 2 hosts, 2 slices, 16 devices (Cloud TPU)"; "" where a process is alone."""
    if not joined:
        return ""
    one, hosts = joined[0].cluster, len(set(joined[0].hosts))
    slices = f", {one.num_slices} slices" * (one.num_slices > 1)
    on = f"{hosts} host{'s' * (hosts > 1)}"
    return f"{one.num_processes} processes on {on}{slices}, {num_devices} devices ({one.where})"
