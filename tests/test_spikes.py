"""A spike of the loss: what is one and what is none, and a run that goes back behind it, to the bit, wherever it is killed."""

import json
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from helpers import LIMIT, ONCE, ROOT, lines_of, poison

from lm_jax import checkpoint, cli, load_model, main, spikes, step_folders
from lm_jax.batch_ramp import DataState, Ramp
from lm_jax.config import Mesh
from lm_jax.data import loader, mixed_rows
from lm_jax.manifest import MANIFEST
from lm_jax.mesh import make_mesh
from lm_jax.train_state import make_program

FIXTURE = ROOT / "tests" / "fixtures" / "loss_curves.json"
NOISE = np.random.RandomState(0)


def spikes_in(losses, norms) -> list[int]:
    """Steps, counted from 1, at which a spike begins."""
    watch = spikes.Watch({})
    return [step for step, pair in enumerate(zip(losses, norms, strict=True), 1) if watch(*map(float, pair))]


CURVES = {name: (curve["loss"], curve["grad_norm"]) for name, curve in json.loads(FIXTURE.read_text()).items()}
FLAT, FALLING = 3 + 0.05 * NOISE.randn(600), 3 + 4 * np.exp(-np.arange(600) / 100) + 0.05 * NOISE.randn(600)
NORM = np.exp(0.2 * NOISE.randn(600))
SMOOTH = CURVES | {
    "flat": (FLAT, NORM),
    "falling": (FALLING, NORM),
    "constant": (np.full(300, 3.0), np.full(300, 1.0)),
    "zero": (np.zeros(300), np.zeros(300)),
    "rising slowly": (3 + np.arange(600) / 600 + 0.05 * NOISE.randn(600), NORM),
    "only norms jump": (FLAT, np.where(np.arange(600) % 50 == 49, 100, NORM)),
    "only losses jump": (np.where(np.arange(600) % 50 == 49, 9, FLAT), NORM),
    "not finite": (
        np.where(np.arange(600) % 50 == 49, np.nan, FLAT),
        np.where(np.arange(600) % 50 == 49, np.inf, NORM),
    ),
    "jumps too early": (np.where(np.arange(300) < spikes.FEWEST, NOISE.randn(300) ** 2 * 9, 3), np.ones(300)),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_a_smooth_curve_has_no_spike(name):
    assert spikes_in(*SMOOTH[name]) == []


@pytest.mark.parametrize("length", [1, 3, 40])
@pytest.mark.parametrize("at", [100, 200, 299])
@pytest.mark.parametrize("name", [*CURVES, "flat", "falling"])
def test_a_jump_is_found_at_its_first_step_and_said_once(name, at, length):
    losses, norms = (np.array(values[:300]) for values in SMOOTH[name])
    losses[at : at + length] += 8
    norms[at : at + length] *= 10
    assert spikes_in(losses, norms) == [at + 1]


def test_what_a_watch_knows_survives_json():
    losses, norms = SMOOTH["flat"]
    for until in (20, 100, 400):
        watch = spikes.Watch({})
        for pair in zip(losses[:until], norms[:until], strict=True):
            watch(*map(float, pair))
        again = spikes.Watch(json.loads(json.dumps(watch.kept())))
        assert again.kept()["recent"] == watch.kept()["recent"] and again.inside == watch.inside
        assert watch(9.0, 99.0) == again(9.0, 99.0) and watch.inside == again.inside == (until >= spikes.FEWEST)


@pytest.mark.parametrize(
    ("skipped", "good", "spike", "expected"),  # 10 rows a step; 2 steps around
    [
        ((), 0, 8, ((50, 100),)),
        ((), 6, 8, ((60, 100),)),  # never rows that the saved step has consumed
        (((3, 5),), 0, 8, ((3, 5), (52, 102))),  # cursors count what is left
        (((50, 100),), 0, 8, ((50, 100), (100, 150))),  # the same steps again: what came in the place of the rows
        (((50, 100),), 0, 6, ((50, 100), (100, 130))),  # rows before a range that was left out are not to blame
        (((50, 100), (400, 410)), 0, 8, ((50, 100), (100, 150), (400, 410))),
        (((80, 85),), 0, 6, ((30, 80), (80, 85))),
    ],
)
def test_rows_around_a_spike_are_one_more_range(monkeypatch, skipped, good, spike, expected):
    monkeypatch.setattr(spikes, "AROUND", 2)
    ramp = Ramp(((0, 0, 10),))

    def row_at(cursor):
        for first, last in skipped:
            cursor += (last - first) * (cursor >= first)
        return cursor

    data = DataState(good, 10 * good, skipped)
    found = spikes.without_rows_around(spike, data, ramp, row_at)
    assert found == DataState(good, 10 * good, expected)
    assert spikes.times_gone_back(found, row_at) >= 1


# A run whose rows 240 to 263 are poison: one token, and it is the wrong one. The limits of `spikes` in miniature.
SMALL = dict(FEWEST=8, MARGIN=4, AROUND=2, MOST=2)
LINE = [
    "--config", "experiments/quickstart.py:smoke", "--config.evaluate.prompt=", "--config.evaluate.every=10",
    "--config.optimizer.learning_rate=1e-2", "--config.checkpoint.every=6", "--config.mesh.data=1",
    "--config.log.every=4", "--config.train.num_steps=48", "--config.model.num_layers=1",
]  # fmt: skip
REWIND = [*LINE, "--config.train.on_spike=rewind"]


@pytest.fixture
def poisoned(monkeypatch):
    """`poison`, and limits in miniature; as they were afterwards."""
    monkeypatch.setattr(loader.Stream, "block", loader.Stream.block)
    for name, value in SMALL.items():
        monkeypatch.setattr(spikes, name, value)
    return poison


def last_state(workdir):
    """What the last step of a run holds: its arrays, its data state and what the watch knows."""
    found = load_model.locate(str(workdir))
    with jax.set_mesh(make_mesh(Mesh(), jax.devices()[:1])):
        program = make_program(found.config, found.tokenizer.vocab_size)
        state, data = checkpoint.restore(found.workdir, found.step, program)
    return (
        [np.asarray(x) for x in jax.tree.leaves(state)],
        data,
        step_folders.saved_beside(found.workdir, found.step)["recent"],
    )


def same_run(a, b) -> None:
    assert lines_of(a) == lines_of(b)
    (arrays, *rest), (expected, *of_b) = last_state(a), last_state(b)
    assert rest == of_b and all(map(np.array_equal, arrays, expected))


@pytest.fixture(scope="module")
def recovered(tmp_path_factory):
    """A run that went back on its own, and the rows that it read, pass by pass."""
    workdir, rows, plain = tmp_path_factory.mktemp("recovered") / "run", [], loader.batches

    def listed(stream, *given):
        read: list[int] = []
        if isinstance(stream, mixed_rows.SkippingRows):  # not those of an evaluation
            rows.append(read)
        for batch in plain(stream, *given):
            read.extend(np.asarray(batch["row"]).tolist())
            yield batch

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loader, "batches", listed)
        poisoned.__wrapped__(patched)(240, 264)
        assert main.main([*REWIND, "--workdir", str(workdir)]) == 0
    return workdir, rows


