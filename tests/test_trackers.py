"""Trackers of experiments beside metrics.jsonl: one run however often it is killed, no number twice; none ends a run."""

import json
import os
import subprocess
import sys

import pytest
from etils import epath
from helpers import LIMIT, ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2
from tracked_run import FLAT, train

from lm_jax import metrics, metrics_file, trackers
from lm_jax.errors import UserError


class Recorder:
    """What it was sent, a line each, in a file that a kill does not touch."""

    def __init__(self, folder, title, kept, flat):
        self.path, self.broken = folder / "sent.jsonl", (folder / "broken").exists()
        self._line("open", title, kept["id"], flat)

    def _line(self, *values):
        if self.broken and values[0] != "open":
            raise ConnectionError("no route to host")
        with open(self.path, "a") as file:
            file.write(json.dumps(values) + "\n")

    def scalars(self, step, values):
        self._line("scalars", step, values)

    def text(self, step, name, text):
        self._line("text", step, {name: text})

    def close(self):
        self._line("close")


def test_killed_and_resumed_it_is_one_run_without_a_number_twice(tmp_path, monkeypatch):
    """Killed after step 6 and again at step 5 of its second life, which began at step 4, as the third does."""
    monkeypatch.setattr(trackers, "KINDS", {"recorder": Recorder})
    train(tmp_path, 0, 6, closes=False)
    train(tmp_path, 4, 5, closes=False)
    train(tmp_path, 4, 8, closes=True)
    lines = [json.loads(line) for line in (tmp_path / "sent.jsonl").read_text().splitlines()]
    opened = [line for line in lines if line[0] == "open"]
    assert len(opened) == 3 and opened[0] == opened[1] == opened[2] and opened[0][1:4:2] == ["mine", FLAT]
    sent = [
        (step, name)
        for kind, *more in lines
        if kind in ("scalars", "text")
        for step, values in [more]
        for name in values
    ]
    even = [(step, name) for step in (2, 4, 6, 8) for name in ("eval/loss", "sample")]
    assert sorted(sent) == sorted([*((step, "train/loss") for step in range(1, 9)), *even])
    assert [line["step"] for line in metrics_file.read(epath.Path(tmp_path))] == [1, 2, 2, 3, 4, 4, 5, 6, 6, 7, 8, 8]


def test_one_that_fails_is_left_and_said(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "KINDS", {"recorder": Recorder})
    (tmp_path / "broken").touch()
    told = []
    train(tmp_path, 0, 3, closes=True, log=told.append)
    assert told == [
        "recorder takes no more numbers of this run, metrics.jsonl has them all: ConnectionError: no route to host"
    ]
    assert len(metrics_file.read(epath.Path(tmp_path))) == 4


def test_one_that_is_not_installed_is_refused_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    trackers.check(("tensorboard",))
    with pytest.raises(
        UserError, match=r"config.log.trackers = 'wandb' needs the package wandb: .*pip install -e '.\[wandb\]'"
    ):
        trackers.check(("tensorboard", "wandb"))


def test_tensorboard_has_the_name_of_the_run_and_both_losses_in_one_chart(tmp_path):
    writer = metrics.Writer(epath.Path(tmp_path), 0, print, ("tensorboard",), "mine", FLAT)
    writer.hyper_parameters()
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    session = plugin_data_pb2.HParamsPluginData.FromString(
        events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    )
    assert session.session_start_info.group_name == "mine"
    layout = layout_pb2.Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    assert ["train/loss", "eval/loss"] in [list(chart.multiline.tag) for chart in layout.category[0].chart]


@pytest.mark.proof
def test_real_trackers_without_a_network(tmp_path):
    """wandb, trackio and mlflow as they are: killed after step 6, resumed at step 4."""
    import sqlite3

    environment = os.environ | {
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "WANDB_MODE": "offline",
        "HF_HUB_OFFLINE": "1",
    }
    for first, last, closes in ((0, 6, False), (4, 8, True)):
        line = [sys.executable, "tests/tracked_run.py", str(tmp_path), str(first), str(last), *["kill"] * (not closes)]
        result = subprocess.run(
            line,
            env=environment | {"PYTHONPATH": os.pathsep.join(map(str, [ROOT, *sys.path[1:]]))},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )
        assert result.returncode == (0 if closes else 9), result.stderr
        assert "takes no more numbers" not in result.stdout, result.stdout
    kept = json.loads((tmp_path / "trackers.json").read_text())
    trackio = sqlite3.connect(tmp_path / "trackio" / "lm_jax.db")
    rows = trackio.execute("select step, metrics from metrics where run_name = ?", (f"mine-{kept['id']}",)).fetchall()
    assert [step for step, values in rows if "train/loss" in json.loads(values)] == [*range(1, 9)]
    mlflow = sqlite3.connect(tmp_path / "mlflow.db")
    found = mlflow.execute("select run_uuid, step from metrics where key = 'train/loss'").fetchall()
    assert found == [(kept["runs"]["mlflow"], step) for step in range(1, 9)]
    assert mlflow.execute("select status from runs").fetchall() == [("FINISHED",)]
    offline = sorted((tmp_path / "wandb").glob(f"offline-run-*-{kept['id']}"))
    assert len(offline) == 2 and sum(len([*folder.glob("files/media/html/sample_*")]) for folder in offline) == 4
