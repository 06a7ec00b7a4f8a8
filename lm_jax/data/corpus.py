"""The corpus of a source: prepared shards as they are, a copy of those behind a URL, or raw text built once into the cache."""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable

from etils import epath

from lm_jax import regular_files
from lm_jax.config import Data
from lm_jax.data import sources, stretches, tokenizer_files, tokenizer_training
from lm_jax.data.shard_writer import ShardWriter
from lm_jax.data.shards import MANIFEST, PIPELINE, Corpus, read, read_manifest
from lm_jax.data.tokenizer import Tokenizer
from lm_jax.errors import UserError
from lm_jax.files import cache_folder, draft_folder, locked, write_whole
from lm_jax.regular_files import check_plain, check_url, is_url

TOGETHER = 32  # documents that are tokenised in one call, on all cores


def is_prepared(source: str) -> bool:
    """Whether a source holds shards, not raw text."""
    check_url("config.data.sources:", source)
    return source != "python" and (epath.Path(source) / MANIFEST).exists()


def open_corpus(
    data: Data,
    log: Callable[[str], None] = lambda line: None,
    source: str = "",
    given: Tokenizer | None = None,
) -> Corpus:
    """The corpus of a source of a config ("": the first), built on first use: one process writes, others wait.

    Raw text is tokenised by `given`, where that is None as `data.tokenizer` says. Raises UserError.
    """
    source = source or data.sources[0][0]
    if is_prepared(source):
        check_plain(*[source] * (not is_url(source)))
        return read(local_copy(source, log), "prepare it again, or restore it from a copy")
    num_pieces = 0 if given else tokenizer_files.vocab_size(data.tokenizer)
    given = given or (None if num_pieces else tokenizer_files.load(data.tokenizer))
    absolute = lambda path: path if is_url(path) else os.path.abspath(path)
    path = "python" if source == "python" else absolute(source)
    tokenizer = given.fingerprint + given.beside.decode() if given else data.tokenizer
    identity = [2, PIPELINE, path, tokenizer, data.validation_fraction, data.test_fraction]
    if source != "python":  # what the folder holds now; the interpreter's own text is kept as it was first read
        found = [(name, *sources.share_of(text)) for name, text in sources.documents(source, data.tokenizer)]
        identity.append([(absolute(name), digest) for name, _, digest in found])
        few = stretches.is_needed([share for _, share, _ in found], data.validation_fraction, data.test_fraction)
        identity += ["stretches"] * few
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
    folder = os.path.join(cache_folder(), "corpora", f"{os.path.basename(path)}-{num_pieces or 'given'}-{key}")
    check_plain(folder, folder + ".lock")
    if not os.path.exists(os.path.join(folder, MANIFEST)):
        with writer_lock(folder + ".lock", log):
            if not os.path.exists(os.path.join(folder, MANIFEST)):
                build(data, source, given, folder, log)
    return read(folder, f"remove {folder} and it is built again")


