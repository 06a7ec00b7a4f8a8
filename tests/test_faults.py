"""What the system refuses (disk, rights, memory) is one to five lines and exit 74, wherever it comes up, and the process ends."""

import errno
import os
import re
import signal
import subprocess
import sys
from threading import Thread

import pytest
from etils import epath
from helpers import LIMIT, LLAMA, ROOT
from refused import refused

from lm_jax import cli, faults, files, manifest

TRAIN = [
    "-m", "lm_jax.main", "--config", str(ROOT / "experiments" / "quickstart.py:smoke"), "--config.data.tokenizer=bytes",
    "--config.checkpoint.every=1", "--config.evaluate.prompt=", "--config.model.num_layers=1",
]  # fmt: skip
RUN, NEW = "{folder}/run", "{folder}/new-{index}"  # a finished run; where none is yet


def at(part: str, number: int, reads: bool = False) -> dict:
    return {"refused": {"part": part, "errno": number, "reads": reads}}


def run(*words: str, workdir: str = NEW, **situation) -> dict:
    small = TRAIN[:-1] if any("num_layers" in word for word in words) else TRAIN
    return {"words": [*small, *words, "--workdir", workdir]} | situation


def tool(name: str, *words: str, **situation) -> dict:
    return {"words": [str(ROOT / "tools" / f"{name}.py"), *words]} | situation


def module(name: str, *words: str, **situation) -> dict:
    return {"words": ["-m", f"lm_jax.{name}", *words]} | situation


def convert(to: str, **situation) -> dict:
    return tool("convert_checkpoint", "{folder}/llama", to, "--unproven", **situation)


# (what a person would call it, the situation, words of its message)
SITUATIONS = [
    ("workdir: no permission", run(**at("/new", errno.EACCES)), "/new-.: Permission denied"),
    ("workdir: read-only", run(**at("/new", errno.EROFS)), "/new-.: Read-only file system"),
    ("lock: no permission", run(**at("/lock", errno.EACCES)), "lock: Permission denied"),
    ("log: disk full", run(**at("log.txt", errno.ENOSPC)), "log.txt: No space left"),
    ("config: quota", run(**at("config.json", errno.EDQUOT)), "config.json.draft: Disk quota exceeded"),
    ("tokenizer: disk full", run(**at("tokenizer.bytes", errno.ENOSPC)), "tokenizer.bytes.draft: No space left"),
    ("metrics: disk full", run(**at("metrics.jsonl", errno.ENOSPC)), "metrics.jsonl.draft: No space left"),
    ("TensorBoard: read-only", run(**at("tensorboard", errno.EROFS)), "tensorboard: Read-only"),
    ("checkpoints: no permission", run(**at("/checkpoints", errno.EACCES)), "checkpoints: Permission denied"),
    ("a step's folder: disk full", run(**at("checkpoints/1", errno.ENOSPC)), "checkpoints/1.*: No space left"),
    ("a step's files: I/O error", run(**at("tmp/data", errno.EIO)), "data.*: Input/output error"),
    ("arrays: a limit of size", run(limits={"RLIMIT_FSIZE": 60_000}), "File too large"),
    ("manifest: disk full", run(**at("MANIFEST", errno.ENOSPC)), "MANIFEST.json.draft: No space left"),
    ("open files", run(limits={"RLIMIT_NOFILE": 3}), "Too many open files\nraise the limit of open files"),
    ("too large a model", run("--config.model.model_dim=65536", "--config.model.num_layers=96"), "this does not fit: .* GiB"),
    ("no home", run(environment={"HOME": "/nowhere"}, unset=["LM_JAX_CACHE"]), "/nowhere: this user has no home"),
    ("cache: no permission", run(**at("/cache", errno.EACCES)), "cache.*: Permission denied\n.*LM_JAX_CACHE"),
    ("corpus: disk full", run("--config.data.test_fraction=0.1", **at("corpora", errno.ENOSPC)), "corpora.*No space left"),
    ("known hashes: read-only", run("--config.data.sources={folder}/made", **at("verified", errno.EROFS)), "verified.*Read-only"),
    ("resumed: manifest unreadable", run(workdir=RUN, **at("MANIFEST", errno.EIO, True)), "MANIFEST.json: Input/output error"),
    ("resumed: config unreadable", run(workdir=RUN, **at("run/config.json", errno.EACCES, True)), "config.json: Permission"),
    ("resumed: arrays unreadable", run(workdir=RUN, **at("checkpoints/2/param", errno.EACCES, True)), "Permission denied"),
    ("evaluate: open files", module("evaluate", "--model", RUN, limits={"RLIMIT_NOFILE": 0}), "Too many open files"),
    ("generate: unreadable", module("generate", "--model", RUN, "--prompt=a", **at("MANIFEST", errno.EACCES, True)), "MANIFEST"),
    ("verify: cache", module("verify", *TRAIN[2:5], "--config.data.test_fraction=0.2", **at("corpora", errno.EROFS)), "corpora"),
    ("convert: disk full", convert("{folder}/hf", **at("/hf.", errno.ENOSPC)), "hf.*No space left"),
    ("convert: size", convert("{folder}/hf", limits={"RLIMIT_FSIZE": 9000}), "File too large"),
    ("prepare: no permission", tool("prepare_data", "--output", "{folder}/c", "python", **at("/c.work", errno.EACCES)), "c.work"),
    ("tokenizer to a full disk", tool("train_tokenizer", "--pieces=600", "--characters=50000", "--output", "{folder}/t.model",
                                      "python", **at("t.model", errno.ENOSPC)), "t.model.draft: No space left"),
]  # fmt: skip
# Every command, and of a run the first and the last that it writes; what else is refused in the same way is a proof.
MORE = {
    "lock: no permission", "config: quota", "tokenizer: disk full", "metrics: disk full", "TensorBoard: read-only",
    "checkpoints: no permission", "a step's folder: disk full", "arrays: a limit of size", "workdir: read-only",
    "resumed: manifest unreadable", "resumed: config unreadable", "convert: disk full",
}  # fmt: skip
PREPARED = tool("prepare_data", "--output", "{folder}/made", "--tokenizer", "bytes", "{folder}/text.jsonl")


