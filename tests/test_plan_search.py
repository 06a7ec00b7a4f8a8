"""The plan's answers beside the plan: short forms of topologies, the fastest settings, a budget, two configs, the page."""

import html.parser
import json
import re
import shlex
from collections import Counter

import pytest
from helpers import ROOT

from lm_jax import experiment
from lm_jax.errors import UserError
from lm_jax.mesh import mesh_shape
from lm_jax.plan import budget, command, devices, page, program_text
from lm_jax.plan import compile as compiler
from lm_jax.plan.estimate import NEAR, estimate
from lm_jax.plan.search import added_seconds, compiled_best, search

LLAMA_7B, POD = "decoders.py:llama_7b", "v5e:16x16"


def load(name: str, *flags: str):
    overrides = experiment.split_overrides(list(flags))[0]
    return experiment.load_config(str(ROOT / "experiments" / name), overrides)[0], overrides


def found_on(topology: str, name: str, *flags: str):
    return estimate(load(name, *flags)[0], devices.parse(topology))


def searched(topology: str, name: str, *flags: str):
    config, overrides = load(name, *flags)
    return search(config, estimate(config, devices.parse(topology)), overrides)


def said(capsys, *arguments: str) -> str:
    command.main(list(arguments))
    return capsys.readouterr().out


# Devices and short forms


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("v5e-8", "v5e:2x4"),
        ("v5litepod-8", "v5e:2x4"),
        ("2*v5e-8", "2*v5e:2x4"),
        ("v5p-8", "v5p:2x2x1"),  # TensorCores, two a chip
        ("v4-8", "v4:2x2x1"),
        ("v5p-512", "v5p:4x8x8"),
        ("tpu7x-8", "tpu7x:2x2x1"),
        ("h100-8", "gpu:8xH100"),
        ("8xh100", "gpu:8xH100"),
        ("H100-32", "gpu:4*8xH100"),
        ("gpu:4*8xh100", "gpu:4*8xH100"),
        ("rtx4070tisuper", "gpu:1xRTX4070TiSUPER"),
        ("GB200-72", "gpu:72xGB200"),
        ("m2", "M2"),
    ],
)
def test_what_people_type_is_understood(typed, meant):
    assert devices.parse(typed).text == meant and devices.parse(meant).text == meant


def test_a_card_is_known_by_what_jax_calls_it():
    named = lambda kind: devices.device_name(type("D", (), {"platform": "gpu", "device_kind": kind})())
    assert named("NVIDIA GeForce RTX 3060 Ti") == "RTX3060Ti" and named("NVIDIA GeForce RTX 4090") == "RTX4090"
    assert named("NVIDIA GB200") == "GB200" and named("Tesla V100-SXM2-16GB") == "V100"
    for other in ("NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 2080", "NVIDIA L40S", "Tesla M4"):
        assert named(other) == other


def test_peaks_are_dense_ones_with_sums_in_float32():
    """White papers: RTX 3090 71 TFLOP/s, RTX 4090 165.2, RTX 5090 209.5; a GB200 is 2.5 PFLOP/s, not its 5 with sparsity."""
    peaks = {"RTX3090": 71.2, "RTX4090": 165.2, "RTX5090": 209.6, "GB200": 2500, "B200": 2250, "L4": 121, "v4": 275}
    for name, tera in peaks.items():
        assert devices.DEVICES[name].peak["bfloat16"] == pytest.approx(tera * 1e12, rel=0.001)
    for name in ("T4", "V100"):
        assert set(devices.DEVICES[name].peak) == {"float16", "float32"}
    for device in devices.DEVICES.values():
        assert device.memory > 2**30 and device.bandwidth > 5e10 and device.peak["float32"] <= max(device.peak.values())


# The search


