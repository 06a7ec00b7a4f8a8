"""Learns what the reference learns: one recipe in lm_jax and in PyTorch (`transformers` GPT-2), same weights, same batches.

    pip install -e '.[peers]'
    python tests/peers/training.py                compares live, and with the losses recorded in tests/fixtures/parity.json
    python tests/peers/training.py --record       writes them anew, with docs/parity.png
    python tests/peers/training.py --seeds 3      each with its own initial weights: losses at equal tokens

AdamW, warm-up, cosine, clipping and decay of matrices only, 200 steps of a GPT-2 of 2 layers, 64 wide, on text of the embedded
corpus. The fixture holds the rows, so that lm_jax is held to PyTorch's losses where there is no torch (tests/test_parity.py).
"""

import argparse
import base64
import dataclasses
import json
import math
import pathlib
import zlib

import jax
import numpy as np

from lm_jax import distributed
from lm_jax.config import Config, Mesh, default_config
from lm_jax.config_check import resolve
from lm_jax.data.corpus import open_corpus
from lm_jax.mesh import make_mesh
from lm_jax.train_state import fresh, make_program
from lm_jax.train_step import compile_step

FIXTURE = pathlib.Path(__file__).parent.parent / "fixtures" / "parity.json"
BATCH, LENGTH, PIECES, STEPS = 8, 64, 512, 200
LIMITS = {"float32": 1e-4, "bfloat16": 1e-2}  # of every loss, relative
PARAMETERS_LIMIT = 1e-3  # of the final parameters in float32, relative norm


def recipe(dtype: str = "float32", num_steps: int = STEPS, seed: int = 0) -> Config:
    config = default_config()
    config.model.num_layers, config.model.model_dim, config.model.num_heads = 2, 64, 4
    config.model.compute_dtype = dtype
    config.data.sequence_length, config.data.global_batch_size = LENGTH, BATCH
    config.optimizer.learning_rate, config.optimizer.warmup, config.optimizer.decay_over = 3e-3, 20, num_steps
    config.train.num_steps, config.train.microbatch_rows, config.train.seed = num_steps, BATCH, seed
    return resolve(config)


def corpus_rows(split: str, num: int) -> np.ndarray:
    """The first rows of the embedded corpus, [num, LENGTH + 1]: each continues the one before."""
    data = dataclasses.replace(recipe().data, tokenizer=f"sentencepiece:{PIECES}")
    tokens = np.asarray(open_corpus(data).splits[split].tokens[: num * LENGTH + 1], np.int32)
    return np.stack([tokens[i * LENGTH : (i + 1) * LENGTH + 1] for i in range(num)])


def batch(rows: np.ndarray, step: int) -> np.ndarray:
    """[BATCH, LENGTH + 1]: the rows in order, over and over."""
    return rows[np.arange(step * BATCH, (step + 1) * BATCH) % len(rows)]


