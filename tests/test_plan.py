"""What a run needs on devices that are not here: counted, proposed, compiled, and read out of the program's text."""

import json
import re
import subprocess
import sys

import pytest
from helpers import ROOT

from lm_jax import experiment
from lm_jax.errors import UserError
from lm_jax.plan import command, devices, program_text
from lm_jax.plan import compile as compiler
from lm_jax.plan.estimate import NEAR, changes, estimate, least, ring, seconds, step_seconds

GIB = 2**30
FULL = ["--config.model.window=(0,)", "--config.data.sequence_length=1024", "--config.data.batch_ramp=(0,0)"]
FLOAT16 = ["--config.model.compute_dtype=float16", "--config.optimizer.loss_scale=1024"]
FULL += ["--config.model.compute_dtype=bfloat16"]  # gpt_125m with GPT-2's attention and length


def config_of(name: str, *flags: str):
    return experiment.load_config(str(ROOT / "experiments" / name), experiment.split_overrides(list(flags))[0])[0]


def counted(name: str, topology: str, *flags: str):
    return estimate(config_of(name, *flags), devices.parse(topology))


# Topologies


@pytest.mark.parametrize(
    ("text", "size", "islands"),
    [
        ("v5e:4x4", 16, 1),
        ("2*v5p:8x8x16", 2048, 2),
        ("tpu7x:2x2x1", 8, 1),
        ("gpu:8xH100", 8, 1),
        ("gpu:4*8xA100", 32, 4),
    ]
    + [("gpu:T4", 1, 1), ("cpu:2", 2, 1), ("v6e:16x16", 256, 1), ("v5p:16x16x24", 6144, 1)],
)
def test_a_topology_is_so_many_devices(text, size, islands):
    found = devices.parse(text)
    assert (found.size, found.islands) == (size, islands)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("v5e:3x3", "no slice of v5e; the nearest is v5e:4x4\nthere is v5e:1x1, v5e:2x2, v5e:2x4"),
        ("v5e:4x2", "the nearest is v5e:2x4"),
        ("v5e", "nothing is no slice of v5e"),
        ("v5p:8x8x15", "the nearest is v5p:8x8x16"),
        ("v5p:4x4", "the nearest is v5p:2x4x4"),
        ("v5p:0x4x4", "the nearest is v5p:2x4x4"),
        ("v6:2x2", "no device 'v6'; did you mean v6e?"),
        ("H10", "no device 'H10'; did you mean H100?"),
        ("gpu:8xh10", "did you mean gpu:8xH100?"),
        ("gpu:8xV9", "there is H100, H200, A100, B200, GB200, L4, T4, V100, RTX3060 to RTX5090"),
        ("gpu:9xH100", "a host has 1 to 8 GPUs\nsuch as gpu:8xH100"),
        ("gpu:0*8xH100", "'0' is no number of hosts"),
        ("0*v5e:2x2", "'0' is no number of slices (1 to 999); such as 2*v5e:2x4"),
        ("*v5e:2x2", "'' is no number of slices"),
        ("two*v5e:2x2", "is no number of slices"),
        ("2**v5e:2x2", "is no number of slices"),
        ("cpu:0", "expected cpu:1 to cpu:64"),
        ("", "no device ''"),
        ("v5e-7", "no slice of v5e has so many chips; the nearest is v5e:2x4 (v5litepod-8)"),
        ("v5p-7", "the nearest is v5p:2x2x1 (v5p-8)"),
        ("h100-9", "a host has 1 to 8 GPUs"),
        ("rtx3061", "did you mean RTX3060?"),
        ("2*M1", "a Mac is one device; say --topology M1"),
    ],
)
def test_a_wrong_topology_is_answered_with_the_nearest(text, said):
    with pytest.raises(UserError) as error:
        devices.parse(text)
    assert said in str(error.value) and str(error.value).count("\n") < 5


def test_the_command_ends_with_2_and_nothing_is_compiled():
    line = [sys.executable, "-m", "lm_jax.plan", "--config", "experiments/gpt_125m.py", "--topology", "v5e:3x3"]
    result = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 2 and result.stderr.startswith("lm_jax: --topology v5e:3x3: 3x3 is no slice")


