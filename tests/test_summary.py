"""`--json`: the last line of a run is one object, whatever ended it; SIGUSR1: a run saves, samples and profiles, and goes on."""

import json
import os
import signal
import sys
import time

import pytest
from etils import epath
from helpers import ROOT, command, lines_of, outputs, start_processes

from lm_jax import between_steps, cli, evaluate, main, step_folders, step_log

SMOKE = ["--config", str(ROOT / "experiments" / "quickstart.py:smoke"), "--config.mesh.data=1", "--json"]
SMALL = [
    "--config.data.tokenizer=bytes",
    "--config.model.num_layers=1",
    "--config.optimizer.name=sgd",
    "--config.evaluate.prompt=",
]


def last(output: str) -> dict:
    return json.loads(output.rstrip("\n").split("\n")[-1])


def ended(arguments: list[str], capsys, command=main.main) -> tuple[int, dict]:
    """(exit code, the object in the last line) of a command in this process."""
    with pytest.raises(SystemExit) as error:
        cli.run_command(command, arguments)
    return error.value.code, last(capsys.readouterr().out)


def test_a_run_is_summed_up_and_again_once_it_is_finished(tmp_path, capsys):
    line = [*SMOKE, *SMALL, "--workdir", str(tmp_path / "run")]
    code, told = ended(line, capsys)
    values = {name: value for found in lines_of(tmp_path / "run") for name, value in found.items()}
    assert (code, told["exit_code"], told["exit_reason"], told["step"]) == (0, 0, "steps", 2)
    assert (told["loss"], told["bits_per_byte"]) == (values["final/loss"], values["final/bits_per_byte"])
    assert told["train_loss"] == values["train/loss"] and told["tokens"] == values["train/tokens"] == 2 * 8 * 64
    assert 0 < told["seconds"] < 600 and told["peak_bytes"] > 1e8 and told["workdir"] == str(tmp_path / "run")
    code, again = ended(line, capsys)
    assert (code, again["exit_reason"]) == (0, "finished before")
    same = ("loss", "bits_per_byte", "step", "tokens", "config_hash")
    assert [again[name] for name in same] == [told[name] for name in same]
    other = ended([*line, "--config.train.seed=1"], capsys)
    assert (
        other[0] == 2
        and other[1]["exit_reason"].startswith("mistake: ")
        and other[1]["config_hash"] != told["config_hash"]
    )


def test_what_never_trained_is_summed_up(tmp_path, capsys):
    assert ended([*SMOKE, *SMALL, "--dry_run"], capsys)[1]["exit_reason"] == "dry run"
    code, told = ended([*SMOKE, "--lr=1"], capsys)
    assert (code, told["exit_code"]) == (2, 2) and "here that is --config.optimizer.learning_rate=1" in told[
        "exit_reason"
    ]


def test_a_run_that_is_stopped_is_summed_up(tmp_path, capsys, monkeypatch):
    """As SIGTERM does it; and where nothing is to be saved, by the thread that ends the process."""
    real = step_log.StepLog.done

    def asking(self, step, *arguments):
        real(self, step, *arguments)
        self.run.stop.requested = step == 3

    monkeypatch.setattr(step_log.StepLog, "done", asking)
    code, told = ended([*SMOKE, *SMALL, "--config.train.num_steps=9", "--workdir", str(tmp_path / "run")], capsys)
    assert (code, told["exit_code"], told["exit_reason"], told["step"]) == (75, 75, "signal", 3)


def test_an_evaluation_is_summed_up_however_it_ends(finished, capsys):
    line = ["--model", str(finished), "--rows=1"]
    assert evaluate.main(line) == 0
    plain = last(capsys.readouterr().out)
    code, told = ended([*line, "--json"], capsys, evaluate.main)
    assert (code, told["exit_code"], told["exit_reason"]) == (0, 0, "done") and plain.items() <= told.items()
    code, told = ended(["--model", f"{finished}-gone", "--json"], capsys, evaluate.main)
    assert (
        (code, told["exit_code"]) == (2, 2) and told["exit_reason"].startswith("mistake: ") and "eval/loss" not in told
    )


@pytest.mark.proof
def test_a_signal_before_the_first_step_leaves_an_object(tmp_path, monkeypatch):
    monkeypatch.setenv("LM_JAX_FAULT", "term@compile")
    result = command("main", *SMOKE, *SMALL, "--workdir", str(tmp_path / "run"), devices=1)
    told = last(result.stdout)
    assert (result.returncode, told["exit_code"], told["exit_reason"]) == (143, 143, "signal") and told["step"] == 0


@pytest.mark.proof
def test_sigusr1_to_any_process_is_answered_by_all(tmp_path, monkeypatch):
    monkeypatch.setenv("LM_JAX_FAULT", "usr1@step:3#1")
    given = [
        *SMOKE[:2],
        *SMALL,
        "--config.train.num_steps=12",
        "--config.checkpoint.every=100",
        f"--workdir={tmp_path / 'run'}",
    ]
    said = outputs(start_processes([sys.executable, "-u", "-m", "lm_jax.main", "--json", *given], 2, devices=2))
    assert (
        "asked by SIGUSR1: step" in said[0] and last(said[0])["exit_reason"] == "steps" and "exit_reason" not in said[1]
    )
    first, *rest = step_folders.complete_steps(epath.Path(tmp_path / "run" / "checkpoints"))
    assert 3 <= first < 12 and rest == [12]


def test_sigusr1_saves_shows_and_profiles_and_the_run_goes_on(tmp_path, capsys, monkeypatch):
    real = step_log.StepLog.done

    def asking(self, step, *arguments):
        real(self, step, *arguments)
        if step == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
            while not self.run.stop.look:  # a thread takes it
                time.sleep(0.001)

    monkeypatch.setattr(step_log.StepLog, "done", asking)
    shown = []
    monkeypatch.setattr(between_steps, "show_sample", lambda run, writer: shown.append(run.data.step))
    line = [
        *SMOKE,
        *SMALL,
        "--config.train.num_steps=9",
        "--config.checkpoint.every=100",
        "--workdir",
        str(tmp_path / "run"),
    ]
    code, told = ended(line, capsys)
    assert (code, told["exit_reason"]) == (0, "steps")
    assert step_folders.complete_steps(epath.Path(tmp_path / "run" / "checkpoints")) == [3, 9]
    assert 3 in shown and list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    assert "trace of steps 4 to 6" in (tmp_path / "run" / "log.txt").read_text()
