"""Files and arguments that mean harm, or look like it: each ends in one to five plain lines with exit code 2, none hangs."""

import contextlib
import gzip
import importlib.util
import json
import os
import pathlib
import signal
import socket
import struct
import zipfile

import numpy as np
import pytest
from helpers import LIMIT, ROOT

from lm_jax import cli, evaluate, files, main
from lm_jax.convert import safetensors
from lm_jax.data import shard_writer, shards, tokenizer
from lm_jax.data.sources import SPLITS
from lm_jax.generate import command as generate

QUICKSTART = f"--config={ROOT}/experiments/quickstart.py:smoke"
TASK = ["--config.train.task=classification", "--config.model.labels=('a', 'b')", "--config.data.packing=best_fit"]
RECORD = b'{"text": "a", "label": "b"}\n'


def tool(name: str):
    """`main` of a tool, found when it is called."""

    def run(arguments: list[str]) -> int:
        spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.main(arguments)

    return run


# Where a command takes the name of a file or folder, as {}.
PLACES = {
    "config": (main.main, ["--config={}", "--dry_run"]),
    "sources": (main.main, [QUICKSTART, "--config.data.sources={}", "--dry_run"]),
    "records": (main.main, [QUICKSTART, *TASK, "--config.data.sources={}", "--dry_run"]),
    "tokenizer": (main.main, [QUICKSTART, "--config.data.tokenizer={}", "--dry_run"]),
    "init_from": (main.main, [QUICKSTART, "--config.train.init_from={}"]),
    "workdir": (main.main, [QUICKSTART, "--workdir={}"]),
    "generate": (generate.main, ["--model={}", "--prompt=x"]),
    "prompts": (generate.main, ["--model=nowhere", "--prompts={}"]),
    "evaluate": (evaluate.main, ["--model={}"]),
    "prepare": (tool("prepare_data"), ["--output=out", "--tokenizer=bytes", "--workers=1", "{}"]),
    "prepare_tokenizer": (tool("prepare_data"), ["--output=out", "--tokenizer={}", "words.txt"]),
    "decontaminate": (tool("prepare_data"), ["--output=out", "--tokenizer=bytes", "--decontaminate={}", "words.txt"]),
    "make_records": (tool("make_records"), ["--csv={}", "--output=out"]),
    "convert": (tool("convert_checkpoint"), ["{}", "out", "--unproven"]),
}  # fmt: skip


def fifo(path: pathlib.Path) -> pathlib.Path:
    os.mkfifo(path)
    return path


def listening(path: pathlib.Path) -> pathlib.Path:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))
    return path


def link(path: pathlib.Path, to: str) -> pathlib.Path:
    path.symlink_to(to)
    return path


def folder(path: pathlib.Path, **contents) -> pathlib.Path:
    path.mkdir()
    for name, content in contents.items():
        target = path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        content(target) if callable(content) else target.write_bytes(content)
    return path


def sized(num_bytes: int):
    """A file of so many bytes that takes no room."""

    def make(path: pathlib.Path) -> pathlib.Path:
        path.touch()
        os.truncate(path, num_bytes)
        return path

    return make


# What is no regular file, or no name of one.
NAMES = {
    "a FIFO": lambda tmp: fifo(tmp / "fifo"),
    "a socket": lambda tmp: listening(tmp / "socket"),
    "/dev/zero": lambda tmp: "/dev/zero",
    "/dev/full": lambda tmp: "/dev/full",
    "a loop": lambda tmp: link(tmp / "loop", "loop"),
    "a broken link": lambda tmp: link(tmp / "broken", "nowhere"),
    "a link to a FIFO": lambda tmp: (fifo(tmp / "fifo"), link(tmp / "link", "fifo"))[1],
    "below a file": lambda tmp: (folder(tmp / "d", a=b"a"), tmp / "d" / "a" / "b")[1],
    "a newline": lambda tmp: tmp / "no\nsuch\nfile\n\n\n\n\n",
    "escapes": lambda tmp: tmp / "\x1b[31mred\x1b]0;title\x07",
    "no UTF-8": lambda tmp: os.fsdecode(os.fsencode(tmp) + b"/\xff\xfe"),
    "a long name": lambda tmp: tmp / ("x" * 4096),
    "a name of braces": lambda tmp: "(" * 5000,
    "a deep name": lambda tmp: tmp / "/".join(["x" * 100] * 60),
    "an empty folder": lambda tmp: folder(tmp / "empty"),
    "a terabyte": lambda tmp: sized(2**40)(tmp / "terabyte"),
}
FINE = {("workdir", name) for name in ("a newline", "escapes", "an empty folder", "a name of braces")}  # they are made


