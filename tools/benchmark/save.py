"""How long a save holds up the training, how fast it is with and without hashes, and memory over many saves.

python tools/benchmark save [--layers 8] [--rounds 5] [--saves 50]
"""

import argparse
import json
import os
import re
import statistics
import tempfile
import time

import jax
from etils import epath

from lm_jax import checkpoint, cli, files
from lm_jax.batch_ramp import DataState
from lm_jax.config import default_config
from lm_jax.config_check import resolve
from lm_jax.distributed import devices
from lm_jax.experiment import shrink
from lm_jax.mesh import make_mesh
from lm_jax.train_state import fresh, make_program

FACTS = {"run": "a run", "pipeline": 0, "tokenizer": "none", "data": "none"}


def resident() -> int:
    """Bytes of this process that are in memory."""
    with open("/proc/self/status") as file:
        return 1024 * int(re.search(r"VmRSS:\s+(\d+) kB", file.read())[1])


def program_of(num_layers: int, model_dim: int):
    config = shrink(default_config())
    config.model.num_layers, config.model.model_dim, config.model.num_heads = num_layers, model_dim, 8
    config.model.mlp_dim, config.checkpoint.keep_last = 4 * model_dim, 2
    return make_program(resolve(config), 2048)


def timed_save(saver: checkpoint.Saver, state, step: int, beside=lambda: None) -> tuple[float, float]:
    """(seconds that `save` holds up its caller, seconds until the manifest is there)."""
    start = time.monotonic()
    saver.save(state, DataState(step, step))
    blocked = time.monotonic() - start
    beside()
    saver.wait()
    return blocked, time.monotonic() - start


def speeds(program, state, folder: str, rounds: int) -> dict:
    """Seconds and MB/s, medians over rounds in turns with hashes and without."""
    num_bytes = sum(x.nbytes for x in jax.tree.leaves(state))
    found: dict[str, list[tuple[float, float]]] = {"hashed": [], "not hashed": []}
    saver, hashing = checkpoint.Saver(epath.Path(folder), program.config, FACTS), files.file_hash
    timed_save(saver, state, 1)  # what is made once
    for step in range(2, 2 + 2 * rounds):
        case = "hashed" if step % 2 else "not hashed"
        files.file_hash = hashing if case == "hashed" else lambda path: {"bytes": 0, "sha256": ""}
        found[case].append(timed_save(saver, state, step))
    files.file_hash = hashing
    saver.close()
    blocked, whole = (statistics.median(times) for times in zip(*found["hashed"], strict=True))
    plain = statistics.median(seconds for _, seconds in found["not hashed"])
    return {
        "megabytes": num_bytes / 1e6, "blocked_seconds": blocked, "seconds": whole, "blocked_over_synchronous": blocked / whole,
        "MB/s": num_bytes / 1e6 / whole, "MB/s without hashes": num_bytes / 1e6 / plain,
        "blocked_spread": [min(b / w for b, w in found["hashed"]), max(b / w for b, w in found["hashed"])],
    }  # fmt: skip


def memory(program, state, folder: str, saves: int) -> list[int]:
    """Bytes in memory after each of so many saves."""
    saver, found = checkpoint.Saver(epath.Path(folder), program.config, FACTS), []
    for step in range(1, saves + 1):
        timed_save(saver, state, step)
        found.append(resident())
    saver.close()
    return found


def growth(found: list[int]) -> float:
    """Of the most in the last ten over the most in ten after the first ten, in which pools fill up."""
    return max(found[-10:]) / max(found[10:20]) - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--saves", type=int, default=50)
    flags = parser.parse_args()
    program = program_of(flags.layers, flags.width)
    with jax.set_mesh(make_mesh(program.config.mesh, devices()[:1])), tempfile.TemporaryDirectory() as folder:
        state = jax.block_until_ready(jax.jit(lambda: fresh(program))())
        print(
            json.dumps({"cores": os.cpu_count()} | speeds(program, state, f"{folder}/speeds", flags.rounds)), flush=True
        )
        found = memory(program, state, f"{folder}/memory", flags.saves)
        print(json.dumps({"saves": len(found), "growth": growth(found), "MB": [n // 10**6 for n in found[::7]]}))


if __name__ == "__main__":
    cli.with_kept_memory()  # as a run has it: threads that write and hash share one heap
    main()
