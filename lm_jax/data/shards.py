"""Tokens on disk: memory-mapped `.npy` shards with document offsets, a tokenizer and a manifest that is written last.

    <folder>/tokenizer.*  {train,validation,test}-00000.tokens.npy  ...-00000.offsets.npy  ...  manifest.json

A document is its `<|endoftext|>` and its tokens. Whoever prepares text writes with `ShardWriter`; a folder that has a manifest
is a place that a config can name (`corpus.py` opens it).
"""

import dataclasses
import errno
import functools
import glob
import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator

import numpy as np

from lm_jax import regular_files
from lm_jax.data import sources, tokenizer_files
from lm_jax.data.tokenizer import Tokenizer
from lm_jax.errors import UserError, needs
from lm_jax.files import BESIDE, file_hash, flush, flush_folder, seal, sealed, unsealed, write_whole
from lm_jax.regular_files import is_url

FORMAT = 3  # 2 had no seal, and is read
PIPELINE = 1  # version of what turns documents into shards and shards into rows: other rows, other number
MANIFEST = "manifest.json"
SHARD_TOKENS = 2**27  # of a full shard
ALWAYS_HASHED = 2**28  # bytes of a corpus that are hashed at every start, smallest files first
HASHED_IN_TURN = 2**28  # bytes of the rest, at least one file


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
        first = max(0, int(np.searchsorted(self.starts, start, side="right")) - 1)
        last = max(first, int(np.searchsorted(self.starts, stop, side="left")) - 1)
        found = [
            self.parts[k][max(0, start - int(self.starts[k])) : max(0, stop - int(self.starts[k]))]
            for k in range(first, min(last + 1, len(self.parts)))
        ]
        return found[0] if len(found) == 1 else np.concatenate(found)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.concatenate(self.parts).astype(dtype or self.dtype)

    def __iter__(self) -> Iterator[int]:
        for part in self.parts:
            yield from map(int, part)


@dataclasses.dataclass(frozen=True)
class Split:
    """Documents d = tokens[offsets[d]:offsets[d + 1]]."""

    tokens: np.ndarray | ShardedArray  # [num_tokens] uint16 or uint32, memory-mapped
    offsets: np.ndarray  # [num_documents + 1] int64
    num_bytes: int  # of text
    place: tuple[str, str] | None = None  # (folder, name) on disk, None in memory

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1

    def __reduce__(self):  # worker processes map the files anew
        if self.place:
            return open_split, self.place
        return Split, (self.tokens, self.offsets, self.num_bytes)


@dataclasses.dataclass(frozen=True)
class Corpus:
    folder: str
    manifest: dict
    splits: dict[str, Split]

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return tokenizer_files.load(os.path.join(self.folder, self.manifest["tokenizer_file"]))

    @property
    def fingerprint(self) -> str:
        """Changes with any token, offset or piece."""
        return hashlib.sha256(json.dumps(self.manifest["files"], sort_keys=True).encode()).hexdigest()[:16]


class NpyAppender:
    """A one-dimensional `.npy` file that grows: numpy's header has room for any length."""

    def __init__(self, path: str, dtype):
        self.dtype, self.size = np.dtype(dtype), 0
        self._file = open(path, "wb")  # noqa: SIM115  (closed by `close`)
        self._header()
        self._start = self._file.tell()

    def _header(self) -> None:
        self._file.seek(0)
        descr = np.lib.format.dtype_to_descr(self.dtype)
        header = {"descr": descr, "fortran_order": False, "shape": (self.size,)}
        np.lib.format.write_array_header_1_0(self._file, header)

    def append(self, values: np.ndarray) -> None:
        self._file.write(np.asarray(values).astype(self.dtype).tobytes())
        self.size += len(values)

    def close(self) -> None:
        self._header()
        assert self._file.tell() == self._start
        flush(self._file)
        self._file.close()


