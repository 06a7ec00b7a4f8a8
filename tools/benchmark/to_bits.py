"""How long a compiled GPT in PyTorch takes to the quickstart's bits per byte: `python tools/benchmark to_bits [--bits 2.22]`.

The rows, their order, the held-out rows, sizes and rate are those of `quickstart.py:gpt3` (extra: peers). PyTorch's own manner
stays: learned positions, no borders between documents in a row, `torch.compile`, fused AdamW. Seconds are those of steps without
the first, which compiles, and without evaluations. On a machine that others use it measures the others.
"""

import math
import sys
import time

import numpy as np

from lm_jax import cli, experiment
from lm_jax.open_data import open_data

EXPERIMENT = "experiments/quickstart.py:gpt3"


def main(arguments: list[str]) -> int:
    parser = cli.Parser("tools/benchmark to_bits", __doc__)
    parser.add_argument("--bits", type=float, default=2.22, help="bits per byte of the validation split")
    parser.add_argument("--steps", type=int, default=1000, help="of the schedule, a cosine to a tenth")
    parser.add_argument("--every", type=int, default=250, help="steps between evaluations")
    flags = parser.parse_args(arguments)
    import torch

    config, _ = experiment.load_config(EXPERIMENT, {"train.num_steps": flags.steps})
    mixed = open_data(config, print)
    stream, (held,) = mixed.stream(config.data), mixed.held(config.data, "validation").values()
    torch.manual_seed(0)
    model = gpt(config, mixed.tokenizer.vocab_size)
    losses, rate = torch.compile(model), config.optimizer
    matrices = [x for x in model.parameters() if x.ndim > 1]
    groups = [{"params": matrices}, {"params": [x for x in model.parameters() if x.ndim == 1], "weight_decay": 0.0}]
    betas = rate.beta1, rate.beta2
    adamw = torch.optim.AdamW(groups, rate.learning_rate, betas, rate.epsilon, rate.weight_decay, fused=True)
    rows, spent = config.data.global_batch_size, 0.0
    for step in range(1, flags.steps + 1):
        for group in adamw.param_groups:
            group["lr"] = rate.learning_rate * share(step, rate.warmup, flags.steps, rate.decay_to)
        batch = torch_batch([stream.row(row) for row in range((step - 1) * rows, step * rows)])
        start = time.perf_counter()
        (losses(*batch) / batch[2].sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), rate.clip_norm)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        taken = time.perf_counter() - start
        spent += taken * (step > 1)
        if step == 1:
            print(f"the first step, compiled: {taken:.1f} s", flush=True)
        if step % flags.every == 0 or step == flags.steps:
            bits = nats(losses, held, rows) / math.log(2) / held.split.num_bytes
            print(f"step {step:,}: {bits:.4f} bits per byte, {spent:.1f} s of steps", flush=True)
            if bits <= flags.bits:
                return 0
    print(f"not at {flags.bits} after {flags.steps:,} steps; give it more: --steps")
    return 0


def share(step: int, warmup: int, end: int, low: float) -> float:
    """Of the peak rate in a step counted from 1: a linear warm-up, then a cosine to `low`."""
    if step < warmup:
        return step / warmup
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (end - warmup)))


def nats(losses, held, size: int) -> float:
    """The sum over all held-out tokens, `size` rows at a time; the last rows are filled up with one that asks nothing."""
    import torch

    nothing = held.row(0) | {"loss_mask": np.zeros(held.sequence_length, np.float32)}
    rows = [*map(held.row, range(held.num_rows)), *[nothing] * (-held.num_rows % size)]
    with torch.no_grad():
        return sum(float(losses(*torch_batch(rows[i : i + size]))) for i in range(0, len(rows), size))


def torch_batch(rows: list[dict]) -> tuple:
    """(tokens, targets, mask) of rows, [B, T] each."""
    import torch

    whole = {
        name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in ("tokens", "targets", "loss_mask")
    }
    return whole["tokens"].long(), whole["targets"].long(), whole["loss_mask"]


def gpt(config, vocab_size: int):
    """A GPT-2 of `transformers` that returns the loss, summed, of (tokens, targets, mask)."""
    import torch
    import transformers

    model, data = config.model, config.data
    sizes = dict(
        n_embd=model.model_dim, n_layer=model.num_layers, n_head=model.num_heads, n_positions=data.sequence_length
    )
    off = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, attn_implementation="sdpa")
    start = dict(initializer_range=model.init_scale)

    class Losses(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gpt2 = transformers.GPT2LMHeadModel(
                transformers.GPT2Config(vocab_size=vocab_size, bos_token_id=0, eos_token_id=0, **sizes, **off, **start)
            )

        def forward(self, tokens, targets, mask):
            logits = self.gpt2(input_ids=tokens).logits.flatten(0, 1)
            found = torch.nn.functional.cross_entropy(logits, targets.flatten(), reduction="none")
            return (found * mask.flatten()).sum()

    return Losses()


if __name__ == "__main__":
    cli.run_command(main, sys.argv[1:])