def deep(opening: bytes = b"[") -> bytes:
    return opening * 100_000


LLAMA = {
    "model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1,
    "intermediate_size": 8, "vocab_size": 257, "max_position_embeddings": 16, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip


def model(tmp: pathlib.Path, **contents) -> pathlib.Path:
    """A Hugging Face folder with a byte tokenizer, some of it as given."""
    whole = {"config.json": json.dumps(LLAMA).encode(), "tokenizer.bytes": tokenizer.Bytes.model}
    return folder(
        tmp / "model", **{name: content for name, content in (whole | contents).items() if content is not None}
    )


def header(content: bytes, size: int | None = None, after: bytes = b"") -> bytes:
    return struct.pack("<Q", len(content) if size is None else size) + content + after


def tensors(**entries) -> bytes:
    return header(json.dumps(entries).encode(), None, b"\0" * 64)


def many_names(num: int) -> bytes:
    entry = json.dumps({"dtype": "F32", "shape": [0], "data_offsets": [0, 0]})
    return header(("{" + ",".join(f'"{k * 7919 % 999983}.{k}": {entry}' for k in range(num)) + "}").encode())


def corpus(tmp: pathlib.Path, array=None, **manifest) -> pathlib.Path:
    """A prepared folder whose manifest says what is given, and whose tokens are `array`, all hashes right."""
    place = tmp / "corpus"
    writer = shard_writer.ShardWriter(str(place), tokenizer.Bytes())
    writer.add("train", np.arange(9), 9)
    content = writer.close()
    if array is not None:
        np.save(place / "train-00000.tokens.npy", array, allow_pickle=True)
        content["files"]["train-00000.tokens.npy"] = files.file_hash(place / "train-00000.tokens.npy")
    (place / shards.MANIFEST).write_text(json.dumps(content | manifest))
    return place


class Canary:
    """What a pickle would run."""

    def __reduce__(self):
        return os.mkdir, ("canary",)


def config_json(content: bytes):
    return lambda tmp: model(tmp, **{"config.json": content})


def with_config(**changes):
    return config_json(json.dumps(LLAMA | changes).encode())


def has(name: str, content):
    return lambda tmp: model(tmp, **{name: content})


def weights(content):
    return has("model.safetensors", content)


def array(shape: list[int], start: int, stop: int, name: str = "a", dtype: str = "F32") -> bytes:
    return tensors(**{name: {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}})


def records(content, name: str = "train.jsonl"):
    return lambda tmp: folder(tmp / "records", **{name: content})


def text(content, name: str = "x.txt"):
    return lambda tmp: folder(tmp / "text", **{"a.txt": b"text\n", name: content})


def one(content: bytes, name: str):
    return lambda tmp: folder(tmp / "one", **{name: content}) / name


def tokens(content, name: str = "tokenizer.json"):
    return lambda tmp: folder(tmp / "tokens", **{name: content}) / name


WHOLE = b'{"format": 1, "files": {}}'


def run(name: str, content):
    return lambda tmp: folder(
        tmp / "run", **{"config.json": b"{}", "checkpoints/2/MANIFEST.json": WHOLE, name: content}
    )


def zipped(path: pathlib.Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("x.txt", b"\0" * 10**6)


NESTED = b'{"text": ' + deep() + b"}\n"
# (place, file): everything that is a file but means harm
FILES = {
    "config.json deep": ("generate", config_json(deep(b'{"a":'))),
    "config.json of a huge number": ("generate", config_json(b'{"model_type": "llama", "hidden_size": ' + b"9" * 10_000 + b"}")),
    "config.json not UTF-8": ("generate", config_json(b'{"model_type": "\xff"}')),
    "config.json empty": ("generate", config_json(b"")),
    "config.json a list": ("generate", config_json(b"[1]")),
    "config.json null": ("evaluate", config_json(b"null")),
    "config.json a FIFO": ("generate", has("config.json", fifo)),
    "config.json a folder": ("generate", has("config.json", folder)),
    "config.json a terabyte": ("generate", has("config.json", sized(2**40))),
    "config.json with NaN": ("generate", with_config(rms_norm_eps=float("nan"))),
    "config.json with infinity": ("generate", with_config(rope_theta=float("inf"))),
    "config.json with a million layers": ("generate", with_config(num_hidden_layers=10**6)),
    "config.json with 2**63 heads": ("generate", with_config(num_attention_heads=2**63)),
    "config.json of another type": ("generate", with_config(model_type=["llama"])),
    "config.json with a terabyte of pieces": ("generate", with_config(vocab_size=2**31 - 1)),
    "tokenizer.json damaged": ("tokenizer", tokens(b'{"version": "1.0", "model": {"type": "BPE", "vocab": 3}}')),
    "tokenizer.json torn": ("tokenizer", tokens(b'{"version": "1.0", "added_tokens": [')),
    "tokenizer.json deep": ("tokenizer", tokens(deep())),
    "tokenizer.json a list": ("tokenizer", tokens(b"[]")),
    "tokenizer.json empty": ("tokenizer", tokens(b"")),
    "tokenizer.model of nothing known": ("tokenizer", tokens(b"\x0a\xff\xff\xff\xff\x0f", "tokenizer.model")),
    "tokenizer.model empty": ("tokenizer", tokens(b"", "tokenizer.model")),
    "tokenizer.model of NUL": ("tokenizer", tokens(b"\0" * 999, "tokenizer.model")),
    "tokenizer.bytes other": ("tokenizer", tokens(b"lm_jax bytes 2\n", "tokenizer.bytes")),
    "tokenizer a terabyte": ("tokenizer", tokens(sized(2**40), "tokenizer.model")),
    "tokenizer of a model a FIFO": ("generate", has("tokenizer.bytes", fifo)),
    "tokenizer of a model none": ("generate", has("tokenizer.bytes", None)),
    "weights none": ("generate", lambda tmp: model(tmp)),
    "weights with 70,000 names": ("generate", weights(many_names(70_000))),
    "weights with 700,000 names": ("generate", lambda tmp: weights(many_names(700_000))(tmp)),
    "weights with a header of 2**63": ("generate", weights(header(b"{}", 2**63))),
    "weights with a header of 2**64 - 1": ("generate", weights(header(b"{}", 2**64 - 1))),
    "weights of 7 bytes": ("generate", weights(b"\0" * 7)),
    "weights empty": ("generate", weights(b"")),
    "weights with a deep header": ("generate", weights(header(deep()))),
    "weights with a list": ("generate", weights(header(b"[]"))),
    "weights below 0": ("generate", weights(array([16], -64, 0))),
    "weights beyond their end": ("generate", weights(array([32], 0, 128))),
    "weights of a huge shape": ("generate", weights(array([2**40, 2**40], 0, 64))),
    "weights of a shape of 9,999 dims": ("generate", weights(array([1] * 9999 + [16], 0, 64))),
    "weights twice": ("generate", weights(header(b'{"a": 1, "a": 2}'))),
    "weights of an unknown type": ("generate", weights(array([16], 0, 64, dtype="F4"))),
    "weights with a gap": ("generate", weights(array([8], 0, 32))),
    "weights with a name of a megabyte": ("generate", weights(array([16], 0, 64, "a" * 10**6))),
    "weights with a name of newlines": ("generate", weights(array([16], 0, 64, "a\n" * 99))),
    "weights a FIFO": ("generate", weights(fifo)),
    "weights a folder": ("generate", weights(folder)),
    "weights a loop": ("generate", weights(lambda path: link(path, path.name))),
    "an index deep": ("generate", has(safetensors.INDEX, deep())),
    "an index that leaves": ("generate", has(safetensors.INDEX, b'{"weight_map": {"a": "../../x.safetensors"}}')),
    "an index of a FIFO": ("generate", has(safetensors.INDEX, fifo)),
    "an index of nothing": ("generate", has(safetensors.INDEX, b'{"weight_map": {}}')),
    "a run with a deep config": ("evaluate", run("config.json", deep(b'{"a":'))),
    "a run with a config of a list": ("evaluate", run("config.json", b'{"config": [1]}')),
    "a run whose step has a deep manifest": ("evaluate", run("checkpoints/2/MANIFEST.json", deep())),
    "a run whose step has a FIFO for a manifest": ("evaluate", run("checkpoints/2/MANIFEST.json", fifo)),
    "a run with a step of 5,000 digits": ("evaluate", lambda tmp: f"{run('a', b'')(tmp)}@" + "9" * 5000),
    "a run whose base has a NUL": ("evaluate", run("config.json", b'{"base": {"place": "a\\u0000b", "hash": ""}, "config": {}}')),
    "a run that is its own base": ("evaluate", run("config.json", b'{"base": {"place": "run", "hash": ""}, "config": {}}')),
    "a workdir whose lock is a FIFO": ("workdir", lambda tmp: folder(tmp / "run", lock=fifo)),
    "a workdir whose config is a FIFO": ("workdir", run("config.json", fifo)),
    "a workdir whose config is deep": ("workdir", run("config.json", deep())),
    "word vectors with NaN": ("init_from", one(b"the " + b" ".join([b"nan"] * 64) + b"\n", "v.txt")),
    "word vectors with infinity": ("init_from", one(b"the " + b" ".join([b"1e999"] * 64) + b"\n", "v.txt")),
    "word vectors too short": ("init_from", one(b"the 1 2 3\n", "v.txt")),
    "word vectors of words": ("init_from", one(b"the " + b" ".join([b"x"] * 64) + b"\n", "v.txt")),
    "word vectors of nobody": ("init_from", one(b"zzzzzzzzzzzz " + b" ".join([b"1"] * 64) + b"\n", "v.txt")),
    "word vectors of many": ("init_from", one(b"99999999999999999999 999999\n", "v.txt")),
    "word vectors empty": ("init_from", one(b"", "v.txt")),
    "word vectors of NUL": ("init_from", one(b"\0" * 10**6, "v.txt")),
    "word vectors not UTF-8": ("init_from", one(b"\xff 1\n", "v.txt")),
    "word vectors of a terabyte": ("init_from", lambda tmp: sized(2**40)(tmp / "v.txt")),
    "records a FIFO": ("records", lambda tmp: folder(tmp / "records", **{"train.jsonl": fifo})),
    "records a folder": ("records", lambda tmp: folder(tmp / "records", **{"train.csv": folder})),
    "records a loop": ("records", lambda tmp: folder(tmp / "records", **{"train.jsonl": lambda path: link(path, path.name)})),
    "records deep": ("records", records(RECORD + NESTED)),
    "records deep below a label": ("records", records(b'{"text": "a", "label": ' + b"[" * 500 + b"]" * 500 + b"}\n")),
    "records of a huge number": ("records", records(b'{"text": "a", "label": ' + b"9" * 9999 + b"}\n")),
    "records of a name twice": ("records", records(b'{"text": "a", "text": "b", "label": "b"}\n')),
    "records with NaN": ("records", records(b'{"text": "a", "label": NaN}\n')),
    "records with half a pair": ("records", records(b'{"text": "\\ud83d", "label": "b"}\n')),
    "records with half a pair for a label": ("records", records(b'{"text": "a", "label": "\\udfff"}\n')),
    "records with a NUL": ("records", records(b'{"text": "\\u0000", "label": "b"}\n')),
    "records with bytes": ("records", records(b'{"text": "\xff", "label": "b"}\n')),
    "records empty": ("records", records(b"")),
    "records of blank lines": ("records", records(b"\n \n\r\n" * 9)),
    "records of a header alone": ("records", records(b"text,label\n", "train.csv")),
    "records of an open quote": ("records", records(b'text,label\n"a,b\n' + b"c,d\n" * 9999, "train.csv")),
    "records of a column twice": ("records", records(b"text,label,text\na,b,c\n", "train.csv")),
    "records of 100,000 columns": ("records", records(b",".join(b"%d" % k for k in range(100_000)) + b"\n", "train.csv")),
    "records of 100,000 cells": ("records", records(b"text,label\n" + b"," * 100_000 + b"\n", "train.csv")),
    "records of semicolons": ("records", records(b"text;label\na;b\n", "train.csv")),
    "records of tabs": ("records", records(b"text\tlabel\na\tb\n", "train.csv")),
    "records of UTF-16": ("records", records("text,label\na,b\n".encode("utf-16"), "train.csv")),
    "records of a terabyte": ("records", lambda tmp: folder(tmp / "records", **{"train.jsonl": sized(2**40)})),
    "records packed": ("records", records(gzip.compress(RECORD), "train.jsonl.gz")),
    "records that are zipped": ("records", lambda tmp: folder(tmp / "records", **{"train.csv": zipped})),
    "records a torn table": ("records", records(b"PAR1" + b"\0" * 99 + b"PAR1", "train.parquet")),
    "records an empty table": ("records", records(b"", "train.parquet")),
    "a corpus with a deep manifest": ("sources", lambda tmp: folder(tmp / "corpus", **{"manifest.json": deep()})),
    "a corpus with a FIFO for a manifest": ("sources", lambda tmp: folder(tmp / "corpus", **{"manifest.json": fifo})),
    "a corpus of a list": ("sources", lambda tmp: folder(tmp / "corpus", **{"manifest.json": b"[]"})),
    "a corpus of 10**12 shards": ("sources", lambda tmp: corpus(tmp, counts=dict.fromkeys(SPLITS, {"shards": 10**12}))),
    "a corpus of no shards": ("sources", lambda tmp: corpus(tmp, counts={})),
    "a corpus that leaves": ("sources", lambda tmp: corpus(tmp, tokenizer_file="../../etc/passwd")),
    "a corpus of a pickle": ("sources", lambda tmp: corpus(tmp, np.array([Canary()] * 9, object))),
    "a corpus of floats": ("sources", lambda tmp: corpus(tmp, np.zeros(10))),
    "a corpus of a table": ("sources", lambda tmp: corpus(tmp, np.zeros((10, 2), np.uint16))),
    "a corpus of fewer tokens": ("sources", lambda tmp: corpus(tmp, np.zeros(3, np.uint16))),
    "text of NUL": ("sources", text(b"\0" * 999)),
    "text of a terabyte": ("sources", text(sized(2**40))),
    "text that is a FIFO": ("sources", text(fifo)),
    "text that is a socket": ("sources", text(listening)),
    "text that is a device": ("sources", text(lambda path: link(path, "/dev/zero"))),
    "text that is a loop": ("sources", text(lambda path: link(path, path.name))),
    "text with records": ("sources", text(RECORD, "x.jsonl")),
    "text with bytes in a name": ("sources", text(b"\0", os.fsdecode(b"\xff.txt"))),
    "text with newlines in a name": ("sources", text(b"\0", "a\nb\nc\nd\ne\nf\ng.txt")),
    "prompts not UTF-8": ("prompts", one(b"\xff", "p.txt")),
    "prompts of NUL": ("prompts", one(b"a\0b", "p.txt")),
    "prompts empty": ("prompts", one(b"", "p.txt")),
    "prepare a torn gz": ("prepare", one(gzip.compress(RECORD * 999)[:-9], "x.jsonl.gz")),
    "prepare no gz": ("prepare", one(RECORD, "x.jsonl.gz")),
    "prepare a bomb of NUL": ("prepare", one(gzip.compress(b"\0" * 10**8, 9), "x.txt.gz")),
    "prepare a bomb of one line": ("prepare", one(gzip.compress(b'{"text": "' + b"a" * 10**8, 1), "x.jsonl.gz")),
    "prepare a bomb of one cell": ("prepare", one(gzip.compress(b'text\n"' + b"a\n" * 10**6, 1), "x.csv.gz")),
    "prepare a zip": ("prepare", lambda tmp: folder(tmp / "z", **{"x.zip": zipped})),
    "prepare deep": ("prepare", one(NESTED, "x.jsonl")),
    "prepare a deep document": ("prepare", one(deep(), "x.json")),
    "prepare half a pair": ("prepare", one(b'{"text": "\\ud83d"}', "x.jsonl")),
    "prepare a FIFO in a folder": ("prepare", lambda tmp: folder(tmp / "f", **{"a.txt": b"a", "fifo.txt": fifo})),
    "prepare a device in a folder": ("prepare", lambda tmp: folder(tmp / "f", zero=lambda path: link(path, "/dev/zero"))),
    "prepare bytes in a name": ("prepare", lambda tmp: folder(tmp / "f", **{os.fsdecode(b"\xff.jsonl"): b"x\n"})),
    "prepare into a file": ("prepare_tokenizer", lambda tmp: (folder(tmp / "out", mine=b"x"), "bytes")[1]),
    "overlap with what is torn": ("decontaminate", one(gzip.compress(RECORD)[:-5], "x.jsonl.gz")),
    "overlap with what is deep": ("decontaminate", one(NESTED, "x.jsonl")),
    "a table without its columns": ("make_records", one(b"a,b\n1,2\n", "x.csv")),
    "a table that is packed": ("make_records", one(gzip.compress(b"text,label\na,b\n"), "x.csv.gz")),
}  # fmt: skip
PACKAGED = {  # what needs packages that CI has not, or not always
    "a table torn at its end": ("prepare", one(b"PAR1" + b"\0" * 99 + b"PAR1", "x.parquet")),
    "an archive of nothing": ("prepare", one(b"\0" * 999, "x.warc")),
    "zst torn": ("prepare", one(b"\x28\xb5\x2f\xfd\x04", "x.jsonl.zst")),
    "GGUF empty": ("convert", one(b"", "x.gguf")),
    "GGUF of 2**63 tensors": ("convert", one(b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0), "x.gguf")),
    "GGUF of 2**63 fields": ("convert", one(b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63), "x.gguf")),
    "GGUF of a string of 2**63": ("convert", one(b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**63), "x.gguf")),
    "GGUF of 2**62 numbers": ("convert", one(b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 0, 2**62), "x.gguf")),
    "GGUF of NUL": ("convert", one(b"\0" * 999, "x.gguf")),
    "GGUF of a FIFO": ("convert", lambda tmp: fifo(tmp / "x.gguf")),
}  # fmt: skip


