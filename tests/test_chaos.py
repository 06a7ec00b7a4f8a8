"""Killed again and again, at named points and at any moment, a run ends as the one that nobody disturbed: to the bit."""

import json
import os
import subprocess
import sys
import types

import bucket_emulator
import chaos
import pytest
from helpers import ROOT

from lm_jax.trust import killed_runs


def killed(*arguments: str) -> dict:
    """What the command says in the end."""
    line = [sys.executable, "tools/chaos.py", *arguments, "--json"]
    result = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("kills", [1, pytest.param(3, marks=pytest.mark.proof)])
def test_a_few_kills(kills):
    """The first kills of this seed: before a manifest, at any moment, and where a broken step is set aside."""
    found = killed(f"--kills={kills}", "--steps=30", "--seed=78")
    assert sum(row["kills"] for row in found["phases"]) == found["kills"] == kills
    assert all(row["steps lost"] <= 3 * killed_runs.EVERY * row["kills"] for row in found["phases"])


@pytest.mark.proof
@pytest.mark.parametrize(("processes", "place"), [(1, "local"), (2, "local"), (4, "local"), (1, "gs"), (4, "gs")])
def test_many_kills(processes, place):
    """LM_JAX_KILLS of them."""
    if place == "gs" and not bucket_emulator.is_here():
        pytest.skip("gcp-storage-emulator is not installed")
    kills = os.environ.get("LM_JAX_KILLS", "40")
    found = killed("--kills", kills, "--processes", str(processes), "--place", place)
    print(f"{processes} processes, {place}: {found}", flush=True)
    assert found["kills"] == int(kills)


@pytest.mark.parametrize("what", ["numbers", "arrays"])
def test_what_differs_is_told(what, monkeypatch, capsys):
    """In the second of two runs."""

    def start(self, workdir: str, phase: str) -> bool:
        self.kills += [killed_runs.Kill(phase, 0)] * bool(phase)
        return True

    found = {"numbers": [{"step": 1}], "arrays": [b"x"]}
    monkeypatch.setattr(killed_runs.KilledRuns, "start", start)
    monkeypatch.setattr(
        killed_runs, "outcome", lambda workdir: found | ({what: []} if workdir.endswith("run-1") else {})
    )
    assert chaos.main(["--kills=1"]) == 0
    assert "1 kills in 1 runs (--seed 0): not a bit differs" in capsys.readouterr().out
    assert chaos.main(["--kills=2"]) == 1
    assert f"run 2: its {what} are not those of the undisturbed run" in capsys.readouterr().err


def test_every_point_is_killed_once_before_one_is_killed_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(killed_runs.step_folders, "complete_steps", lambda folder: [5, 10])
    for processes, place, left_out in ((1, "local", {"send", "save.part"}), (4, "gs", set())):
        flags = types.SimpleNamespace(processes=processes, place=place, seed=3)
        made = killed_runs.KilledRuns(flags, str(tmp_path), str(tmp_path))
        phases = [
            made.next_phase(str(tmp_path)) for _ in range(len(killed_runs.fault_points.POINTS) - len(left_out) + 4)
        ]
        assert sorted(phases) == sorted(
            [*(killed_runs.fault_points.POINTS.keys() - left_out), *[killed_runs.STARTING, killed_runs.RUNNING] * 2]
        )
        again = killed_runs.KilledRuns(flags, str(tmp_path), str(tmp_path))
        assert [again.next_phase(str(tmp_path)) for _ in phases] == phases
