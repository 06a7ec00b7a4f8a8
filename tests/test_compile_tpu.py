"""A train step for a TPU that is not here, compiled by libtpu (extra `[tpu]`)."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT

from lm_jax.errors import UserError

# Twelve layers of 768, rows of 1,024 tokens, eight a device, everything recomputed: what others' numbers are given for.
CASE = [
    "--config", "experiments/gpt_125m.py", "--topology", "v5e:2x4", "--config.mesh.data=1", "--config.mesh.fsdp=-1",
    "--config.model.window=(0,)", "--config.data.sequence_length=1024", "--config.data.tokenizer=sentencepiece:50304",
    "--config.data.global_batch_size=64", "--config.data.batch_ramp=(0,0)", "--config.model.compute_dtype=bfloat16",
    "--config.model.unroll=False",
]  # fmt: skip


def compile_tpu(*arguments: str) -> subprocess.CompletedProcess:
    line = [sys.executable, "tools/compile_tpu.py", *arguments]
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=None)


@pytest.mark.proof
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install '.[tpu]'")
@pytest.mark.parametrize(("remat", "limit"), [("full", 0.95 * 2.05), ("dots", 0.95 * 3.60)])
def test_gpt_125m_on_eight_chips_with_splash_attention(remat, limit):
    """GiB a device at most 0.95 of what MaxText's step takes; the Pallas kernels stand in the program."""
    result = compile_tpu(*CASE, f"--config.model.remat={remat}")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.strip().split("\n")[-1])
    assert found["peak"] <= limit and found["kernels"] >= 3, found


@pytest.mark.proof
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install '.[tpu]'")
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
    result = compile_tpu(*line)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.strip().split("\n")[-1])["between_slices"] == ["all-reduce"]


def test_a_number_of_slices_that_cannot_be_is_refused(monkeypatch):
    result = compile_tpu(*CASE[:2], "--topology", "0*v5e:2x2")
    assert result.returncode == 2 and "is no number of slices; such as 2*v5e:2x4" in result.stderr
    monkeypatch.setattr(os, "environ", dict(os.environ))  # the tool asks for CPUs when it is imported
    chips = importlib.import_module("compile_tpu").chips
    for topology in ("0*v5e:2x2", "*v5e:2x2", "two*v5e:2x2", "2**v5e:2x2"):
        with pytest.raises(UserError, match=r"is no number of slices; such as 2\*v5e:2x4"):
            chips(topology)


def test_a_step_that_cannot_be_is_refused_before_libtpu_is_asked():
    result = compile_tpu(*CASE, "--config.mesh.tensro=5")
    assert result.returncode == 2 and "did you mean" in result.stderr
