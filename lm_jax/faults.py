"""What the operating system refuses (disk, rights, memory), as lines: which path, what is wrong, what mends it.

`cli.run_command` is the one place that asks; whoever opens or writes a file lets its OSError through.
"""

import errno
import io
import os
import re
import traceback
from collections.abc import Iterator
from types import TracebackType

EXIT_USER, EXIT_MACHINE = 2, 74
ROOM, RIGHTS = "make room there, or name another place", "let this user write there, or name another place"
MENDS = {
    errno.ENOSPC: ROOM,
    errno.EDQUOT: ROOM,
    errno.EFBIG: "raise the limit of a file's size (ulimit -f), or name another place",
    errno.EACCES: RIGHTS,
    errno.EPERM: RIGHTS,
    errno.EROFS: "name a place that can be written",
    errno.EIO: "the disk may be failing: name a place on another one",
    errno.EMFILE: "raise the limit of open files: ulimit -n 4096",
    errno.ENFILE: "end other programs: this machine has no more open files",
    errno.ENOMEM: "take fewer rows at once (--config.train.microbatch_rows=1), a smaller model, or more devices",
    errno.EAGAIN: "no thread can be started: raise the limit of processes (ulimit -u), or end other programs",
    errno.EPIPE: "who read this command's output is gone",
}
NAMES = {  # a place that cannot be one: the user's mistake
    errno.ENOTDIR: "a part of it is a file: name another place",
    errno.EISDIR: "it is a folder: name another place",
    errno.ENOTEMPTY: "name another place",
    errno.EEXIST: "name another place",
    errno.ELOOP: "its links lead in a circle: name another place",
    errno.ENAMETOOLONG: "name a shorter place",
    errno.ENXIO: "it is no file: name another place",
}
TEXTS = {os.strerror(number): number for number in MENDS} | {  # as libraries in C++ say it
    "RESOURCE_EXHAUSTED": errno.ENOMEM,
    "ut of memory": errno.ENOMEM,
    "OUT_OF_MEMORY": errno.ENOMEM,
    "can't start new thread": errno.EAGAIN,
    "bad_alloc": errno.ENOMEM,
}


def described(error: BaseException) -> tuple[int, str] | None:
    """(exit code, one to five lines) of what the system refused, None where an error is something else."""
    for one in chain(error):
        number = number_of(one)
        if number is None:
            continue
        path = path_of(one)
        what = (getattr(one, "strerror", "") or os.strerror(number)) if number else first_line(one)
        mend = MENDS.get(number) or NAMES.get(number) or f"mend it, or name another place ({raised_at(one)})"
        lines = f"{path}: {what}\n{mend}{where(path)}" if path else f"{what}\n{mend}"
        return (EXIT_USER if number in NAMES else EXIT_MACHINE), lines
    return None


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that it was raised from; what was only being handled meanwhile says nothing about it."""
    while error is not None:
        yield error
        error = error.__cause__


def number_of(error: BaseException) -> int | None:
    """The number of what the system refused, 0 where it has none, None where it is an error of another kind."""
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    if isinstance(error, OSError) and error.errno:
        return error.errno
    text = str(error)
    found = next((number for words, number in TEXTS.items() if words in text), None)
    return 0 if found is None and isinstance(error, OSError) else found


def path_of(error: BaseException) -> str:
    """The path that an error is about, "" where it says none."""
    if isinstance(error, OSError) and error.filename:
        return str(error.filename)
    if named := re.search(r"""["'](/[^"'\n]+)["']""", str(error)):
        return named[1]
    return path_of_file(error.__traceback__)


def path_of_file(frames: TracebackType | None) -> str:
    """The file that was written when an error came up: a refused `write` does not say where, its frame has the file."""
    found = ""
    while frames is not None:
        local = frames.tb_frame.f_locals
        for value in (*local.values(), *getattr(local.get("self"), "__dict__", {}).values()):
            if isinstance(value, io.IOBase) and getattr(value, "mode", "r")[:1] in "wax":
                name = str(getattr(value, "name", ""))
                found = found if name.startswith("<") else name or found
        frames = frames.tb_next
    return found


def where(path: str) -> str:
    """How another place is named for what lies in the cache; all else has a flag of the command."""
    from lm_jax.files import cache_folder  # late: `epath` takes half a second, and mistakes are answered before

    try:
        cache = os.path.abspath(cache_folder())
    except FileNotFoundError:  # there is no home for it, which may be what is being told
        return ""
    inside = os.path.abspath(path).startswith(cache)
    return f"; the cache is at {cache}, unless LM_JAX_CACHE says where" if inside else ""


def raised_at(error: BaseException) -> str:
    """The line of ours that an error came through last."""
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if os.path.dirname(__file__) in frame.filename]
    return f"{os.path.basename(ours[-1].filename)} line {ours[-1].lineno}" if ours else type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
