"""One run a workdir: its lock, and the proof that all processes of the run share the workdir."""

import contextlib
import os
import secrets
import time
from collections.abc import Callable, Iterator

from etils import epath

from lm_jax.distributed import agree, everyone, is_main_process
from lm_jax.errors import UserError
from lm_jax.files import locked
from lm_jax.multihost import peers
from lm_jax.regular_files import is_url
from lm_jax.remote import leased

# Seconds in which all processes must see what one of them writes: a network file system caches what it has read.
TOGETHER = 5.0


@contextlib.contextmanager
def workdir_lock(workdir: epath.Path, log: Callable[[str], None]) -> Iterator[None]:
    """Holds the lock of a workdir for the main process, and lets go when it dies. Raises UserError where another run has it."""
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

    Process 0 writes a random word into the lock, and the others have to find it: equal paths may be different folders.
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
