"""Tokens on disk: memory-mapped `.npy` shards with document offsets, a tokenizer and a manifest that is written last.

    <folder>/tokenizer.*  {train,validation,test}-00000.tokens.npy  ...-00000.offsets.npy  ...  manifest.json

A document is its `<|endoftext|>` and its tokens. Whoever prepares text writes with `ShardWriter`; a folder that has a manifest
is a place that a config can name. What a config names as raw text is built once into the cache, and read from there.
"""

import contextlib
import dataclasses
import errno
import functools
import glob
import hashlib
import importlib.util
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator

import numpy as np
from etils import epath

from lm_jax import regular_files
from lm_jax.config import Data
from lm_jax.data import sources, tokenizer
from lm_jax.errors import UserError, needs
from lm_jax.files import (
    BESIDE,
    draft_folder,
    file_hash,
    flush,
    flush_folder,
    locked,
    seal,
    sealed,
    unsealed,
    write_whole,
)
from lm_jax.regular_files import is_url

FORMAT = 3  # 2 had no seal, and is read
PIPELINE = 1  # version of what turns documents into shards and shards into rows: other rows, other number
MANIFEST = "manifest.json"
SHARD_TOKENS = 2**27  # of a full shard
ALWAYS_HASHED = 2**28  # bytes of a corpus that are hashed at every start, smallest files first
HASHED_IN_TURN = 2**28  # bytes of the rest, at least one file
TOGETHER = 32  # documents that are tokenised in one call, on all cores


class Joined:
    """Token arrays of several shards read as one. A slice is a view where it lies in one shard, else a copy."""

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

    tokens: np.ndarray | Joined  # [num_tokens] uint16 or uint32, memory-mapped
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
    def tokenizer(self) -> tokenizer.Tokenizer:
        return tokenizer.load(os.path.join(self.folder, self.manifest["tokenizer_file"]))

    @property
    def fingerprint(self) -> str:
        """Changes with any token, offset or piece."""
        return hashlib.sha256(json.dumps(self.manifest["files"], sort_keys=True).encode()).hexdigest()[:16]


class Growing:
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

    def __init__(self, folder: str, tokens_of: tokenizer.Tokenizer, shard_tokens: int = SHARD_TOKENS):
        self.folder, self.tokenizer, self.shard_tokens = folder, tokens_of, shard_tokens
        os.makedirs(folder, exist_ok=True)
        assert not os.path.exists(os.path.join(folder, MANIFEST)), f"{folder} is a corpus already"
        for left in glob.glob(os.path.join(glob.escape(folder), "*.npy")):
            os.remove(left)
        self.dtype = np.dtype(np.uint16 if tokens_of.num_pieces <= 2**16 else np.uint32)
        nothing = {"documents": 0, "tokens": 0, "bytes": 0, "shards": 0}
        self.counts = {split: dict(nothing) for split in sources.SPLITS}  # of what is written so far
        self._open: dict[str, tuple[Growing, Growing]] = {}

    def add(self, split: str, ids: np.ndarray, num_bytes: int) -> None:
        """One more document: the ids of its text (`<|endoftext|>` is put before them), and its bytes of UTF-8."""
        if split in self._open and self._open[split][0].size + 1 + len(ids) > self.shard_tokens:
            self._finish(split)
        if split not in self._open:
            stem = os.path.join(self.folder, f"{split}-{self.counts[split]['shards']:05}")
            self._open[split] = Growing(f"{stem}.tokens.npy", self.dtype), Growing(f"{stem}.offsets.npy", np.int64)
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
        assert not len(ids) or 0 <= ids.min() <= ids.max() < self.tokenizer.num_pieces
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
        kept = tokenizer.files(self.tokenizer)
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
        raise FileNotFoundError(
            errno.ENOENT, "this user has no home: say LM_JAX_CACHE=FOLDER, where the cache may be", home
        )
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


def is_prepared(place: str) -> bool:
    """Whether a place holds shards, not raw text."""
    check_url("config.data.sources:", place)
    return place != "python" and (epath.Path(place) / MANIFEST).exists()


def open_corpus(
    data: Data,
    say: Callable[[str], None] = lambda line: None,
    place: str = "",
    given: tokenizer.Tokenizer | None = None,
) -> Corpus:
    """The corpus of a source of a config ("": the first), built on first use: one process writes, others wait.

    Raw text is tokenised by `given`, where that is None as `data.tokenizer` says. Raises UserError.
    """
    place = place or data.sources[0][0]
    if is_prepared(place):
        check_plain(*[place] * (not is_url(place)))
        return read(local_copy(place, say), "prepare it again, or restore it from a copy")
    pieces = 0 if given else tokenizer.num_pieces(data.tokenizer)
    given = given or (None if pieces else tokenizer.load(data.tokenizer))
    source = place if place == "python" or is_url(place) else os.path.abspath(place)
    by = given.fingerprint + given.beside.decode() if given else data.tokenizer
    identity = [2, PIPELINE, source, by, data.validation_fraction, data.test_fraction]
    if place != "python":  # what the folder holds now; the interpreter's own text is kept as it was first read
        named = lambda name: name if is_url(name) else os.path.abspath(name)
        found = sources.documents(place, data.tokenizer)
        identity.append([(named(name), hashlib.sha256(text).hexdigest()) for name, text in found])
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
    name = "python" if place == "python" else os.path.basename(source)
    folder = os.path.join(cache_folder(), "corpora", f"{name}-{pieces or 'given'}-{key}")
    check_plain(folder, folder + ".lock")
    if not os.path.exists(os.path.join(folder, MANIFEST)):
        with writer_lock(folder + ".lock", say):
            if not os.path.exists(os.path.join(folder, MANIFEST)):
                build(data, place, given, folder, say)
    return read(folder, f"remove {folder} and it is built again")


