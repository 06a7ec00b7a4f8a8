"""Raw text -> a corpus: read, normalise, filter, scrub, drop duplicates, tokenise, write shards.

Stages of tasks, each a pure function of its input files. How many tasks there are follows from the input alone, and documents
lie in the order of their content hashes: the shards are the same whatever ran the tasks, how many at once, and how often it
was killed. A finished task leaves a mark and is not done again. Tasks are run in this process, or by datatrove's executors.

    read        files -> documents, normalised, filtered, scrubbed, dealt into buckets by their hash
    gather      a bucket, sorted by hash: of equal documents one is kept; overlap with evaluation sets
    signatures, pairs, clusters         datatrove's MinHash, of near-duplicates one is kept
    tokenizer   trained on the training documents with the smallest hashes
    tokenise    a bucket -> ids; at last all are copied into shards, in order
"""

import contextlib
import dataclasses
import glob
import hashlib
import importlib.util
import itertools
import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from lm_jax.data import shard_writer, shards, sources, tokenizer_files
from lm_jax.data.corpus import is_prepared, writer_lock
from lm_jax.data.corpus import publish as publish_corpus
from lm_jax.errors import UserError, needs
from lm_jax.files import cache_folder, draft_folder, locked, write_whole
from lm_jax.prepare import clean, overlap, readers, report, steps
from lm_jax.prepare.executors import Choice, Log, Stage, run_stage
from lm_jax.prepare.report import Dropped, Tally
from lm_jax.regular_files import check_url, is_url

