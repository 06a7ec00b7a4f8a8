"""What "auto" is on which devices: counted alone, the same for a run as for the plan of devices that are not here."""

import importlib
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from helpers import ROOT, tiny

from lm_jax import decide, experiment, train
from lm_jax.batch_ramp import make_ramp
from lm_jax.config import flatten
from lm_jax.model import attention, flash_attention
from lm_jax.model_config import PLAIN
from lm_jax.plan import devices
from lm_jax.plan.estimate import described, estimate, mesh_of, site_of
from lm_jax.sharding import AXES

RAMP = "data.batch_ramp=(0,0)"
SPLIT = ("mesh.tensor=8", "data.batch_ramp=(128, '12B tokens')")
PLAINLY = {f"model.{name}": value for name, value in PLAIN.items()} | {"mesh.fsdp": 1, "mesh.slices": 1}
GPU = PLAINLY | {"model.compute_dtype": "bfloat16"}
TPU = GPU | {"model.unroll": False}


def config_of(name: str, *settings: str):
    given = dict(setting.split("=", 1) for setting in settings)
    return experiment.load_config(str(ROOT / "experiments" / name), given)[0]


def decided(name: str, topology: str, *settings: str) -> dict:
    found = estimate(config_of(name, *settings), devices.parse(topology))
    assert {**flatten(found.config), **found.decided} == flatten(found.config)
    return found.decided


def site(topology: str) -> decide.Site:
    parsed = devices.parse(topology)
    return site_of(parsed, described(parsed), parsed.islands)


def decided_on(config, here: decide.Site, saved: dict | None = None) -> dict:
    kind = {"cpu": "cpu:1", "tpu": "v5e:1x1", "gpu": "gpu:H100" if here.bfloat16 else "gpu:T4"}[here.platform]
    with jax.sharding.use_abstract_mesh(mesh_of(devices.parse(kind), dict.fromkeys(AXES, 1))):
        return decide.decide(config, 500, make_ramp(config), here, saved or {}, here.size).values


@pytest.mark.parametrize(
    ("name", "topology", "settings", "expected"),
    [
        ("quickstart.py", "cpu:1", [], PLAINLY),
        ("gpt_125m.py", "cpu:2", [], PLAINLY),
        ("gpt_125m.py", "gpu:T4", [], PLAINLY | {"model.compute_dtype": "float16", "optimizer.loss_scale": 1024}),
        ("gpt_125m.py", "gpu:A100", [], GPU),
        ("gpt_125m.py", "gpu:8xH100", [], GPU),
        ("gpt_125m.py", "v5e:2x4", [], TPU),
        ("gpt_125m.py", "2*v5e:2x4", [], TPU | {"mesh.slices": 2}),
        ("llama_1b.py", "gpu:8xH100", [], GPU),
        ("llama_1b.py", "v5e:2x4", [], TPU | {"mesh.fsdp": 8, "model.remat": "dots"}),
        ("gpt3.py:2.7b", "gpu:4*8xH100", [RAMP], GPU | {"model.unroll": False, "mesh.fsdp": 8, "model.remat": "dots"}),
        ("gpt3.py:13b", "gpu:4*8xH100", [RAMP], GPU | {"model.unroll": False, "mesh.fsdp": 8, "model.remat": "full"}),
        ("decoders.py:llama_7b", "2*v5e:16x16", [], TPU | {"mesh.slices": 2, "mesh.fsdp": 256, "model.remat": "full"}),
        ("gpt3.py:175b", "v5p:8x8x16", SPLIT, TPU | {"mesh.fsdp": 128}),
    ],
)
def test_the_same_file_is_right_on_each_machine(name, topology, settings, expected):
    found = decided(name, topology, *settings)
    rows = found.pop("train.microbatch_rows")
    assert found == expected and rows > 0


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "experiments").glob("*.py")))
def test_on_a_cpu_all_is_as_it_is_by_default(name):
    """So that no bit of what a CPU has computed changes."""
    config = config_of(f"{name}:smoke")
    found = decided_on(config, decide.Site("cpu", True, 2.0**33, 8, 8, 1))
    assert {path: found.get(path, value) for path, value in PLAINLY.items()} == PLAINLY
    assert found["mesh.fsdp"] == 1 and found["model.compute_dtype"] == "float32"


