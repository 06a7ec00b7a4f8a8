"""Loader tokens/s beside readers that do less: `python tools/benchmark/data.py [--config experiments/quickstart.py]`.

One interleaved run over the shards of the config's first source. `window` is a bare fancy index of random windows of tokens, the
ceiling; `per row` reads tokens and targets of random windows row by row, as nanoGPT does; `rows` makes rows of the batch contract
(documents permuted, segments, positions, masks) in this process; `loader` is the whole way to arrays on the device, and
`per row, put` that of the row-by-row reader.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np

from lm_jax import cli, distributed, experiment
from lm_jax.config import Mesh
from lm_jax.data import loader, mixture
from lm_jax.mesh import make_mesh

ROWS, SECONDS, ROUNDS = 32, 1.5, 5


def windows(tokens: np.memmap, length: int) -> Iterator[None]:
    random, reach = np.random.default_rng(0), np.arange(length + 1)
    while True:
        block = tokens[random.integers(0, len(tokens) - length - 1, (ROWS, 1)) + reach].astype(np.int32)
        yield (block[:, :-1], block[:, 1:])


def per_row(path: str, length: int) -> Iterator[None]:
    random = np.random.default_rng(0)
    while True:
        tokens = np.load(path, mmap_mode="r")  # anew for each batch, as the original does
        starts = random.integers(0, len(tokens) - length - 1, ROWS)
        x = np.stack([tokens[i : i + length].astype(np.int64) for i in starts])
        yield (x, np.stack([tokens[i + 1 : i + 1 + length].astype(np.int64) for i in starts]))


def rate(batches: Iterator, length: int) -> float:
    """Tokens/s over `SECONDS`, after three batches."""
    for _ in range(3):
        next(batches)
    start, done = time.perf_counter(), 0
    while (spent := time.perf_counter() - start) < SECONDS:
        next(batches)
        done += 1
    return done * ROWS * length / spent


def data(arguments: list[str]) -> int:
    overrides, rest = experiment.split_overrides(arguments)
    parser = cli.Parser("tools/benchmark/data.py", __doc__)
    parser.add_argument("--config", default="experiments/quickstart.py")
    flags = parser.parse_args(rest)
    config, _ = experiment.load_config(flags.config, overrides)
    length, mixed = config.data.sequence_length, mixture.open_mixture(config.data)
    corpus, stream = next(iter(mixed.corpora.values())), mixed.stream(config.data)
    mesh = make_mesh(Mesh(), [distributed.own(distributed.devices())])
    path = f"{corpus.folder}/train-00000.tokens.npy"
    made = loader.Batches(stream, 0, 10**6, ROWS, tuple(range(ROWS)))
    load = lambda num_workers: loader.batches(stream, mesh, 0, 10**6, ROWS, num_workers)
    contenders: dict[str, Callable[[], Iterator]] = {
        "window": lambda: windows(np.load(path, mmap_mode="r"), length),
        "per row": lambda: per_row(path, length),
        "per row, put": lambda: (jax.device_put(pair) for pair in per_row(path, length)),
        "rows": lambda: (made[j] for j in range(10**6)),
        "loader, 0 workers": lambda: load(0),
        "loader, 2 workers": lambda: load(2),
    }
    found: dict[str, list[float]] = {name: [] for name in contenders}
    running = {name: start() for name, start in contenders.items()}
    for _ in range(ROUNDS):
        for name, batches in running.items():
            found[name].append(rate(batches, length))
    print(f"rows of {length} tokens, batches of {ROWS}, median of {ROUNDS} rounds of {SECONDS} s")
    for name, rates in found.items():
        ratio = statistics.median(a / b for a, b in zip(rates, found["per row"], strict=True))
        spread = f"{min(rates) / 1e6:.1f} to {max(rates) / 1e6:.1f}"
        print(f"{name:<18} {statistics.median(rates) / 1e6:6.1f} M tokens/s ({spread})   {ratio:.2f} of per row")
    return 0


if __name__ == "__main__":
    cli.run_command(data, sys.argv[1:])