VERSION = 1  # of what a plan means: another version does not go on with a work folder
TASK_BYTES = 16_000_000  # of input that a task reads
BUCKET_BYTES = 4_000_000  # of text that a task sorts, compares and tokenises
MOST_TASKS = 256  # so that there are at most MOST_TASKS ** 2 files between reading and gathering
GROWS = 4  # text in a packed file, against its size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Choice):
    """The settings of the command; `identity` are those that decide on the corpus."""

    sources: tuple[str, ...]
    output: str
    work: str = ""  # a folder that all workers see; "" = <output>.work
    on_bad_record: str = "stop"  # or skip
    tokenizer: str = "sentencepiece:32768"
    text_key: str = "text"
    normalise: str = "nfc"  # or none
    filters: tuple[str, ...] = ()
    scrub: bool = False
    duplicates: str = "exact"  # or minhash
    decontaminate: tuple[str, ...] = ()  # evaluation sets
    remove_contaminated: bool = False
    validation_fraction: float = 0.02
    test_fraction: float = 0.02

    @property
    def folder(self) -> str:
        """The work folder, absolute: beside the output, or in the cache for an output behind a URL."""
        here = os.path.join(cache_folder(), "work", re.sub(r"\W+", "-", self.output))
        return os.path.abspath(self.work or (here if is_url(self.output) else self.output.rstrip("/") + ".work"))

    def identity(self) -> dict[str, Any]:
        """The settings that decide on the corpus, {name: value}."""
        names = [field.name for field in dataclasses.fields(self)]
        return {name: getattr(self, name) for name in ("sources", *names[names.index("on_bad_record") + 1 :])}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which files each task reads, and how many buckets there are."""

    key: str  # of everything that decides on the corpus
    tasks: list[list[str]]  # files of each reading task
    num_bytes: int  # of all files
    buckets: int


def make_plan(settings: Settings, log: Log = lambda line: None) -> Plan:
    """Which files each task reads. Raises UserError where a path or URL holds none."""
    files = readers.find(settings.sources, log)
    with tokenizer_files.named("--tokenizer"):
        given = None if tokenizer_files.vocab_size(settings.tokenizer) else tokenizer_files.load(settings.tokenizer)
        tokens = given.fingerprint + given.beside.decode() if given else ""
    evaluation = [file.key for file in readers.find(settings.decontaminate)] if settings.decontaminate else []
    identity = [VERSION, shards.PIPELINE, settings.identity(), files, tokens, evaluation]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    total = sum(file.size for file in files)
    share = max(TASK_BYTES, -(-total // MOST_TASKS))
    tasks: list[list[str]] = []
    room = 0
    for file in files:
        if room < file.size or not tasks:
            tasks.append([])
            room = share
        tasks[-1].append(file.path)
        room -= file.size
    text = sum(file.size * (GROWS if file.path.endswith((".gz", ".zst", ".parquet")) else 1) for file in files)
    return Plan(key, tasks, total, min(MOST_TASKS, -(-text // BUCKET_BYTES) or 1))


def run(settings: Settings, log: Log = print) -> dict[str, Any]:
    """Prepares the corpus, or goes on where an earlier run was stopped. Returns the report. Raises UserError."""
    check(settings)
    check_url("--output", settings.output)
    plan = make_plan(settings, log)
    if is_prepared(settings.output):
        return already(settings, plan, log)
    if not is_url(settings.output) and os.path.exists(settings.output) and os.listdir(settings.output):
        raise UserError(f"--output {settings.output} is not empty, and no corpus of ours; name another")
    folder = settings.folder
    with writer_lock(folder + ".lock", log):
        start(folder, plan, log)
        seconds = {}
        for stage in stages(settings, plan, folder):
            began = time.monotonic()
            run_stage(stage, os.path.join(folder, stage.name), settings, plan.num_bytes, log)
            seconds[stage.name] = round(time.monotonic() - began, 2)
        made = finish(settings, plan, folder, seconds)
        publish(os.path.join(folder, "corpus"), settings.output)
    shutil.rmtree(folder)
    with contextlib.suppress(FileNotFoundError):
        os.remove(folder + ".lock")
    return made


def publish(draft: str, output: str) -> None:
    """Moves the finished folder to its name, or copies it to a bucket with the manifest last."""
    if is_url(output):
        for name in ("report.json", "report.html"):
            (epath.Path(output) / name).write_text((epath.Path(draft) / name).read_text())
        publish_corpus(draft, output)
        return
    target = os.path.abspath(output)
    os.makedirs(os.path.dirname(target), exist_ok=True)
    with draft_folder(target) as beside:  # the work folder may lie on another file system
        shutil.move(draft, beside)


def check(settings: Settings) -> None:
    """Raises UserError, with the name of the flag, for settings that contradict and for packages that are missing."""
    for flag, value, choices in (
        *(("filters", name, clean.FILTERS) for name in settings.filters),
        ("normalise", settings.normalise, ("nfc", "none")),
        ("duplicates", settings.duplicates, ("exact", "minhash")),
        ("executor", settings.executor, ("local", "ray", "slurm")),
        ("on_bad_record", settings.on_bad_record, ("stop", "skip")),
    ):
        if value not in choices:
            raise UserError(f"--{flag} {value}: choose from {', '.join(choices)}")
    if not 0 <= settings.validation_fraction + settings.test_fraction < 0.9:
        raise UserError("--validation_fraction and --test_fraction leave less than a tenth for training")
    if settings.remove_contaminated and not settings.decontaminate:
        raise UserError("--remove_contaminated needs --decontaminate FILE...")
    for flag, wanted in (
        ("filters", settings.filters),
        ("scrub", settings.scrub),
        ("duplicates minhash", settings.duplicates == "minhash"),
        (f"executor {settings.executor}", settings.executor != "local"),
    ):
        if wanted:
            clean.require(f"--{flag}")
    if settings.executor == "ray" and not importlib.util.find_spec("ray"):
        raise needs("--executor ray", "ray", "ray")
    if settings.executor == "slurm" and not settings.slurm_partition:
        raise UserError("--executor slurm needs --slurm_partition NAME")


def already(settings: Settings, plan: Plan, log: Log) -> dict[str, Any]:
    """The report of a corpus that is there. Raises UserError where it is of other text or settings."""
    try:
        made = json.loads((epath.Path(settings.output) / "report.json").read_text())
    except (OSError, ValueError):
        made = {}
    if made.get("key") != plan.key:
        raise UserError(
            f"{settings.output} holds a corpus of other text or settings; name another --output, or remove it"
        )
    log(f"{settings.output} is prepared already")
    return made


def start(folder: str, plan: Plan, log: Log) -> None:
    """Makes an empty work folder, or keeps the one that an earlier run of this plan left. Raises UserError."""
    path = os.path.join(folder, "plan.json")
    wanted = json.loads(json.dumps(dataclasses.asdict(plan)))
    found = None
    with contextlib.suppress(OSError, ValueError), open(path) as file:
        found = json.load(file)
    if found == wanted:
        log(f"going on with {folder}")
        with locked(os.path.join(folder, "busy")):  # tasks of a killed run may still be at their last files
            pass
        return
    if os.path.exists(folder):
        if {*os.listdir(folder)} - {"plan.json.draft"} and not os.path.exists(path):
            raise UserError(f"--work {folder} is not a work folder of ours and not empty; name another")
        if found is not None:
            log(f"{folder} is of other text or settings: starting over")
        shutil.rmtree(folder)
    os.makedirs(folder)
    write_json(path, wanted)


def write_json(path: str, content) -> None:
    """Writes JSON, whole or not at all."""
    write_whole(path, json.dumps(content, indent=1).encode())


def stages(settings: Settings, plan: Plan, folder: str) -> list[Stage]:
    """The stages, in order."""
    near, fractions = settings.duplicates == "minhash", (settings.validation_fraction, settings.test_fraction)
    busy = steps.Busy(folder)

    def read() -> list:
        tally = Tally()
        cleaning = clean.filters(settings.filters, lambda rule: Dropped(tally, rule))
        cleaning += clean.scrubbers() if settings.scrub else []
        first = steps.Read(tally, plan.tasks, folder, settings.text_key, settings.on_bad_record)
        normalise = steps.Normalise(tally, settings.normalise)
        return [busy, first, normalise, *cleaning, steps.Deal(tally, folder, plan.buckets)]

    def gather() -> list:
        tally, found = Tally(), []
        if settings.decontaminate:
            remove = settings.remove_contaminated
            found = [overlap.Overlap(tally, settings.decontaminate, settings.text_key, remove)]
        return [busy, steps.Gather(tally, folder, len(plan.tasks)), *found, steps.Keep(tally, folder)]

    def tokenise() -> list:
        tally = Tally()
        kept = clean.minhash("remove", folder, Dropped(tally, "near-duplicate")) if near else []
        return [busy, steps.Load(folder), *kept, steps.Tokenise(tally, folder, fractions)]

    cleaned = bool(settings.filters or settings.scrub)
    found = [Stage("read", len(plan.tasks), read, cleaned), Stage("gather", plan.buckets, gather)]
    if near:
        signatures = lambda: [busy, steps.Load(folder), *clean.minhash("signatures", folder)]
        found += [
            Stage("signatures", plan.buckets, signatures, True),
            Stage("pairs", clean.PAIR_TASKS, lambda: [busy, *clean.minhash("pairs", folder)], True),
            Stage("clusters", 1, lambda: [busy, *clean.minhash("clusters", folder)], True),
        ]
    train = lambda: [busy, steps.Train(folder, plan.buckets, settings.tokenizer, fractions)]
    return [*found, Stage("tokenizer", 1, train), Stage("tokenise", plan.buckets, tokenise, near)]


def finish(settings: Settings, plan: Plan, folder: str, seconds: dict[str, float]) -> dict[str, Any]:
    """Copies the tokens into shards, writes the report beside them and the manifest last."""
    draft = os.path.join(folder, "corpus")
    shutil.rmtree(draft, ignore_errors=True)
    made = tokenizer_files.load(os.path.join(folder, "tokenizer", "model"))
    writer, lengths = shard_writer.ShardWriter(draft, made), Counter[int]()
    for rank in range(plan.buckets):
        ids, index = (np.load(os.path.join(folder, "tokens", f"{rank:05}.{part}.npy")) for part in ("ids", "index"))
        offset = 0
        for split, num, num_bytes in index.tolist():
            writer.add(sources.SPLITS[split], ids[offset : offset + num], num_bytes)
            lengths[int(num).bit_length()] += 1
            offset += num
    if not writer.counts["train"]["documents"]:
        raise UserError("no training document is left: give more text, or fewer filters")
    told = describe(settings, plan, folder, writer, lengths, seconds)
    write_json(os.path.join(draft, "report.json"), told)
    with open(os.path.join(draft, "report.html"), "w", encoding="utf-8") as file:
        file.write(report.page(told))
    left_out = {reason: entry["documents"] for stage in told["stages"] for reason, entry in stage["dropped"].items()}
    writer.close(source=list(settings.sources), left_out=left_out, settings=told["settings"])
    return told


def describe(settings, plan, folder, writer: shard_writer.ShardWriter, lengths: Counter, seconds) -> dict[str, Any]:
    """The report of a prepared corpus, as JSON."""
    tallies = {}
    for name in ("read", "gather", "tokenise"):
        tallies[name] = Tally()
        for path in sorted(glob.glob(os.path.join(glob.escape(folder), name, "tally", "*.json"))):
            with open(path) as file:
                tallies[name].merge(json.load(file))
    counts = writer.counts
    told = {
        "key": plan.key,
        "output": os.path.basename(settings.output.rstrip("/")),
        "settings": settings.identity(),
        "tokenizer": f"{settings.tokenizer} ({writer.tokenizer.vocab_size:,} pieces, {writer.tokenizer.fingerprint})",
        "in": {name: getattr(tallies["read"], name) for name in ("documents", "bytes", "pieces")},
        "stages": [{"name": name, "dropped": tallies[name].dropped} for name in tallies],
        "out": {name: sum(counts[split][name] for split in counts) for name in ("documents", "tokens", "bytes")},
        "splits": counts,
        "lengths": report.histogram(lengths),
        "near_duplicates": steps.near_duplicates(folder) if settings.duplicates == "minhash" else {},
        "contamination": overlap.summary(settings.decontaminate, settings.text_key, tallies["gather"]),
        "seconds": seconds,
    }
    report.check(told)
    return told


def texts_of(paths: tuple[str, ...], text_key: str, on_bad_record: str) -> Iterator[str]:
    """The texts of raw paths as they are read, and the training documents of prepared ones. Raises UserError."""
    raw = tuple(path for path in paths if not (os.path.isdir(path) and is_prepared(path)))
    for path in sorted({*paths} - {*raw}):
        corpus = shards.read(path, "prepare it again")
        split = corpus.splits["train"]
        for start, end in itertools.pairwise(split.offsets):
            yield corpus.tokenizer.decode(split.tokens[start + 1 : end])
    for file in readers.find(raw) if raw else ():
        for record in readers.records(file.path, text_key):
            if isinstance(record, readers.Document):
                yield record.text
            elif on_bad_record == "stop":
                raise steps.bad_record(record)
