"""Know before you start: what a run needs, and takes, on devices that are not here.

    python -m lm_jax.plan --config experiments/llama_1b.py --topology v5e:4x4
    python -m lm_jax.plan --config experiments/gpt_125m.py --topology h100-8 --counted --config.model.remat=full
    python -m lm_jax.plan --config experiments/llama_1b.py --topology v5e-8 --search      # mesh, rows, remat, unroll
    python -m lm_jax.plan --config experiments/llama_1b.py --topology v5e-8 --compare experiments/gpt3.py:1.3b
    python -m lm_jax.plan --budget 1e20          # which size, on how many tokens? Or: --devices v5e-8 --hours 24

First what is counted, within seconds; then, unless --counted, the step compiled by the compiler of those devices (extra
`[tpu]` or `[cuda12]`, no device needed). Topologies: v4, v5e, v5p, v6e, tpu7x as v5e:4x4 or v5e-16, two slices
2*v5p:8x8x16; H100, H200, A100, B200, GB200, L4, T4, V100, RTX3060 to RTX5090 as gpu:8xH100 or h100-8, four hosts
gpu:4*8xH100; a Mac's M1 to M4; cpu:1.
"""

import argparse
import json
import math
import os
import re
from typing import TYPE_CHECKING, Any

import jax

from lm_jax import cli, decide, experiment, files, regular_files
from lm_jax.config import Config
from lm_jax.parts import of_experiment
from lm_jax.plan import devices, estimate
from lm_jax.plan.counts import TYPICAL_MFU, brief, duration, short, total_flops
from lm_jax.sharding import AXES

if TYPE_CHECKING:  # it imports what takes a second, and is imported where something is compiled
    from lm_jax.plan.compile import Compiled

GIB = 2**30


def main(arguments: list[str]) -> None:
    """Prints the plan as lines, or as one line of JSON."""
    jax.config.update("jax_platforms", "cpu")  # nobody waits for a device that is here
    overrides, rest = experiment.split_overrides(arguments)
    flags = parsed(rest, overrides)
    if flags.budget or flags.devices:
        return answer_budget(flags)
    topology = devices.parse(flags.topology)
    if topology.platform == "cpu":
        jax.config.update("jax_num_cpu_devices", topology.size)
    name, (config, origins) = experiment.run_name(flags.config), experiment.load_config(flags.config, overrides)
    found = estimate.estimate(config, topology, of_experiment(flags.config))
    plan = {"config": name, "topology": topology.text} | counted_facts(config, found, flags.price_per_hour)
    say = (lambda *lines: None) if flags.json else (lambda *lines: print(*lines, sep="\n", flush=True))
    if flags.compare:
        plan = compared(flags, overrides, topology, plan, say)
    else:
        say(*counted_lines(name, found, plan))
        if flags.search:
            searched(flags, overrides, config, found, plan, say)
        elif not flags.counted:
            from lm_jax.plan import compile as compiler

            compiled = compiler.compiled(found)
            plan["compiled"] = compiled_facts(found, compiled)
            say(*compiled_lines(found, compiled, plan["compiled"]))
        if not flags.search:
            say(*next_lines(flags, overrides, plan))
    if flags.html:
        from lm_jax.plan import page

        files.write_whole(flags.html, page.page(plan, config, origins).encode(), alone=False)
        say(f"written: {flags.html}")
    if flags.json:
        print(json.dumps(plan))