def train_here(config: Config, rows: np.ndarray, num_steps: int) -> tuple[list[float], dict[str, np.ndarray]]:
    """Losses of the first steps in lm_jax, and the parameters after them as GPT-2 names them."""
    mesh = make_mesh(Mesh(), jax.devices()[:1])
    context = {"segment_ids": np.ones((BATCH, LENGTH), np.int32), "loss_mask": np.ones((BATCH, LENGTH), np.float32),
               "positions": np.arange(LENGTH, dtype=np.int32)[None].repeat(BATCH, 0)}  # fmt: skip
    with jax.set_mesh(mesh):
        program = make_program(config, PIECES)
        state, one_step = jax.jit(lambda: fresh(program))(), compile_step(program, mesh, one_microbatch=True)
        losses = []
        for step in range(num_steps):
            tokens = batch(rows, step)
            whole = context | {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
            whole["row"] = np.arange(step * BATCH, (step + 1) * BATCH, dtype=np.uint32)
            parts = iter([jax.tree.map(jax.numpy.asarray, whole)])
            state, metrics = one_step(state, 1, parts, lambda done: False)
            losses.append(float(metrics["train/loss"]))
        return losses, gpt2_names(state.parameters)


def initial(config: Config) -> dict[str, np.ndarray]:
    return gpt2_names(make_program(config, PIECES).graph.init(jax.random.key(config.train.seed)))


def gpt2_names(parameters: dict) -> dict[str, np.ndarray]:
    """Our parameters under the names and in the shapes of `transformers` GPT-2: query, key and value as one matrix."""
    ours = jax.tree.map(np.asarray, parameters)
    named = {"wte.weight": ours["embedding"]["table"], "wpe.weight": ours["positions"]["table"]}
    named |= {"ln_f.weight": ours["norm"]["scale"], "ln_f.bias": ours["norm"]["bias"]}
    block = ours["block_0"]
    for i in range(len(block["mlp"]["up"]["bias"])):
        attention, mlp = block["attention"], block["mlp"]
        width = attention["output"]["bias"].shape[-1]
        heads = lambda part, attention=attention, i=i: [attention[name][part][i] for name in ("query", "key", "value")]
        named |= {
            f"h.{i}.ln_1.weight": block["attention_norm"]["scale"][i],
            f"h.{i}.ln_1.bias": block["attention_norm"]["bias"][i],
            f"h.{i}.attn.c_attn.weight": np.concatenate([x.reshape(width, -1) for x in heads("kernel")], axis=1),
            f"h.{i}.attn.c_attn.bias": np.concatenate([x.reshape(-1) for x in heads("bias")]),
            f"h.{i}.attn.c_proj.weight": attention["output"]["kernel"][i].reshape(-1, width),
            f"h.{i}.attn.c_proj.bias": attention["output"]["bias"][i],
            f"h.{i}.ln_2.weight": block["mlp_norm"]["scale"][i],
            f"h.{i}.ln_2.bias": block["mlp_norm"]["bias"][i],
            f"h.{i}.mlp.c_fc.weight": mlp["up"]["kernel"][i],
            f"h.{i}.mlp.c_fc.bias": mlp["up"]["bias"][i],
            f"h.{i}.mlp.c_proj.weight": mlp["down"]["kernel"][i],
            f"h.{i}.mlp.c_proj.bias": mlp["down"]["bias"][i],
        }
    return named


def train_there(config: Config, rows: np.ndarray, num_steps: int, weights: dict[str, np.ndarray] | None):
    """The same in PyTorch, from `weights` (None: GPT-2's own initial weights, of the config's seed)."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(config.train.seed)
    model, optimizer = config.model, config.optimizer
    off = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    sizes = dict(n_embd=model.model_dim, n_layer=model.num_layers, n_head=model.num_heads)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=PIECES, n_positions=LENGTH, **sizes, **off))
    named = dict(gpt2.transformer.named_parameters())
    if weights is not None:
        assert named.keys() == weights.keys()
        with torch.no_grad():
            for name, value in weights.items():
                named[name].copy_(torch.tensor(value))
    decayed = [parameter for parameter in named.values() if parameter.ndim == 2]
    others = [parameter for parameter in named.values() if parameter.ndim != 2]
    adamw = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": optimizer.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=optimizer.learning_rate, betas=(optimizer.beta1, optimizer.beta2), eps=optimizer.epsilon,
    )  # fmt: skip

    def share(step: int) -> float:
        """Of the peak rate, in the step after `step` steps."""
        warmup, end, low = int(optimizer.warmup), int(optimizer.decay_over), optimizer.decay_to
        if step + 1 < warmup:
            return (step + 1) / warmup
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1, (step + 1 - warmup) / (end - warmup))))

    rate = torch.optim.lr_scheduler.LambdaLR(adamw, share)
    losses = []
    for step in range(num_steps):
        tokens = torch.tensor(batch(rows, step), dtype=torch.long)
        with torch.autocast("cpu", torch.bfloat16, enabled=model.compute_dtype == "bfloat16"):
            logits = gpt2(tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(gpt2.parameters(), optimizer.clip_norm)
        adamw.step()
        rate.step()
        losses.append(loss.item())
    return losses, {name: parameter.detach().numpy() for name, parameter in named.items()}


def apart(found: list[float], expected: list[float]) -> float:
    """The largest relative difference of the losses."""
    return max(abs(a - b) / b for a, b in zip(found, expected, strict=True))


def parameters_apart(found: dict, expected: dict) -> float:
    """Norm of the difference over the norm, of all parameters together."""
    square = lambda tree: sum(float(np.square(x, dtype=np.float64).sum()) for x in tree.values())
    return math.sqrt(square({name: found[name] - expected[name] for name in expected}) / square(expected))


def fixture() -> tuple[np.ndarray, dict]:
    """(rows [num, LENGTH + 1], what PyTorch did on them)."""
    content = json.loads(FIXTURE.read_text())
    tokens = np.frombuffer(zlib.decompress(base64.b64decode(content["rows"])), np.uint16)
    return tokens.reshape(-1, LENGTH + 1).astype(np.int32), content


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--seeds", type=int, default=0)
    flags = parser.parse_args()
    distributed.configure()
    if flags.seeds:
        return compare_seeds(flags.seeds)
    rows = corpus_rows("train", 128) if flags.record else fixture()[0]
    weights, curves = initial(recipe()), {}
    for dtype, limit in LIMITS.items():
        config = recipe(dtype)
        (ours, mine), (theirs, reference) = train_here(config, rows, STEPS), train_there(config, rows, STEPS, weights)
        curves[dtype] = ours, theirs
        print(
            f"{dtype}: {STEPS} steps, loss {theirs[0]:.4f} -> {theirs[-1]:.4f}; losses apart {apart(ours, theirs):.1e}"
        )
        print(f"  (limit {limit:.0e}), final parameters apart {parameters_apart(mine, reference):.1e}")
        if not flags.record:
            print(f"  the recorded losses of PyTorch: apart {apart(theirs, fixture()[1]['losses'][dtype]):.1e}")
    if flags.record:
        packed = base64.b64encode(zlib.compress(rows.astype(np.uint16).tobytes(), 9)).decode()
        losses = {dtype: [round(loss, 6) for loss in theirs] for dtype, (_, theirs) in curves.items()}
        FIXTURE.write_text(json.dumps({"rows": packed, "losses": losses}) + "\n")
        draw(curves)


def compare_seeds(num: int) -> None:
    """Training loss over the last tenth of 500 steps on rows that are seen once; each its own initial weights."""
    rows, steps, found = corpus_rows("train", 500 * BATCH), 500, []
    for seed in range(num):
        config = recipe(num_steps=steps, seed=seed)
        runs = train_here(config, rows, steps), train_there(config, rows, steps, None)
        found.append([float(np.mean(losses[-steps // 10 :])) for losses, _ in runs])
        print(f"seed {seed}: lm_jax {found[-1][0]:.4f}, PyTorch {found[-1][1]:.4f}", flush=True)
    ours, theirs = np.mean(found, axis=0)
    print(f"mean of {num}: lm_jax {ours:.4f}, PyTorch {theirs:.4f}, at {steps * BATCH * LENGTH:,} tokens")


def draw(curves: dict) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    _, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3), layout="constrained")
    left.plot(curves["float32"][1], color="tab:orange", linewidth=4, alpha=0.5, label="PyTorch")
    left.plot(curves["float32"][0], color="tab:blue", linewidth=1, label="lm_jax")
    left.set(xlabel="step", ylabel="training loss, nats per token")
    left.legend()
    for dtype, (ours, theirs) in curves.items():
        right.semilogy(np.maximum(1e-9, np.abs(np.array(ours) / theirs - 1)), label=dtype)
    right.set(xlabel="step", ylabel="losses apart, relative")
    right.legend()
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    pyplot.savefig(pathlib.Path(__file__).parent.parent.parent / "docs" / "parity.png", dpi=80)


if __name__ == "__main__":
    main()