def test_what_is_given_is_never_overruled():
    given = {"model.compute_dtype": "float32", "model.remat": "full", "model.unroll": "true", "mesh.fsdp": "2"}
    given |= {"mesh.slices": "1", "train.microbatch_rows": "8", "model.attention": "chunked"}
    config = config_of("gpt_125m.py", *(f"{path}={value}" for path, value in given.items()))
    found = estimate(config, devices.parse("v5e:2x4"))
    assert found.decided == {} and found.config.model == config.model and found.config.mesh == config.mesh
    assert decide.told(found.config, found.decided, "tpu", True, 1) == ""
    alone = decided("gpt_125m.py", "gpu:T4", "model.compute_dtype=float16", "optimizer.loss_scale=64")
    assert "optimizer.loss_scale" not in alone and "model.compute_dtype" not in alone


def test_recomputation_is_the_least_that_fits():
    """Less memory for the same rows: none, dots, names, full, and full where not even that fits."""
    config, found = tiny(model__remat="auto", train__microbatch_rows=8), []
    for memory in (2.0**30, 2.0**20):
        found.append(decided_on(config, decide.Site("tpu", True, memory, 1, 1, 1))["model.remat"])
    assert found == ["none", "full"]
    order = [
        decided("llama_1b.py", "v5e:2x4", "data.global_batch_size=768", f"train.microbatch_rows={rows}")["model.remat"]
        for rows in (8, 16, 48, 128)
    ]
    assert order == ["none", "dots", "names", "full"]


# Processes and devices of a run


class Chip(SimpleNamespace):
    """A device as JAX shows it."""

    process_index = 0

    def memory_stats(self):
        return {"bytes_limit": self.memory}