def put(value, folder: str, index: int = 0):
    """A situation with its folder, and its place in the list."""
    if isinstance(value, str):
        return value.replace("{folder}", folder).replace("{index}", str(index))
    if isinstance(value, dict):
        return {name: put(x, folder, index) for name, x in value.items()}
    return [put(x, folder, index) for x in value] if isinstance(value, list) else value


def check(name: str, words: str, done: dict) -> None:
    output = done["output"]
    assert done["code"] == 74, f"{name}: exit {done['code']}\n{output}"
    assert "Traceback" not in output and "Exception" not in output, f"{name}:\n{output}"
    lines = output[output.index("lm_jax: ") :].strip().split("\n")
    assert 1 <= len(lines) <= 5 and max(map(len, lines)) < 400, f"{name}:\n{output}"
    assert re.search(words, "\n".join(lines)), f"{name}: expected {words!r} in\n{output}"


@pytest.mark.parametrize("part", ["of each kind", pytest.param("all", marks=pytest.mark.proof)])
def test_what_the_system_refuses_is_said_in_a_few_lines(part, tmp_path):
    """Every place that is written, and a run that is gone on with; what was whole before is whole after."""
    text = "".join(f'{{"text": "document {i} {"word " * 200}"}}\n' for i in range(60))
    (tmp_path / "text.jsonl").write_text(text)
    flags = [f"--config.{name.replace('__', '.')}={value}" for name, value in LLAMA.items()]
    first = [run(workdir=RUN), run(*flags, "--config.train.num_steps=1", workdir="{folder}/llama"), PREPARED]
    asked = [each for each in SITUATIONS if part == "all" or each[0] not in MORE]
    assert MORE < {name for name, *_ in SITUATIONS}
    situations = [*first, *(situation for _, situation, _ in asked)]
    situations = [put(each, str(tmp_path), index) for index, each in enumerate(situations)]
    done = refused(situations, tmp_path, LM_JAX_CACHE=str(tmp_path / "cache"))
    assert len(done) == len(situations) and not any(each["code"] for each in done[:3]), done[:3]
    for (name, _, words), each in zip(asked, done[3:], strict=True):
        check(name, words, each)
    steps = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in steps.iterdir()) == ["1", "2"], "nothing was set aside for want of rights"
    assert manifest.invalid_reason(epath.Path(steps / "2")) == ""


