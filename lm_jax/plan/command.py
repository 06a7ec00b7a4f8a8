"""Know before you start: what a run needs, and takes, on devices that are not here.

    python -m lm_jax.plan --config experiments/llama_1b.py --topology v5e:4x4
    python -m lm_jax.plan --config experiments/gpt_125m.py --topology gpu:8xH100 --counted --config.model.remat=full

First what is counted, within seconds; then, unless --counted, the step compiled by the compiler of those devices (extra
`[tpu]` or `[cuda12]`, no device needed). Topologies: v5e:4x4, v5p:8x8x16, v6e:16x16, tpu7x:2x2x1, two slices 2*v5p:8x8x16;
gpu:8xH100, four hosts gpu:4*8xH100 (H200, A100, B200, L4, T4); cpu:1.
"""

import json
import math
import re
from typing import Any

import jax

from lm_jax import cli, decide, experiment
from lm_jax.config import Config
from lm_jax.plan import compile as compiler
from lm_jax.plan import devices, estimate
from lm_jax.plan.counts import TYPICAL_MFU, duration, short, total_flops

GIB = 2**30


def main(arguments: list[str]) -> None:
    """Prints the plan as lines, or as one line of JSON."""
    jax.config.update("jax_platforms", "cpu")  # nobody waits for a device that is here
    overrides, rest = experiment.split_overrides(arguments)
    parser = cli.Parser("lm_jax.plan", __doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--topology", required=True, help=devices.SUCH_AS)
    parser.add_argument("--counted", action="store_true", help="compile nothing")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    parser.add_argument("--price-per-hour", type=float, default=0.0, help="of one chip or GPU, in any currency")
    flags = parser.parse_args(rest)
    if not 0 <= flags.price_per_hour < math.inf:
        parser.error(f"--price-per-hour {flags.price_per_hour}: expected a price, 0 or more")
    topology = devices.parse(flags.topology)
    if topology.platform == "cpu":
        jax.config.update("jax_num_cpu_devices", topology.size)
    config, _ = experiment.load_config(flags.config, overrides)
    found = estimate.estimate(config, topology)
    plan = counted_facts(config, found, flags.price_per_hour)
    name = experiment.run_name(flags.config)
    if not flags.json:
        print("\n".join(counted_lines(name, found, plan)), flush=True)
    if not flags.counted:
        compiled = compiler.compiled(found)
        plan["compiled"] = compiled_facts(found, compiled)
        if not flags.json:
            print("\n".join(compiled_lines(found, compiled, plan["compiled"])))
    if flags.json:
        print(json.dumps({"config": name, "topology": topology.text} | plan))


def counted_facts(asked: Config, found: estimate.Estimate, price: float) -> dict[str, Any]:
    """What is counted, by name: bytes, seconds, FLOP; `asked` is the config as given. What is not known is not there."""
    best, expected = estimate.step_seconds(found)
    tokens, flops = total_flops(found.config, found.costs, found.ramp)
    strict = found.tokens * found.costs.flops_per_token / (found.topology.size * estimate.peak(found))
    facts = {
        "devices": found.topology.size,
        "mesh": found.sizes,
        "decided": found.decided,
        "parameters": found.costs.parameters,
        "flops_per_token": found.costs.flops_per_token,
        "microbatch_rows": found.rows,
        "microbatches": found.num_microbatches,
        "bytes": found.memory,
        "needed": found.needed,
        "memory": found.device.memory,
        "fits": found.fits,
        "largest": found.largest,
        "seconds": estimate.seconds(found),
        "step_seconds": {"best": best, "expected": expected},
        "tokens_per_second": {"best": found.tokens / best, "expected": found.tokens / expected},
        "mfu": {"best": strict / best, "expected": strict / expected},
    }
    if found.has_end:
        steps = tokens / found.tokens  # of the largest batch
        hours = {"best": steps * best / 3600, "expected": steps * expected / 3600}
        chips = found.topology.size / found.device.per_chip
        facts |= {"tokens": tokens, "flops": flops, "days": {name: hour / 24 for name, hour in hours.items()}}
        facts |= {"cost": price * chips * hours["expected"]} if price else {}
        watts = found.device.watts
        facts |= {"kilowatt_hours": watts * found.topology.size * hours["expected"] / 1000} if watts else {}
    if not found.fits:
        facts["changes"] = [_change(*change) for change in estimate.changes(asked, found)]
        facts["least"] = _change(*estimate.least(asked, found))
    return facts


def _change(change: dict[str, object], other: estimate.Estimate) -> dict[str, Any]:
    flags = " ".join(f"--config.{name}={value}" for name, value in change.items())
    best, needed = estimate.step_seconds(other)[0], other.needed
    return {"flags": flags, "needed": needed, "microbatch_rows": other.rows, "step_seconds": best}


def counted_lines(name: str, found: estimate.Estimate, plan: dict[str, Any]) -> list[str]:
    """The first half of the page."""
    gib = lambda size: f"{size / GIB:,.3g}"
    mesh = ", ".join(f"{axis} {size}" for axis, size in found.sizes.items())
    batch = f"{found.ramp.smallest}-{found.ramp.largest}" if len(found.ramp.stages) > 1 else f"{found.ramp.largest}"
    classes = ", ".join(f"{name} {gib(size)}" for name, size in found.memory.items())
    total = f" · {short(plan['tokens'])} tokens = {plan['flops']:.1e} FLOP".replace("e+", "e") if found.has_end else ""
    best, expected = plan["step_seconds"]["best"], plan["step_seconds"]["expected"]
    times = ", ".join(f"{what} {_seconds(time)}" for what, time in plan["seconds"].items())
    platform, able = found.topology.platform, "bfloat16" in found.device.peak
    told = filter(None, [decide.told(found.config, found.decided, platform, able, found.sizes["context"])])
    near = " (near: the compiler decides)" if found.fits and found.needed > estimate.NEAR * found.device.memory else ""
    lines = [
        f"{name} on {found.topology.text}: {found.topology.size} devices, mesh {mesh}",
        *told,
        f"{short(found.costs.parameters)} parameters · {short(found.costs.flops_per_token)} FLOP a token{total}",
        f"{'fits' if found.fits else 'does not fit'}{near}: {gib(found.needed)} of {gib(found.device.memory)} GiB a device "
        f"({classes}); microbatch {found.rows} of {batch} rows, {found.num_microbatches} a step",
        f"a step of {short(found.tokens)} tokens: at best {_seconds(best)} ({times}: the largest), "
        f"expected {_seconds(expected)}",
        f"{short(found.tokens / expected)} tokens/s at {plan['mfu']['expected']:.0%} MFU "
        f"(at best {short(found.tokens / best)}, {plan['mfu']['best']:.0%}; {TYPICAL_MFU:.0%} is typical)",
    ]
    if found.has_end:
        days, parts = plan["days"], []
        parts.append(f"to the end {duration(days['expected'] * 86400)} (at best {duration(days['best'] * 86400)})")
        parts += [f"costs {plan['cost']:,.0f}"] if "cost" in plan else []
        kwh = plan.get("kilowatt_hours")
        parts.append(f"{short(kwh)} kWh by rated power of the devices" if kwh else "no rated power is published")
        lines.append(" · ".join(parts))
    if not found.fits:
        lines.append(
            f"too large: {found.largest}, {gib(found.memory[found.largest])} GiB; what fits, by the same counts:"
        )
        told = lambda change: f"{gib(change['needed'])} GiB, {_seconds(change['step_seconds'])} a step at best"
        lines += [f"  {change['flags']}    ({told(change)})" for change in plan["changes"]]
        if not plan["changes"]:
            lines[-1] = lines[-1].partition(";")[0] + "; no recomputation, microbatch or mesh here makes it fit"
            lines.append(
                f"  least: {plan['least']['flags'] or 'as it is'}    ({told(plan['least'])}); take more devices"
            )
    return lines


def _seconds(time: float) -> str:
    return f"{time:.3g} s" if time >= 1 else f"{time * 1e3:.3g} ms"


def compiled_facts(found: estimate.Estimate, compiled: compiler.Compiled) -> dict[str, Any]:
    """What the compiler says, by name."""
    facts = {"fits": compiled.fits, "peak": compiled.peak, "memory": compiled.limit, "seconds": compiled.seconds}
    if not compiled.arguments:
        return facts | {"largest": found.largest}
    facts |= {"arguments": compiled.arguments, "temporaries": compiled.temporaries}
    if compiled.unread:
        return facts | {"unread": compiled.unread}
    reading = compiled.reading
    loops = {(re.sub(r"^jit\(\w+\)/", "", loop.op_name), loop.rounds, loop.known) for loop in reading.loops}
    times = compiler.step_seconds(found, reading)
    return facts | {
        "collectives": {kind: {"number": n, "bytes": size} for kind, (n, size) in sorted(reading.collectives.items())},
        "between_slices": sorted(reading.between_slices),
        "kernels": dict(reading.kernels),
        "cycles": dict(reading.cycles),
        "step_seconds": times,
        "float32_products": dict(reading.float32_products),
        "large_buffers": reading.large,
        "loops": [{"op_name": name, "rounds": rounds, "known": known} for name, rounds, known in sorted(loops)],
    }


def compiled_lines(found: estimate.Estimate, compiled: compiler.Compiled, facts: dict[str, Any]) -> list[str]:
    """The second half of the page."""
    gib = lambda size: f"{size / GIB:,.3g}"
    if not compiled.arguments:
        line = f"compiled: does not fit: {gib(compiled.peak)} of {gib(compiled.limit)} GiB; the largest class is"
        return [f"{line} {found.largest} ({gib(found.memory[found.largest])} GiB by the counts)"]
    verdict = "fits" if compiled.fits else f"does not fit, the largest class is {found.largest}"
    lines = [
        f"compiled in {compiled.seconds:.0f} s: {verdict}: peak {gib(compiled.peak)} of {gib(compiled.limit)} GiB "
        f"(counted {gib(found.needed)}), arguments {gib(compiled.arguments)}, temporaries {gib(compiled.temporaries)}"
    ]
    if compiled.unread:
        return [
            *lines,
            f"its text is not known: {compiled.unread}",
            "take the libtpu that goes with this jax: extra [tpu]",
        ]
    moved = [f"{kind} {n['number']:,} = {n['bytes'] / 1e9:.3g} GB" for kind, n in facts["collectives"].items()]
    crossing = "; between slices " + ", ".join(facts["between_slices"]) if facts["between_slices"] else ""
    lines.append(f"collectives a step and device: {', '.join(moved) or 'none'}{crossing}")
    kernels = [f"{name} {number}" for name, number in facts["kernels"].items()]
    lines.append(f"kernels a step: {', '.join(kernels) or 'none'}")
    if times := facts["step_seconds"]:
        cycles, total = facts["cycles"], sum(times.values())
        parts = ", ".join(f"{what} {short(number)}" for what, number in cycles.items())
        added = ", ".join(f"{what} {_seconds(time)}" for what, time in times.items())
        lines.append(f"estimated cycles a step: {short(sum(cycles.values()))} ({parts})")
        lines.append(
            f"an estimate: {_seconds(total)} a step = {added} (collectives and kernels by roofline, nothing hidden)"
        )
    if products := facts["float32_products"]:
        lines.append(f"products in float32: {sum(products.values())}, such as {', '.join(list(products)[:3])}")
    if large := facts["large_buffers"]:
        largest = sorted(large, key=lambda shape: -large[shape])[:3]
        lines.append(f"large buffers: {', '.join(f'{shape} {gib(large[shape])} GiB' for shape in largest)}")
    if (length := found.config.data.sequence_length) in compiler.widths(found):
        lines.append(f"buffers of [length, length] were not looked for: {length} is also a width of the model")
    assumed = [f"{loop['op_name']} {loop['rounds']}" for loop in facts["loops"] if not loop["known"]]
    return lines + ([f"assumed rounds of loops: {', '.join(assumed)}"] if assumed else [])