class ShardWriter:
    """Streams documents into the shards of a folder in bounded memory; with `close` the folder is a corpus.

        writer = ShardWriter(folder, tokenizer)
        writer.add("train", tokenizer.encode(text), len(text.encode()))
        writer.close(source="...", left_out={...})

    A shard holds at most `shard_tokens` tokens, or one document that is longer. Shards that an earlier writer left
    unfinished are removed.
    """

    def __init__(self, folder: str, tokens_of: Tokenizer, shard_tokens: int = SHARD_TOKENS):
        self.folder, self.tokenizer, self.shard_tokens = folder, tokens_of, shard_tokens
        os.makedirs(folder, exist_ok=True)
        assert not os.path.exists(os.path.join(folder, MANIFEST)), f"{folder} is a corpus already"
        for left in glob.glob(os.path.join(glob.escape(folder), "*.npy")):
            os.remove(left)
        self.dtype = np.dtype(np.uint16 if tokens_of.vocab_size <= 2**16 else np.uint32)
        nothing = {"documents": 0, "tokens": 0, "bytes": 0, "shards": 0}
        self.counts = {split: dict(nothing) for split in sources.SPLITS}  # of what is written so far
        self._open: dict[str, tuple[NpyAppender, NpyAppender]] = {}

    def add(self, split: str, ids: np.ndarray, num_bytes: int) -> None:
        """One more document: the ids of its text (`<|endoftext|>` is put before them), and its bytes of UTF-8."""
        if split in self._open and self._open[split][0].size + 1 + len(ids) > self.shard_tokens:
            self._finish(split)
        if split not in self._open:
            stem = os.path.join(self.folder, f"{split}-{self.counts[split]['shards']:05}")
            self._open[split] = (
                NpyAppender(f"{stem}.tokens.npy", self.dtype),
                NpyAppender(f"{stem}.offsets.npy", np.int64),
            )
            self.counts[split]["shards"] += 1
        tokens, offsets = self._open[split]
        offsets.append(np.array([tokens.size]))
        self.counts[split]["documents"] += 1
        self.counts[split]["tokens"] += 1
        tokens.append(np.array([self.tokenizer.document_id]))
        self.extend(split, ids, num_bytes)

    def extend(self, split: str, ids: np.ndarray, num_bytes: int) -> None:
        """More of the document that was added to the split last, where it is too large to be encoded at once."""
        ids = np.asarray(ids)
        assert not len(ids) or 0 <= ids.min() <= ids.max() < self.tokenizer.vocab_size
        self._open[split][0].append(ids)
        self.counts[split]["tokens"] += len(ids)
        self.counts[split]["bytes"] += num_bytes

    def _finish(self, split: str) -> None:
        tokens, offsets = self._open.pop(split)
        offsets.append(np.array([tokens.size]))
        tokens.close()
        offsets.close()

    def close(self, **facts) -> dict:
        """Writes what is open, the tokenizer and last the manifest, with `facts` (JSON) beside counts and hashes."""
        for split in list(self._open):
            self._finish(split)
        kept = tokenizer_files.files(self.tokenizer)
        for name, content in kept.items():
            with open(os.path.join(self.folder, name), "wb") as file:
                file.write(content)
                flush(file)
        names = [*kept, *shard_names(self.counts)]
        manifest = {
            "format": FORMAT,
            "pipeline": PIPELINE,
            **facts,
            "tokenizer": self.tokenizer.fingerprint,
            "tokenizer_file": self.tokenizer.file_name,
            "counts": self.counts,
            "files": {name: file_hash(os.path.join(self.folder, name)) for name in sorted(names)},
        }
        write_whole(os.path.join(self.folder, MANIFEST), sealed(manifest))
        flush_folder(self.folder)
        return manifest


def shard_names(counts: dict[str, dict[str, int]]) -> list[str]:
    """Names of the `.npy` files that a manifest with these counts has."""
    return [
        f"{split}-{number:05}.{part}.npy"
        for split in sources.SPLITS
        for number in range(counts[split]["shards"])
        for part in ("tokens", "offsets")
    ]


