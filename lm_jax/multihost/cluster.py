"""Which processes this one belongs to: decided once, from where it is, before JAX has devices.

How each kind of cluster says it is known to JAX (`jax._src.clusters`); here stands whom to ask, when, for which port.
"""

import dataclasses
import http.client
import os
from collections.abc import Callable

from jax._src import cloud_tpu_init
from jax._src.clusters import GceTpuCluster, GkeTpuCluster, OmpiCluster, SlurmCluster
from jax._src.clusters.cloud_tpu_cluster import BaseTpuCluster, get_tpu_env_value

from lm_jax.errors import UserError, needs

PORT = "8476"  # the firewall rule that comes with a TPU network lets it through, unlike JAX's 8482
PROBE_SECONDS = 2  # for the metadata server of a Google machine, which answers in milliseconds


@dataclasses.dataclass(frozen=True)
class Cluster:
    """A job of several processes. `process` is this one's number, `address` the host:port where process 0 is."""

    where: str  # in words
    address: str
    num_processes: int
    process: int
    hosts: tuple[str, ...] = ()  # those of this slice, in the order of its processes, where that is known
    num_slices: int = 1
    slice_index: int = 0
    local_device: int | None = None  # where each of a host's processes has one accelerator: which; None: all of them

    def name(self, process: int) -> str:
        """A process in words, "process 3 (10.0.0.4)", or without its host where that is not known."""
        inside = process - self.slice_index * len(self.hosts)
        return f"process {process}" + (f" ({self.hosts[inside]})" if 0 <= inside < len(self.hosts) else "")


def find() -> Cluster | None:
    """The job that this process belongs to, None where it is alone.

    JAX_COORDINATOR_ADDRESS comes first, with JAX_NUM_PROCESSES and JAX_PROCESS_ID, or with the numbers of a cluster
    below; then Open MPI, a step of Slurm, GKE, and a Cloud TPU VM, which alone is asked over the network.
    JAX_NUM_PROCESSES=1 is one process anywhere. Raises UserError where the environment contradicts itself.
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    num, process = given("JAX_NUM_PROCESSES"), given("JAX_PROCESS_ID")
    if num == 1:
        return None
    known = address and num is not None and process is not None
    # What is given needs no server; a host's accelerators are shared out all the same.
    kinds = KINDS[:-1] if known else KINDS
    found = next(filter(None, (kind() for kind in kinds)), None)
    if address:
        found = explicit(address, found, num, process)
    if found is None or found.num_processes == 1:
        return None
    if not 0 <= found.process < found.num_processes:
        raise UserError(
            f"{found.where}: this is process {found.process} of {found.num_processes}, whose numbers go from 0 to "
            f"{found.num_processes - 1}; mend JAX_PROCESS_ID or JAX_NUM_PROCESSES"
        )
    return found


def given(name: str) -> int | None:
    """A number in the environment, None where it is not set. Raises UserError for any other text."""
    text = os.environ.get(name, "")
    if text and not text.isdecimal():
        raise UserError(f"{name}={text!r} is no number of processes, or of one of them; give one, such as {name}=1")
    return int(text) if text else None


def explicit(address: str, found: Cluster | None, num: int | None, process: int | None) -> Cluster:
    """The job whose coordinator is at `address`; what the environment does not say is taken from `found`."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal():
        address = f"{address.rstrip(':')}:{os.environ.get('JAX_COORDINATOR_PORT', PORT)}"
    if (num is None or process is None) and found is None:
        missing = "JAX_NUM_PROCESSES" if num is None else "JAX_PROCESS_ID"
        raise UserError(
            f"JAX_COORDINATOR_ADDRESS={address} without {missing}, and no cluster is here that says it: set it"
        )
    found = found or Cluster("JAX_COORDINATOR_ADDRESS", address, 1, 0)
    return dataclasses.replace(
        found,
        address=address,
        num_processes=found.num_processes if num is None else num,
        process=found.process if process is None else process,
    )


