"""A plan as one page: HTML with its pictures and style inside, no script, nothing that is fetched."""

import html
import itertools
from typing import Any

from lm_jax.config import Config, flatten
from lm_jax.plan.counts import brief, duration, short

GIB = 2**30
WIDTH, LABEL, VALUE, BAR, GAP = (
    760,
    150,
    110,
    22,
    10,
)  # of a picture: its width, the columns left and right, a bar, between
COLOURS = ("#0072b2", "#56b4e9", "#009e73", "#e69f00", "#cc79a7", "#d55e00", "#f0e442")  # Okabe and Ito's, for all eyes
STYLE = """
:root{color-scheme:light dark;--line:#d0d4da;--soft:#f4f6f8;--bad:#b3261e;--good:#0a7a3d}
@media(prefers-color-scheme:dark){:root{--line:#3a4048;--soft:#1d2126;--bad:#ff8a80;--good:#6fdc9a}}
body{font:15px/1.5 system-ui,sans-serif;max-width:780px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem;margin:0}h2{font-size:1.05rem;margin:2rem 0 .5rem}p{margin:.3rem 0}
.fits{color:var(--good);font-weight:600}.misfit{color:var(--bad);font-weight:600}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:.6rem;margin:1rem 0}
dl div{background:var(--soft);border-radius:6px;padding:.5rem .7rem}dt{font-size:.8rem;opacity:.75}dd{margin:0;font-weight:600}
svg{display:block;width:100%;height:auto}
svg text{font:13px system-ui,sans-serif;fill:currentColor;paint-order:stroke;stroke:canvas;stroke-width:4px}
table{border-collapse:collapse;width:100%}td,th{text-align:left;padding:.2rem .6rem .2rem 0;border-bottom:1px solid var(--line)}
td.n,th.n{text-align:right;white-space:nowrap}code{display:inline-block;overflow-wrap:anywhere}i{display:inline-block;width:.8em;height:.8em;border-radius:2px;margin-right:.5em}
pre{background:var(--soft);border-radius:6px;padding:.6rem .8rem;overflow-x:auto;font-size:.85rem;margin:.3rem 0}
h3{font-size:.95rem;margin:1rem 0 .2rem}h4{font-size:.85rem;margin:.6rem 0 0;opacity:.75}
.paper{background:#fff;border-radius:6px}.paper svg text{font:inherit;paint-order:normal;stroke:none}
.soft{opacity:.7;font-size:.9rem}
"""
Parts = list[tuple[float, str]]  # (size, colour), one beside the other in a bar


def bars(rows: list[tuple[str, Parts, str]], marks: list[tuple[float, str]]) -> str:
    """A picture of horizontal bars (name, parts, what stands behind it), and lines across them at `marks`."""
    most = max([1e-30, *(sum(size for size, _ in parts) for _, parts, _ in rows), *(at for at, _ in marks)])
    scale, top = (WIDTH - LABEL - VALUE) / most, 20 if marks else 0
    height = top + len(rows) * (BAR + GAP)
    drawn = []
    for i, (name, parts, text) in enumerate(rows):
        y, x = top + i * (BAR + GAP), float(LABEL)
        drawn.append(f'<text x="{LABEL - 10}" y="{y + 16}" text-anchor="end">{html.escape(name)}</text>')
        for size, colour in parts:
            drawn.append(f'<rect x="{x:.1f}" y="{y}" width="{size * scale:.1f}" height="{BAR}" fill="{colour}"/>')
            x += size * scale
        drawn.append(f'<text x="{x + 8:.1f}" y="{y + 16}">{html.escape(text)}</text>')
    for at, text in marks:
        x = LABEL + at * scale
        line = f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top - 4}" y2="{height}" stroke="currentColor" stroke-dasharray="4 3"/>'
        anchor = "end" if x > WIDTH / 2 else "start"
        drawn.append(f'{line}<text x="{x:.1f}" y="{top - 8}" text-anchor="{anchor}">{html.escape(text)}</text>')
    told = html.escape(", ".join(f"{name} {text}" for name, _, text in rows))
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{told}">{"".join(drawn)}</svg>'


def table(head: list[str], rows: list[list[str]], numbers: int = 0) -> str:
    """A table whose last columns, so many, are numbers. Cells are HTML."""
    kind = lambda i: ' class="n"' if i >= len(head) - numbers else ""
    cells = lambda row, tag: "".join(f"<{tag}{kind(i)}>{cell}</{tag}>" for i, cell in enumerate(row))
    lines = [cells(head, "th"), *(cells(row, "td") for row in rows)]
    return f"<table><tr>{'</tr><tr>'.join(lines)}</tr></table>"


def page(plan: dict[str, Any], config: Config, origins: dict[str, dict[str, Any]]) -> str:
    """The page of what `command` found of a config, and of where its settings come from."""
    parts = [_verdict(plan), _numbers(plan), _memory(plan), _times(plan), _collectives(plan), _changes(plan)]
    values = flatten(config)
    rows = [
        [_codes([path]), html.escape(str(values[path])), origins[path]["from"]] for path in values if path in origins
    ]
    parts.append(f"<h2>Settings that are not by default</h2>{table(['setting', 'value', 'from'], rows)}")
    return document(f"{plan['config']} on {plan['topology']}", "".join(parts))


def document(title: str, body: str) -> str:
    """A whole page of a title and the HTML under it."""
    title = html.escape(title)
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    return f'<!doctype html><html lang="en"><head>{head}<style>{STYLE}</style></head><body><h1>{title}</h1>{body}</body></html>\n'


def _gib(size: float) -> str:
    return f"{size / GIB:,.3g} GiB"