def cache_folder() -> str:
    """Where what can be made again is kept: $LM_JAX_CACHE, else ~/.cache/lm_jax. Raises FileNotFoundError without a home."""
    if given := os.environ.get("LM_JAX_CACHE"):
        return given
    home = os.path.expanduser("~")
    if not os.path.isdir(home):
        wrong = "this user has no home: say LM_JAX_CACHE=FOLDER, where the cache may be"
        raise FileNotFoundError(errno.ENOENT, wrong, home)
    return os.path.join(home, ".cache", "lm_jax")


def check_url(name: str, place) -> None:
    """Raises UserError where the package that reads a URL is not installed."""
    scheme = str(place).partition("://")[0] if is_url(place) else ""
    package, extra = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}.get(scheme, ("", ""))
    if package and importlib.util.find_spec(package) is None:
        raise needs(f"{name} {place}", package, extra)


def check_plain(*places: str) -> None:
    """Raises UserError where a file, or one of a folder, is a pipe or a device: it would be read, or waited for, for ever."""
    for place in filter(os.path.lexists, places):
        try:
            for path in regular_files.below(place):
                regular_files.check(path)
        except OSError as error:
            if error.errno not in regular_files.NO_FILE:
                raise  # a refusal of the machine
            raise UserError(f"{error.filename}: {error.strerror}; remove it, or name another place") from None


def read(folder: str, mend: str) -> Corpus:
    """Opens and verifies a corpus. Raises UserError that names the file that is not as it was written, and the mend."""
    manifest = read_manifest(folder, mend)
    verify(folder, manifest, mend)
    return Corpus(folder, manifest, {split: open_split(folder, split) for split in sources.SPLITS})


def read_manifest(folder: str, mend: str) -> dict:
    path = os.path.join(folder, MANIFEST)
    try:
        manifest = unsealed(regular_files.read_bytes(path), FORMAT)
        listed, counts = manifest["files"], [manifest["counts"][split]["shards"] for split in sources.SPLITS]
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


def verify(folder: str, manifest: dict, mend: str, whole: bool = False) -> None:
    """Every file is as it was written. Raises UserError.

    A bit can turn under an unchanged size and time of change. So what is small is hashed at every start, and of the rest
    what is new, what changed, and a share in turn: the whole corpus in a few starts, or at once with `whole`.
    """
    known_by = os.path.join(cache_folder(), "verified", f"{seal(os.path.abspath(folder))[:16]}.json")
    start, known = verified_before(known_by)
    due = set(manifest["files"]) if whole else due_files(manifest["files"], known)
    seen = {}
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
        seen[name] = now, start if hashes else last
    os.makedirs(os.path.dirname(known_by), exist_ok=True)
    write_whole(known_by, sealed({"format": 1, "start": start, "files": seen}), alone=False)


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


def open_split(folder: str, name: str) -> Split:
    """A split of a verified corpus, its tokens mapped."""
    with open(os.path.join(folder, MANIFEST)) as file:
        count = json.load(file)["counts"][name]
    path = lambda k, part: os.path.join(folder, f"{name}-{k:05}.{part}.npy")
    # A plain view of what is mapped: slices of a memmap are slow.
    load = lambda k, part: np.asarray(np.load(path(k, part), mmap_mode="r"))
    try:
        tokens = [load(k, "tokens") for k in range(count["shards"])] or [np.zeros(0, np.uint16)]
        offsets = [load(k, "offsets") for k in range(count["shards"])]
    except ValueError as error:  # a pickle, or no .npy
        raise UserError(f"{folder}: the {name} split cannot be read: {error}; prepare it again") from None
    for array, own in zip(tokens, offsets, strict=False):
        borders = own[[0, -1]].tolist() if own.dtype == np.int64 and own.ndim == 1 and len(own) else []
        if array.dtype not in (np.uint16, np.uint32) or borders != [0, len(array)] or (np.diff(own) < 0).any():
            raise UserError(f"{folder}: the {name} split is no tokens with the borders of documents; prepare it again")
    starts = np.cumsum([0, *map(len, tokens)])
    joined = np.concatenate([*(own[:-1] + start for own, start in zip(offsets, starts, strict=False)), starts[-1:]])
    return Split(tokens[0] if len(tokens) == 1 else ShardedArray(tokens), joined, count["bytes"], (folder, name))
