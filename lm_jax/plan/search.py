"""The settings that make a step fastest on devices that are not here: all of them counted, the best of them compiled."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp

from lm_jax.cli import as_typed
from lm_jax.config import Config
from lm_jax.mesh import batch_shards
from lm_jax.model_config import MOST_UNROLLED
from lm_jax.plan.estimate import NEAR, Estimate, candidates, seconds
from lm_jax.plan.layer_memory import layer_bytes
from lm_jax.sharding import AXES

MOST_COMPILED = 8  # settings, with those that turn out not to fit
SHOWN = 6  # lines of the table


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Settings, what is counted of them, and what their compiled step says."""

    change: dict[str, object]  # beside the config as given
    found: Estimate
    peak: float = 0.0  # bytes of the compiled step, 0 where it was not compiled
    fits: bool = True
    compiled_seconds: float = 0.0  # cycles, collectives and kernels; 0 where the compiler gives no cycles

    @functools.cached_property
    def counted_seconds(self) -> float:
        """What is counted of a step, one after the other."""
        return sum(added_seconds(self.found).values())

    @property
    def order(self) -> tuple[bool, float]:
        """The fastest that fits is the smallest: by its compiled step, where there is one."""
        return not self.fits, self.compiled_seconds or self.counted_seconds

    @property
    def key(self) -> tuple[object, ...]:
        """What is searched: (mesh, recomputation, unrolling, rows)."""
        model = self.found.config.model
        return tuple(self.found.sizes.values()), model.remat, model.unroll, self.found.rows


def added_seconds(found: Estimate) -> dict[str, float]:
    """{what: seconds} of a step, to be added: what the compiler's own estimate of it comes to, nothing hidden.

    `estimate.seconds` is the least that each takes at its peak. A compiled step moves more (docs/notebook.md): its elementwise
    work writes and reads what `remat = none` keeps, forward, backward and once more where it is computed again; gathered
    weights are written, copied and read; and on a TPU the gradients of `fsdp` are summed whole, which is twice the wire.
    """
    times, device, config = seconds(found), found.device, found.config
    if device.bandwidth:
        recomputes = config.model.remat != "none"
        everything = dataclasses.replace(config.model, remat="none")
        tokens = found.rows * config.data.sequence_length / batch_shards(found.sizes) / found.sizes["context"]
        kept = config.model.num_layers * tokens * layer_bytes(everything, found.sizes, backend="").kept
        weights = found.costs.parameters * jnp.dtype(config.model.compute_dtype).itemsize / found.sizes["tensor"]
        copies = 3 * weights if found.sizes["fsdp"] > 1 else 0.0
        times["elementwise"] = found.num_microbatches * (2 + recomputes) * (2 * kept + copies) / device.bandwidth
    if found.topology.platform == "tpu" and "links fsdp" in times:
        times["links fsdp"] *= 4 / 3
    return times


@dataclasses.dataclass(frozen=True)
class Search:
    """What was tried, from the best to the slowest."""

    tried: int
    fitting: int  # of those
    ranked: list[Candidate]
    now: Candidate  # the config as given
    given: dict[str, str]  # {setting: value} of the command line

    @property
    def flags(self) -> list[str]:
        """The settings to use, those of the command line with them."""
        return flags(self.given, self.ranked[0].change)


def flags(given: dict[str, str], change: dict[str, object]) -> list[str]:
    """`--config.x.y=v` of a command line as it was given, and of what changes."""
    return [f"--config.{path}={value}" for path, value in (given | change).items()]


def search(asked: Config, found: Estimate, given: dict[str, str]) -> Search:
    """Counts every legal mesh, recomputation and microbatch; what the command line sets stays as it is set.

    What needs more than `NEAR` of the memory is left out. There may be nothing left: `ranked` is empty.
    """
    fixed = {path for path, value in given.items() if value not in ("auto", "-1")}
    tried = [Candidate(*pair) for pair in candidates(asked, found, everything=True) if not fixed & set(pair[0])]
    fitting = [one for one in tried if one.found.needed <= NEAR * one.found.device.memory]
    ranked = sorted(fitting, key=lambda one: (one.counted_seconds, one.found.needed))
    return Search(len(tried), len(fitting), ranked, Candidate({}, found), given)


