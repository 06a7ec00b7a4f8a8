"""Compiled programs kept for the next run, each with a hash: one that is not as it was written is compiled again.

JAX's own cache writes in place and does not check what it reads: a kill leaves half a program, a flipped bit another one.
"""

import hashlib
import os
import pathlib
import sys

import jax
from jax._src import compilation_cache
from jax._src.compilation_cache_interface import CacheInterface

from lm_jax.files import write_whole

HASH = hashlib.sha256
SIZE = HASH().digest_size


class CompileCache(CacheInterface):
    """`<folder>/<key>.program`: the hash, then what JAX keeps. That a folder cannot be written is printed once."""

    def __init__(self, folder: str):
        self._path, self._said = pathlib.Path(folder), False

    def get(self, key: str) -> bytes | None:
        """The program, None where there is none or its hash does not match."""
        try:
            with open(self._file(key), "rb") as file:
                raw = file.read()
        except OSError:
            return None
        return raw[SIZE:] if HASH(raw[SIZE:]).digest() == raw[:SIZE] else None

    def put(self, key: str, value: bytes) -> None:
        """Keeps a program, where the folder can be written."""
        try:
            os.makedirs(self._path, exist_ok=True)
            write_whole(self._file(key), HASH(value).digest() + value, alone=False)
        except OSError as error:
            if not self._said:
                print(f"programs are not kept for the next run: {self._path}: {error.strerror}", file=sys.stderr)
            self._said = True

    def _file(self, key: str) -> str:
        return os.path.join(self._path, f"{key}.program")


def use(folder: str) -> None:
    """Keeps every program that this process compiles in `folder`, however small and fast it is."""
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    # JAX has no public way to name another cache; both functions are the same from 0.10 to 0.12.
    compilation_cache.get_file_cache = lambda path: (CompileCache(str(path)), path)
