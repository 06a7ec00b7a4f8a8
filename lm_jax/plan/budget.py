"""What a budget of FLOPs trains best: the size of the model, its tokens, its batch, and the experiment nearest to it."""

import dataclasses
import math
from typing import Any

from lm_jax import experiment
from lm_jax.cli import as_typed
from lm_jax.data import tokenizer_files
from lm_jax.errors import UserError
from lm_jax.model import build
from lm_jax.plan import counts, devices
from lm_jax.plan.counts import duration, short
from lm_jax.plan.estimate import described, estimate, step_seconds, vocab_size

ANYWHERE = "gpu:8xH100"  # to plan for, where only a budget is given
LOOKED_AT = 5  # experiments that are counted exactly
DTYPES = ("bfloat16", "float16", "float32")  # the first that a device multiplies in


@dataclasses.dataclass(frozen=True)
class Budget:
    """FLOPs, and what they train best."""

    flops: float
    parameters: float
    tokens: float
    batch_tokens: float


def optimal(flops: float) -> Budget:
    """The compute-optimal model of a budget.

    Parameters and tokens by Chinchilla's approach 1 (arXiv:2203.15556): both grow with the square root of the FLOPs (table
    2), through 1B parameters and 20.2B tokens at 1.21e20 (table 3). Approaches 2 and 3 give fewer parameters above that; the
    fit of approach 3 does not agree with the paper's own runs (arXiv:2404.10102). The batch in tokens, about which the paper
    says nothing, is 0.2920 * FLOPs^0.3271 (DeepSeek LLM, arXiv:2401.02954, equation 1).
    """
    scale = math.sqrt(flops / 1.21e20)
    return Budget(flops, 1e9 * scale, 20.2e9 * scale, 0.2920 * flops**0.3271)


def of_devices(topology: devices.Topology, hours: float) -> float:
    """FLOPs of so many hours at a typical MFU."""
    return counts.TYPICAL_MFU * topology.size * described(topology).peak[fastest(topology)] * 3600 * hours


def fastest(topology: devices.Topology) -> str:
    """The dtype of products there: a CPU's are as fast in float32."""
    return (
        next(name for name in DTYPES if name in described(topology).peak) if topology.platform != "cpu" else "float32"
    )


def nearest(parameters: float) -> tuple[str, counts.Costs]:
    """The pretraining experiment of a dense decoder whose parameters are nearest. Raises UserError where there is none."""
    asked = [(name, experiment.experiment_config(name)) for name in experiment.shipped()]
    dense = [
        (name, one.model.num_layers * 12 * one.model.model_dim**2 + one.model.model_dim * vocabulary)
        for name, one in asked
        if not one.train.task
        and not one.train.init_from
        and one.model.kind == "transformer"
        and not one.model.num_experts
        for vocabulary in [tokenizer_files.vocab_size(one.data.tokenizer) or 0]
    ]
    if not dense:
        raise UserError("experiments come with a clone of the repository; here is none to take")
    unlike = lambda size: abs(math.log(size / parameters))
    found = []
    for name, _ in sorted(dense, key=lambda one: unlike(one[1]))[:LOOKED_AT]:
        config, _ = experiment.load_config(name, {})
        model = build.build(config.model, vocab_size(config), config.data.sequence_length)
        found.append((name, counts.count(config, model.declarations)))
    return min(found, key=lambda one: unlike(one[1].parameters))


def settings(name: str, costs: counts.Costs, budget: Budget, topology: devices.Topology) -> dict[str, str]:
    """{setting: value} with which an experiment spends the budget: its tokens, its batch; what devices decide stays "auto"."""
    config, _ = experiment.load_config(name, {})
    length = config.data.sequence_length
    tokens = budget.flops / costs.flops_per_token
    halvings = round(math.log2(budget.batch_tokens / length / topology.size))
    rows = topology.size * 2 ** max(0, halvings)
    changed = {"train.num_steps": f"{_written(tokens)} tokens", "data.global_batch_size": str(rows)}
    steps = tokens / length / rows
    if config.data.batch_ramp[0]:
        changed["data.batch_ramp"] = "(0,0)"
    if config.optimizer.decay_over:
        changed["optimizer.decay_over"] = "0"
    if not isinstance(config.optimizer.warmup, int) or config.optimizer.warmup > steps / 20:
        changed["optimizer.warmup"] = str(max(1, round(steps / 50)))
    return changed


def _written(tokens: float) -> str:
    """A number as lengths are written: "14.7B"."""
    for scale, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if tokens >= scale:
            return f"{tokens / scale:.3g}{letter}" if tokens < 1000 * scale else f"{tokens / scale:.0f}{letter}"
    return f"{max(1, tokens / 1e3):.3g}k"


def facts(budget: Budget, topology: devices.Topology) -> dict[str, Any]:
    """By name: the optimum, the nearest experiment, the command that plans it, and how long that takes there."""
    name, costs = nearest(budget.parameters)
    changed = settings(name, costs, budget, topology)
    flags = [f"--config.{path}={value}" for path, value in changed.items()]
    found = estimate(experiment.load_config(name, changed)[0], topology)
    steps = budget.flops / costs.flops_per_token / found.tokens
    return dataclasses.asdict(budget) | {
        "experiment": name,
        "experiment_parameters": costs.parameters,
        "experiment_tokens": budget.flops / costs.flops_per_token,
        "rows": found.ramp.largest,
        "topology": topology.text,
        "fits": found.fits,
        "hours": steps * step_seconds(found)[1] / 3600,
        "command": as_typed("-m", "lm_jax.plan", "--config", name, "--topology", topology.text, *flags),
    }


def lines(found: dict[str, Any], of: str) -> list[str]:
    """The answer; `of` says where the FLOPs come from, "" where they were given."""
    ratio = lambda tokens, parameters: f"{tokens / parameters:.3g} a parameter"
    budget = f"{found['flops']:.2g} FLOP{of}".replace("e+", "e")
    verdict = "it fits" if found["fits"] else "it does not fit"
    return [
        f"{budget}: {short(found['parameters'])} parameters on {short(found['tokens'])} tokens "
        f"({ratio(found['tokens'], found['parameters'])}: Chinchilla, approach 1, arXiv:2203.15556)",
        f"batch {short(found['batch_tokens'])} tokens (0.292 FLOP^0.3271, arXiv:2401.02954)",
        f"nearest: {found['experiment']}, {short(found['experiment_parameters'])} parameters; the same FLOP are "
        f"{short(found['experiment_tokens'])} tokens of it "
        f"({ratio(found['experiment_tokens'], found['experiment_parameters'])}), {found['rows']} rows a step",
        f"on {found['topology']} {verdict}, {duration(found['hours'] * 3600)} expected; plan it:",
        f"  {found['command']}",
    ]