def parsed(rest: list[str], overrides: dict[str, str]) -> argparse.Namespace:
    """The flags. Raises UserError, also for those that do not go together."""
    parser = cli.Parser("lm_jax.plan", __doc__)
    parser.add_argument("--config", help="an experiment file; file.py:variant")
    parser.add_argument("--topology", help=devices.SUCH_AS)
    parser.add_argument("--counted", action="store_true", help="compile nothing")
    parser.add_argument(
        "--search", action="store_true", help="mesh, microbatch rows, remat and unroll of the fastest step"
    )
    parser.add_argument("--compare", default="", help="another experiment on the same devices, counted")
    parser.add_argument("--html", default="", help="a file for the plan as a page with pictures")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    parser.add_argument("--price-per-hour", type=float, default=0.0, help="of one chip or GPU, in any currency")
    parser.add_argument("--budget", type=float, default=0.0, help="FLOPs: what do they train best?")
    parser.add_argument("--devices", default="", help="with --hours: the same of devices, as --topology names them")
    parser.add_argument("--hours", type=float, default=0.0, help="how long there are these devices")
    parser.reads({"devices": ()}, "hours")
    flags = parser.parse_args(rest)
    if not 0 <= flags.price_per_hour < math.inf:
        parser.error(f"--price-per-hour {flags.price_per_hour}: expected a price, 0 or more")
    if flags.budget or flags.devices:
        named = {"--topology": flags.topology, "--config": flags.config or overrides, "--compare": flags.compare}
        named |= {"--search": flags.search, "--html": flags.html, "--price-per-hour": flags.price_per_hour}
        unread = [name for name, value in (named | {"--budget": flags.budget and flags.devices}).items() if value]
        if unread:
            parser.error(f"{unread[0]} is not read with --{'devices' if flags.devices else 'budget'}: leave one out")
        if flags.budget and not 1e12 <= flags.budget <= 1e30:
            parser.error(f"--budget {flags.budget:g}: expected FLOPs, 1e12 to 1e30, such as --budget 1e20")
        if flags.devices and not 0 < flags.hours <= 1e6:
            parser.error(f"--devices {flags.devices} needs --hours, such as --hours 24")
    elif missing := [name for name in ("config", "topology") if not getattr(flags, name)]:
        parser.error(f"--{missing[0]} is missing; such as --config experiments/llama_1b.py --topology v5e:2x4")
    if flags.compare and (flags.search or flags.html):
        parser.error(f"--{'search' if flags.search else 'html'} is not read with --compare: leave one out")
    folder = os.path.dirname(os.path.abspath(flags.html))
    if flags.html and not regular_files.is_url(flags.html) and (os.path.isdir(flags.html) or not os.path.isdir(folder)):
        parser.error(f"--html {flags.html}: expected a file in a folder that is there, such as --html plan.html")
    return flags


def answer_budget(flags: argparse.Namespace) -> None:
    """What a number of FLOPs, or devices for so many hours, train best."""
    from lm_jax.plan import budget

    topology = devices.parse(flags.devices or budget.ANYWHERE)
    flops, of = flags.budget, ""
    if flags.devices:
        flops = budget.of_devices(topology, flags.hours)
        of = f" ({topology.text} for {flags.hours:g} hours at {TYPICAL_MFU:.0%} MFU)"
    facts = budget.facts(budget.optimal(flops), topology)
    print(json.dumps(facts) if flags.json else "\n".join(budget.lines(facts, of)))


def compared(flags, overrides: dict[str, str], topology: devices.Topology, plan: dict[str, Any], say) -> dict[str, Any]:
    """The plan of the other experiment, with the same overrides, beside this one."""
    from lm_jax.plan import compare

    config, name = experiment.load_config(flags.compare, overrides)[0], experiment.run_name(flags.compare)
    other = counted_facts(
        config, estimate.estimate(config, topology, of_experiment(flags.compare)), flags.price_per_hour
    )
    say(*compare.lines((plan["config"], name), (plan, other), topology.text))
    return {"config": plan["config"], "other": name, "topology": topology.text, "numbers": compare.facts(plan, other)}