@pytest.mark.parametrize(
    ("owner", "name", "error", "mend"),
    [
        (os, "pipe", OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
        (Thread, "start", RuntimeError("can't start new thread"), "ulimit -u"),
    ],
)
def test_what_is_refused_before_a_command_begins_is_a_line(owner, name, error, mend, monkeypatch, capsys):
    """It listens to signals first: a pipe and a thread. Where one is refused, signals do what they did before."""
    before = signal.getsignal(signal.SIGTERM)

    def refuse(*given):
        raise error

    monkeypatch.setattr(owner, name, refuse)
    with pytest.raises(SystemExit) as end:
        cli.run_command(lambda arguments: 0, [])
    told = capsys.readouterr().err
    assert end.value.code == 74 and mend in told and len(told.strip().split("\n")) <= 5, told
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("stream", ["full", "gone"])
def test_output_that_cannot_be_written_ends_in_a_line(stream):
    line = [sys.executable, "-m", "lm_jax.main", "--print_config", "--config", "experiments/quickstart.py"]
    read, write = os.pipe()
    os.close(read)
    out = os.open("/dev/full", os.O_WRONLY) if stream == "full" else write
    result = subprocess.run(line, stdout=out, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=LIMIT)
    words = {"full": "No space left on device", "gone": "Broken pipe"}[stream]
    assert result.returncode == 74 and words in result.stderr, result.stderr
    assert len(result.stderr.strip().split("\n")) <= 5, result.stderr


def test_a_checkpoint_that_the_disk_has_no_room_for_is_not_begun(tmp_path):
    with pytest.raises(OSError, match="a checkpoint needs [0-9,]+.0 MB"):
        files.check_room(epath.Path(tmp_path), 1e30)
    files.check_room(epath.Path(tmp_path), 1)


# What may stand where a file is expected.
ODD = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "loop": lambda path: path.symlink_to(path),
}
FILES = ["config.json", "metrics.jsonl", "log.txt", "tokenizer.bytes", "lock", "checkpoints/2/MANIFEST.json", "x"]


@pytest.mark.parametrize("odd", [pytest.param(x, marks=[] if x == "pipe" else pytest.mark.proof) for x in ODD])
def test_pipes_devices_and_loops_are_a_line_and_not_waited_for(odd, tmp_path):
    """In every place of a run, as the run itself, and as the cache; a process that waits for ever is the failure."""
    situations = []
    for index, file in enumerate(FILES):
        workdir = tmp_path / f"run-{index}"
        (workdir / file).parent.mkdir(parents=True)
        ODD[odd](workdir / file)
        situations += [run(workdir=str(workdir)), module("generate", "--model", str(workdir), "--prompt=a")]
    ODD[odd](tmp_path / "odd")
    situations += [
        run(workdir=str(tmp_path / "odd")),
        module("generate", "--model", str(tmp_path / "odd"), "--prompt=a"),
    ]
    situations.append(run(workdir=str(tmp_path / "new"), environment={"LM_JAX_CACHE": str(tmp_path / "odd")}))
    for situation, each in zip(situations, refused(situations, tmp_path), strict=True):
        output = each["output"]
        assert each["code"] in (2, 74) and "Traceback" not in output, f"{situation}:\n{output}"
        assert len(output.strip().split("\n")) <= 5 and "lm_jax: " in output, f"{situation}:\n{output}"


