"""What a workdir in a bucket needs: there nothing can be renamed, appended or locked by flock.

A file is one object, written whole. A run writes its log, metrics and TensorBoard into a local mirror of the workdir,
which is copied up at every checkpoint and at the end. Its lock is an object that only one can create, with a lease.
"""

import base64
import concurrent.futures
import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import fsspec
import fsspec.config
import jax
from etils import epath

from lm_jax import fault_points
from lm_jax.errors import UserError
from lm_jax.files import Hash, cache_folder
from lm_jax.meanwhile import every
from lm_jax.regular_files import files_below, is_url

LISTINGS = 16  # folders of a bucket that are listed at once
LEASE = 30.0  # seconds that a lock on a URL holds without being renewed
fsspec.config.conf.setdefault("gs", {})["use_listings_cache"] = False  # others write to a bucket, too


def listed(folder: epath.Path, part: int = 0, parts: int = 1) -> dict[str, dict[str, Any]]:
    """{relative path: what the store says of it} of the files in a folder of a bucket; nothing is downloaded.

    Only one of `parts` parts: a share of the folders two levels below (the arrays); part 0 has all other files too.
    """
    store, root = fsspec.core.url_to_fs(str(folder))
    ends: list[dict] = []
    below: list[dict] = []
    for entry in store.ls(root, detail=True):
        for inside in store.ls(entry["name"], detail=True) if entry["type"] == "directory" else [entry]:
            (below if inside["type"] == "directory" else ends).append(inside)
    mine = sorted(entry["name"] for entry in below)[part::parts]
    with concurrent.futures.ThreadPoolExecutor(LISTINGS) as pool:
        found = list(pool.map(lambda name: store.find(name, detail=True).values(), mine))
    files = [entry for entries in found for entry in entries] + (ends if part == 0 else [])
    return {os.path.relpath(entry["name"], root.rstrip("/")): entry for entry in files if entry["type"] == "file"}


def store_hash(about: dict[str, Any]) -> Hash | None:
    """The hash that a store computed when it took an object, None where it has none (as of a joined object)."""
    if "md5Hash" not in about:
        return None
    return {"bytes": int(about["size"]), "md5": base64.b64decode(about["md5Hash"]).hex()}


def set_aside(folder: epath.Path, to: epath.Path) -> None:
    """Renames a folder; on a URL the store copies it, and what was copied is removed."""
    if not is_url(folder):
        folder.rename(to)
        return
    store, root = fsspec.core.url_to_fs(str(folder))
    store.copy(root, fsspec.core.url_to_fs(str(to))[1], recursive=True)  # inside the store: nothing is downloaded
    folder.rmtree()


class LocalMirror:
    """`folder`: where a run writes the files that grow; the workdir itself where that is local."""

    NAMES = ("metrics.jsonl", "metrics.crc32", "log.txt")  # what a run on another machine goes on with

    def __init__(self, workdir: epath.Path):
        self.workdir, self.folder = workdir, workdir
        self._sent: dict[str, tuple[int, int]] = {}
        if is_url(workdir):
            name = hashlib.sha256(str(workdir).encode()).hexdigest()[:12]
            self.folder = epath.Path(cache_folder()) / "runs" / f"{workdir.name}-{name}"

    def fetch(self) -> None:
        """Makes the folder anew, with what a run goes on writing from the bucket."""
        if self.folder == self.workdir:
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        for name in self.NAMES:
            if (self.workdir / name).exists():
                (self.folder / name).write_bytes((self.workdir / name).read_bytes())

    def send(self) -> None:
        """Copies every file up, whole, that changed since it was sent. Only the main process does it."""
        if self.folder == self.workdir or jax.process_index():
            return
        for path in files_below(self.folder):
            name, stat = os.path.relpath(path, self.folder), os.stat(path)
            if self._sent.get(name) != (stat.st_size, stat.st_mtime_ns):
                fault_points.reach("send")
                (self.workdir / name).write_bytes(path.read_bytes())
                self._sent[name] = stat.st_size, stat.st_mtime_ns


class Lease:
    """The objects `<url>/lock/<number>`: the highest number holds the lock as long as its lease is renewed.

    Taking over from a run that is dead is creating the next number: no object is ever written by two.
    """

    def __init__(self, workdir: epath.Path):
        import tensorstore

        self.workdir, self.number = workdir, 0
        self._store = tensorstore.KvStore.open(f"{str(workdir).rstrip('/')}/lock/").result()

    def _numbers(self) -> list[int]:
        folder = self.workdir / "lock"
        return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.exists() else []

    def _mine(self) -> bytes:
        return json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "until": time.time() + LEASE}).encode()

    def _create(self, number: int) -> bool:
        """Whether this process is the one that created the object (generation-match 0)."""
        missing = self._store.read(str(number)).result()
        if missing.state != "missing":
            return False
        return bool(self._store.write(str(number), self._mine(), if_equal=missing.stamp.generation).result().generation)

    def take(self, log: Callable[[str], None]) -> None:
        """Raises UserError where another run renews the lock; waits for a lease that nobody renews."""
        start, first = time.monotonic(), b""
        while True:
            numbers = self._numbers()
            holder = self._store.read(str(numbers[-1])).result().value if numbers else b""
            if _expired(holder) and self._create(numbers[-1] + 1 if numbers else 0):
                self.number = numbers[-1] + 1 if numbers else 0
                for number in numbers:
                    self._store.write(str(number), None).result()
                return
            first = first or holder
            if holder != first or time.monotonic() - start > 2 * LEASE:
                raise UserError(
                    f"another run is at work in {self.workdir}: {holder.decode()}\n"
                    f"wait for it, stop it, or use another --workdir"
                )
            log(f"{self.workdir} is locked by a run that may be dead: waiting for its lease of {LEASE:.0f} s")
            time.sleep(LEASE / 6)

    def renew(self) -> None:
        """Renews the lease; ends the process where another run has taken the lock."""
        if self._numbers()[-1:] != [self.number]:  # this run slept past its lease: it must not write any more
            os.write(2, b"\nlm_jax: another run took the lock of the workdir: leaving\n")
            os.kill(os.getpid(), signal.SIGKILL)
        self._store.write(str(self.number), self._mine()).result()

    def give_back(self) -> None:
        """Ends the lease."""
        self._store.write(str(self.number), None).result()


def _expired(value: bytes) -> bool:
    """Whether a lock is held no more: there is none, its lease is over, or its process on this machine is dead."""
    try:
        holder = json.loads(value)
        if holder["host"] == socket.gethostname() and not os.path.exists(f"/proc/{holder['pid']}"):
            return True
        return holder["until"] < time.time()
    except (ValueError, KeyError, TypeError):
        return True


@contextlib.contextmanager
def leased(workdir: epath.Path, log: Callable[[str], None]) -> Iterator[None]:
    """The lock of a workdir on a URL."""
    lease = Lease(workdir)
    lease.take(log)
    try:
        with every(LEASE / 3, lease.renew):
            yield
    finally:
        lease.give_back()
