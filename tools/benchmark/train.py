"""Speeds beside a peer's, in one interleaved run: `python tools/benchmark train [--shape base]` (extra: peers).

Every contender is a process of its own that trains when it is told to; rounds go A B C A B C, ratios are taken within a
round. A machine that others use is not measured: a busy one slows PyTorch far more than JAX.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

from lm_jax import cli
from lm_jax.errors import UserError

#        layers, width, heads, length, rows, vocabulary
SHAPES = {"base": (6, 384, 6, 256, 8, 8192), "tiny": (4, 128, 4, 64, 12, 2048), "quickstart": (4, 128, 2, 512, 2, 2048)}
STEPS = 4  # a round takes that many of each contender
BUSY = 0.15  # share of the cores that others may use


class Contender:
    """`python tools/benchmark/train.py worker NAME SHAPE`: says when it is ready, then answers a number of steps with seconds."""

    def __init__(self, name: str, shape: str):
        self.name = name
        line = [sys.executable, __file__, "worker", name, shape]
        memory = {"GLIBC_TUNABLES": cli.KEPT_MEMORY}  # as `lm_jax.main` has it; the peer gets it, too
        self.process = subprocess.Popen(
            line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | memory
        )
        self.first = self.answer()["seconds"]

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise UserError(f"{self.name} ended before it answered; its words stand above (pip install -e '.[peers]')")
        return json.loads(line)

    def run(self, steps: int) -> dict:
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def others() -> float:
    """Share of the cores that somebody uses while all contenders wait."""

    def times():
        with open("/proc/stat") as file:
            values = [int(x) for x in file.readline().split()[1:]]
        return values[3] + values[4], sum(values)

    (idle, total), _ = times(), time.sleep(0.5)
    idle_after, total_after = times()
    return 1 - (idle_after - idle) / max(1, total_after - total)


def quiet_rounds(num: int) -> Iterator[None]:
    """So many rounds in which nobody else uses the cores. Raises UserError once twice as many were busy."""
    quiet = busy = 0
    while quiet < num and busy < 2 * num:
        if (used := others()) > BUSY:
            busy += 1
            print(f"others use {100 * used:.0f}% of the cores: this round does not count", flush=True)
        else:
            quiet += 1
            yield
    if quiet < num:
        raise UserError(f"no measurement: {busy} rounds found the machine busy; stop what else runs and try again")


def train(shape: str, rounds: int) -> int:
    layers, width, heads, length, rows, vocabulary = SHAPES[shape]
    contenders = [Contender(name, shape) for name in ("jax", "torch", "torch_compiled")]
    for contender in contenders:
        contender.run(2)
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    peak = {}
    for _ in quiet_rounds(rounds):
        for contender in contenders:
            found = contender.run(STEPS)
            seconds[contender.name].append(found["seconds"] / STEPS)
            peak[contender.name] = found["peak_bytes"]
        print("  ".join(f"{name} {1000 * times[-1]:,.0f} ms" for name, times in seconds.items()), flush=True)
    for contender in contenders:
        contender.close()
    best = min(("torch", "torch_compiled"), key=lambda name: statistics.median(seconds[name]))
    ratios = sorted(theirs / ours for ours, theirs in zip(seconds["jax"], seconds[best], strict=True))
    print(
        f"{layers} layers x {width}, {heads} heads, {rows} rows x {length}, vocabulary {vocabulary}, float32, AdamW + clip"
    )
    for name, times in seconds.items():
        rate = rows * length / statistics.median(times)
        print(f"{name:<15} {rate:>9,.0f} tokens/s  peak {peak[name] / 2**30:.2f} GiB")
    print(f"jax over {best}: {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}, {rounds} rounds)")
    return 0


def worker(name: str, shape: str) -> int:
    """Trains as told on its standard input: a number of steps a line -> {"seconds", "peak_bytes"}."""
    start = time.perf_counter()
    step = (jax_step if name == "jax" else torch_step)(SHAPES[shape], name)
    step()
    print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        for _ in range(int(line)):
            step()
        seconds = time.perf_counter() - start
        with open("/proc/self/status") as file:
            peak = next(int(row.split()[1]) * 1024 for row in file if row.startswith("VmHWM"))
        print(json.dumps({"seconds": seconds, "peak_bytes": peak}), flush=True)
    return 0


def jax_step(shape, name: str):
    import jax
    import numpy as np

    from lm_jax.config import default_config
    from lm_jax.config_check import resolve
    from lm_jax.data import packing
    from lm_jax.mesh import make_mesh
    from lm_jax.train_state import fresh, make_program
    from lm_jax.train_step import compile_step

    layers, width, heads, length, rows, vocabulary = shape
    config = default_config()
    config.model.num_layers, config.model.model_dim, config.model.num_heads = layers, width, heads
    config.data.sequence_length, config.data.global_batch_size = length, rows
    config.train.microbatch_rows, config.train.num_steps = rows, 1_000_000
    config.optimizer.decay_over = 1_000_000
    resolved = resolve(config)
    program, mesh = make_program(resolved, vocabulary), make_mesh(resolved.mesh)
    tokens = np.random.default_rng(0).integers(0, vocabulary, length + 1).astype(np.int32)
    row = packing.make_row([(0, tokens)], length, 0)
    with jax.set_mesh(mesh):
        state = jax.jit(lambda: fresh(program))()
        one_step = compile_step(program, mesh, one_microbatch=True)
        batch = {name: jax.numpy.stack([value] * rows) for name, value in row.items()}

    def step():
        nonlocal state
        state, _ = jax.block_until_ready(one_step(state, 1, iter([batch]), lambda done: False))

    return step


def torch_step(shape, name: str):
    import torch
    import transformers

    layers, width, heads, length, rows, vocabulary = shape
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=vocabulary, n_positions=length, n_embd=width, n_layer=layers, n_head=heads,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, attn_implementation="sdpa",
        )
    )  # fmt: skip
    forward = torch.compile(model) if name == "torch_compiled" else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    tokens = torch.randint(0, vocabulary, (rows, length))

    def step():
        forward(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["worker"]:
        return worker(*arguments[1:])
    parser = cli.Parser("tools/benchmark/train.py", __doc__)
    parser.add_argument("--shape", default="base", choices=tuple(SHAPES))
    parser.add_argument("--rounds", type=int, default=7)
    flags = parser.parse_args(arguments)
    return train(flags.shape, flags.rounds)


if __name__ == "__main__":
    cli.run_command(main, sys.argv[1:])
