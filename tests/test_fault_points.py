"""Where a run can be broken on purpose: every point that is declared is come to, every other value is refused."""

import contextlib
import re
import shutil
import signal

import pytest
from etils import epath
from helpers import ROOT, damage

from lm_jax import cli, fault_points, files, main, manifest, remote
from lm_jax.errors import UserError

LINE = [
    "--config", "experiments/quickstart.py:smoke", "--config.train.num_steps=4", "--config.train.microbatch_rows=4",
    "--config.checkpoint.every=1", "--config.checkpoint.keep_last=1", "--config.evaluate.every=2",
    "--config.evaluate.prompt=", "--config.mesh.data=1",
    "--config.model.num_layers=1", "--config.optimizer.name=sgd",
]  # fmt: skip


def test_every_point_is_called_where_it_is_declared():
    text = "".join(path.read_text() for path in (ROOT / "lm_jax").rglob("*.py"))
    called = re.findall(r'fault_points\.reach\("([\w.]+)"\)', text)
    assert sorted(called) == sorted(fault_points.POINTS)


def test_every_point_is_come_to(tmp_path, monkeypatch):
    """By a run that goes on from a damaged checkpoint, but for what only a bucket has."""
    found = []
    monkeypatch.setattr(fault_points, "reach", found.append)
    line = [*LINE, "--workdir", str(tmp_path / "run")]
    assert main.main(line) == 0
    assert {"restore", "quarantine", "send"} == fault_points.POINTS.keys() - {*found}
    assert found[:3] == ["start", "compile", "step"] and found.count("step") == found.count("microbatch") == 4
    whole = tmp_path / "run" / "checkpoints" / "4"
    shutil.copytree(whole, whole.with_name("5"))
    damage(whole.with_name("5"))
    changed = manifest.read_manifest(epath.Path(whole)) | {"step": 5}
    (whole.with_name("5") / "MANIFEST.json").write_bytes(files.sealed(changed))
    assert main.main(["--config.train.num_steps=5" if "num_steps" in word else word for word in line]) == 0
    for name in ("near", "far"):
        (tmp_path / name).mkdir()
    (tmp_path / "near" / "log.txt").write_text("said")
    mirror = remote.LocalMirror(epath.Path(tmp_path / "far"))
    mirror.folder = epath.Path(tmp_path / "near")
    mirror.send()
    assert fault_points.POINTS.keys() == {*found}


# LM_JAX_FAULT -> what is said
REFUSED = {
    "kill": "expected ACTION@POINT",
    "kill@step:0": "expected ACTION@POINT",
    "kill@step:-1": "expected ACTION@POINT",
    "kill@step:1.5": "expected ACTION@POINT",
    "kill@step#x": "expected ACTION@POINT",
    "kill@step#1:2": "expected ACTION@POINT",
    "kill@step:٣": "expected ACTION@POINT",
    "kill@step,stop@step": "expected ACTION@POINT",
    " kill@step": "expected ACTION@POINT",
    "kil@step": "no action 'kil'; did you mean kill?\nthere is kill, stop,",
    "@step": "no action ''",
    "kill@": "no point ''",
    "kill@save": "no point 'save'",
    "kill@save.comit": "no point 'save.comit'; did you mean save.commit?\nthere is start,",
    "x" * 500: "expected ACTION@POINT",
}


@pytest.mark.parametrize("given", REFUSED)
def test_a_value_that_no_run_comes_to_is_refused(given):
    with pytest.raises(UserError) as error:
        fault_points.arm(given)
    assert REFUSED[given] in str(error.value) and len(str(error.value)) < 500
    fault_points.reach("step")  # nothing is left of it


@pytest.fixture
def done(monkeypatch) -> list:
    """What a process does to itself."""
    found = []
    monkeypatch.setattr(fault_points.os, "kill", lambda process, number: found.append(number))
    monkeypatch.setattr(fault_points.os, "_exit", lambda code: found.append(code))
    monkeypatch.setattr(fault_points.time, "sleep", found.append)
    yield found
    fault_points.arm("")


ACTS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM, "exit": 1, "sleep": 3600}


@pytest.mark.parametrize("action", ACTS)
def test_it_acts_once_at_its_time_in_its_process(action, done):
    for more, points, expected in (
        ("", ["step", "step"], [ACTS[action]]),
        (":2", ["step", "save.mark", "step", "step"], [ACTS[action]]),
        (":2", ["step", "save.mark"], []),
        (":2#0", ["step", "step", "step"], [ACTS[action]]),
        ("#1", ["step"], []),
    ):
        done.clear()
        fault_points.arm(f"{action}@step{more}")
        for point in points:
            fault_points.reach(point)
        assert done == expected, more
        assert bool(fault_points.unreached()) == (not expected and "#1" not in more)


def test_it_raises():
    fault_points.arm("raise@save.mark")
    with pytest.raises(RuntimeError, match="LM_JAX_FAULT"):
        fault_points.reach("save.mark")
    fault_points.arm("")


def test_a_command_says_that_it_was_not_broken_or_refuses(monkeypatch, capsys):
    def code() -> int:
        with contextlib.ExitStack() as listens:
            return cli.exit_code(lambda arguments: 0, [], listens)

    monkeypatch.setenv("LM_JAX_FAULT", "kill@step:3")
    assert code() == 0
    assert "not broken: step was reached 0 times" in capsys.readouterr().err
    monkeypatch.setenv("LM_JAX_FAULT", "kill@stap")
    assert code() == 2
    assert "did you mean step?" in capsys.readouterr().err
    monkeypatch.delenv("LM_JAX_FAULT")
    assert code() == 0
    assert capsys.readouterr().err == ""