def test_no_hand_set_step_is_counted_faster_than_the_one_that_is_found():
    """Llama 7B on 256 chips, twenty settings and more of mesh, recomputation and rows; its flags mean it."""
    best = searched(POD, LLAMA_7B).ranked[0]
    total = lambda found: sum(added_seconds(found).values())
    number = 0
    for data, fsdp, tensor in ((1, 256, 1), (2, 128, 1), (4, 64, 1), (1, 64, 4), (1, 128, 2), (16, 16, 1)):
        for remat, rows in (("full", 2048), ("full", 512), ("names", 512), ("dots", 512), ("full", 1024)):
            flags = [f"--config.mesh.data={data}", f"--config.mesh.fsdp={fsdp}", f"--config.mesh.tensor={tensor}"]
            flags += [f"--config.model.remat={remat}", f"--config.train.microbatch_rows={rows}"]
            hand = found_on(POD, LLAMA_7B, *flags)
            if hand.needed <= NEAR * hand.device.memory:
                number += 1
                assert total(best.found) <= total(hand), flags
    assert number >= 20
    again = found_on(POD, LLAMA_7B, *searched(POD, LLAMA_7B).flags)
    assert again.needed == best.found.needed <= NEAR * again.device.memory and total(again) == best.counted_seconds


def test_what_is_counted_ranks_as_the_compiler_does():
    """Seconds by libtpu 0.0.52's cycles, collectives and kernels by roofline: Llama 7B on 256 chips."""
    compiled = {(1, 256, 1, "full", 2048): 6.86, (1, 256, 1, "dots", 512): 7.12, (1, 128, 2, "dots", 512): 7.38}
    names = [
        f"--config.{name}" for name in ("mesh.data", "mesh.fsdp", "mesh.tensor", "model.remat", "train.microbatch_rows")
    ]
    given = lambda values: [f"{name}={value}" for name, value in zip(names, values, strict=True)]
    times = {values: sum(added_seconds(found_on(POD, LLAMA_7B, *given(values))).values()) for values in compiled}
    assert min(times, key=times.get) == min(compiled, key=compiled.get)
    assert all(0.8 < times[values] / compiled[values] < 1 for values in compiled)


def test_what_the_command_line_sets_stays():
    flags = ["--config.model.remat=full", "--config.mesh.tensor=2"]
    result = searched(POD, LLAMA_7B, *flags)
    assert {one.found.config.model.remat for one in result.ranked} == {"full"}
    assert {one.found.sizes["tensor"] for one in result.ranked} == {2}
    assert len({one.found.sizes["fsdp"] for one in result.ranked}) > 3
    assert set(flags) < set(result.flags)


def test_a_search_that_finds_nothing_says_so(capsys):
    line = ["--config", str(ROOT / "experiments/gpt3.py:175b"), "--topology", "h100-8", "--counted", "--search"]
    assert "nothing here makes it fit: take more devices" in said(capsys, *line, "--config.data.batch_ramp=(0,0)")


def test_the_compiler_has_the_last_word(monkeypatch):
    """The best, which was given, does not fit. Compiled: its next, another recomputation, the faster of both unrolled."""
    result = searched("v5e:2x4", "llama_1b.py")
    seen = []

    def compiled(found):
        seen.append(found)
        misfit = len(seen) == 1
        return compiler.Compiled(1.0, 2e10, 1e10) if misfit else compiler.Compiled(1.0, 1e9, 1e10, 1e9)

    times = lambda found, reading: {"cycles": {2: 3.0, 3: 2.0, 4: 1.0}[len(seen)]}
    monkeypatch.setattr(compiler, "compiled", compiled)
    monkeypatch.setattr(compiler, "step_seconds", times)
    best = compiled_best(result, lambda line: None)
    assert [one.config.model.unroll for one in seen] == [False, False, False, True]
    assert seen[0] is result.ranked[0].found and seen[0].rows == result.now.found.rows  # what was given
    assert all(mesh_shape(one.config.mesh, 8) == one.sizes for one in seen)
    assert seen[2].config.model.remat != seen[1].config.model.remat and seen[3].rows == seen[2].rows
    assert [one.compiled_seconds for one in best.ranked[:4]] == [1.0, 2.0, 3.0, 0]
    assert best.ranked[0].change["model.unroll"] is True and "--config.model.unroll=True" in best.flags
    assert not best.ranked[3].fits and best.ranked[3].found is seen[0] and not best.now.fits
    assert len(best.ranked) == len(result.ranked) + 1