def _codes(words: list[str]) -> str:
    """Flags, of which none is broken over two lines."""
    return " ".join(f"<code>{html.escape(word)}</code>" for word in words)


def _verdict(plan: dict[str, Any]) -> str:
    compiled = plan.get("compiled")
    say = lambda fits: f'<span class="{"fits" if fits else "misfit"}">{"fits" if fits else "does not fit"}</span>'
    text = f"By the counts it {say(plan['fits'])}: {_gib(plan['needed'])} of {_gib(plan['memory'])} on each device."
    if compiled:
        text += f" Compiled it {say(compiled['fits'])}: {_gib(compiled['peak'])}."
    mesh = ", ".join(f"{axis} {size}" for axis, size in plan["mesh"].items())
    how = f"microbatch of {plan['microbatch_rows']} rows, {plan['microbatches']} a step"
    return f"<p>{text}</p><p class=soft>{plan['devices']} devices, mesh {mesh}; {how}</p>"


def _numbers(plan: dict[str, Any]) -> str:
    facts = {
        "parameters": short(plan["parameters"]),
        "FLOP a token": short(plan["flops_per_token"]),
        "tokens/s expected": short(plan["tokens_per_second"]["expected"]),
        "MFU expected (at best)": f"{plan['mfu']['expected']:.0%} ({plan['mfu']['best']:.0%})",
    }
    if "days" in plan:
        facts["tokens in all"] = short(plan["tokens"])
        facts["to the end (at best)"] = " ".join(
            f"{'(' * (name == 'best')}{duration(plan['days'][name] * 86400)}{')' * (name == 'best')}"
            for name in ("expected", "best")
        )
    facts |= {"costs": f"{plan['cost']:,.0f}"} if "cost" in plan else {}
    facts |= {"energy by rated power": f"{short(plan['kilowatt_hours'])} kWh"} if "kilowatt_hours" in plan else {}
    return "<dl>" + "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts.items()) + "</dl>"


def _memory(plan: dict[str, Any]) -> str:
    colours = dict(zip(plan["bytes"], itertools.cycle(COLOURS), strict=False))
    rows = [("counted", [(size, colours[name]) for name, size in plan["bytes"].items()], _gib(plan["needed"]))]
    if compiled := plan.get("compiled"):
        rows.append(("compiled, peak", [(compiled["peak"], "#888")], _gib(compiled["peak"])))
    picture = bars(rows, [(plan["memory"], f"limit {_gib(plan['memory'])}")])
    classes = [
        [f'<i style="background:{colours[name]}"></i>{name}', _gib(size), f"{size / plan['memory']:.1%}"]
        for name, size in plan["bytes"].items()
    ]
    same = f"<p class=soft>Each of the {plan['devices']} devices holds the same.</p>" if plan["devices"] > 1 else ""
    return f"<h2>Memory of a device</h2>{picture}{table(['class', 'size', 'of the limit'], classes, 2)}{same}"


def _times(plan: dict[str, Any]) -> str:
    largest = max(plan["seconds"].values())
    rows = [
        (name, [(time, COLOURS[0] if time == largest else COLOURS[1])], brief(time))
        for name, time in plan["seconds"].items()
    ]
    if times := plan.get("compiled", {}).get("step_seconds"):
        inside = [(time, colour) for time, colour in zip(times.values(), ("#888", "#aaa", "#ccc"), strict=False)]
        rows.append(("compiler's estimate", inside, brief(sum(times.values()))))
    expected = plan["step_seconds"]["expected"]
    picture = bars(rows, [(expected, f"expected {brief(expected)}")])
    told = "No step is faster than the longest of these; expected is a typical share of the peak."
    return f"<h2>Seconds of a step, each part at its peak</h2>{picture}<p class=soft>{told}</p>"


def _collectives(plan: dict[str, Any]) -> str:
    moved = [(f"by {axis}, counted", size, COLOURS[0]) for axis, size in plan["links"].items()]
    kinds = plan.get("compiled", {}).get("collectives", {})
    moved += [(kind, found["bytes"], "#888") for kind, found in kinds.items()]
    if not moved:
        return "<h2>Collectives</h2><p class=soft>None: nothing is moved between devices.</p>"
    number = lambda name: f" in {kinds[name]['number']:,}" if name in kinds else ""
    rows = [(name, [(size, colour)], f"{size / 1e9:.3g} GB{number(name)}") for name, size, colour in moved]
    told = "By mesh axis as counted" + ("; by kind as the compiled step has them." if kinds else ".")
    return f"<h2>Collectives of a step and device</h2>{bars(rows, [])}<p class=soft>{told}</p>"


def _changes(plan: dict[str, Any]) -> str:
    told = []
    if "search" in plan:
        head = ["settings", "counted", "peak", "counted", "compiled"]
        known = lambda one, name, told: told(one[name]) if name in one else "-"
        rows = [
            [_codes(one["flags"] or ["as it is"]), _gib(one["needed"]), known(one, "peak", _gib)]
            + [brief(one["counted_seconds"]), known(one, "compiled_seconds", brief)]
            for one in plan["search"]["candidates"]
        ]
        told.append(f"<h2>Searched: the fastest settings, seconds with nothing hidden</h2>{table(head, rows, 4)}")
    if not plan["fits"]:
        changes = plan["changes"] or [plan["least"]]
        title = "What makes it fit" if plan["changes"] else "Nothing here makes it fit; this needs least"
        row = lambda one: [
            f"<code>{html.escape(one['flags'])}</code>",
            _gib(one["needed"]),
            brief(one["step_seconds"]),
        ]
        told.append(f"<h2>{title}</h2>{table(['flags', 'needed', 'a step at best'], [row(one) for one in changes], 2)}")
    return "".join(told)