@pytest.mark.parametrize(
    ("topology", "flags", "said"),
    [
        ("gpu:T4", ["--config.model.compute_dtype=bfloat16"], "--config.model.compute_dtype=float16"),
        ("2*v5e:2x4", ["--config.mesh.slices=1"], "say --config.mesh.slices=2"),
        ("v5e:2x4", ["--config.mesh.data=3"], "config.mesh"),
        ("v5e:2x4", ["--config.mesh.data=4"], "leaves 4 of 8 devices without work"),
        ("v5e:2x4", ["--config.model.attention=cudnn"], "runs on a gpu, this is a tpu"),
        ("gpu:T4", [*FLOAT16, "--config.model.attention=flash"], "compute capability 8.0), this is an older one"),
        ("v5e:4x8", [], "does not divide over mesh axis data x fsdp"),
    ],
)
def test_what_cannot_run_there_is_refused_with_what_can(topology, flags, said):
    with pytest.raises(UserError) as error:
        counted("gpt_125m.py", topology, *flags)
    assert said in str(error.value)


def test_a_device_is_found_by_what_jax_calls_it():
    named = lambda platform, kind: devices.device_name(type("D", (), {"platform": platform, "device_kind": kind})())
    assert named("tpu", "TPU v5 lite") == "v5e" and named("tpu", "TPU v9") == "TPU v9"
    assert named("gpu", "NVIDIA H100 80GB HBM3") == "H100" and named("gpu", "NVIDIA L40S") == "NVIDIA L40S"


# Counts


def test_gpt_2_on_an_h100_is_what_is_known_of_it():
    """798 MFLOP a token, 1.24M tokens/s at the peak (docs/benchmarks.md); 124M parameters, four floats of each."""
    found = counted("gpt_125m.py", "gpu:1xH100", *FULL)
    assert found.costs.flops_per_token == pytest.approx(798e6, rel=0.005)
    assert found.tokens / seconds(found)["compute"] == pytest.approx(1.24e6, rel=0.01)
    assert found.memory["parameters"] == 4 * found.costs.parameters and found.fits
    half = counted("gpt_125m.py", "gpu:1xH100", *FULL, "--config.optimizer.moment_dtype=bfloat16")
    assert found.memory["optimizer"] == 8 * found.costs.parameters == 2 * half.memory["optimizer"]


def test_llama_1b_is_split_over_eight_chips_and_its_links_are_counted():
    found = counted("llama_1b.py", "v5e:2x4")
    assert found.costs.parameters == 1_100_048_384 and found.sizes["fsdp"] == 8
    assert found.memory["optimizer"] == 8 * found.costs.parameters / 8
    moved = found.num_microbatches * 3 * 2 * found.costs.parameters * 7 / 8
    assert seconds(found)["links fsdp"] == pytest.approx(moved / 200e9)  # eight chips need both dims of the torus
    best, expected = step_seconds(found)
    assert best == max(seconds(found).values()) and expected >= best


def test_what_crosses_hosts_goes_over_the_network():
    split = "--config.mesh.data=1", "--config.mesh.fsdp=-1"
    one, four = (counted("llama_1b.py", text, *split) for text in ("gpu:8xH100", "gpu:4*8xH100"))
    assert ring(one, "fsdp") == 450e9 and ring(four, "fsdp") == 8 * 50e9
    data = counted("llama_1b.py", "gpu:4*8xH100", "--config.mesh.data=4", "--config.mesh.fsdp=8")
    assert ring(data, "data") == 50e9 and ring(data, "fsdp") == 450e9


@pytest.mark.parametrize(
    ("name", "topology", "flags"),
    [
        ("llama_1b.py", "v5e:2x2", ["--config.train.microbatch_rows=1024"]),
        ("llama_1b.py", "v5e:2x4", ["--config.model.remat=none", "--config.train.microbatch_rows=512"]),
        (
            "gpt3.py:175b",
            "v5p:4x4x4",
            ["--config.data.batch_ramp=(0,0)", "--config.mesh.data=4", "--config.mesh.fsdp=16"],
        ),
        (
            "gpt3.py:13b",
            "gpu:8xH100",
            ["--config.data.batch_ramp=(0,0)", "--config.mesh.data=8", "--config.mesh.fsdp=1"],
        ),
    ],
)
def test_every_change_that_is_proposed_fits_when_it_is_made(name, topology, flags):
    config, parsed = config_of(name, *flags), devices.parse(topology)
    found = estimate(config, parsed)
    proposed = changes(config, found)
    assert not found.fits and 1 <= len(proposed) <= 3
    for change, promised in proposed:
        given = {f"--config.{key}": value for key, value in change.items()}
        old = [flag for flag in flags if flag.split("=")[0] not in given]
        again = counted(name, topology, *old, *(f"{key}={value}" for key, value in given.items()))
        assert again.needed == promised.needed <= NEAR * again.device.memory


