"""The loop: it learns, it can be killed anywhere and goes on to the bit, and what it wrote can be read back."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from helpers import FAMILIES, LIMIT, ONCE, ROOT, assert_same_run, command, damage, lines_of, tiny
from one_process import performed
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lm_jax import checkpoint, experiment, files, main, manifest, metrics_file, step_folders
from lm_jax.config import Config, Mesh, default_config
from lm_jax.config_check import resolve
from lm_jax.data import loader
from lm_jax.errors import UserError
from lm_jax.experiment import shrink
from lm_jax.mesh import make_mesh
from lm_jax.model_config import OBJECTIVES
from lm_jax.train_state import fresh, make_program
from lm_jax.train_step import compile_step

# Dropout, two microbatches a step, an evaluation and several checkpoints: everything that a resumed run must get right.
STEPS = 12
ARGUMENTS = [
    "--config", "experiments/quickstart.py:smoke", f"--config.train.num_steps={STEPS}", "--config.train.microbatch_rows=4",
    "--config.model.dropout=0.1", "--config.checkpoint.every=3", "--config.evaluate.every=4", "--config.evaluate.prompt=",
    "--config.mesh.data=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> pathlib.Path:
    """The run that nobody interrupts."""
    workdir = tmp_path_factory.mktemp("reference") / "run"
    assert main.main([*ARGUMENTS, "--workdir", str(workdir)]) == 0
    return workdir


def start(workdir, *more: str) -> subprocess.Popen:
    line = [sys.executable, "-u", "-m", "lm_jax.main", *ARGUMENTS, "--workdir", str(workdir), *more]
    environment = os.environ | ONCE  # the same eight devices, of which the run has one
    return subprocess.Popen(
        line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )


def wait_for_step(process: subprocess.Popen, workdir: pathlib.Path, step: int) -> None:
    """Until the metrics have `step`, or the process has ended."""
    path = workdir / "metrics.jsonl"
    while process.poll() is None:
        if path.exists() and sum('"train/loss"' in line for line in path.read_text().split("\n")) >= step:
            break
        time.sleep(0.002)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.proof)])
def test_asked_to_stop_it_saves_and_says_how_to_go_on(reference, tmp_path, number):
    workdir = tmp_path / "run"
    process = start(workdir)
    wait_for_step(process, workdir, step=2)
    process.send_signal(number)
    out, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 75, out
    assert "the same command goes on from there" in out and "Traceback" not in out
    saved = step_folders.complete_steps(workdir / "checkpoints")[-1]
    assert 2 <= saved < STEPS
    if number == signal.SIGTERM:
        assert main.main([*ARGUMENTS, "--workdir", str(workdir)]) == 0
        assert f"resumed at step {saved}" in (workdir / "log.txt").read_text()
        assert_same_run(workdir, reference)


def test_a_finished_run_prints_its_result_and_changes_nothing(reference):
    before = {
        path: path.stat().st_mtime_ns
        for path in reference.rglob("*")
        if path.is_file() and path.name not in ("log.txt", "lock")
    }
    result = command("main", *ARGUMENTS, "--workdir", str(reference), cwd=ROOT)
    assert result.returncode == 0 and "this run is finished: final/loss" in result.stdout
    assert all(path.stat().st_mtime_ns == time_before for path, time_before in before.items())


def test_an_event_file_holds_every_scalar_of_the_metrics(reference):
    events = EventAccumulator(str(reference / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    lines = metrics_file.read(reference)
    expected = {(line["step"], name): value for line in lines for name, value in line.items() if name != "step"}
    found = {(event.step, tag): event.value for tag in events.Tags()["scalars"] for event in events.Scalars(tag)}
    assert found.keys() == expected.keys() and len(found) > 50
    np.testing.assert_allclose(list(found.values()), [expected[key] for key in found], rtol=1e-6)
    assert {"train/loss", "train/grad_norm", "train/learning_rate", "train/tokens", "perf/tokens_per_second",
            "perf/step_seconds", "eval/loss", "eval/perplexity", "eval/bits_per_byte"} <= {name for _, name in found}  # fmt: skip
    assert "perf/mfu" not in {name for _, name in found}, "of a peak that was measured beside other work"
    text = events.Tensors("config")[0].tensor_proto.string_val[0].decode()
    assert "model.dropout = 0.1" in text
    assert "_hparams_/session_start_info" in events.Tags()["tensors"]


def test_samples_are_in_the_event_file(finished):
    events = EventAccumulator(str(finished / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    assert [event.step for event in events.Tensors("sample")] == [0, 1, 2]


def test_the_metrics_have_no_hole_and_count_tokens(reference):
    lines = [line for line in metrics_file.read(reference) if "train/loss" in line]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["train/tokens"] for line in lines] == [8 * 64 * step for step in range(1, STEPS + 1)]
    assert [line["step"] for line in metrics_file.read(reference) if "eval/loss" in line] == [4, 8, 12]


def test_the_config_is_kept_with_where_values_came_from(reference):
    saved = json.loads((reference / "config.json").read_text())
    assert saved["config"]["train.microbatch_rows"] == 4
    assert saved["origins"]["model.dropout"] == {"from": "command line", "default": 0.0, "file": 0.0}
    assert saved["origins"]["model.num_layers"]["from"] == "file"


def test_retention_keeps_the_newest(reference):
    assert step_folders.complete_steps(reference / "checkpoints") == [9, 12]
    assert sorted(path.name for path in (reference / "checkpoints").iterdir()) == ["12", "9"]


@pytest.fixture
def copy(reference, tmp_path) -> pathlib.Path:
    subprocess.run(["cp", "-r", str(reference), str(tmp_path / "copy")], check=True)
    return tmp_path / "copy"


def test_a_broken_checkpoint_is_set_aside_and_the_one_before_is_used(copy, reference, capsys):
    damage(copy / "checkpoints" / "12")
    assert main.main([*ARGUMENTS, "--workdir", str(copy)]) == 0
    said = capsys.readouterr().out
    assert "checkpoint 12 is broken" in said and "resumed at step 9" in said
    assert (copy / "checkpoints" / "12.broken").exists()
    assert_same_run(copy, reference)


def fault_in(folder: pathlib.Path) -> str:
    return manifest.invalid_reason(checkpoint.epath.Path(folder))


def test_every_kind_of_damage_is_found(copy):
    step = copy / "checkpoints" / "9"
    manifest = (step / "MANIFEST.json").read_text()
    assert fault_in(step) == ""
    (step / "more").write_text("x")
    assert fault_in(step) == "more is not as it was written"
    (step / "more").unlink()
    (step / "MANIFEST.json").write_bytes(files.sealed(json.loads(manifest) | {"format": 7}))
    assert "format 7" in fault_in(step)
    (step / "MANIFEST.json").write_text(manifest.replace('"step": 9', '"step": 8'))
    assert fault_in(step) == "MANIFEST.json is not as it was written"
    (step / "MANIFEST.json").write_text(manifest[:50])
    assert fault_in(step) == "MANIFEST.json cannot be read as JSON"
    (step / "MANIFEST.json").write_text(manifest)
    path = damage(step)
    assert fault_in(step) == f"{path.relative_to(step)} is not as it was written"
    path.unlink()
    assert fault_in(step) == f"{path.relative_to(step)} is missing"


def test_a_step_that_was_never_finished_is_removed(copy):
    torn = copy / "checkpoints" / "12"
    (torn / "MANIFEST.json").unlink()
    (copy / "checkpoints" / "12.unfinished").touch()
    (copy / "checkpoints" / "15.orbax-checkpoint-tmp").mkdir()
    said = []
    step_folders.clean(checkpoint.epath.Path(copy), said.append)
    assert [path.name for path in (copy / "checkpoints").iterdir()] == ["9"] and len(said) == 2


def test_a_step_that_lost_its_manifest_is_set_aside_and_a_run_without_another_does_not_start_over(copy):
    folder, said = copy / "checkpoints", []
    for step in ("9", "12"):
        (folder / step / "MANIFEST.json").unlink()
    assert step_folders.has_steps(checkpoint.epath.Path(copy))
    step_folders.clean(checkpoint.epath.Path(copy), said.append)
    assert sorted(path.name for path in folder.iterdir()) == ["12.broken", "9.broken"] and len(said) == 2
    with pytest.raises(UserError, match="is whole; remove the folder to start over"):
        step_folders.newest_valid(checkpoint.epath.Path(copy), said.append, quarantine=True)


def test_what_is_not_ours_beside_the_steps_stays(copy):
    folder = copy / "checkpoints"
    names = ["2024", "01", "notes", "my.orbax-checkpoint-tmp", "²", "7.copy"]
    for name in names:
        (folder / name).mkdir()
        (folder / name / "notes.txt").write_text("mine")
    step_folders.clean(checkpoint.epath.Path(copy), print)
    assert all((folder / name / "notes.txt").read_text() == "mine" for name in names)
    assert step_folders.complete_steps(checkpoint.epath.Path(folder)) == [9, 12]


def test_a_second_run_in_the_workdir_is_refused(copy):
    import fcntl

    with open(copy / "lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        result = command("main", *ARGUMENTS, "--workdir", str(copy), cwd=ROOT)
    assert result.returncode == 2 and "another run is at work" in result.stderr


def test_init_from_starts_from_the_parameters_of_another_run(reference, tmp_path):
    more = ["--workdir", str(tmp_path / "run"), f"--config.train.init_from={reference}", "--config.log.every=1"]
    assert main.main([*ARGUMENTS, *more]) == 0
    first, last = lines_of(tmp_path / "run")[0], lines_of(reference)[-1]
    assert first["step"] == 1 and abs(first["train/loss"] - last["final/loss"]) < 0.5
    assert lines_of(reference)[0]["train/loss"] - first["train/loss"] > 0.5


@pytest.mark.parametrize(
    "family",  # an LSTM takes another rate: test_families.py
    [pytest.param(name, marks=[] if name == "gpt2" else pytest.mark.proof) for name in FAMILIES if name != "lstm"],
)
def test_one_batch_is_learnt_by_heart(corpus, family):
    """To under 0.1 nats a token: the gradient reaches everything and the update goes down."""
    changes = FAMILIES[family] | dict(optimizer__learning_rate=1e-2, optimizer__weight_decay=0.0)
    config = tiny(**changes, train__num_steps=150, optimizer__decay_over=150, optimizer__warmup=10)
    mesh = make_mesh(Mesh(), jax.devices()[:1])
    stream = loader.Stream(corpus.splits["train"], 64, 0)
    with jax.set_mesh(mesh):
        batch = next(loader.batches(stream, mesh, 0, 1, 8))
        program = make_program(config, corpus.tokenizer.vocab_size)
        state, one_step = jax.jit(lambda: fresh(program))(), compile_step(program, mesh, one_microbatch=True)
        losses = []
        for _ in range(150):
            state, found = one_step(state, 1, iter([batch]), lambda done: False)
            losses.append(float(found["train/loss"]))
    assert abs(losses[0] - np.log(corpus.tokenizer.vocab_size)) < 0.1, "an untrained model knows nothing"
    cap, others = config.model.logit_softcap[1], corpus.tokenizer.vocab_size - 1
    least = np.log1p(others * np.exp(-2 * cap)) if cap else 0  # where no logit is farther than `cap` from nought
    assert losses[-1] < least + 0.1


def test_a_given_up_step_leaves_the_state_as_it_was(corpus):
    config = tiny(train__microbatch_rows=4, model__num_layers=1, optimizer__name="sgd")
    mesh = make_mesh(Mesh(), jax.devices()[:1])
    stream = loader.Stream(corpus.splits["train"], 64, 0)
    with jax.set_mesh(mesh):
        program = make_program(config, corpus.tokenizer.vocab_size)
        state, one_step = jax.jit(lambda: fresh(program))(), compile_step(program, mesh, one_microbatch=False)
        before = jax.tree.map(np.asarray, state)
        assert one_step(state, 2, loader.batches(stream, mesh, 0, 2, 4), lambda done: True) is None
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(state), strict=True):
            np.testing.assert_array_equal(a, b)
        assert one_step(state, 2, loader.batches(stream, mesh, 0, 2, 4), lambda done: False) is not None


def command_config(name: str) -> Config:
    return experiment.load_config(f"experiments/{name}", {})[0]


EXPERIMENTS = sorted(path.name for path in (ROOT / "experiments").glob("*.py"))
# The rows of GPT-3's table beyond the first are one program in miniature: it is run, test_experiments.py traces each.
LARGE_ROW = ["model.compute_dtype=bfloat16", "model.unroll=False", "model.remat=full", "mesh.data=1", "mesh.fsdp=-1"]
SMALL = {*EXPERIMENTS} - {"tour.py"}  # test_tour.py runs that


def record_of(task: str, labels: tuple[str, ...], i: int) -> dict:
    """The i-th record of a task."""
    words = [f"word{i}", "and", "more"] * 4
    return {
        "classification": {"text": f"{i} " * 20, "label": labels[i % len(labels)] if labels else ""},
        "regression": {"text": f"{i} " * 20, "value": i % 7},
        "token_classification": {
            "tokens": words,
            "tags": [labels[k % len(labels)] if labels else "" for k in range(12)],
        },
        "question_answering": {"question": "which?", "context": " ".join(words), "answer": f"word{i}"},
        "text_to_text": {"source": f"{i} in full", "target": f"{i}"},
    }[task]


def smoke(name: str, folder: pathlib.Path) -> list[str]:
    """The command of an experiment in miniature, with records and a tokenizer in the place of those that are not here."""
    arguments = ["--config", str(ROOT / "experiments" / f"{name}:smoke"), "--workdir", str(folder / "run")]
    config = command_config(name)
    if name in ("gpt3.py", "decoders.py"):  # as an accelerator would have it
        arguments += [f"--config.{setting}" for setting in LARGE_ROW]
    if task := config.train.task:
        lines = [json.dumps(record_of(task, config.model.labels, i)) for i in range(120)]
        folder.mkdir()
        (folder / "train.jsonl").write_text("\n".join(lines))
        arguments += [f"--config.data.sources={folder}", "--config.data.tokenizer=bytes"]
        arguments += ["--config.data.validation_fraction=0.2"]
        if config.evaluate.metrics:  # those that need no package
            arguments += ["--config.evaluate.metrics=answers"]
    return ["-m", "lm_jax.main", *arguments]


def check_smoke(name: str, workdir: pathlib.Path, output: str) -> None:
    found, config = metrics_file.read(workdir), command_config(name)
    assert [line["step"] for line in found if "train/loss" in line] == [1, 2], name
    for words in ("parameters", "this machine: cpu", "eval/loss", "next:", "done in"):
        assert words in output, name
    writes = config.model.kind not in OBJECTIVES and not config.train.task
    for words in ("sample at step 0", "gzip -9", "xz -9", "lm_jax.generate"):
        assert (words in output) == writes, f"{name}: a sample and gzip's bytes, of what writes text alone"


def test_smoke_of_the_quickstart_runs_two_steps(finished):
    check_smoke("quickstart.py", finished, (finished / "log.txt").read_text())


@pytest.mark.proof
def test_smoke_of_every_experiment_runs_two_steps(tmp_path):
    names = sorted(SMALL)
    for name, result in zip(names, performed([smoke(name, tmp_path / name) for name in names], tmp_path), strict=True):
        assert result["code"] == 0, name + result["output"]
        check_smoke(name, tmp_path / name / "run", result["output"])


@pytest.mark.parametrize(
    "axes", [("data", "fsdp", "tensor"), pytest.param(("fsdp", "context"), marks=pytest.mark.proof)]
)
def test_a_run_goes_on_on_another_mesh(copy, reference, capsys, axes):
    """Saved on one device, finished on 2x2x2, or with rows over devices: the same rows, losses to 1e-5."""
    shutil.rmtree(copy / "checkpoints" / "12")
    mesh = [f"--config.mesh.{axis}=2" for axis in axes] + ["--config.mesh.data=1", "--config.evaluate.prompt=The"] * (
        "data" not in axes
    )
    assert main.main([*ARGUMENTS[:-1], *mesh, "--workdir", str(copy)]) == 0
    said = capsys.readouterr().out
    assert "resumed at step 9" in said and ("sample at step 12" in said) == ("data" not in axes)
    found, expected = lines_of(copy), lines_of(reference)
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-5)


def test_shrink_keeps_what_an_experiment_is_about():
    config = default_config()
    config.model.num_heads, config.model.num_kv_heads, config.model.window = 32, 8, (0, 128)
    small = resolve(shrink(config)).model
    assert (small.num_heads, small.num_kv_heads, small.window, small.num_layers) == (4, 1, (0, 16), 4)
