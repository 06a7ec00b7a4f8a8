"""What the tasks of preparing do: steps that take documents and give documents, as datatrove calls its blocks.

A step is called as step(documents, rank of the task, number of tasks). Files appear whole or not at all.
"""

import contextlib
import glob
import hashlib
import json
import os
import struct
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import IO, Any

import numpy as np

from lm_jax.data import sources, tokenizer_files, tokenizer_training
from lm_jax.errors import UserError
from lm_jax.files import draft, locked
from lm_jax.prepare import clean, readers
from lm_jax.prepare.readers import Bad, Document
from lm_jax.prepare.report import Tally


class Busy:
    """The first step of every task: locks the folder for as long as this process works in it."""

    held: list[contextlib.ExitStack] = []  # with the lock, where this process has it

    def __init__(self, folder: str):
        self.folder = folder

    def __call__(self, data, rank: int = 0, world_size: int = 1):
        """Takes the shared lock of the folder, once in a process."""
        if not Busy.held:
            Busy.held.append(contextlib.ExitStack())
            Busy.held[0].enter_context(locked(os.path.join(self.folder, "busy"), shared=True))
        return None


@contextlib.contextmanager
def working():
    """A context for tasks that this process runs itself; unlocks the folder after them."""
    try:
        yield
    finally:
        while Busy.held:
            Busy.held.pop().close()