class Hangs(BaseException):
    pass


@contextlib.contextmanager
def deadline(seconds: int):
    def stop(*_):
        raise Hangs

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def ends(place: str, name: str, capfd) -> None:
    """Performs a command on what is named: it ends with exit code 2 and one to five plain lines."""
    function, arguments = PLACES[place]
    with deadline(LIMIT), pytest.raises(SystemExit) as stopped:
        cli.run_command(function, [argument.format(name) if "{}" in argument else argument for argument in arguments])
    output, error = capfd.readouterr()
    assert stopped.value.code == 2, f"exit {stopped.value.code}\n{output[-2000:]}\n{error[-3000:]}"
    shown = error.strip().split("\n")
    assert shown[0].startswith("lm_jax: ") and 1 <= len(shown) <= 5 and "Traceback" not in output + error, error
    assert all(c.isprintable() or c == "\n" for c in error) and max(map(len, shown)) < 1100, error


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.txt").write_text("some words")
    yield tmp_path
    assert not (tmp_path / "canary").exists()


def named(cases: dict, places) -> list:
    pairs = [(place, name) for name in cases for place in places if (place, name) not in FINE]
    return [pytest.param(place, cases[name], id=f"{place}: {name}") for place, name in pairs]


@pytest.mark.parametrize(("place", "make"), named(NAMES, ("sources", "tokenizer", "generate", "prompts", "prepare")))
def test_a_name_of_no_file_is_answered(place, make, here, capfd):
    ends(place, str(make(here)), capfd)


@pytest.mark.proof
@pytest.mark.parametrize(("place", "make"), named(NAMES, PLACES))
def test_a_name_of_no_file_is_answered_everywhere(place, make, here, capfd):
    ends(place, str(make(here)), capfd)


LARGE = ("weights with 700,000 names",)  # a proof: ten times as many as another


@pytest.mark.parametrize("name", [pytest.param(x, marks=[pytest.mark.proof] * (x in LARGE)) for x in FILES])
def test_a_file_that_means_harm_is_answered(name, here, capfd):
    place, make = FILES[name]
    ends(place, str(make(here)), capfd)


@pytest.mark.proof
@pytest.mark.parametrize("name", PACKAGED)
def test_a_packed_file_that_means_harm_is_answered(name, here, capfd):
    place, make = PACKAGED[name]
    ends(place, str(make(here)), capfd)