def chips(platform: str, kind: str, memory: float, size: int, capability: str = "", slices: int = 1) -> list[Chip]:
    each = size // slices
    more = {"compute_capability": capability} if capability else {}
    made = dict(platform=platform, device_kind=kind, memory=memory) | more
    return [Chip(id=i, slice_index=i // each, **made) for i in range(size)]


HERE = {
    "gpu:T4": chips("gpu", "Tesla T4", 12e9, 1, "7.5"),
    "gpu:8xA100": chips("gpu", "NVIDIA A100-SXM4-80GB", 60e9, 8, "8.0"),
    "gpu:1xH100": chips("gpu", "NVIDIA H100 80GB HBM3", 60e9, 1, "9.0"),
    "v5e:2x4": chips("tpu", "TPU v5 lite", 15.75 * 2**30, 8),
    "2*v5p:2x2x2": chips("tpu", "TPU v5p", 95.73 * 2**30, 16, slices=2),
}


@pytest.mark.parametrize("topology", HERE)
def test_a_run_decides_as_the_plan_of_its_devices(topology):
    here = HERE[topology]
    found, planned = decide.at_hand(here, here[0]), site(topology)
    assert found == planned
    config = config_of("llama_1b.py")
    assert decided_on(config, found) == decided_on(config, planned)


@pytest.mark.parametrize(("capability", "able"), [("6.1", False), ("7.0", False), ("8.6", True), ("gfx942", True)])
def test_a_gpu_that_no_table_has_is_asked(capability, able, monkeypatch):
    [device] = chips("gpu", "Some other GPU", 8e9, 1, capability)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert devices.has_bfloat16(device) is able
    assert decide.at_hand([device], device).bfloat16 is able


def test_processes_that_see_different_devices_decide_as_the_least_of_them(monkeypatch):
    """One has a T4, the other an H100: float16 for both, and what fits on the T4."""
    config, found = config_of("gpt_125m.py"), []
    old, new = chips("gpu", "Tesla T4", 12e9, 1), chips("gpu", "NVIDIA H100 80GB HBM3", 60e9, 1)
    alone = [decided_on(config, decide.at_hand([*old, *new], device)) for device in (*old, *new)]
    assert alone[0] != alone[1]
    for _ in range(2):
        monkeypatch.setattr(decide, "everyone", lambda fact, about: [[False, 12e9], [True, 60e9]])
        found += [decided_on(config, decide.at_hand([*old, *new], device)) for device in (*old, *new)]
    assert all(each == alone[0] for each in found)


# Runs that go on


def test_a_run_that_goes_on_keeps_its_numbers_and_decides_the_rest_anew():
    """Begun on a T4, gone on with on an H100: float16 and its scale stay; what changes no number is as it is best there."""
    saved = {"model.compute_dtype": "float16", "optimizer.loss_scale": 512, "train.microbatch_rows": 2}
    saved |= {"model.remat": "full", "model.unroll": False, "mesh.fsdp": 4}
    found = decided_on(config_of("gpt_125m.py"), site("gpu:1xH100"), saved)
    kept = {path: saved[path] for path in ("model.compute_dtype", "optimizer.loss_scale", "train.microbatch_rows")}
    assert found == PLAINLY | kept
    larger = saved | {"train.microbatch_rows": 16}
    assert decided_on(config_of("gpt_125m.py", RAMP), site("gpu:1xH100"), larger)["train.microbatch_rows"] == 16
    assert decided_on(config_of("gpt_125m.py", RAMP), site("gpu:T4"), larger)["train.microbatch_rows"] == 16
    too_many = saved | {"train.microbatch_rows": 256}
    assert decided_on(config_of("gpt_125m.py", RAMP), site("gpu:T4"), too_many)["train.microbatch_rows"] < 256


def test_what_was_decided_stands_in_config_json_and_is_kept(finished, tmp_path, monkeypatch, capsys):
    """Of the run of a CPU nothing is "auto" but its attention; an H100 would go on with it in float32."""
    saved = json.loads((finished / "config.json").read_text())["config"]
    assert [path for path, value in saved.items() if value == "auto"] == ["model.attention"]
    assert {path: saved[path] for path in PLAINLY} == PLAINLY
    assert saved["model.unroll"] is True
    line = {"mesh.data": "1", "train.num_steps": "20"}
    config, origins = experiment.load_config(str(ROOT / "experiments" / "quickstart.py:smoke"), line)
    monkeypatch.setattr(decide, "at_hand", lambda *_: site("gpu:1xH100"))
    for workdir, dtype in ((finished, "float32"), (tmp_path / "new", "bfloat16")):
        assert train.run(config, "experiments/quickstart.py:smoke", str(workdir), origins, dry_run=True) == 0
        assert f"\nauto: compute_dtype {dtype}, " in capsys.readouterr().out


# Attention by the device that a program is for


@pytest.mark.parametrize(("topology", "fused"), [("gpu:T4", False), ("gpu:A100", True)])
def test_a_gpu_before_ampere_is_given_no_fused_attention(topology, fused, monkeypatch):
    """By the kind of device that a program is traced for."""
    calls = []
    monkeypatch.setattr(flash_attention, "on_each_gpu", lambda q, *others: calls.append(q.dtype) or q)
    x = jax.ShapeDtypeStruct((2, 512, 4, 64), jnp.float16)
    context = attention.Context(*2 * [jax.ShapeDtypeStruct((2, 512), jnp.int32)])
    attend = lambda q, k, v, where: attention.attend(q, k, v, where, where, 0, "auto")
    with jax.sharding.use_abstract_mesh(mesh_of(devices.parse(topology), dict.fromkeys(AXES, 1))):
        jax.eval_shape(attend, x, x, x, context)
    assert bool(calls) is fused


# Experiments

# Where each is meant to run, by its file or by file:variant; the others on a T4.
NATURAL = {
    "gpt_125m": ("v5e:2x4", ()), "bert_base": ("v5e:2x2", ()), "llama_1b": ("v5e:4x4", ()), "decoders": ("v5e:16x16", ()),
    "gpt3:125m": ("v5e:2x4", ()), "gpt3:175b": ("v5p:8x8x16", SPLIT),
    "gpt3": ("v5p:4x4x4", ("data.batch_ramp=(64,'8B tokens')",)),
}  # fmt: skip


def test_every_experiment_fits_on_its_natural_devices(monkeypatch, starts):
    """All but `finetune.py`, which is as large as the model that it is given."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    for name in sorted({path.stem for path in (ROOT / "experiments").glob("*.py")} - {"finetune"}):
        for variant in getattr(importlib.import_module(name), "VARIANTS", ("",)):
            place = f"{name}:{variant}" if variant else name
            topology, settings = NATURAL.get(place, NATURAL.get(name, ("gpu:T4", ())))
            config = config_of(f"{name}.py:{variant}", *settings)
            if ":" not in config.data.tokenizer and config.data.tokenizer != "bytes":  # of a model that is not here
                config = decide.replaced(config, {"data.tokenizer": "sentencepiece:32000"})
            found = estimate(config, devices.parse(topology))
            assert found.fits, (place, found.memory)
            assert found.config.model.compute_dtype != "float32", place