def test_what_nothing_makes_fit_is_told_with_the_least(capsys):
    line = ["--config", str(ROOT / "experiments/gpt3.py:175b"), "--topology", "gpu:8xH100", "--counted"]
    command.main([*line, "--config.data.batch_ramp=(0,0)"])
    said = capsys.readouterr().out
    assert "does not fit" in said and "take more devices" in said and "least: --config." in said
    config = config_of("gpt3.py:175b", "--config.data.batch_ramp=(0,0)")
    found = estimate(config, devices.parse("gpu:8xH100"))
    assert not changes(config, found) and least(config, found)[1].needed < found.needed
    config = config_of("llama_1b.py")  # recomputes all, on one chip: there is nothing to change
    found = estimate(config, devices.parse("v5e:1x1"))
    assert not found.fits and not changes(config, found) and least(config, found) == ({}, found)


def test_the_page_and_its_json_say_the_same(capsys):
    line = ["--config", str(ROOT / "experiments/gpt_125m.py"), "--topology", "gpu:8xH100", "--counted", *FULL]
    command.main([*line, "--price-per-hour", "2"])
    page = capsys.readouterr().out
    command.main([*line, "--price-per-hour", "2", "--json"])
    found = json.loads(capsys.readouterr().out)
    hours = 24 * found["days"]["expected"]
    assert found["fits"] and found["cost"] == pytest.approx(16 * hours) and "changes" not in found
    assert found["kilowatt_hours"] == pytest.approx(8 * 0.7 * hours)
    assert f"costs {found['cost']:,.0f}" in page and page.startswith("gpt_125m on gpu:8xH100: fits, ")
    assert found["needed"] == pytest.approx(sum(found["bytes"].values())) and found["mfu"]["expected"] <= 0.4 + 1e-9


# Texts of programs


TPU_TEXT = """HloModule jit_step

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%async_collective_fusion.1 (p: bf16[96,3072]) -> bf16[768,3072] {
  %p = bf16[96,3072]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.2 = bf16[768,3072]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=7, dimensions={0}
  ROOT %custom-call.3 = (bf16[768,3072]{1,0}, u32[]{:S(2)}) custom-call(%all-gather.2), custom_call_target="AsyncCollectiveStart"
}

%fused (a: f32[8,64], b: f32[64,8]) -> f32[8,8] {
  %a = f32[8,64]{1,0} parameter(0)
  %b = f32[64,8]{1,0} parameter(1)
  %inner = f32[8,8]{1,0} fusion(%a), kind=kLoop, calls=%none, backend_config={"estimated_cycles":"999"}
  ROOT %dot.1 = f32[8,8]{1,0} convolution(%a, %b), dim_labels=bf_io->bf, metadata={op_name="jit(step)/router/dot_general"}
}

%cond (s: (s32[], f32[8])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(4), metadata={op_name="jit(step)"}
  %s = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %constant.1), direction=LT
}

%cond.2 (s: (s32[], f32[8])) -> pred[] {
  ROOT %gte = pred[] custom-call(%s), custom_call_target="Sharding"
}

%body (s: (s32[], f32[8])) -> (s32[], f32[8]) {
  %s = (s32[], f32[8]) parameter(0)
  %w = f32[100]{0} constant({...})
  %all-reduce.1 = f32[100]{0} all-reduce(%w), channel_id=9, to_apply=%add
  %splash_mha_fwd.4 = bf16[2,12,256,64]{3,2,1,0} custom-call(%w), custom_call_target="tpu_custom_call"
  ROOT %loop_fusion = (s32[], f32[8]) fusion(%s), kind=kLoop, calls=%none, backend_config={"estimated_cycles":"10"}
}

ENTRY %main (p0: bf16[96,3072]) -> f32[8,8] {
  %p0 = bf16[96,3072]{1,0} parameter(0)
  %fusion.1 = (bf16[768,3072]{1,0}, u32[]{:S(2)}) fusion(%p0), kind=kOutput, calls=%async_collective_fusion.1, \
backend_config={"window_config":{"estimated_cycles":"1000"}}
  %fusion.2 = (bf16[768,3072]{1,0}, u32[]{:S(2)}) fusion(%p0), kind=kOutput, calls=%async_collective_fusion.1, \
backend_config={"window_config":{"estimated_cycles":"500"}}
  %scores = bf16[2,12,256,256]{3,2,1,0} copy(%p0), backend_config={"estimated_cycles":"7"}
  %square = f32[256,256]{1,0} copy(%p0)
  %logits = f32[2,256,50304]{2,1,0} copy(%p0)
  %while.1 = (s32[], f32[8]) while(%t), condition=%cond, body=%body, metadata={op_name="jit(step)/shard_map/while"}
  %while.2 = (s32[], f32[8]) while(%t), condition=%cond.2, body=%body, metadata={op_name="jit(step)/jvp()/while"}
  ROOT %fusion.3 = f32[8,8]{1,0} fusion(%p0, %p0), kind=kCustom, calls=%fused
}
"""

