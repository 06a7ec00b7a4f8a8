"""Writes a corpus: documents -> the shards of a folder in bounded memory, and the manifest that makes it one."""

import glob
import os

import numpy as np

from lm_jax.data import tokenizer_files
from lm_jax.data.shards import FORMAT, MANIFEST, PIPELINE, shard_name, shard_names
from lm_jax.data.sources import SPLITS
from lm_jax.data.tokenizer import Tokenizer
from lm_jax.files import file_hash, flush, flush_folder, sealed, write_whole

SHARD_TOKENS = 2**27  # of a full shard


class ShardWriter:
    """Streams documents into the shards of a folder in bounded memory; with `close` the folder is a corpus.

        writer = ShardWriter(folder, tokenizer)
        writer.add("train", tokenizer.encode(text), len(text.encode()))
        writer.close(source="...", left_out={...})

    A shard holds at most `shard_tokens` tokens, or one document that is longer. Shards that an earlier writer left
    unfinished are removed.
    """

    def __init__(self, folder: str, tokenizer: Tokenizer, shard_tokens: int = SHARD_TOKENS):
        self.folder, self.tokenizer, self.shard_tokens = folder, tokenizer, shard_tokens
        os.makedirs(folder, exist_ok=True)
        assert not os.path.exists(os.path.join(folder, MANIFEST)), f"{folder} is a corpus already"
        for unfinished in glob.glob(os.path.join(glob.escape(folder), "*.npy")):
            os.remove(unfinished)
        self.dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
        nothing = {"documents": 0, "tokens": 0, "bytes": 0, "shards": 0}
        self.counts = {split: dict(nothing) for split in SPLITS}  # of what is written so far
        self._open: dict[str, tuple[NpyAppender, NpyAppender]] = {}

    def add(self, split: str, ids: np.ndarray, num_bytes: int) -> None:
        """One more document: the ids of its text (`<|endoftext|>` is put before them), and its bytes of UTF-8."""
        if split in self._open and self._open[split][0].size + 1 + len(ids) > self.shard_tokens:
            self._finish(split)
        if split not in self._open:
            path = lambda part: os.path.join(self.folder, shard_name(split, self.counts[split]["shards"], part))
            self._open[split] = NpyAppender(path("tokens"), self.dtype), NpyAppender(path("offsets"), np.int64)
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
        beside = tokenizer_files.files(self.tokenizer)
        for name, content in beside.items():
            with open(os.path.join(self.folder, name), "wb") as file:
                file.write(content)
                flush(file)
        names = [*beside, *shard_names(self.counts)]
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
        """More values, at the end."""
        self._file.write(np.asarray(values).astype(self.dtype).tobytes())
        self.size += len(values)

    def close(self) -> None:
        """Writes the length into the header. What was written is on the disk then."""
        self._header()
        assert self._file.tell() == self._start
        flush(self._file)
        self._file.close()
