"""Tokens on disk: memory-mapped `.npy` shards with document offsets, a tokenizer, and a manifest that is written last.

    <folder>/tokenizer.*  {train,validation,test}-00000.tokens.npy  ...-00000.offsets.npy  ...  manifest.json

A document is its `<|endoftext|>` and its tokens. `shard_writer.py` writes such a folder, and a config can name it as a source
(`corpus.py` opens it).
"""

import dataclasses
import functools
import os
from collections.abc import Callable

import numpy as np

from lm_jax import regular_files
from lm_jax.data import tokenizer_files
from lm_jax.data.corpus_verification import verify
from lm_jax.data.sources import SPLITS
from lm_jax.data.tokenizer import Tokenizer
from lm_jax.errors import UserError
from lm_jax.files import BESIDE, unsealed

FORMAT = 3  # 2 had no seal, and is read
PIPELINE = 1  # version of what turns documents into shards and shards into rows: other rows, other number
MANIFEST = "manifest.json"


class ShardedArray:
    """The token arrays of several shards, read as one array. A slice is a view where it lies in one shard, else a copy."""

    def __init__(self, parts: list[np.ndarray]):
        self.parts, self.starts = parts, np.cumsum([0, *map(len, parts)])
        self.dtype = parts[0].dtype

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, window: slice) -> np.ndarray:
        start, stop, step = window.indices(len(self))
        assert step == 1
        first, last = np.searchsorted(self.starts, start, side="right") - 1, np.searchsorted(self.starts, stop)
        parts = zip(self.parts[first:last], self.starts[first:last], strict=True)
        found = [part[max(0, start - begin) : stop - begin] for part, begin in parts]
        return found[0] if len(found) == 1 else np.concatenate(found or [self.parts[0][:0]])

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return np.concatenate(self.parts).astype(dtype or self.dtype)


@dataclasses.dataclass(frozen=True)
class Split:
    """The documents of a split: document d = tokens[offsets[d]:offsets[d + 1]]."""

    tokens: np.ndarray | ShardedArray  # [num_tokens] uint16 or uint32, memory-mapped
    offsets: np.ndarray  # [num_documents + 1] int64
    num_bytes: int  # of text
    origin: tuple[str, str, dict[str, int]] | None = None  # what `open_split` opened; None in memory

    @property
    def num_documents(self) -> int:
        """How many documents it has."""
        return len(self.offsets) - 1

    def __reduce__(self) -> tuple[Callable[..., "Split"], tuple]:  # worker processes map the files anew
        if self.origin:
            return open_split, self.origin
        return Split, (self.tokens, self.offsets, self.num_bytes)


def shard_name(split: str, number: int, part: str) -> str:
    """The file of a shard's "tokens" or "offsets"."""
    return f"{split}-{number:05}.{part}.npy"


def shard_names(counts: dict[str, dict[str, int]]) -> list[str]:
    """Names of the `.npy` files that a manifest with these counts has."""
    numbers = ((split, number) for split in SPLITS for number in range(counts[split]["shards"]))
    return [shard_name(*number, part) for number in numbers for part in ("tokens", "offsets")]


def open_split(folder: str, name: str, counts: dict[str, int]) -> Split:
    """A split of a verified corpus, its tokens mapped; `counts` are the manifest's. Raises UserError."""

    def load(part: str) -> list[np.ndarray]:
        paths = (os.path.join(folder, shard_name(name, k, part)) for k in range(counts["shards"]))
        return [np.asarray(np.load(path, mmap_mode="r")) for path in paths]  # views: slices of a memmap are slow

    try:
        tokens, offsets = load("tokens") or [np.zeros(0, np.uint16)], load("offsets")
    except ValueError as error:  # a pickle, or no .npy
        raise UserError(f"{folder}: the {name} split cannot be read: {error}; prepare it again") from None
    for array, own in zip(tokens, offsets, strict=False):
        borders = own[[0, -1]].tolist() if own.dtype == np.int64 and own.ndim == 1 and len(own) else []
        if array.dtype not in (np.uint16, np.uint32) or borders != [0, len(array)] or (np.diff(own) < 0).any():
            raise UserError(f"{folder}: the {name} split is no tokens with the borders of documents; prepare it again")
    starts = np.cumsum([0, *map(len, tokens)])
    whole = np.concatenate([*(own[:-1] + start for own, start in zip(offsets, starts, strict=False)), starts[-1:]])
    origin = (folder, name, counts)
    return Split(tokens[0] if len(tokens) == 1 else ShardedArray(tokens), whole, counts["bytes"], origin)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A prepared folder that is open: its manifest and its splits."""

    folder: str
    manifest: dict
    splits: dict[str, Split]

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made its tokens."""
        return tokenizer_files.load(os.path.join(self.folder, self.manifest["tokenizer_file"]))


def read(folder: str, mend: str) -> Corpus:
    """Opens and verifies a corpus. Raises UserError that names the file that is not as it was written, and the mend."""
    manifest = read_manifest(folder, mend)
    verify(folder, manifest, mend)
    return Corpus(folder, manifest, {split: open_split(folder, split, manifest["counts"][split]) for split in SPLITS})


def read_manifest(folder: str, mend: str) -> dict:
    """The manifest of a corpus, checked. Raises UserError that ends with `mend`, what to do about it."""
    path = os.path.join(folder, MANIFEST)
    try:
        manifest = unsealed(regular_files.read_bytes(path), FORMAT)
        listed, counts = manifest["files"], [manifest["counts"][split]["shards"] for split in SPLITS]
        if any(os.path.basename(name) != name or {"bytes", "sha256"} - {*file} for name, file in listed.items()):
            raise ValueError("files elsewhere")
        if not all(type(count) is int and 0 <= count <= len(listed) for count in counts):
            raise ValueError("more shards than files")
        found, names = manifest["format"], [manifest["tokenizer_file"], *shard_names(manifest["counts"])]
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} cannot be read as the manifest of a corpus; {mend}") from None
    if found not in (2, FORMAT):
        raise UserError(f"{path} has format {found!r}, this version reads 2 and {FORMAT}; {mend}")
    if sorted(names) != sorted(name for name in manifest["files"] if name != BESIDE):
        raise UserError(f"{path}: its files are not those of its counts; {mend}")
    return manifest