GPU_TEXT = """HloModule jit_step

ENTRY %main.1 (p0: f32[96]) -> f32[768] {
  %p0 = f32[96]{0} parameter(0)
  %p1 = bf16[96,8]{1,0} parameter(1)
  %all-gather-start.3 = ((f32[96]{0}, bf16[96,8]{1,0}), (f32[768]{0}, bf16[768,8]{1,0})) all-gather-start(%p0, %p1), channel_id=1
  %all-gather-done.3 = (f32[768]{0}, bf16[768,8]{1,0}) all-gather-done(%all-gather-start.3)
  %big = f32[768]{0} get-tuple-element(%all-gather-done.3), index=0
  %reduce-scatter-start = ((f32[768]{0}), f32[96]{0}) reduce-scatter-start(%big), channel_id=2, to_apply=%add
  %while.1 = (s32[], f32[8]) while(%t), condition=%c, body=%b, backend_config={"known_trip_count":{"n":"12"}}
  %attention = (bf16[2,64]{1,0}, u8[0]{0}) custom-call(%p1), custom_call_target="__cudnn$fmhaScaleBiasSoftmax"
  %pallas_call.1 = bf16[2,64]{1,0} custom-call(%p1), custom_call_target="__gpu$xla.gpu.triton", backend_config={grid_x = 8, \
ir = "ML?R(x)", name = "flash_attention_query", num_stages = 2 : i32}
  ROOT %all-reduce-start.1 = f32[10754]{0} all-reduce-start(%big), channel_id=3, to_apply=%add
}

%b (s: (s32[], f32[8])) -> (s32[], f32[8]) {
  %x = bf16[10]{0} parameter(0)
  ROOT %collective-permute.1 = bf16[10]{0} collective-permute(%x), channel_id=4, source_target_pairs={{0,1}}
}
"""


def read(text: str, widths: tuple[int, ...] = (768,)):
    return program_text.read(text, lambda name: 12, length=256, tokens=512, vocab=50304, widths={*widths})


COUNTS_BY_TWO = """
%by_two (s: (s32[], f32[8])) -> (s32[], f32[8]) {
  %s.2 = (s32[], f32[8]) parameter(0)
  %i.2 = s32[] get-tuple-element(%s.2), index=0
  %x.2 = f32[8] get-tuple-element(%s.2), index=1
  %two = s32[] constant(2)
  %next = s32[] add(%i.2, %two)
  %done.2 = f32[8]{0} copy(%x.2), backend_config={"estimated_cycles":"100"}
  ROOT %out.2 = (s32[], f32[8]) tuple(%next, %done.2)
}
"""


def test_a_loop_of_windowed_products_counts_by_two():
    """Four of them are two rounds."""
    text = TPU_TEXT.replace("\n%cond (", f"{COUNTS_BY_TWO}\n%cond (").replace("body=%body", "body=%by_two", 1)
    assert [loop.rounds for loop in read(text).loops] == [2, 12]
    assert read(text).cycles["rest"] - read(TPU_TEXT).cycles["rest"] == 200


