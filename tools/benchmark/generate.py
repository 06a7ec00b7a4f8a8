"""Greedy tokens/s beside `transformers` generate on the same weights: `python tools/benchmark generate` (extra: peers).

Both contenders are processes of their own; rounds go A B A B, ratios are taken within a round, prefill included. By default the
weights are random, of SmolLM2-135M's shape; `--model` names a Hugging Face folder instead.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

from train import quiet_rounds

from lm_jax import cli
from lm_jax.errors import UserError

SHAPE = dict(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, max_position_embeddings=2048, rope_theta=1e5, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
PROMPT, NEW = 32, 96  # tokens


def make(folder: str) -> str:
    """Random weights in a Hugging Face folder."""
    import torch
    import transformers

    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).save_pretrained(folder)
    return folder


def prompts(batch: int):
    import numpy as np

    return np.random.default_rng(0).integers(10, 1000, (batch, PROMPT)).astype(np.int32)


def jax_writer(folder: str, batch: int):
    import jax
    import numpy as np

    from lm_jax.convert import hugging_face
    from lm_jax.generate.decoding import decode, on_mesh, prefill
    from lm_jax.generate.sampling import GREEDY
    from lm_jax.mesh import make_mesh
    from lm_jax.model.build import build

    described = hugging_face.read_description(folder)
    mesh = make_mesh(described.config.mesh, jax.devices()[:1])
    graph = build(described.config.model, described.vocab_size, described.config.data.sequence_length)
    with jax.set_mesh(mesh):
        parameters = graph.unstacked(jax.tree.map(on_mesh_whole, hugging_face.read_parameters(folder, described)))
        tokens, lengths = on_mesh(prompts(batch)), on_mesh(np.full(batch, PROMPT, np.int32))
        greedy = jax.tree.map(on_mesh, GREEDY.of_each(np.zeros(batch)))

    def write():
        with jax.set_mesh(mesh):
            state = prefill(graph, parameters, tokens, lengths, PROMPT + NEW)
            return np.asarray(decode(graph, parameters, state, greedy, NEW, NEW, ())[0]).tolist()

    return write


def on_mesh_whole(x):
    import jax

    return jax.device_put(x, jax.NamedSharding(jax.sharding.get_mesh(), jax.P(*[None] * x.ndim)))


def torch_writer(folder: str, batch: int):
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.tensor(prompts(batch)).long()
    settings = dict(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=None)

    def write():
        with torch.no_grad():
            out = model.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)
        return out[:, PROMPT:].tolist()

    return write


def worker(name: str, folder: str, batch: int) -> int:
    """For every line of its standard input writes once -> {"seconds", "tokens"}."""
    write = {"jax": jax_writer, "torch": torch_writer}[name](folder, batch)
    for _ in sys.stdin:
        start = time.perf_counter()
        tokens = write()
        print(json.dumps({"seconds": time.perf_counter() - start, "tokens": tokens}), flush=True)
    return 0


def compare(folder: str, batch: int, rounds: int) -> None:
    line = lambda name: [sys.executable, __file__, "worker", name, folder, str(batch)]
    memory = os.environ | {"GLIBC_TUNABLES": cli.KEPT_MEMORY}
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=memory)
    running = {name: subprocess.Popen(line(name), **pipes) for name in ("jax", "torch")}

    def once(name: str) -> dict:
        process = running[name]
        process.stdin.write("\n")
        process.stdin.flush()
        if not (answer := process.stdout.readline()):
            raise UserError(f"{name} ended before it answered; its words stand above (pip install -e '.[peers]')")
        return json.loads(answer)

    first = {name: once(name)["tokens"] for name in running}
    alike = sum(a == b for a, b in zip(sum(first["jax"], []), sum(first["torch"], []), strict=True)) / (batch * NEW)
    seconds: dict[str, list[float]] = {name: [] for name in running}
    for _ in quiet_rounds(rounds):
        for name, found in seconds.items():
            found.append(once(name)["seconds"])
    for process in running.values():
        process.stdin.close()
        process.wait()
    ratios = sorted(b / a for a, b in zip(*seconds.values(), strict=True))
    rates = "  ".join(
        f"{name} {batch * NEW / statistics.median(found):.1f} tokens/s" for name, found in seconds.items()
    )
    spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}, {rounds} rounds"
    print(
        f"batch {batch}: {rates}  {statistics.median(ratios):.2f} times transformers ({spread}); {alike:.0%} of tokens equal"
    )


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["worker"]:
        return worker(arguments[1], arguments[2], int(arguments[3]))
    parser = cli.Parser("tools/benchmark/generate.py", __doc__)
    parser.add_argument("--model", default="", help="a Hugging Face folder; default: random weights")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[1, 8], help="requests at once, one comparison for each"
    )
    flags = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = flags.model or make(temporary)
        print(f"prompts of {PROMPT} tokens, {NEW} new ones, float32", flush=True)
        for batch in flags.batch:
            compare(folder, batch, flags.rounds)
    return 0


if __name__ == "__main__":
    cli.run_command(main, sys.argv[1:])
