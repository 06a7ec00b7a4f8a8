"""The table for one GPU in one call of under ten minutes: `python tools/benchmark gpu [--smoke] [--only REGEX] [--json FILE]`.

Strict MFU and tokens/s of GPT-2 124M and 1.5B by attention backend, the cost of a checkpoint every 50 steps, decoding. Data
are made up and already on the device: what is measured is the step. `--smoke` runs every case in miniature, anywhere.
"""

import json
import re
import statistics
import sys
import tempfile
import time

import jax
import numpy as np
from etils import epath

from lm_jax import checkpoint, cli
from lm_jax.config import default_config
from lm_jax.config_check import resolve
from lm_jax.data import packing
from lm_jax.errors import UserError
from lm_jax.generate.decoding import decode, prefill
from lm_jax.generate.sampling import GREEDY
from lm_jax.mesh import make_mesh
from lm_jax.plan import counts
from lm_jax.train_state import fresh, make_program
from lm_jax.train_step import compile_step

#                     layers, width, heads, length, rows, backend, remat
TRAINING = {  # the least memory first: a peak is that of all cases so far
    "124M xla": (12, 768, 12, 1024, 8, "xla", "none"),
    "124M cudnn": (12, 768, 12, 1024, 32, "cudnn", "none"),
    "124M flash": (12, 768, 12, 1024, 32, "flash", "none"),
    "124M flash, head size 128": (12, 768, 6, 1024, 32, "flash", "none"),
    "124M chunked": (12, 768, 12, 1024, 32, "chunked", "none"),
    "124M flash, 64 rows": (12, 768, 12, 1024, 64, "flash", "none"),
    "1.5B flash": (48, 1600, 25, 1024, 8, "flash", "full"),
}
VOCABULARY = 50257
LIMIT = 560  # seconds after which no further case is started


def program_of(shape, smoke: bool):
    layers, width, heads, length, rows, backend, remat = shape
    config = default_config()
    model, data = config.model, config.data
    model.num_layers, model.model_dim, model.num_heads = (2, 64, 4) if smoke else (layers, width, heads)
    model.attention, model.remat, model.compute_dtype = "auto" if smoke else backend, remat, "bfloat16"
    data.sequence_length, data.global_batch_size = (64, 4) if smoke else (length, rows)
    config.train.microbatch_rows, config.train.num_steps = data.global_batch_size, 1_000_000
    config.optimizer.decay_over = 1_000_000
    return make_program(resolve(config), 500 if smoke else VOCABULARY)


class Training:
    """A compiled step, its state and a batch; `run(n)` returns seconds of n steps."""

    def __init__(self, program, mesh):
        data = program.config.data
        self.state = jax.jit(lambda: fresh(program))()
        self.step = compile_step(program, mesh, one_microbatch=True)
        tokens = np.random.default_rng(0).integers(0, 500, data.sequence_length + 1)
        row = packing.make_row([(0, tokens.astype(np.int32))], data.sequence_length, 0)
        self.batch = {name: jax.numpy.stack([value] * data.global_batch_size) for name, value in row.items()}
        self.tokens = data.global_batch_size * data.sequence_length

    def run(self, num: int, after=lambda state, n: None) -> float:
        start = time.perf_counter()
        for n in range(num):
            self.state, _ = self.step(self.state, 1, iter([self.batch]), lambda done: False)
            after(self.state, n + 1)
        jax.block_until_ready(self.state)
        return time.perf_counter() - start


def train(shape, smoke: bool) -> dict:
    program = program_of(shape, smoke)
    mesh = make_mesh(program.config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        training = Training(program, mesh)
        training.run(3)
        num = 2 if smoke else 10
        rates = [num * training.tokens / training.run(num) for _ in range(5)]
        rate = statistics.median(rates)
        found = {"tokens_per_second": rate, "spread": [min(rates), max(rates)]}
        if peak := counts.peak_flops(mesh, "bfloat16"):
            found["strict_mfu"] = rate * counts.count(program.config, program.graph.declarations).flops_per_token / peak
        found["peak_bytes"] = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
        return found


def saving(smoke: bool) -> dict:
    """Throughput with a checkpoint every 50 steps over without, in turns."""
    program, every = program_of(TRAINING["124M cudnn"], smoke), 5 if smoke else 50
    mesh = make_mesh(program.config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
        training = Training(program, mesh)
        saver = checkpoint.Saver(epath.Path(folder), program.config, dict.fromkeys(checkpoint.FACTS, "made up"))
        training.run(3)
        ratios, saved = [], 0
        for _ in range(3):

            def save(state, n: int) -> None:
                nonlocal saved
                if n % every == 0:
                    saved += 1
                    saver.save(state, checkpoint.DataState(saved, saved))

            plain = training.run(2 * every)
            ratios.append(plain / training.run(2 * every, save))
        saver.close()
        return {"with_checkpoints_over_without": statistics.median(ratios), "spread": [min(ratios), max(ratios)]}


def decoding(batch: int, smoke: bool) -> dict:
    """Greedy tokens/s of 124M from prompts of 64 tokens, prefill included."""
    program = program_of(TRAINING["124M xla"], smoke)
    graph, limit = program.graph, 32 if smoke else 256
    with jax.set_mesh(make_mesh(program.config.mesh, jax.devices()[:1])):
        parameters = jax.jit(lambda: fresh(program))().parameters
        length = min(64, graph.sequence_length - limit)
        tokens = jax.numpy.asarray(np.random.default_rng(0).integers(0, 500, (batch, length)), jax.numpy.int32)
        lengths, greedy = jax.numpy.full((batch,), length), GREEDY.of_each(np.zeros(batch))

        def write():
            state = prefill(graph, parameters, tokens, lengths, length + limit)
            return decode(graph, parameters, state, greedy, limit, limit, ())[0].block_until_ready()

        write()
        rates = []
        for _ in range(3):
            start = time.perf_counter()
            write()
            rates.append(batch * limit / (time.perf_counter() - start))
        return {"tokens_per_second": statistics.median(rates), "spread": [min(rates), max(rates)]}


def main(arguments: list[str]) -> int:
    parser = cli.Parser("tools/benchmark/gpu.py", __doc__)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--only", default="", help="cases that this regular expression is found in")
    parser.add_argument("--json", default="")
    flags = parser.parse_args(arguments)
    start, device = time.monotonic(), jax.devices()[0]
    print(f"{device.device_kind} · jax {jax.__version__} · bfloat16 compute, float32 parameters, AdamW", flush=True)
    cases = {name: lambda shape=shape: train(shape, flags.smoke) for name, shape in TRAINING.items()}
    cases["124M, a checkpoint every 50 steps"] = lambda: saving(flags.smoke)
    cases |= {f"decode, batch {batch}": lambda batch=batch: decoding(batch, flags.smoke) for batch in (1, 8, 64)}
    results = {}
    for name, case in cases.items():
        if not re.search(flags.only, name):
            continue
        if time.monotonic() - start > LIMIT:
            print(f"{name}: not started, {LIMIT} s are over")
            continue
        try:
            results[name] = case()
        except (jax.errors.JaxRuntimeError, UserError) as error:  # out of memory, or a backend that is not here
            results[name] = {"failed": str(error).split("\n")[0][:200]}
        print(f"{name}: {json.dumps(results[name])}", flush=True)
    if flags.json:
        content = {"device": device.device_kind, "jax": jax.__version__, "shapes": TRAINING, "results": results}
        epath.Path(flags.json).write_text(json.dumps(content, indent=1))
    return 0


if __name__ == "__main__":
    cli.run_command(main, sys.argv[1:])
