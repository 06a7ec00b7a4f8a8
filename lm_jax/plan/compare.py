"""Two configs on the same devices, side by side: one line a number, and the ratio."""

from typing import Any

from lm_jax.plan.counts import short

GIB = 2**30
# (what, names in the facts of a plan)
FIRST = [("parameters", ("parameters",)), ("FLOP a token", ("flops_per_token",))]
REST = [
    ("microbatch rows", ("microbatch_rows",)),
    ("microbatches a step", ("microbatches",)),
    ("seconds a step at best", ("step_seconds", "best")),
    ("seconds a step expected", ("step_seconds", "expected")),
    ("tokens/s expected", ("tokens_per_second", "expected")),
    ("MFU expected", ("mfu", "expected")),
    ("tokens", ("tokens",)),
    ("FLOP in all", ("flops",)),
    ("days expected", ("days", "expected")),
    ("cost", ("cost",)),
    ("kWh", ("kilowatt_hours",)),
]


def facts(one: dict[str, Any], other: dict[str, Any]) -> dict[str, list[float]]:
    """{what: [of the first, of the second, second over first]}, of what is known of both."""
    sizes = [*((f"GiB of {name}", ("bytes", name)) for name in one["bytes"]), ("GiB a device", ("needed",))]
    found = {}
    for what, path in [*FIRST, *sizes, *REST]:
        values = [_value(plan, path) for plan in (one, other)]
        if None not in values:
            a, b = (value / GIB if what.startswith("GiB") else value for value in values)
            found[what] = [a, b, b / a if a else 0.0]
    return found


def _value(plan: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        plan = plan.get(name) if isinstance(plan, dict) else None
    return plan


def lines(names: tuple[str, str], plans: tuple[dict[str, Any], dict[str, Any]], where: str) -> list[str]:
    """The verdicts, then a table."""
    fits = [f"{name} {'fits' if plan['fits'] else 'does not fit'}" for name, plan in zip(names, plans, strict=True)]
    number = lambda value: short(value) if value >= 1e4 else f"{value:,.0f}" if value == int(value) else f"{value:.3g}"
    table = [("", *names, "ratio")]
    table += [(what, number(a), number(b), f"{ratio:.3g}") for what, (a, b, ratio) in facts(*plans).items()]
    widths = [max(len(row[i]) for row in table) for i in range(4)]
    cells = lambda row: [
        row[0].ljust(widths[0]),
        *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
    ]
    return [f"on {where}: {', '.join(fits)}", *("  ".join(cells(row)).rstrip() for row in table)]