def writer_lock(path: str, say: Callable[[str], None]) -> contextlib.AbstractContextManager:
    """Held by the one process that builds; others say that they wait."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    return locked(path, lambda: say("another process builds this corpus: waiting"))


def build(data: Data, place: str, given: tokenizer.Tokenizer | None, folder: str, say: Callable[[str], None]) -> None:
    """Read, split, train the tokenizer on the training documents (or take the one given), tokenise, write."""
    found: dict[str, dict[str, str]] = {split: {} for split in sources.SPLITS}
    unreadable: list[str] = []
    hidden: list[str] = []
    duplicates, empty = 0, 0
    for name, raw in sources.documents(place, data.tokenizer, hidden):
        text = sources.decode(name, raw)
        if text is None:
            unreadable.append(name)
            continue
        if not text:
            empty += 1
            continue
        split, digest = sources.split_of(text, data.validation_fraction, data.test_fraction)
        duplicates += digest in found[split]
        found[split][digest] = text
    ordered = {split: [texts[digest] for digest in sorted(texts)] for split, texts in found.items()}
    if not ordered["train"]:
        raise UserError(f"config.data.sources: {place!r} holds no text (UTF-8 files that are not empty)")
    num_bytes = sum(len(text.encode()) for texts in ordered.values() for text in texts)
    dropped = f"; left out: {empty} empty, {duplicates} duplicates, {len(unreadable)} not UTF-8, {len(hidden)} hidden"
    say(f"corpus {place}: {sum(map(len, ordered.values())):,} documents, {num_bytes / 1e6:.1f} MB{dropped}")
    for what, names in (("not UTF-8", unreadable), ("hidden", hidden)):
        for name in names[:3]:
            say(f"{what}, left out: {regular_files.shown(name)}")
    if not given:
        say(f"training a tokenizer of {tokenizer.num_pieces(data.tokenizer):,} pieces")
    trained = given or tokenizer.make(data.tokenizer, ordered["train"])
    left_out = {"empty": empty, "duplicates": duplicates, "not_utf8": unreadable, "hidden": hidden}
    with draft_folder(folder) as draft:
        write_splits(draft, ordered, trained, num_bytes, say).close(source=place, left_out=left_out)
        shutil.rmtree(folder, ignore_errors=True)


def write_splits(
    folder: str, ordered: dict[str, list[str]], trained: tokenizer.Tokenizer, num_bytes: int, say: Callable[[str], None]
) -> ShardWriter:
    """The texts of each split, `num_bytes` in all, tokenised into the shards of a folder. Returns the writer, to be closed."""
    writer, start, done = ShardWriter(folder, trained), time.monotonic(), 0
    for split, texts in ordered.items():  # documents in the order of their hashes
        for first in range(0, len(texts), TOGETHER):
            group = texts[first : first + TOGETHER]
            for text, ids in zip(group, trained.encode_batch(group), strict=True):
                writer.add(split, ids, len(text.encode()))
                done += len(text)
            if time.monotonic() - start > 2:
                start = time.monotonic()
                say(f"tokenising: {100 * done / num_bytes:.0f}%")
    return writer


def local_copy(place: str, say: Callable[[str], None]) -> str:
    """The folder itself; of a URL a copy in the cache, made once, the manifest last. `read` checks it."""
    if not is_url(place):
        return place
    url = epath.Path(place)
    manifest = (url / MANIFEST).read_bytes()
    folder = os.path.join(cache_folder(), "copies", f"{url.name}-{hashlib.sha256(manifest).hexdigest()[:12]}")
    with writer_lock(folder + ".lock", say):
        if not os.path.exists(os.path.join(folder, MANIFEST)):
            os.makedirs(folder, exist_ok=True)
            files = json.loads(manifest)["files"]
            say(f"copying {place}: {sum(file['bytes'] for file in files.values()) / 1e6:,.1f} MB")
            for name in files:
                assert os.path.basename(name) == name
                with (url / name).open("rb") as source, open(os.path.join(folder, name), "wb") as file:
                    shutil.copyfileobj(source, file, 1 << 22)
            write_whole(os.path.join(folder, MANIFEST), manifest)
    return folder


def publish(folder: str, url: str) -> None:
    """Copies a corpus up to a URL, the manifest last: until it is there the URL holds no corpus."""
    for name in (*read_manifest(folder, "prepare it again")["files"], MANIFEST):
        with open(os.path.join(folder, name), "rb") as source, (epath.Path(url) / name).open("wb") as file:
            shutil.copyfileobj(source, file, 1 << 22)


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
    load = lambda k, part: np.asarray(
        np.load(path(k, part), mmap_mode="r")
    )  # a plain view: slices of a memmap are slow
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
    return Split(tokens[0] if len(tokens) == 1 else Joined(tokens), joined, count["bytes"], (folder, name))
