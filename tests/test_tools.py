"""Tools that are doors: each does its work on a real run, or says what is missing."""

import json
import shutil
import subprocess
import sys

import pytest
from helpers import LIMIT, ROOT


def tool(name: str, *arguments: str) -> subprocess.CompletedProcess:
    line = [sys.executable, str(ROOT / "tools" / name), *arguments]
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT, timeout=LIMIT)


def test_runs_are_compared_side_by_side(finished, tmp_path):
    picture = tmp_path / "curves.png"
    shutil.copytree(finished, tmp_path / "again")
    result = tool("compare_runs.py", str(finished), str(tmp_path / "again"), "--picture", str(picture))
    assert result.returncode == 0, result.stderr
    last = {line.split()[0]: line.split()[1:] for line in result.stdout.split("\n") if line.strip()}
    assert last["steps"] == ["2", "2"] and last["train/tokens"] == ["1,024", "1,024"]
    assert last["final/loss"][0] == last["final/loss"][1]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_folder_without_metrics_is_named(finished, tmp_path):
    result = tool("compare_runs.py", str(finished), str(tmp_path))
    assert result.returncode == 2 and f"no metrics in {tmp_path.name}" in result.stderr


@pytest.mark.proof
def test_every_case_of_the_gpu_table_runs_in_miniature(tmp_path):
    result = tool("benchmark", "gpu", "--smoke", "--json", str(tmp_path / "gpu.json"))
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())["results"]
    assert len(found) == 11 and all("failed" not in case for case in found.values()), found


def test_an_unknown_benchmark_is_answered_with_those_there_are():
    result = tool("benchmark", "gpus")
    assert result.returncode == 2 and "name one of" in result.stderr and "gpu" in result.stderr
