"""Whether the files of a corpus are as they were written, asked at every start, also of corpora that take hours to hash."""

import os

from lm_jax.errors import UserError
from lm_jax.files import cache_folder, file_hash, seal, sealed, unsealed, write_whole

ALWAYS_HASHED = 2**28  # bytes of a corpus that are hashed at every start, smallest files first
HASHED_IN_TURN = 2**28  # bytes of the rest, at least one file


def verify(folder: str, manifest: dict, mend: str, whole: bool = False) -> None:
    """Every file is as it was written. Raises UserError.

    A bit can turn under an unchanged size and time of change. So what is small is hashed at every start, and of the rest
    what is new, what changed, and a share in turn: the whole corpus in a few starts, or at once with `whole`.
    """
    record = os.path.join(cache_folder(), "verified", f"{seal(os.path.abspath(folder))[:16]}.json")
    start, known = verified_before(record)
    due = set(manifest["files"]) if whole else due_files(manifest["files"], known)
    verified = {}
    for name, expected in manifest["files"].items():
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            raise UserError(f"{path} is missing; {mend}")
        found = os.stat(path)
        if found.st_size != expected["bytes"]:
            raise UserError(
                f"{path} is changed since it was built: {found.st_size:,} bytes, not {expected['bytes']:,}; {mend}"
            )
        now, (before, last) = [found.st_size, found.st_mtime_ns, expected["sha256"]], known.get(name, ([], 0))
        if hashes := name in due or before != now:
            if file_hash(path) != expected:
                raise UserError(f"{path} is changed since it was built; {mend}")
        verified[name] = now, start if hashes else last
    os.makedirs(os.path.dirname(record), exist_ok=True)
    write_whole(record, sealed({"format": 1, "start": start, "files": verified}), alone=False)


def verified_before(path: str) -> tuple[int, dict[str, tuple[list, int]]]:
    """(number of this start, {file: ([size, time of change, hash], the start at which it was hashed last)}).

    The first start where that is lost or damaged: everything is hashed again then.
    """
    try:
        with open(path, "rb") as file:
            content = unsealed(file.read(), first=1)
        return content["start"] + 1, {name: (state, last) for name, (state, last) in content["files"].items()}
    except (OSError, ValueError, KeyError):
        return 1, {}


def due_files(files: dict[str, dict], known: dict[str, tuple[list, int]]) -> set[str]:
    """The files to hash at this start: all that is small, and of the rest those that were hashed longest ago."""
    sizes = sorted((file["bytes"], name) for name, file in files.items())
    total, due = 0, set()
    for size, name in sizes:
        total += size
        if total <= ALWAYS_HASHED:
            due.add(name)
    rest, total = sorted((known.get(name, ([], 0))[1], name) for _, name in sizes if name not in due), 0
    for _, name in rest:
        due.add(name)
        total += files[name]["bytes"]
        if total >= HASHED_IN_TURN:
            break
    return due