def open_mpi() -> Cluster | None:
    """The processes that mpirun started. Raises UserError where nothing says where process 0 is."""
    num = given("OMPI_COMM_WORLD_SIZE")
    if num is None or num == 1:
        return None
    address = ""  # said by JAX_COORDINATOR_ADDRESS
    if "JAX_COORDINATOR_ADDRESS" not in os.environ:
        try:
            address = OmpiCluster.get_coordinator_address(None, os.environ.get("JAX_COORDINATOR_PORT"))
        except (KeyError, RuntimeError):  # version 5 says it to mpi4py alone, which JAX asks from 0.12 on
            raise UserError(
                "Open MPI runs several processes and does not say where it was started (version 5 never does): "
                f"mpirun -x JAX_COORDINATOR_ADDRESS=HOST:{PORT} ..., where process 0 is"
            ) from None
    alone = os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    local = None if alone else one_accelerator(given("OMPI_COMM_WORLD_LOCAL_RANK"))
    return Cluster("Open MPI", address, num, given("OMPI_COMM_WORLD_RANK") or 0, local_device=local)


def slurm() -> Cluster | None:
    """The tasks that srun started. A script of sbatch has the job's numbers too, and is one process."""
    num = given("SLURM_STEP_NUM_TASKS")
    if num is None or num == 1 or not SlurmCluster.is_env_present():
        return None
    address = SlurmCluster.get_coordinator_address(None, os.environ.get("JAX_COORDINATOR_PORT"))
    alone = os.environ.get("SLURM_STEP_NUM_NODES") == str(num)
    local = None if alone else one_accelerator(SlurmCluster.get_local_process_id())
    job = f"job {os.environ['SLURM_JOB_ID']} of Slurm"
    return Cluster(job, address, num, SlurmCluster.get_process_id(), local_device=local)


def one_accelerator(local: int | None) -> int | None:
    """Which accelerator of its host belongs to a process among several; None where the cluster shows it no other."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return None if shown and "," not in shown else local


def gke() -> Cluster | None:
    """A pod with TPUs: GKE puts the hosts of its slice into the environment, JobSet those of several slices."""
    if not (os.environ.get("TPU_WORKER_ID") and GkeTpuCluster._get_worker_host_names_env_var()):
        return None
    return of_tpus(GkeTpuCluster, "GKE", os.environ.get)


def tpu_vm() -> Cluster | None:
    """The hosts of a Cloud TPU VM's slice, as the metadata server names them. Raises UserError without `requests`."""
    if not cloud_tpu_init.running_in_cloud_tpu_vm or "TPU_SKIP_MDS_QUERY" in os.environ:
        return None  # no chips of Google's are in this machine
    if "TPU_PROCESS_BOUNDS" in os.environ or not metadata_answers():  # its chips were given out by hand; no server
        return None
    try:
        import requests  # noqa: F401  (by which JAX asks the server)
    except ImportError:
        raise needs("a Cloud TPU VM", "requests", "tpu") from None
    return of_tpus(GceTpuCluster, "Cloud TPU", get_tpu_env_value)


def of_tpus(kind: type[BaseTpuCluster], where: str, value: Callable[[str], str | None]) -> Cluster:
    """Slices of equally many hosts, one process each. `value`: what is said of several slices, by its name."""
    hosts = tuple(host.partition(":")[0] for host in kind._get_worker_list_in_slice())
    slices, own = int(value("MEGASCALE_NUM_SLICES") or 1), int(value("MEGASCALE_SLICE_ID") or 0)
    first = (value("MEGASCALE_COORDINATOR_ADDRESS") or hosts[0]).partition(":")[0]
    return Cluster(
        where,
        f"{first}:{os.environ.get('JAX_COORDINATOR_PORT', PORT)}",
        len(hosts) * slices,
        own * len(hosts) + kind._get_process_id_in_slice(),
        hosts,
        slices,
        own,
    )


def metadata_answers() -> bool:
    """Whether Google's metadata server is there and knows the number of this worker. JAX would wait minutes for it."""
    address = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    connection = http.client.HTTPConnection(address, timeout=PROBE_SECONDS)
    try:
        path = "/computeMetadata/v1/instance/attributes/agent-worker-number"
        connection.request("GET", path, headers={"Metadata-Flavor": "Google"})
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):  # no such name, nobody there, no answer, or no HTTP
        return False
    finally:
        connection.close()


KINDS = (open_mpi, slurm, gke, tpu_vm)  # the one that asks over the network last