def task_file(path: str, mode: str = "w") -> contextlib.AbstractContextManager[IO]:
    """Opens a file that appears whole or not at all, even where two processes write it; it is not synced."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    return draft(path, mode, alone=False, durable=False)


class Read:
    """Documents of this task's files. A bad record stops the run with its file and line, or is counted."""

    def __init__(self, tally: Tally, tasks: list[list[str]], folder: str, text_key: str, on_bad_record: str):
        self.tally, self.tasks, self.folder = tally, tasks, folder
        self.text_key, self.on_bad_record = text_key, on_bad_record

    def __call__(self, data, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Yields the documents of the files of task `rank`. Raises UserError for a bad record."""
        self.tally.clear()
        progress = Progress(self.folder, rank)
        for path in self.tasks[rank]:
            for record in readers.records(path, self.text_key, progress.at):
                if isinstance(record, Bad):
                    self.bad(record)
                else:
                    self.tally.see(record.text)
                    self.tally.pieces += "chunk" in record.metadata
                    yield record
            progress.end_of_file()

    def bad(self, record: Bad) -> None:
        """Counts a bad record, or raises UserError."""
        if self.on_bad_record == "stop":
            raise bad_record(record)
        self.tally.see("")
        self.tally.drop(f"bad record: {record.reason.partition(' (')[0]}", record.id, record.reason)


def bad_record(record: Bad) -> UserError:
    """The error that says where a bad record is and how to go on."""
    return UserError(
        f"{record.id}: {record.reason}\nmend it, or leave such records out and count them: --on_bad_record skip"
    )


class Progress:
    """How many bytes of its files a reading task has read, written down once a second for whoever watches."""

    def __init__(self, folder: str, rank: int):
        self.path = os.path.join(folder, "read", "progress", f"{rank:05}")
        self.done, self.here, self.told = 0, 0, 0.0

    def at(self, num_bytes: int) -> None:
        """Notes that the current file is read up to `num_bytes`."""
        self.here = num_bytes
        if time.monotonic() - self.told > 1:
            self.told = time.monotonic()
            with task_file(self.path) as file:
                file.write(str(self.done + self.here))

    def end_of_file(self) -> None:
        """Notes that the current file is read."""
        self.done, self.here = self.done + self.here, 0


class Normalise:
    """Normalises texts, and drops those that are empty."""

    def __init__(self, tally: Tally, how: str):
        self.tally, self.how = tally, how

    def __call__(self, data, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Yields the documents that are left."""
        for document in data:
            text = clean.normalise(document.text) if self.how == "nfc" else document.text
            if text.strip():
                document.text = text
                yield document
            else:
                self.tally.drop("empty", document.id, text)


class Deal:
    """Documents -> a file for each bucket of hashes: one JSON list [hash, name, text] a line."""

    def __init__(self, tally: Tally, folder: str, buckets: int):
        self.tally, self.folder, self.buckets = tally, folder, buckets

    def __call__(self, data, rank: int = 0, world_size: int = 1) -> None:
        """Writes every document into the file of its bucket."""
        with contextlib.ExitStack() as stack:
            paths = [os.path.join(self.folder, "dealt", f"{bucket:05}", f"{rank:05}") for bucket in range(self.buckets)]
            files = [stack.enter_context(task_file(path)) for path in paths]
            for document in data:
                if not document.text.strip():  # what a scrubber or a rule left of it
                    self.tally.drop("empty", document.id, document.text)
                    continue
                digest = hashlib.sha256(document.text.encode()).hexdigest()
                line = json.dumps([digest, document.id, document.text], ensure_ascii=False)
                files[int(digest[:8], 16) * self.buckets >> 32].write(line + "\n")
        _save_tally(self.tally, self.folder, "read", rank)


def _save_tally(tally: Tally, folder: str, stage: str, rank: int) -> None:
    os.makedirs(os.path.join(folder, stage, "tally"), exist_ok=True)
    tally.save(os.path.join(folder, stage, "tally", f"{rank:05}.json"))


def _lines_of(path: str) -> Iterator[list[str]]:
    with open(path, encoding="utf-8", newline="\n") as file:
        for line in file:
            yield json.loads(line)


class Gather:
    """A bucket's documents in the order of their hashes, equal ones once (the first name stays)."""

    def __init__(self, tally: Tally, folder: str, tasks: int):
        self.tally, self.folder, self.tasks = tally, folder, tasks

    def __call__(self, data, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Yields the documents of bucket `rank`, sorted by hash, without repetition."""
        self.tally.clear()
        paths = [os.path.join(self.folder, "dealt", f"{rank:05}", f"{task:05}") for task in range(self.tasks)]
        before = ""
        for digest, name, text in sorted(line for path in paths for line in _lines_of(path)):
            self.tally.see(text)
            if digest == before:
                self.tally.drop("the same text", name, text)
            else:
                before = digest
                yield Document(text, name, metadata={"digest": digest})


class Keep:
    """Documents -> documents/<bucket>."""

    def __init__(self, tally: Tally, folder: str):
        self.tally, self.folder = tally, folder

    def __call__(self, data, rank: int = 0, world_size: int = 1) -> None:
        """Writes the documents of bucket `rank` as one JSON list [hash, name, text] a line."""
        with task_file(os.path.join(self.folder, "documents", f"{rank:05}")) as file:
            for document in data:
                line = [document.metadata["digest"], document.id, document.text]
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        _save_tally(self.tally, self.folder, "gather", rank)


class Load:
    """Reads what `Keep` wrote."""

    def __init__(self, folder: str):
        self.folder = folder

    def __call__(self, data, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Yields the documents of bucket `rank`."""
        for digest, name, text in _lines_of(os.path.join(self.folder, "documents", f"{rank:05}")):
            yield Document(text, name, metadata={"digest": digest})


class Train:
    """The tokenizer of the corpus: trained on its training documents in the order of their hashes, or copied."""

    def __init__(self, folder: str, buckets: int, setting: str, fractions: tuple[float, float]):
        self.folder, self.buckets, self.setting, self.fractions = folder, buckets, setting, fractions

    def __call__(self, data, rank: int = 0, world_size: int = 1) -> None:
        """Trains or copies the tokenizer, and writes its files."""
        with tokenizer_files.named("--tokenizer"):
            made = tokenizer_training.make(self.setting, self.texts())
        for name, content in tokenizer_files.files(made).items():
            with task_file(os.path.join(self.folder, "tokenizer", "model", name), "wb") as file:
                file.write(content)

    def texts(self) -> Iterator[str]:
        """Training documents until a sample is full; near-duplicates are left out."""
        taken = 0
        for rank in range(self.buckets):
            removed = removals(self.folder, rank)
            for index, document in enumerate(Load(self.folder)(None, rank)):
                name, _ = sources.split_of(document.text, *self.fractions)
                if name != "train" or index in removed:
                    continue
                yield document.text
                taken += len(document.text)
                if taken > tokenizer_training.SAMPLE_BYTES:
                    return
        if not taken:
            raise UserError(
                "no training document is left: see what was dropped with --on_bad_record and --filters, or give more text"
            )


def removals(folder: str, rank: int) -> set[int]:
    """Documents of a bucket that are near-duplicates of a kept one, as datatrove writes them."""
    path = os.path.join(folder, "clusters", f"{rank:06}.remove")
    if not os.path.exists(path):
        return set()
    with open(path, "rb") as file:
        return {index for (index,) in struct.iter_unpack("<I", file.read())}


def near_duplicates(folder: str) -> dict[str, Any]:
    """How many clusters, of how many documents, and the three largest by the names of their first members."""
    members: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "clusters", "*.clusters"))):
        with open(path, "rb") as file:
            for index, cluster in struct.iter_unpack("<2I", file.read()):
                members[cluster].append((int(os.path.basename(path)[:6]), index))
    largest = sorted(members.values(), key=lambda found: (-len(found), found))[:3]
    wanted = {number for found in largest for number in found[:5]}
    names = {}
    for rank in {rank for rank, _ in wanted}:
        for index, document in enumerate(Load(folder)(None, rank)):
            if (rank, index) in wanted:
                names[rank, index] = document.id
    return {
        "clusters": len(members),
        "documents": sum(map(len, members.values())),
        "largest": [(len(found), [names[number] for number in found[:5]]) for found in largest],
    }


class Tokenise:
    """Documents -> tokens/<bucket>.npy, and for each document its split, how many ids and how many bytes."""

    def __init__(self, tally: Tally, folder: str, fractions: tuple[float, float]):
        self.tally, self.folder, self.fractions = tally, folder, fractions

    def __call__(self, data, rank: int = 0, world_size: int = 1) -> None:
        """Writes ids (uint32) and index (int64 [documents, 3]) of bucket `rank`."""
        self.tally.clear()
        made = tokenizer_files.load(os.path.join(self.folder, "tokenizer", "model"))
        ids, index = [np.zeros(0, np.uint32)], []
        for document in data:
            encoded = made.encode(document.text)
            ids.append(encoded.astype(np.uint32))
            name, _ = sources.split_of(document.text, *self.fractions)
            index.append((sources.SPLITS.index(name), len(encoded), len(document.text.encode())))
        for part, array in (("ids", np.concatenate(ids)), ("index", np.array(index, np.int64).reshape(-1, 3))):
            with task_file(os.path.join(self.folder, "tokens", f"{rank:05}.{part}.npy"), "wb") as file:
                np.save(file, array)
        _save_tally(self.tally, self.folder, "tokenise", rank)