def test_a_run_goes_back_behind_a_spike_and_leaves_its_rows_out(recovered):
    workdir, (before, after) = recovered
    said = (workdir / "log.txt").read_text()
    assert "step 31, rows 240 to 247: loss" in said and "went back to step 24: from there on rows 224 to 263" in said
    assert before[:248] == list(range(248)) and after == [*range(192, 224), *range(264, 424)], "every other row once"
    assert last_state(workdir)[1] == DataState(48, 384, ((224, 264),))
    assert max(line["train/loss"] for line in lines_of(workdir) if "train/loss" in line) < 7


class Killed(BaseException):
    pass


def die(*_, **__):
    raise Killed


# SIGKILL comes while steps are removed, as a real process: these are proofs.
POINTS = ["before", "later steps removed", "manifest written", "restoring", "at the next save"]


@pytest.mark.proof
@pytest.mark.parametrize("point", POINTS)
def test_a_run_that_is_killed_while_it_goes_back_is_the_one_that_was_not(recovered, poisoned, tmp_path, point):
    """Wherever it dies on the way, the same command ends with the same bits."""
    poisoned(240, 264)
    line, real = [*REWIND, "--workdir", str(tmp_path / "killed")], step_folders.go_back
    with pytest.MonkeyPatch.context() as patched:

        def dying(*given):
            if point == "before":
                die()
            if point == "later steps removed":
                patched.setattr(step_folders, "write_whole", die_at_the_manifest)
            real(*given)
            if point == "manifest written":
                die()
            patched.setattr(*(checkpoint, "restore") if point == "restoring" else (checkpoint.Saver, "save"), die)

        def die_at_the_manifest(path, content, write=step_folders.write_whole):
            if path.name == MANIFEST:
                die()
            write(path, content)

        patched.setattr(step_folders, "go_back", dying)
        with pytest.raises(Killed):
            main.main(line)
    assert main.main(line) == 0
    same_run(tmp_path / "killed", recovered[0])


