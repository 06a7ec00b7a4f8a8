"""The manifest of a step: the hash of every file, made by the processes that wrote it, checked by those that read it.

On a disk a process hashes what it wrote, right after it was written, in several threads. In a bucket nothing is read
back: the store computes the MD5 of an object from the bytes that it took, and says it in the listing. The manifest is
written last. To restore, each process reads and hashes a share of the files, however many processes wrote them.
"""

import concurrent.futures
import heapq
import json
import os
import re
import time
from collections.abc import Callable, Collection
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from lm_jax import __version__, files
from lm_jax.distributed import first_answer, is_main_process, share
from lm_jax.files import Hash, flush_folder, sealed, unsealed, write_whole
from lm_jax.regular_files import files_below, is_url, read_bytes
from lm_jax.remote import listed, store_hash

FORMAT = 2  # 1 had no seal, and is read
MANIFEST = "MANIFEST.json"
ITEMS = ("parameters", "optimizer", "data")  # the folders of a step
THREADS = 32  # that hash: hashlib lets others work meanwhile, and a bucket answers many at once
PATIENCE = 600  # seconds that one process waits for a file of another


def writer_of(path: str) -> int:
    """The process that wrote a file of a step on a disk: Orbax keeps what process k wrote in `ocdbt.process_k`."""
    found = re.search(r"process_(\d+)(/|$)", path)
    return int(found[1]) if found else 0


def is_part_of_step(name: str) -> bool:
    """Whether a file is hashed: all but the manifest and its parts."""
    return not os.path.basename(name).startswith("MANIFEST.")


def in_threads(work: Callable, *arguments) -> list:
    """`map(work, ...)`, several at once; raises what the first raised that did."""
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(work, *arguments))


def written_here(folder: epath.Path) -> dict[str, Hash]:
    """{relative path: hash} of this process' share of a step; all processes together have each file once."""
    process, count = share()
    if is_url(folder):
        known = {name: store_hash(about) for name, about in listed(folder, process, count).items()}
    else:
        known = {name: None for name in names_below(folder) if writer_of(name) == process}
    names = list(filter(is_part_of_step, known))
    return dict(zip(names, in_threads(lambda name: known[name] or files.file_hash(folder / name), names), strict=True))


def names_below(folder: epath.Path) -> list[str]:
    """The files of a step, in order."""
    if is_url(folder):
        return sorted(filter(is_part_of_step, listed(folder)))
    return sorted(filter(is_part_of_step, (os.path.relpath(path, folder) for path in files_below(folder))))


def part_of(folder: epath.Path, process: int) -> epath.Path:
    """Where a process writes its part of the manifest."""
    return folder / f"MANIFEST.p{process}.json"


def write_part(folder: epath.Path) -> None:
    """`MANIFEST.p<k>.json`: hashes of what this process wrote, so that no process reads what the others did."""
    write_whole(part_of(folder, share()[0]), json.dumps(written_here(folder)).encode())


def wait_for(path: epath.Path) -> None:
    """Returns once another process has written a file. Raises TimeoutError after PATIENCE seconds."""
    start = time.monotonic()
    while not path.exists():
        if time.monotonic() - start > PATIENCE:
            raise TimeoutError(f"{path} was not written in {PATIENCE} s: is the workdir shared by all processes?")
        time.sleep(0.5 if is_url(path) else 0.05)


def written_files(folder: epath.Path) -> dict[str, Hash]:
    """{relative path: hash} of all files of a step; with several processes the parts that each wrote are joined."""
    count = share()[1]
    if count == 1:
        return written_here(folder)
    parts = [part_of(folder, process) for process in range(count)]
    for part in parts:
        wait_for(part)
    return {name: file for part in parts for name, file in json.loads(part.read_text()).items()}


def write_manifest(folder: epath.Path, facts: dict[str, Any]) -> None:
    """Writes the manifest of a step, durably: hashes of all files, `facts`, and the versions that wrote it."""
    versions = {module.__name__: module.__version__ for module in (jax, ocp)} | {"lm_jax": __version__}
    manifest = {"format": FORMAT, **facts, "versions": versions, "files": written_files(folder)}
    write_whole(folder / MANIFEST, sealed(manifest))
    for path in (folder, folder.parent) if not is_url(folder) else ():
        flush_folder(path)


def read_manifest(folder: epath.Path) -> dict[str, Any]:
    """The manifest of a step. Raises ValueError that says why it is not valid."""
    try:
        manifest = unsealed(read_bytes(folder / MANIFEST), FORMAT)
        if manifest["format"] not in (1, FORMAT):
            raise ValueError(f"has format {manifest['format']!r}, this version reads 1 and {FORMAT}")
        if str(manifest["step"]) != folder.name.partition(".")[0]:
            raise ValueError(f"is of step {manifest['step']}")
        manifest["files"].items()
    except FileNotFoundError:  # another refusal of the system is no damage: it is let through
        raise ValueError("is missing") from None
    except (KeyError, AttributeError):
        raise ValueError("is no manifest of a step") from None
    return manifest


def invalid_reason(folder: epath.Path, run: str = "", items: Collection[str] = ITEMS) -> str:
    """What is wrong with the `items` of a step, "" where all is as it was written (and, if given, by the run `run`).

    All processes call it together; each reads its share of the files, and all have the same answer.
    """
    return first_answer(lambda: _reason_here(folder, run, items), f"step {folder.name} is whole")


def _reason_here(folder: epath.Path, run: str, items: Collection[str]) -> str:
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        return f"{MANIFEST} {error}"
    if run and manifest.get("run", run) != run:
        return f"{MANIFEST} is of another run than config.json"
    is_read = lambda name: (top := name.partition("/")[0]) not in ITEMS or top in items
    expected = {name: file for name, file in manifest["files"].items() if is_read(name)}
    names = shared_out(expected, share()[1])[share()[0]]
    reasons = in_threads(lambda name: files.invalid_reason(folder / name, expected[name]), names)
    wrong = dict(zip(names, reasons, strict=True))
    if is_main_process():
        strange = {*filter(is_read, names_below(folder))} - {*expected}
        wrong |= dict.fromkeys(strange, "is not as it was written")
    return next((f"{name} {wrong[name]}" for name in sorted(wrong) if wrong[name]), "")


def shared_out(hashes: dict[str, Hash], count: int) -> list[list[str]]:
    """Names of files, dealt to `count` processes by bytes: the largest first, each to the process with the fewest."""
    shares: list[list[str]] = [[] for _ in range(count)]
    loads = [(0, process) for process in range(count)]
    for name in sorted(hashes, key=lambda name: (-int(hashes[name]["bytes"]), name)):
        load, process = heapq.heappop(loads)
        shares[process].append(name)
        heapq.heappush(loads, (load + int(hashes[name]["bytes"]), process))
    return shares