def test_a_tpu_program_is_read():
    """A collective that two fusions carry on with is one; loops have their rounds; what is inside a fusion is not added."""
    found = read(TPU_TEXT)
    assert found.collectives == {"all-gather": [1, 2 * 768 * 3072], "all-reduce": [16, 16 * 400]}
    assert found.kernels == {"splash_mha_fwd": 16}
    assert found.cycles == {"products": 1500, "elementwise": 160, "rest": 7}
    assert found.float32_products == {"jit(step)/router/dot_general": 1}
    squares = {"bf16[2,12,256,256]": 2 * 24 * 256**2, "f32[256,256]": 4 * 256**2}
    assert found.large == squares | {"f32[2,256,50304]": 4 * 512 * 50304}
    assert list(read(TPU_TEXT, {256}).large) == ["f32[2,256,50304]"]  # a width of the model
    assert [(loop.rounds, loop.known) for loop in found.loops] == [(4, True), (12, False)]


def test_a_gpu_program_is_read():
    """Starts alone count, by their larger side; the rounds that the text states are taken."""
    found = read(GPU_TEXT)
    gathered, scattered = 768 * 4 + 768 * 8 * 2, 768 * 4
    assert found.collectives == {
        "all-gather": [1, gathered],
        "reduce-scatter": [1, scattered],
        "all-reduce": [1, 4 * 10754],
        "collective-permute": [12, 12 * 20],
    }
    assert found.kernels == {"__cudnn$fmhaScaleBiasSoftmax": 1, "flash_attention_query": 1} and not found.cycles


def test_programs_of_a_step_are_added():
    found, more = read(GPU_TEXT), read(GPU_TEXT)
    found.add(more, 3)
    assert found.collectives["collective-permute"] == [48, 48 * 20] and found.kernels.total() == 8


def test_a_misfit_is_read_from_what_the_compiler_says():
    said = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 21.54G of 15.75G hbm. Exceeded by 5.79G."
    assert compiler.misfit(said) == (21.54 * GIB, 15.75 * GIB)
    said = "the total memory required for HLO temporaries (512.0M) exceeds available HBM (15.75G)"
    assert compiler.misfit(said) == (GIB / 2, 15.75 * GIB)
    assert (
        compiler.misfit("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 20.1M of 16.0M vmem.") is None
    )


def test_what_the_compiler_says_is_told_in_lines():
    found = counted("gpt_125m.py", "v5e:2x4", "--config.model.compute_dtype=bfloat16")
    said = lambda compiled: "\n".join(command.compiled_lines(found, compiled, command.compiled_facts(found, compiled)))
    misfit = compiler.Compiled(1.0, 21.5 * GIB, 15.75 * GIB)
    assert said(misfit).startswith("compiled: does not fit: 21.5 of 15.8 GiB; the largest class is activations")
    unread = compiler.Compiled(1.0, 3 * GIB, 15.75 * GIB, GIB, GIB, unread="INTERNAL: async-update")
    assert "fits: peak 3 of 15.8 GiB" in said(unread) and "not known: INTERNAL: async-update" in said(unread)
    whole = said(compiler.Compiled(1.0, 3 * GIB, 15.75 * GIB, GIB, GIB, read(TPU_TEXT)))
    for words in (
        "all-gather 1 = 0.00472 GB",
        "splash_mha_fwd 16",
        "estimated cycles a step: 1.7k (",
        "kernels ",
        "router",
    ):
        assert words in whole
    assert "f32[2,256,50304]" in whole and "assumed rounds of loops: jvp()/while 12" in whole


@pytest.mark.parametrize(("kind", "units"), [("H100", 132), ("H200", 132), ("A100", 108), ("L4", 58), ("T4", 40)])
def test_the_compilers_figures_of_a_gpu_are_those_of_the_table(kind, units):
    """Memory and bandwidth, and multiprocessors x FP32 units x 2 FLOPs x clock = the table's float32 peak."""
    figure = lambda name: float(re.search(rf"\b{name}: ([\d.]+)", compiler.target(kind).read_text())[1])
    device = devices.DEVICES[kind]
    assert figure("core_count") == units
    assert figure("memory_bandwidth") == pytest.approx(device.bandwidth, rel=0.01)
    assert figure("device_memory_size") == pytest.approx(device.memory / 0.75, rel=0.07)
    peak = 2e9 * units * figure("fpus_per_core") * figure("clock_rate_ghz")
    assert peak == pytest.approx(device.peak["float32"], rel=0.01)