def searched(flags, overrides: dict[str, str], config: Config, found: estimate.Estimate, plan: dict, say) -> None:
    """The best settings, into the plan and as a table."""
    from lm_jax.plan import search

    result = search.search(config, found, overrides)
    if not flags.counted:
        result = search.compiled_best(result, say)
    plan["search"] = search.facts(result)
    say(*search.lines(result, flags.config))


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
        "seconds": (times := estimate.seconds(found)),
        "links": {
            axis: times[f"links {axis}"] * estimate.ring(found, axis) for axis in AXES if f"links {axis}" in times
        },
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
    """The first half of the page, the verdict first."""
    gib = lambda size: f"{size / GIB:,.3g}"
    mesh = ", ".join(f"{axis} {size}" for axis, size in found.sizes.items())
    batch = f"{found.ramp.smallest}-{found.ramp.largest}" if len(found.ramp.stages) > 1 else f"{found.ramp.largest}"
    classes = ", ".join(f"{name} {gib(size)}" for name, size in found.memory.items())
    total = f" · {short(plan['tokens'])} tokens = {plan['flops']:.1e} FLOP".replace("e+", "e") if found.has_end else ""
    best, expected = plan["step_seconds"]["best"], plan["step_seconds"]["expected"]
    times = ", ".join(f"{what} {brief(time)}" for what, time in plan["seconds"].items())
    platform, able = found.topology.platform, "bfloat16" in found.device.peak
    told = filter(None, [decide.told(found.config, found.decided, platform, able, found.sizes["context"])])
    near = " (near: the compiler decides)" if found.fits and found.needed > estimate.NEAR * found.device.memory else ""
    end = f"; to the end {duration(plan['days']['expected'] * 86400)}" if found.has_end else ""
    verdict = f"{'fits' if found.fits else 'does not fit'}{near}, {gib(found.needed)} of {gib(found.device.memory)} GiB"
    lines = [
        f"{name} on {found.topology.text}: {verdict} a device{end if found.fits else ''}",
        f"{found.topology.size} device{'s' * (found.topology.size > 1)}, mesh {mesh}; "
        f"microbatch {found.rows} of {batch} rows, {found.num_microbatches} a step",
        *told,
        f"{short(found.costs.parameters)} parameters · {short(found.costs.flops_per_token)} FLOP a token{total}",
        f"GiB a device: {classes}",
        f"a step of {short(found.tokens)} tokens: at best {brief(best)} ({times}: the largest), "
        f"expected {brief(expected)}",
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
    if found.topology.platform == "cpu" and found.topology.kind != "cpu":
        lines.append("a Mac's GPU, at its peak: JAX computes on its CPU cores, more slowly")
    if not found.fits:
        lines.append(
            f"too large: {found.largest}, {gib(found.memory[found.largest])} GiB; what fits, by the same counts:"
        )
        in_words = lambda change: f"{gib(change['needed'])} GiB, {brief(change['step_seconds'])} a step at best"
        lines += [f"  {change['flags']}    ({in_words(change)})" for change in plan["changes"]]
        if not plan["changes"]:
            lines[-1] = lines[-1].partition(";")[0] + "; no recomputation, microbatch or mesh here makes it fit"
            lines.append(
                f"  least: {plan['least']['flags'] or 'as it is'}    ({in_words(plan['least'])}); take more devices"
            )
    return lines


def next_lines(flags: argparse.Namespace, overrides: dict[str, str], plan: dict[str, Any]) -> list[str]:
    """What to do with the answer, where there is nothing to mend."""
    given = [f"--config.{path}={value}" for path, value in overrides.items()]
    again = ("-m", "lm_jax.plan", "--config", flags.config, "--topology", flags.topology)
    if plan["fits"] and plan.get("compiled", {}).get("fits", True):
        faster = f"faster settings: {cli.as_typed(*again, *given, '--search')}"
        return [faster, f"train there: {cli.as_typed('-m', 'lm_jax.main', '--config', flags.config, *given)}"]
    return []


def compiled_facts(found: estimate.Estimate, compiled: "Compiled") -> dict[str, Any]:
    """What the compiler says, by name."""
    from lm_jax.plan import compile as compiler

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


def compiled_lines(found: estimate.Estimate, compiled: "Compiled", facts: dict[str, Any]) -> list[str]:
    """The second half of the page."""
    from lm_jax.plan import compile as compiler

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
        added = ", ".join(f"{what} {brief(time)}" for what, time in times.items())
        lines.append(f"estimated cycles a step: {short(sum(cycles.values()))} ({parts})")
        lines.append(
            f"an estimate: {brief(total)} a step = {added} (collectives and kernels by roofline, nothing hidden)"
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