KILLING = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from helpers import poison
from lm_jax import cli, main, spikes, step_folders
vars(spikes).update({SMALL})
poison(240, 264)
remove = step_folders.remove_step
def removed(folder, step):
    remove(folder, step)
    if step == 30:
        os.kill(os.getpid(), signal.SIGKILL)
step_folders.remove_step = removed
cli.run_command(main.main)
"""


def test_sigkill_in_the_middle_of_going_back_changes_no_bit(recovered, poisoned, tmp_path):
    poisoned(240, 264)
    line, environment = [*REWIND, "--workdir", str(tmp_path / "killed")], os.environ | ONCE
    killed = subprocess.run([sys.executable, "-c", KILLING, *line], env=environment, capture_output=True, timeout=LIMIT)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert main.main(line) == 0
    same_run(tmp_path / "killed", recovered[0])


def test_what_comes_again_and_again_ends_with_70(poisoned, tmp_path, capsys):
    poisoned(240, 10**9)
    line = [*REWIND, "--workdir", str(tmp_path / "run")]
    assert main.main(line) == cli.EXIT_FAULT
    said = capsys.readouterr().out
    assert said.count("went back to step 24") == SMALL["MOST"]
    assert "stopped: the loss jumps again, after rows were left out 2 times from step 24 on" in said
    steps = step_folders.complete_steps(tmp_path / "run" / "checkpoints")
    assert main.main(line) == cli.EXIT_FAULT and "went back" not in capsys.readouterr().out
    assert step_folders.complete_steps(tmp_path / "run" / "checkpoints") == steps
    assert main.main([*LINE, "--config.train.on_spike=log", "--workdir", str(tmp_path / "run")]) == 0


@pytest.mark.proof
def test_off_and_log_change_nothing(poisoned, tmp_path, capsys):
    """But for a line on the terminal."""
    poisoned(240, 264)
    for name in ("off", "log"):
        assert main.main([*LINE, f"--config.train.on_spike={name}", "--workdir", str(tmp_path / name)]) == 0
        assert ("step 31, rows 240 to 247: loss" in capsys.readouterr().out) == (name == "log")
    assert lines_of(tmp_path / "off") == lines_of(tmp_path / "log")
    manifest = (tmp_path / "off" / "checkpoints" / "48" / "MANIFEST.json").read_text()
    assert '"recent"' not in manifest and len(lines_of(tmp_path / "off")) > 12


def test_without_an_old_enough_step_it_goes_on(poisoned, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(spikes, "MARGIN", 40)
    poisoned(240, 264)
    assert main.main([*REWIND, "--workdir", str(tmp_path / "run")]) == 0
    assert "no saved step is 40 steps before it" in capsys.readouterr().out