def test_a_gpu_without_figures_for_the_compiler_is_refused(monkeypatch):
    monkeypatch.setattr(compiler, "installed", lambda *names: True)
    with pytest.raises(UserError, match="no target of a B200 to compile for; add --counted"):
        compiler.absent_devices(devices.parse("gpu:8xB200"))
    monkeypatch.setattr(compiler, "installed", lambda *names: False)
    for topology, extra in (("gpu:8xH100", "cuda12"), ("v5e:2x4", "tpu")):
        with pytest.raises(UserError, match=rf"without --counted, .* pip install -e '.\[{extra}\]'"):
            compiler.absent_devices(devices.parse(topology))


# Compiled

# Twelve layers of 768, rows of 1,024 tokens, eight a device, everything recomputed: what others' numbers are given for.
CASE = [
    "--config",
    "experiments/gpt_125m.py",
    "--topology",
    "v5e:2x4",
    "--config.mesh.data=1",
    "--config.mesh.fsdp=-1",
    *FULL,
]
CASE += ["--config.data.tokenizer=sentencepiece:50304", "--config.data.global_batch_size=64"]
CASE += ["--config.train.microbatch_rows=64", "--config.model.unroll=False"]
libtpu = pytest.mark.skipif(not compiler.installed("libtpu"), reason="needs libtpu: pip install '.[tpu]'")
cuda = pytest.mark.skipif(
    not compiler.installed("jax_plugins", "jax_plugins.xla_cuda12"), reason="needs pip install '.[cuda12]'"
)


def plan(*arguments: str) -> dict:
    line = [sys.executable, "-m", "lm_jax.plan", *arguments, "--json"]
    result = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.strip().split("\n")[-1])


@pytest.mark.proof
@libtpu
@pytest.mark.parametrize(("remat", "limit"), [("full", 0.95 * 2.05), ("dots", 0.95 * 3.60)])
def test_gpt_125m_on_eight_chips_with_splash_attention(remat, limit):
    """GiB a device at most 0.95 of what MaxText's step takes; the Pallas kernels stand in the program, in each layer once."""
    found = plan(*CASE, f"--config.model.remat={remat}")["compiled"]
    assert found["fits"] and found["peak"] / GIB <= limit, found
    assert len(found["kernels"]) >= 3 and set(found["kernels"].values()) <= {12, 24}, found["kernels"]
    assert not found["float32_products"] and not found["large_buffers"], found


@pytest.mark.proof
@libtpu
def test_only_sums_over_data_cross_from_one_slice_to_another():
    """A real topology of two slices: inside of one stay the gathers of fsdp and the sums of tensor."""
    line = [
        "--config",
        "experiments/quickstart.py:smoke",
        "--topology",
        "2*v5e:2x2",
        "--config.data.global_batch_size=8",
    ]
    line += [f"--config.mesh.{axis}=2" for axis in ("data", "fsdp", "tensor", "slices")]
    assert plan(*line)["compiled"]["between_slices"] == ["all-reduce"]


@pytest.mark.proof
@libtpu
def test_a_step_that_does_not_fit_is_told_from_the_compilers_words():
    found = plan("--config", "experiments/llama_1b.py", "--topology", "v5e:2x2", "--config.train.microbatch_rows=1024")
    assert not found["fits"] and not found["compiled"]["fits"] and found["compiled"]["largest"] == "activations"


@pytest.mark.proof
@cuda
def test_a_step_for_eight_h100_has_fused_attention_and_scatters_its_gradients():
    line = ["--config", "experiments/gpt_125m.py", "--topology", "gpu:8xH100", *FULL, "--config.model.num_layers=2"]
    line += ["--config.model.remat=names"]  # the kernels run once all the same
    found = plan(*line, "--config.mesh.data=1", "--config.mesh.fsdp=8", "--config.train.microbatch_rows=256")[
        "compiled"
    ]
    kernels = {f"flash_attention_{name}": 2 for name in ("forward", "query", "key")}
    assert found["fits"] and found["kernels"] == kernels, found
    assert not any("1024,1024" in shape for shape in found["large_buffers"]), found
    assert found["collectives"]["reduce-scatter"]["bytes"] > 0 and not found["float32_products"], found