# What libraries in C++ and the interpreter say, and the number that it is.
@pytest.mark.parametrize(
    ("error", "number"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), errno.ENOSPC),
        (MemoryError(), errno.ENOMEM),
        (ValueError("Error writing \"/a/b\": No space left on device [OS error 28: ENOSPC]"), errno.ENOSPC),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 17179869184 bytes."), errno.ENOMEM),
        (RuntimeError("INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory"), errno.ENOMEM),
        (RuntimeError("can't start new thread"), errno.EAGAIN),
        (TimeoutError("x was not written in 600 s"), 0),
        (ValueError("shapes differ"), None),
        (KeyError("x"), None),
    ],
)  # fmt: skip
def test_a_refusal_is_told_from_a_fault_of_ours(error, number):
    assert faults.number_of(error) == number
    wrapped = RuntimeError("a save failed")
    wrapped.__cause__ = error
    assert (faults.described(wrapped) is None) == (number is None)
    handled = RuntimeError("a fault of ours, while a refusal was handled")
    handled.__context__ = error
    assert faults.described(handled) is None


@pytest.mark.parametrize(
    ("numbers", "code"),
    [
        ("ENOSPC EDQUOT EFBIG EACCES EPERM EROFS EIO EMFILE ENFILE ENOMEM EPIPE ETIMEDOUT", 74),
        ("ENOTDIR EISDIR ENOTEMPTY EEXIST ELOOP ENAMETOOLONG ENXIO", 2),  # no machine has what such a name means
    ],
)
def test_what_a_machine_refuses_and_what_is_a_wrong_name(numbers, code):
    for number in (getattr(errno, name) for name in numbers.split()):
        found, lines = faults.described(OSError(number, os.strerror(number), "/a/place"))
        assert found == code and lines.startswith(f"/a/place: {os.strerror(number)}\n") and len(lines.split("\n")) == 2


def test_the_file_of_a_refused_write_is_named(tmp_path):
    """`write` says no path: the frame that wrote has the file."""
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(OSError) as refusal, open(tmp_path / "full", "w") as file:
        file.write("x")
        files.flush(file)
    code, lines = faults.described(refusal.value)
    assert code == 74 and lines.startswith(f"{tmp_path / 'full'}: No space left on device"), lines


# What a real system refuses: (place that is mounted, size of a disk or "" for read-only); sizes end a run at different places.
MOUNTS = [("run", size) for size in ("16k", "64k", "400k", "1m", "1600k", "2m", "")]
MOUNTS += [("cache", size) for size in ("16k", "1m", "16m", "")]


@pytest.mark.proof
@pytest.mark.parametrize(("place", "size"), MOUNTS)
def test_a_real_disk_that_is_full_or_read_only(place, size, tmp_path):
    """In a mount namespace of its own, with real files of Python's and of C++'s; the process ends."""
    for name in ("run", "cache"):
        (tmp_path / name).mkdir()
    target = tmp_path / place
    read_only = f"mount --bind {target} {target} && mount -o remount,ro,bind {target}"
    mount = f"mount -t tmpfs -o size={size} none {target}" if size else read_only
    command = " ".join([sys.executable, *run(workdir=str(tmp_path / "run"))["words"]])
    more = {"LM_JAX_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1"}
    line = ["unshare", "-rm", "sh", "-c", f"{mount} && exec {command}"]
    result = subprocess.run(line, capture_output=True, text=True, env=os.environ | more, timeout=LIMIT)
    print(f"{place} {size}: {result.returncode}\n{result.stderr}", flush=True)
    words = ("No space left on device" if size else "Read-only file system") + "\n.*LM_JAX_CACHE" * (place == "cache")
    check(f"{place} {size}", words, {"code": result.returncode, "output": result.stderr})


@pytest.mark.proof
@pytest.mark.parametrize("gib", [1, 2, 3])
def test_a_limit_of_memory_ends_in_lines(gib, tmp_path):
    command = " ".join([sys.executable, *run(workdir=str(tmp_path / "run"))["words"]])
    line = f"ulimit -v {gib * 2**20} && exec {command}"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1"}
    result = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=environment, timeout=LIMIT)
    print(f"{gib} GiB: {result.returncode}\n{result.stderr[-1500:]}", flush=True)
    ours = (
        result.returncode != -signal.SIGABRT
    )  # else LLVM ended the process, where it has no memory for a program's text
    assert "Traceback" not in result.stderr and (
        result.returncode in (0, 74) if ours else "LLVM ERROR" in result.stderr
    )
