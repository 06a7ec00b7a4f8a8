"""Tokens on disk: memory-mapped `.npy` arrays with document offsets, a tokenizer and a manifest, built once.

    <folder>/tokenizer.{model,json,bytes}  {train,validation,test}.tokens.npy  {...}.offsets.npy  manifest.json (written last)

A document is its `<|endoftext|>` and its tokens; documents lie in the order of their content hashes.
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from typing import IO

import numpy as np
from etils import epath

from lm_jax.config import Data, UserError
from lm_jax.data import sources, tokenizer

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Split:
    """Documents d = tokens[offsets[d]:offsets[d + 1]]."""

    tokens: np.ndarray  # [num_tokens] uint16 or uint32, memory-mapped
    offsets: np.ndarray  # [num_documents + 1] int64
    num_bytes: int  # of text

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1


@dataclasses.dataclass(frozen=True)
class Corpus:
    folder: str
    manifest: dict
    splits: dict[str, Split]

    @functools.cached_property
    def tokenizer(self) -> tokenizer.Tokenizer:
        return tokenizer.load(self.folder)

    @property
    def fingerprint(self) -> str:
        """Changes with any token, offset or piece."""
        return hashlib.sha256(json.dumps(self.manifest["files"], sort_keys=True).encode()).hexdigest()[:16]


def cache_folder() -> str:
    """Where what can be made again is kept: $LM_JAX_CACHE, else ~/.cache/lm_jax."""
    return os.environ.get("LM_JAX_CACHE") or os.path.join(os.path.expanduser("~"), ".cache", "lm_jax")


def open_corpus(data: Data, say: Callable[[str], None] = lambda line: None) -> Corpus:
    """The corpus of a config, built on first use: one process writes, others wait. Raises UserError."""
    pieces = tokenizer.num_pieces(data.tokenizer)
    source = data.source if data.source == "python" else os.path.abspath(data.source)
    identity = [FORMAT, source, data.tokenizer, data.validation_fraction, data.test_fraction]
    if not pieces:
        identity.append(tokenizer.load(data.tokenizer).fingerprint)
    if data.source != "python":  # what the folder holds now; the interpreter's own text is kept as it was first read
        identity.append([(name, hashlib.sha256(text).hexdigest()) for name, text in sources.documents(source)])
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
    name = "python" if data.source == "python" else os.path.basename(source)
    folder = os.path.join(cache_folder(), "corpora", f"{name}-{pieces or 'given'}-{key}")
    if not os.path.exists(os.path.join(folder, "manifest.json")):
        with writer_lock(folder + ".lock", say):
            if not os.path.exists(os.path.join(folder, "manifest.json")):
                build(data, pieces, folder, say)
    return read(folder)


@contextlib.contextmanager
def writer_lock(path: str, say: Callable[[str], None]):
    """Held by the one process that builds; others say that they wait. The lock dies with its process."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another process builds this corpus: waiting")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build(data: Data, pieces: int, folder: str, say: Callable[[str], None]) -> None:
    """Read, split, train the tokenizer on the training documents, tokenise, write; the manifest last."""
    found: dict[str, dict[str, str]] = {split: {} for split in sources.SPLITS}
    unreadable, duplicates, empty = [], 0, 0
    for name, raw in sources.documents(data.source):
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
        raise UserError(f"config.data.source = {data.source!r} holds no text (UTF-8 files that are not empty)")
    num_bytes = {split: sum(len(text.encode()) for text in texts) for split, texts in ordered.items()}
    dropped = f"; left out: {empty} empty, {duplicates} duplicates, {len(unreadable)} not UTF-8"
    say(
        f"corpus {data.source}: {sum(map(len, ordered.values())):,} documents, {sum(num_bytes.values()) / 1e6:.1f} MB{dropped}"
    )
    for name in unreadable[:3]:
        say(f"not UTF-8, left out: {name}")
    if pieces:
        say(f"training a tokenizer of {pieces:,} pieces")
    trained = tokenizer.make(data.tokenizer, ordered["train"])
    draft = f"{folder}.draft"
    shutil.rmtree(draft, ignore_errors=True)
    os.makedirs(draft)
    with open(os.path.join(draft, trained.file_name), "wb") as file:
        file.write(trained.model)
    counts, start, done = {}, time.monotonic(), 0
    dtype = np.uint16 if trained.num_pieces <= 2**16 else np.uint32
    for split, texts in ordered.items():
        encoded = []
        for text in texts:
            encoded.append(np.concatenate([[trained.document_id], trained.encode(text)]).astype(dtype))
            done += len(text)
            if time.monotonic() - start > 2:
                start = time.monotonic()
                say(f"tokenising: {100 * done / sum(num_bytes.values()):.0f}%")
        tokens = np.concatenate(encoded) if encoded else np.zeros(0, dtype)
        offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        np.save(os.path.join(draft, f"{split}.tokens.npy"), tokens)
        np.save(os.path.join(draft, f"{split}.offsets.npy"), offsets)
        counts[split] = {"documents": len(texts), "tokens": len(tokens), "bytes": num_bytes[split]}
    files = {name: file_hash(os.path.join(draft, name)) for name in sorted(os.listdir(draft))}
    manifest = {
        "format": FORMAT,
        "source": data.source,
        "tokenizer": trained.fingerprint,
        "counts": counts,
        "files": files,
    }
    manifest["left_out"] = {"empty": empty, "duplicates": duplicates, "not_utf8": unreadable}
    with open(os.path.join(draft, "manifest.json"), "w") as file:
        json.dump(manifest, file, indent=1)
        flush(file)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(draft, folder)


def read(folder: str) -> Corpus:
    """Opens and verifies a built corpus. Raises UserError that names the file that is not as it was written."""
    with open(os.path.join(folder, "manifest.json")) as file:
        manifest = json.load(file)
    for name, expected in manifest["files"].items():
        path = os.path.join(folder, name)
        if not os.path.exists(path) or file_hash(path) != expected:
            state = "changed since it was built" if os.path.exists(path) else "missing"
            raise UserError(f"{path} is {state}; remove {folder} and it is built again")
    load = lambda split, part: np.load(os.path.join(folder, f"{split}.{part}.npy"), mmap_mode="r")
    splits = {
        split: Split(load(split, "tokens"), np.asarray(load(split, "offsets")), manifest["counts"][split]["bytes"])
        for split in sources.SPLITS
    }
    return Corpus(folder, manifest, splits)


def file_hash(path) -> dict[str, int | str]:
    """{"bytes": size, "sha256": hash} of a file at any place."""
    digest, size = hashlib.sha256(), 0
    with epath.Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}


def flush(file: IO) -> None:
    file.flush()
    os.fsync(file.fileno())