def writer_lock(path: str, log: Callable[[str], None]) -> contextlib.AbstractContextManager:
    """Held by the one process that builds; others say that they wait."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    return locked(path, lambda: log("another process builds this corpus: waiting"))


def build(data: Data, source: str, given: Tokenizer | None, folder: str, log: Callable[[str], None]) -> None:
    """Read, split, train the tokenizer on the training documents (or take the one given), tokenise, write."""
    found: dict[str, dict[str, str]] = {split: {} for split in sources.SPLITS}
    unreadable: list[str] = []
    hidden: list[str] = []
    duplicates, empty = 0, 0
    for name, raw in sources.documents(source, data.tokenizer, hidden):
        text = sources.decode(raw)
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
    if not any(ordered.values()):
        raise UserError(f"config.data.sources: {source!r} holds no text (UTF-8 files that are not empty)")
    ordered = held_out(data, source, ordered, log)
    num_bytes = sum(len(text.encode()) for texts in ordered.values() for text in texts)
    dropped = f"; left out: {empty} empty, {duplicates} duplicates, {len(unreadable)} not UTF-8, {len(hidden)} hidden"
    log(f"corpus {source}: {sum(map(len, ordered.values())):,} documents, {num_bytes / 1e6:.1f} MB{dropped}")
    for what, names in (("not UTF-8", unreadable), ("hidden", hidden)):
        for name in names[:3]:
            log(f"{what}, left out: {regular_files.shown(name)}")
    if not given:
        log(f"training a tokenizer of {tokenizer_files.vocab_size(data.tokenizer):,} pieces")
    trained = given or tokenizer_training.make(data.tokenizer, ordered["train"])
    left_out = {"empty": empty, "duplicates": duplicates, "not_utf8": unreadable, "hidden": hidden}
    with draft_folder(folder) as draft:
        write_splits(draft, ordered, trained, num_bytes, log).close(source=source, left_out=left_out)
        shutil.rmtree(folder, ignore_errors=True)


def held_out(
    data: Data, source: str, ordered: dict[str, list[str]], log: Callable[[str], None]
) -> dict[str, list[str]]:
    """The texts of each split; where whole documents leave nothing to evaluate on, with stretches of them held out.

    Raises UserError where whole documents leave nothing to train on, and there is too little for stretches.
    """
    shares = [sources.share_of(text)[0] for texts in ordered.values() for text in texts]
    fractions = data.validation_fraction, data.test_fraction
    cut = stretches.cut(ordered, *fractions) if stretches.is_needed(shares, *fractions) else None
    if cut:
        log(
            f"corpus {source}: {len(shares):,} documents are too few to hold out whole ones: stretches of them are held out "
            f"({len(cut['validation']):,} for validation, {len(cut['test']):,} for test)"
        )
    elif not ordered["train"]:
        raise UserError(
            f"config.data.sources: {source!r}: all its documents are held out ({len(shares):,}, with too little text for "
            "stretches)\ngive more text, or --config.data.validation_fraction=0.0 --config.data.test_fraction=0.0"
        )
    return cut or ordered


def write_splits(
    folder: str, ordered: dict[str, list[str]], trained: Tokenizer, num_bytes: int, log: Callable[[str], None]
) -> ShardWriter:
    """The texts of each split, `num_bytes` in all, tokenised into the shards of a folder. Returns the writer, to be closed."""
    writer, start, done = ShardWriter(folder, trained), time.monotonic(), 0
    told = start
    for split, texts in ordered.items():  # documents in the order of their hashes
        for first in range(0, len(texts), TOGETHER):
            group = texts[first : first + TOGETHER]
            for text, ids in zip(group, trained.encode_batch(group), strict=True):
                size = len(text.encode())
                writer.add(split, ids, size)
                done += size
            if (now := time.monotonic()) - told > 2:
                told = now
                left = (now - start) * (num_bytes - done) / max(done, 1)
                log(f"tokenising: {100 * done / num_bytes:.0f}%, {left:.0f} s left")
    return writer


def local_copy(source: str, log: Callable[[str], None]) -> str:
    """The folder itself; of a URL a copy in the cache, made once, the manifest last. `read` checks it."""
    if not is_url(source):
        return source
    url = epath.Path(source)
    manifest = (url / MANIFEST).read_bytes()
    folder = os.path.join(cache_folder(), "copies", f"{url.name}-{hashlib.sha256(manifest).hexdigest()[:12]}")
    with writer_lock(folder + ".lock", log):
        if not os.path.exists(os.path.join(folder, MANIFEST)):
            os.makedirs(folder, exist_ok=True)
            files = json.loads(manifest)["files"]
            log(f"copying {source}: {sum(file['bytes'] for file in files.values()) / 1e6:,.1f} MB")
            for name in files:
                assert os.path.basename(name) == name
                with (url / name).open("rb") as there, open(os.path.join(folder, name), "wb") as here:
                    shutil.copyfileobj(there, here, 1 << 22)
            write_whole(os.path.join(folder, MANIFEST), manifest)
    return folder


def publish(folder: str, url: str) -> None:
    """Copies a corpus up to a URL, the manifest last: until it is there the URL holds no corpus."""
    for name in (*read_manifest(folder, "prepare it again")["files"], MANIFEST):
        with open(os.path.join(folder, name), "rb") as here, (epath.Path(url) / name).open("wb") as there:
            shutil.copyfileobj(here, there, 1 << 22)