def test_a_deep_model_is_not_unrolled_but_tried_on_another_mesh(monkeypatch):
    seen = []
    monkeypatch.setattr(
        compiler, "compiled", lambda found: seen.append(found) or compiler.Compiled(1.0, 1e9, 1e10, 1e9)
    )
    monkeypatch.setattr(compiler, "step_seconds", lambda found, reading: {"cycles": 5.0 - len(seen)})
    best = compiled_best(searched(POD, LLAMA_7B), lambda line: None)
    assert not any(one.config.model.unroll for one in seen) and len(seen) == 3  # the best is what was given
    assert all(mesh_shape(one.config.mesh, 256) == one.sizes for one in seen)
    assert seen[2].sizes not in (seen[0].sizes, seen[1].sizes) and best.ranked[0].found is seen[2]


def test_the_table_and_its_json_say_the_same(capsys):
    line = ["--config", str(ROOT / "experiments/llama_1b.py"), "--topology", "v5e-8", "--counted", "--search"]
    text = said(capsys, *line)
    told = json.loads(said(capsys, *line, "--json"))["search"]
    assert f"searched: {told['tried']:,} settings, {told['fitting']:,} fit" in text
    assert text.rstrip().endswith(told["flags"]) and len(text.splitlines()) < 24
    first = next(row for row in text.splitlines() if row.startswith("  1 "))
    assert f"{told['candidates'][0]['counted_seconds']:.3g}" in first
    times = [one["counted_seconds"] for one in told["candidates"]]
    assert times == sorted(times)


# A budget


@pytest.mark.parametrize(
    ("parameters", "flops", "tokens"),
    [
        (400e6, 1.92e19, 8.0e9), (1e9, 1.21e20, 20.2e9), (10e9, 1.23e22, 205.1e9), (67e9, 5.76e23, 1.5e12),
        (1e12, 1.27e26, 21.2e12),
    ],
)  # fmt: skip
def test_a_budget_is_spent_as_in_chinchillas_table_3(parameters, flops, tokens):
    found = budget.optimal(flops)
    assert found.parameters == pytest.approx(parameters, rel=0.08) and found.tokens == pytest.approx(tokens, rel=0.08)
    assert 6 * found.parameters * found.tokens == pytest.approx(flops, rel=0.01)
    assert budget.optimal(1e20).batch_tokens == pytest.approx(1.02e6, rel=0.01)  # DeepSeek LLM, equation 1


def test_the_command_of_a_budget_plans_a_run_of_that_budget(capsys):
    text = said(capsys, "--budget", "3e18")
    assert "157M parameters on 3.2B tokens" in text and "experiments/modern.py" in text
    assert "'--config.data.batch_ramp=(0,0)' --config.optimizer.decay_over=0" in text  # both are longer than the run
    line = shlex.split(text.splitlines()[-1])
    plan = json.loads(said(capsys, *line[line.index("lm_jax.plan") + 1 :], "--counted", "--json"))
    assert plan["flops"] == pytest.approx(3e18, rel=0.01) and plan["fits"]


def test_devices_for_some_hours_are_a_budget_that_takes_these_hours(capsys):
    told = json.loads(said(capsys, "--devices", "v5e-8", "--hours", "24", "--json"))
    assert told["flops"] == pytest.approx(8 * 197e12 * 0.4 * 86400)
    assert told["topology"] == "v5e:2x4" and told["hours"] == pytest.approx(24, rel=0.01)


def test_a_card_without_bfloat16_gets_float16_and_a_loss_scale(capsys):
    """The command says no dtype: what it plans is decided there."""
    told = budget.facts(budget.optimal(1e17), devices.parse("T4"))
    assert "dtype" not in told["command"] and "loss_scale" not in told["command"] and told["fits"]
    line = shlex.split(told["command"])
    decided = json.loads(said(capsys, *line[line.index("lm_jax.plan") + 1 :], "--counted", "--json"))["decided"]
    assert decided["model.compute_dtype"] == "float16" and decided["optimizer.loss_scale"] == 1024


# Two configs, the page, and what does not go together