def compiled_best(searched: Search, say: Callable[[str], None]) -> Search:
    """The best compiled and put first, by the compiler's cycles and what these leave out by roofline.

    No count is as good as the compiler, and errs alike for what is alike. So these are compiled: the best, the best of another
    recomputation, and the best with its layers unrolled, or scanned (on a TPU, where they are few; no count sees it), or the
    best of another mesh; and the settings as given, which nothing that is slower shall replace. `say` takes a line of progress.
    """
    from lm_jax.plan import compile as compiler

    done: list[Candidate] = []
    ranked, model = searched.ranked, searched.now.found.config.model

    def compile_first(those: Iterable[Candidate]) -> list[Candidate]:
        """Compiles one after the other until one fits; all that fit so far."""
        for one in those:
            if len(done) == MOST_COMPILED or one.key in {other.key for other in done}:
                continue
            say(f"compiling {_named(one)}: {one.counted_seconds:.3g} s a step by the counts")
            compiled = compiler.compiled(one.found)
            times = compiler.step_seconds(one.found, compiled.reading) if compiled.fits else {}
            peak, total = compiled.peak, sum(times.values())
            done.append(dataclasses.replace(one, peak=peak, fits=compiled.fits, compiled_seconds=total))
            if compiled.fits:
                break
        return [one for one in done if one.fits]

    fit = compile_first(ranked)
    fit = compile_first(one for one in ranked if one.key[1] not in {other.key[1] for other in fit})
    unroll = model.unroll is not True
    is_tpu = searched.now.found.topology.platform == "tpu"
    if fit and is_tpu and "model.unroll" not in searched.given and (not unroll or model.num_layers <= MOST_UNROLLED):
        compile_first([_with_unroll(min(fit, key=lambda one: one.order), unroll)])
    else:
        compile_first(one for one in ranked if one.found.sizes not in [other.found.sizes for other in fit])
    compile_first(one for one in ranked if one.key == searched.now.key)
    done.sort(key=lambda one: one.order)
    keys = {one.key for one in done}
    now = next((one for one in done if one.key == searched.now.key), searched.now)
    rest = [one for one in ranked if one.key not in keys]
    return dataclasses.replace(searched, ranked=done + rest if any(one.fits for one in done) else rest, now=now)


def _with_unroll(best: Candidate, unroll: bool) -> Candidate:
    config = best.found.config
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, unroll=unroll))
    return Candidate(best.change | {"model.unroll": unroll}, dataclasses.replace(best.found, config=config))


def _named(one: Candidate) -> str:
    mesh = "x".join(str(one.found.sizes[axis]) for axis in AXES)
    how = "unrolled" if one.found.config.model.unroll is True else "scanned"
    return f"mesh {mesh}, {one.found.rows} rows, remat {one.found.config.model.remat}, {how}"


def facts(searched: Search) -> dict[str, Any]:
    """By name: the table, and the settings to use."""
    rows = [
        {
            "flags": flags({}, one.change),
            "mesh": one.found.sizes,
            "microbatch_rows": one.found.rows,
            "remat": one.found.config.model.remat,
            "unroll": one.found.config.model.unroll,
            "needed": one.found.needed,
            "counted_seconds": one.counted_seconds,
        }
        | ({"peak": one.peak, "fits": one.fits} if one.peak else {})
        | ({"compiled_seconds": one.compiled_seconds} if one.compiled_seconds else {})
        for one in searched.ranked[:SHOWN]
    ]
    best = {"flags": " ".join(searched.flags)} if rows else {}
    return {"tried": searched.tried, "fitting": searched.fitting, "candidates": rows} | best


def lines(searched: Search, experiment: str) -> list[str]:
    """The table, then the command to use."""
    head = f"searched: {searched.tried:,} settings, {searched.fitting:,} fit in {NEAR:.0%} of the memory"
    if not searched.ranked:
        return [f"{head}; nothing here makes it fit: take more devices"]
    gib = lambda size: f"{size / 2**30:.3g}" if size else "-"
    table = [("", "mesh " + " x ".join(AXES), "rows", "remat", "layers", "GiB", "peak", "counted s", "compiled s")]
    for name, one in [*enumerate(searched.ranked[:SHOWN], 1), ("now", searched.now)]:
        mesh, model = " x ".join(str(one.found.sizes[axis]) for axis in AXES), one.found.config.model
        how = "unrolled" if model.unroll is True else "scanned"
        peak = gib(one.peak) + ("" if one.fits else " misfit")
        times = f"{one.counted_seconds:.3g}", f"{one.compiled_seconds:.3g}" if one.compiled_seconds else "-"
        table.append((str(name), mesh, str(one.found.rows), model.remat, how, gib(one.found.needed), peak, *times))
    columns = [i for i in range(len(table[0])) if any(row[i] not in ("-", table[0][i]) for row in table)]
    widths = {i: max(len(row[i]) for row in table) for i in columns}
    best, now = searched.ranked[0], searched.now
    both = bool(best.compiled_seconds and now.compiled_seconds)
    ratio = now.order[1] / best.order[1] if both else now.counted_seconds / best.counted_seconds
    by = "the compiler" if both else "the counts"
    use = as_typed("-m", "lm_jax.main", "--config", experiment, *searched.flags)
    advice = (
        f"take the first, by {by} {ratio:.3g} times as fast as now"
        if best.key != now.key
        else "the first is what it is now"
    )
    return [
        f"{head}; the best, seconds of a step with nothing hidden:",
        *("  " + "  ".join(row[i].ljust(widths[i]) for i in columns).rstrip() for row in table),
        f"{advice}: {use}",
    ]
