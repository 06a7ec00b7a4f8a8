"""Where a process is, and which others it belongs to: every kind of cluster as its environment says it, and nearly so."""

import dataclasses
import os
import socket
import sys
import threading

import pytest
from helpers import ROOT
from jax._src import cloud_tpu_init
from metadata_server import of_worker, serve

from lm_jax.errors import UserError
from lm_jax.multihost import cluster
from lm_jax.multihost.cluster import Cluster

sys.path.append(str(ROOT / "tools"))
import convert_checkpoint  # noqa: E402

KNOWN = ("JAX_", "OMPI_", "SLURM_", "TPU_", "MEGASCALE_", "CUDA_VISIBLE", "GCE_METADATA", "KUBERNETES_")
STEP = {
    "SLURM_JOB_ID": "17", "SLURM_NTASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "node[07-08]", "SLURM_STEP_ID": "0",
}  # fmt: skip
MPI = {
    "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}  # fmt: skip
POD = {"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "a-0.a,a-1.a", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}
SLICES = {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "job-0-0.job:8080"}
ADDRESS = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234"}
FULL = ADDRESS | {"JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"}
SLURM_PORT = 17 % 4096 + 65535 - 4096 + 1

# environment -> what is found: (address, processes, number, slices, own slice, own accelerator of a host), None: alone
PLACES = {
    "nothing": ({}, None),
    "explicit": (FULL, ("10.0.0.1:1234", 3, 2, 1, 0, None)),
    "explicit, no port": (FULL | {"JAX_COORDINATOR_ADDRESS": "host-0"}, ("host-0:8476", 3, 2, 1, 0, None)),
    "explicit, own port": (
        FULL | {"JAX_COORDINATOR_ADDRESS": "host-0", "JAX_COORDINATOR_PORT": "9000"},
        ("host-0:9000", 3, 2, 1, 0, None),
    ),
    "explicit, process 0": (FULL | {"JAX_PROCESS_ID": "0"}, ("10.0.0.1:1234", 3, 0, 1, 0, None)),
    "explicit, alone": (FULL | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, None),
    "slurm": (STEP, (f"node07:{SLURM_PORT}", 4, 2, 1, 0, 0)),
    "slurm, one task a node": (
        STEP | {"SLURM_STEP_NUM_NODES": "4", "SLURM_STEP_NODELIST": "n1,n3"},
        (f"n1:{SLURM_PORT}", 4, 2, 1, 0, None),
    ),
    "slurm, each shown its own": (STEP | {"CUDA_VISIBLE_DEVICES": "3"}, (f"node07:{SLURM_PORT}", 4, 2, 1, 0, None)),
    "slurm, shown all": (STEP | {"CUDA_VISIBLE_DEVICES": "0,1"}, (f"node07:{SLURM_PORT}", 4, 2, 1, 0, 0)),
    "slurm, address given": (STEP | ADDRESS, ("10.0.0.1:1234", 4, 2, 1, 0, 0)),
    "slurm, all given": (STEP | FULL, ("10.0.0.1:1234", 3, 2, 1, 0, 0)),
    "mpi, all given": (MPI | FULL, ("10.0.0.1:1234", 3, 2, 1, 0, 1)),
    "slurm, port given": (STEP | {"JAX_COORDINATOR_PORT": "9000"}, ("node07:9000", 4, 2, 1, 0, 0)),
    "script of sbatch": ({name: STEP[name] for name in STEP if "STEP" not in name}, None),
    "shell of salloc": ({"SLURM_JOB_ID": "17", "SLURM_NTASKS": "4"}, None),
    "interactive step of salloc": (STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
    "slurm, one task": (STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
    "slurm, alone by hand": (STEP | {"JAX_NUM_PROCESSES": "1"}, None),
    "mpi": (MPI, ("10.96.0.1:62624", 2, 1, 1, 0, 1)),
    "mpi, one a host": (MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, ("10.96.0.1:62624", 2, 1, 1, 0, None)),
    "mpi, one process": (MPI | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, None),
    "mpi inside slurm": (STEP | MPI, ("10.96.0.1:62624", 2, 1, 1, 0, 1)),
    "mpi 5, address given": (
        {name: MPI[name] for name in MPI if "uri" not in name} | ADDRESS,
        ("10.0.0.1:1234", 2, 1, 1, 0, 1),
    ),
    "gke": (POD, ("a-0.a:8476", 2, 1, 1, 0, None)),
    "gke, one host": (POD | {"TPU_WORKER_HOSTNAMES": "a-0.a", "TPU_WORKER_ID": "0"}, None),
    "gke, by addresses": (
        {"TPU_WORKER_ID": "0", "TPU_PROCESS_ADDRESSES": "a:8471,b:8471,c:8471"},
        ("a:8476", 3, 0, 1, 0, None),
    ),
    "gke, two slices": (POD | SLICES, ("job-0-0.job:8476", 4, 3, 2, 1, None)),
    "gke, two slices of one host": (
        POD | SLICES | {"TPU_WORKER_HOSTNAMES": "job-1-0.job", "TPU_WORKER_ID": "0"},
        ("job-0-0.job:8476", 2, 1, 2, 1, None),
    ),
    "kubernetes without TPUs": ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
}  # fmt: skip


@pytest.fixture
def nowhere(monkeypatch):
    """A process of no cluster; returns what sets its environment."""
    for name in [name for name in os.environ if name.startswith(KNOWN)]:
        monkeypatch.delenv(name)
    return lambda environment: [monkeypatch.setenv(name, value) for name, value in environment.items()]


def facts(found: Cluster | None) -> tuple | None:
    return found and (*dataclasses.astuple(found)[1:4], found.num_slices, found.slice_index, found.local_device)


@pytest.mark.parametrize("place", PLACES)
def test_a_process_knows_where_it_is(place, nowhere, monkeypatch):
    """And without a word over the network."""
    monkeypatch.setattr(cluster, "metadata_answers", lambda: pytest.fail("the metadata server was asked"))
    environment, expected = PLACES[place]
    nowhere(environment)
    assert facts(cluster.find()) == expected


WRONG = {
    "no number of processes": (ADDRESS | {"JAX_PROCESS_ID": "0"}, "JAX_NUM_PROCESSES"),
    "no number of this one": (ADDRESS | {"JAX_NUM_PROCESSES": "2"}, "JAX_PROCESS_ID"),
    "one too many": (FULL | {"JAX_PROCESS_ID": "3"}, "0 to 2"),
    "not a number": (FULL | {"JAX_PROCESS_ID": "two"}, "JAX_PROCESS_ID='two'"),
    "negative": (FULL | {"JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID='-1'"),
    "none at all": (FULL | {"JAX_NUM_PROCESSES": "0"}, "process 2 of 0"),
    "open mpi 5 says no address": ({name: MPI[name] for name in MPI if "uri" not in name}, "-x JAX_COORDINATOR_ADDRESS"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_an_environment_that_contradicts_itself_is_a_mistake(case, nowhere):
    environment, words = WRONG[case]
    nowhere(environment)
    with pytest.raises(UserError, match="(?s)" + words.replace("-x", ".*-x")):
        cluster.find()


HOSTS = ["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4"]
VMS = {
    "one host": (of_worker(0, HOSTS[:1]), None),
    "a slice": (of_worker(3, HOSTS), ("10.0.0.1:8476", 4, 3, 1, 0, None)),
    "a slice, first": (of_worker(0, HOSTS), ("10.0.0.1:8476", 4, 0, 1, 0, None)),
    "hosts as triples": (of_worker(1, ["w:0:10.0.0.1", "w:1:10.0.0.2"]), ("10.0.0.1:8476", 2, 1, 1, 0, None)),
    "two slices of two": (of_worker(1, HOSTS[2:], 2, 1, HOSTS[0]), ("10.0.0.1:8476", 4, 3, 2, 1, None)),
    "two slices of one": (of_worker(0, HOSTS[1:2], 2, 1, HOSTS[0]), ("10.0.0.1:8476", 2, 1, 2, 1, None)),
    "a machine of Google's that is no worker": ({}, None),
}  # fmt: skip


@pytest.fixture
def served(nowhere, monkeypatch):
    """Starts the metadata server of a TPU VM. Returns the list of what it is asked for."""
    servers = []

    def start(attributes):
        asked: list[str] = []
        servers.append(serve(attributes, asked))
        threading.Thread(target=servers[0].serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{servers[0].server_port}")
        monkeypatch.setattr(cloud_tpu_init, "running_in_cloud_tpu_vm", True)
        return asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("vm", VMS)
def test_a_tpu_vm_is_told_by_its_metadata_server(vm, served):
    attributes, expected = VMS[vm]
    asked = served(attributes)
    assert facts(cluster.find()) == expected
    assert asked[0] == "agent-worker-number" and (expected is None or asked.count("agent-worker-number") == 2)


@pytest.mark.parametrize(
    "environment",
    [{"TPU_SKIP_MDS_QUERY": "1"}, {"TPU_PROCESS_BOUNDS": "1,1,1"}, {"JAX_NUM_PROCESSES": "1"}, FULL, STEP, POD],
    ids=["no chips", "chips given out by hand", "alone by hand", "explicit", "slurm", "gke"],
)
def test_a_tpu_vm_is_not_asked_where_something_else_says_it(environment, served, nowhere):
    asked = served(of_worker(1, HOSTS))
    nowhere(environment)
    cluster.find()
    assert asked == []


def test_a_metadata_server_that_does_not_answer_holds_nobody_up(monkeypatch):
    monkeypatch.setattr(cluster, "PROBE_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for address in (f"127.0.0.1:{silent.getsockname()[1]}", "127.0.0.1:1", "no-such-name.invalid"):
            monkeypatch.setenv("GCE_METADATA_IP", address)
            assert not cluster.metadata_answers()


def test_hosts_are_named_where_they_are_known():
    of_second = Cluster("Cloud TPU", "a:1", 4, 3, ("c", "d"), 2, 1)
    assert [of_second.name(k) for k in range(4)] == ["process 0", "process 1", "process 2 (c)", "process 3 (d)"]
    assert Cluster("Slurm", "a:1", 2, 1).name(1) == "process 1"


def test_of_a_job_only_the_first_process_converts_a_model_without_the_others(nowhere, tmp_path):
    line = [str(tmp_path / "nothing"), str(tmp_path / "out")]
    for process in ("2", "1"):
        nowhere(FULL | {"JAX_PROCESS_ID": process})
        assert convert_checkpoint.main(line) == 0
    nowhere(FULL | {"JAX_PROCESS_ID": "0"})
    with pytest.raises(UserError, match="nothing is not a run"):
        convert_checkpoint.main(line)
    assert cluster.find() is None, "it has left the job: nobody is waited for"