def test_two_configs_stand_side_by_side(capsys):
    names = [str(ROOT / "experiments" / name) for name in ("llama_1b.py", "gpt3.py:1.3b")]
    line = ["--config", names[0], "--compare", names[1], "--topology", "gpu:8xH100", "--price-per-hour", "2"]
    line += ["--config.data.batch_ramp=(0,0)"]
    text, told = said(capsys, *line), json.loads(said(capsys, *line, "--json"))
    for number, (a, b, ratio) in told["numbers"].items():
        assert ratio == pytest.approx(b / a if a else 0) and re.search(
            rf"^{number} .* {ratio:.3g}$", text, re.MULTILINE
        )
    assert {"parameters", "GiB of logits", "days expected", "cost", "kWh"} < set(told["numbers"])
    assert "llama_1b fits, gpt3-1.3b fits" in text


class Reader(html.parser.HTMLParser):
    """The tags of a page that are open, all that were, its texts and the attributes of its rectangles."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.texts, self.bars = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.open += [tag] if tag != "meta" else []

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.bars += [dict(attrs)] if tag == "rect" else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def read(path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text())
    assert reader.open == []
    return reader


def test_the_page_has_everything_and_asks_for_nothing(tmp_path, capsys):
    line = ["--config", str(ROOT / "experiments/llama_1b.py"), "--topology", "h100-8", "--counted"]
    line += ["--config.train.microbatch_rows=1024", "--config.model.remat=none", "--html", str(tmp_path / "plan.html")]
    plan = json.loads(said(capsys, *line, "--json"))
    found = read(tmp_path / "plan.html")
    text = (tmp_path / "plan.html").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["plan.html"]
    assert not set(found.tags) & {"script", "link", "img", "iframe"} and "http" not in text and "url(" not in text
    words = "".join(found.texts)
    told = [
        "does not fit",
        "limit 55.9 GiB",
        "What makes it fit",
        "optimizer.learning_rate",
        *plan["bytes"],
        "links data",
    ]
    told += [word for change in plan["changes"] for word in change["flags"].split()]
    assert not plan["fits"] and all(word in words for word in told)
    right = [float(bar["x"]) + float(bar["width"]) for bar in found.bars]
    assert max(right) <= page.WIDTH and len(right) == len(plan["bytes"]) + len(plan["seconds"]) + len(plan["links"])


def test_a_name_on_the_page_is_no_html():
    assert "<b>" not in page.bars([("<b>", [(1.0, "red")], "a&b")], [(2.0, "<b>")])


def test_what_the_compiler_says_is_on_the_page(tmp_path, capsys, monkeypatch):
    reading = program_text.Reading({"all-gather": [12, 3e9]}, cycles=Counter(products=3e9))
    compiled = compiler.Compiled(1.0, 5 * 2**30, 15.75 * 2**30, 2**30, 2**30, reading)
    monkeypatch.setattr(compiler, "compiled", lambda found: compiled)
    line = ["--config", str(ROOT / "experiments/llama_1b.py"), "--topology", "v5e:2x4"]
    text = said(capsys, *line, "--html", str(tmp_path / "plan.html"))
    assert "compiled in 1 s: fits" in text and "train there: " in text
    words = "".join(read(tmp_path / "plan.html").texts)
    for told in ("Compiled it fits: 5 GiB", "compiled, peak", "all-gather", "3 GB in 12", "compiler's estimate"):
        assert told in words


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("--topology v5e-8", "--config is missing; such as --config experiments/llama_1b.py"),
        ("--config x.py", "--topology is missing"),
        ("--budget 1e20 --topology v5e-8", "--topology is not read with --budget"),
        ("--budget 1e20 --devices v5e-8 --hours 1", "--budget is not read with --devices"),
        ("--budget 1e20 --config.model.num_layers=2", "--config is not read with --budget"),
        ("--budget 5", "expected FLOPs, 1e12 to 1e30"),
        ("--budget nan", "expected FLOPs, 1e12 to 1e30"),
        ("--devices v5e-8", "needs --hours, such as --hours 24"),
        ("--hours 3", "--hours 3.0 is read only where --devices is given"),
        ("--config x.py --topology v5e-8 --compare y.py --search", "--search is not read with --compare"),
        ("--config x.py --topology v5e-8 --html /nowhere/plan.html", "expected a file in a folder that is there"),
    ],
)
def test_what_does_not_go_together_is_told_before_anything_is_read(line, told):
    with pytest.raises(UserError) as error:
        command.main(line.split())
    assert told in str(error.value)
