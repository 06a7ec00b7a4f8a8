"""A bucket in the memory of a process on this machine, as Google's are asked: `pip install gcp-storage-emulator gcsfs`."""

import contextlib
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterator

from lm_jax.errors import UserError
from lm_jax.multihost.roll_call import free_port

# It serves one request at a time and lets five wait: what a save asks beyond that is lost, and asked again minutes later.
# At each request it also writes down all that it holds, with what was removed days ago: nobody reads that here, and 320 removals
# took 14 minutes.
PATIENT = (
    "import http.server; http.server.HTTPServer.request_queue_size = 512; "
    "from gcp_storage_emulator import storage; storage.DEFAULT_SOFT_DELETE_RETENTION_SECONDS = 0; "
    "storage.Storage._write_config_to_file = lambda self: None; "
    "from gcp_storage_emulator.__main__ import main; main()"
)


def is_here() -> bool:
    return importlib.util.find_spec("gcp_storage_emulator") is not None


@contextlib.contextmanager
def bucket(name: str) -> Iterator[str]:
    """`gs://<name>`, and an environment in which this process and those that it starts see it. Raises UserError."""
    port = free_port()
    if not is_here():
        raise UserError("a bucket on this machine needs an emulator: pip install gcp-storage-emulator gcsfs")
    urls = dict.fromkeys(("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"), f"http://127.0.0.1:{port}")
    settings = urls | {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
    line = [
        sys.executable,
        "-c",
        PATIENT,
        "start",
        "--host=127.0.0.1",
        f"--port={port}",
        "--in-memory",
        f"--default-bucket={name}",
    ]
    with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        os.environ.update(settings)
        time.sleep(3)
        try:
            yield f"gs://{name}"
        finally:
            process.terminate()
            for setting in settings:
                del os.environ[setting]
