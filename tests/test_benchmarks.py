"""lm-eval's tasks inside a run: its own numbers, of one process or two, killed or not; and the export at its end."""

import json
import math
import os
import pathlib
import pydoc_data.topics
import re
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from helpers import ONCE, ROOT, Crash, assert_same_run, crash_at, lines_of, outputs, start_processes
from one_process import LIMIT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lm_jax import cli, load_model, main
from lm_jax.config import Mesh
from lm_jax.convert import export, of_run
from lm_jax.errors import UserError
from lm_jax.mesh import make_mesh

pytest.importorskip("lm_eval", reason="pip install -e '.[lm-eval]'")

CHOICES = [
    {"question": "Which of them swims?", "choices": ["a trout", "a table"], "answer": 0},
    {"question": "What falls from clouds?", "choices": ["sand", "rain", "iron", "wool"], "answer": 1},
    {"question": "What is it that a loop does?", "choices": ["it repeats", "it ends", "it sleeps"], "answer": 0},
    {"question": "Two and two?", "choices": ["five", "four", "éléphant"], "answer": 1},
]
WORDS = [
    {"context": "for item in", "word": " items"},
    {"context": "import", "word": " os"},
    {"context": "", "word": "class"},
]
TEXTS = [{"text": "def main():\n    return 0\n" * 9}, {"text": "A loop repeats what stands in it, again and again."}]
WORDS_TASK = """
task: words
dataset_path: json
dataset_kwargs: {data_files: {test: words.jsonl}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{context}}"
doc_to_target: "{{word}}"
target_delimiter: ""
metric_list: [{metric: acc}, {metric: perplexity}]
"""
SHOTS_TASK = (ROOT / "tools" / "lm_eval_tasks" / "choices.yaml").read_text().replace("task: choices", "task: shots") + (
    "num_fewshot: 2\nfewshot_split: test\n"
)
TASKS = "('choices.yaml', 'words.yaml', 'texts.yaml', 'shots.yaml')"
RUN = [
    "--config", str(ROOT / "experiments" / "quickstart.py:smoke"), "--config.train.num_steps=4", "--config.evaluate.every=1",
    "--config.evaluate.tasks_every=2", "--config.checkpoint.every=1", "--config.evaluate.prompt=",
    "--config.model.positions=learned",
]  # fmt: skip


def write_tasks(folder: pathlib.Path) -> pathlib.Path:
    """Local tasks of each kind, and what they read, in a folder."""
    for name, records in {"choices": CHOICES, "words": WORDS, "texts": TEXTS}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        if name != "words":
            (folder / f"{name}.yaml").write_text((ROOT / "tools" / "lm_eval_tasks" / f"{name}.yaml").read_text())
    (folder / "words.yaml").write_text(WORDS_TASK)
    (folder / "shots.yaml").write_text(SHOTS_TASK)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """Where the commands run: tasks, their records, and a run that asked them, with its export."""
    place = write_tasks(tmp_path_factory.mktemp("benchmarks"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("HF_DATASETS_CACHE", str(place / "cache"))
        line = [*RUN, f"--config.evaluate.tasks={TASKS}", "--config.mesh.data=1", "--config.train.export_to=out"]
        assert main.main([*line, "--workdir", "run"]) == 0
    return place


@pytest.fixture
def there(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    return folder


def of_tasks(line: dict) -> dict[str, float]:
    return {name: value for name, value in line.items() if name.startswith("tasks/")}


def bits_per_byte(samples: list[dict]) -> float:
    """Of the right answers among lm-eval's samples."""
    right = [one["target"] if isinstance(one["target"], int) else 0 for one in samples]
    nats = [one["resps"][index][0][0] for one, index in zip(samples, right, strict=True)]
    texts = [one["arguments"][index][1] for one, index in zip(samples, right, strict=True)]
    return -sum(nats) / math.log(2) / sum(len(text.encode()) for text in texts)


def test_a_run_asks_when_it_is_due_and_says_what_lm_eval_says(there):
    """The last numbers are those of the command on the saved run, which asks it anew."""
    from lm_jax.generate import lm_eval as harness

    asked = {line["step"]: of_tasks(line) for line in lines_of("run") if of_tasks(line)}
    assert list(asked) == [2, 4], "every second evaluation, and the end"
    model = harness.HarnessModel.load(load_model.locate("run"), 8, devices=jax.devices()[:1])
    found = harness.run(model, ["choices", "words", "texts", "shots"], str(there), log_samples=True)
    for task, result in found["results"].items():
        theirs = {key.split(",")[0]: value for key, value in result.items() if "," in key and "_stderr" not in key}
        mine = {name: asked[4][f"tasks/{task}/{name}"] for name in theirs}
        assert mine == pytest.approx(theirs, rel=1e-6) and theirs, task
    assert asked[4]["tasks/choices/bits_per_byte"] == pytest.approx(
        bits_per_byte(found["samples"]["choices"]), rel=1e-6
    )
    chance = np.mean([1 / len(record["choices"]) for record in CHOICES])
    centred = {
        "choices": (asked[4]["tasks/choices/acc_norm"] - chance) / (1 - chance),
        "shots": (asked[4]["tasks/shots/acc_norm"] - chance) / (1 - chance),
        "words": asked[4]["tasks/words/acc"],
    }
    assert {name: asked[4][f"tasks/{name}/centred_accuracy"] for name in centred} == pytest.approx(centred)
    assert asked[4]["tasks/centred_accuracy"] == pytest.approx(np.mean(list(centred.values())))
    assert "tasks/texts/centred_accuracy" not in asked[4] and asked[4] != asked[2]


def test_curves_a_table_and_the_cost_are_shown(there):
    events = EventAccumulator("run/tensorboard", size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    assert "tasks/choices/acc" in str(events.Tags())
    log = pathlib.Path("run/log.txt").read_text()
    assert re.search(r"choices +4 +\d\.\d{4} ± \d\.\d{4}", log) and "mean accuracy above chance" in log
    assert re.search(r"goodput .*\n(.*\n)*.*  tasks +\d", log)


def test_the_export_is_the_tool_s_and_the_run_stays_finished(there, capsys):
    """Byte for byte; the same command again says the result, and one that would train on is refused the folder."""
    with jax.set_mesh(make_mesh(Mesh(data=1), jax.devices()[:1])):
        leaving = export.of_model(load_model.locate("run"))
        export.write_folder("by_tool", leaving, lambda *given: None, print)
    files = {path.name: path.read_bytes() for path in pathlib.Path("out").iterdir()}
    assert files == {path.name: path.read_bytes() for path in pathlib.Path("by_tool").iterdir()}
    assert "wrote out, a GPT2LMHeadModel" in pathlib.Path("run/log.txt").read_text()
    line = [*RUN, f"--config.evaluate.tasks={TASKS}", "--config.mesh.data=1", "--workdir=run"]
    assert main.main([*line, "--config.train.export_to=out"]) == 0
    assert "this run is finished" in capsys.readouterr().out
    longer = [word.replace("num_steps=4", "num_steps=6") for word in line]
    refused(capsys, [*longer, "--config.train.export_to=out"], "not what this run will be")


def refused(capsys, line: list[str], words: str) -> None:
    line = line if line[0] == "--config" else ["--config", *line]
    with pytest.raises(SystemExit) as stopped:
        cli.run_command(main.main, line)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and re.search(words, error) and len(error.strip().split("\n")) <= 5, error


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--config.evaluate.tasks=('arc_esay',)"], "lm-eval knows no such task; did you mean arc_easy?"),
        (["--config.evaluate.tasks=('nowhere.yaml',)"], "tasks: nowhere.yaml: lm-eval knows no such task"),
        (["--config.evaluate.tasks=('missing.yaml',)"], "the data cannot be read: .*missing.jsonl"),
        (["--config.evaluate.tasks=('long.yaml',)"], r"words: the answer .* tokens, and the model sees 64"),
        (["--config.evaluate.tasks=('answers.yaml',)"], "asks for 500 new tokens, the model sees 64"),
        (["--config.evaluate.tasks_every=2"], "is read only where config.evaluate.tasks is"),
        (
            ["--config.evaluate.tasks=('choices.yaml',)", "--config.checkpoint.keep_best=tasks/choices/ac"],
            "did you mean tasks/choices/acc?",
        ),
        (["--config.train.export_to=file"], "file' is there, and not what this run will be"),
        (["--config.train.export_to=gs://b/x"], "a folder of this machine is expected"),
        (["--config.train.export_to=x", "--config.model.positions=rotary"], "no Hugging Face family has this model"),
    ],
)
def test_mistakes_are_answered_before_anything_compiles(flags, words, tmp_path, monkeypatch, capsys):
    write_tasks(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "missing.yaml").write_text(WORDS_TASK.replace("words.jsonl", "missing.jsonl"))
    (tmp_path / "long.jsonl").write_text(json.dumps({"context": "x", "word": " again" * 99}) + "\n")
    (tmp_path / "long.yaml").write_text(WORDS_TASK.replace("words.jsonl", "long.jsonl"))
    (tmp_path / "answers.jsonl").write_text(json.dumps({"question": "x", "answers": ["y"]}) + "\n")
    answers = (ROOT / "tools" / "lm_eval_tasks" / "answers.yaml").read_text()
    (tmp_path / "answers.yaml").write_text(answers.replace("max_gen_toks: 32", "max_gen_toks: 500"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
    )
    smoke = [RUN[1], "--config.mesh.data=1", "--config.evaluate.prompt=", "--workdir=run"]
    positions = [] if any("positions" in flag for flag in flags) else ["--config.model.positions=learned"]
    refused(capsys, [*smoke, *positions, *flags], words)
    assert compiled == [] and not (tmp_path / "run").exists()


def test_a_missing_package_is_named_with_its_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, "lm_jax.generate.lm_eval", raising=False)
    monkeypatch.delitem(sys.modules, "lm_jax.generate.benchmarks", raising=False)
    line = [RUN[1], "--config.evaluate.tasks=('arc_easy',)", "--config.mesh.data=1", f"--workdir={tmp_path}/run"]
    refused(capsys, line, r"needs the package lm_eval: in the clone, pip install -e '\.\[lm-eval\]'")


def assert_same_folders(one: pathlib.Path, other: pathlib.Path) -> None:
    """But for the name of the step, which has the hashes of its files: two processes write other files than one."""
    content = lambda folder: {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lm_jax.json"}
    assert content(one) == content(other) and (other / "lm_jax.json").exists()


def start(folder, line: list[str], processes: int, devices: int) -> None:
    for text in outputs(start_processes([sys.executable, "-m", "lm_jax.main", *line], processes, devices)):
        assert "Traceback" not in text


def arc_from_the_manual(folder: pathlib.Path) -> None:
    """Questions in the form of ARC, where lm-eval's own `arc_easy` looks for them: how do pages of Python's manual go on?"""
    pages = [text for _, text in sorted(pydoc_data.topics.topics.items()) if len(text) > 400][:32]
    place = folder / "allenai" / "ai2_arc"
    place.mkdir(parents=True)
    records = []
    for i, page in enumerate(pages):
        texts = [other[80:120] for other in (page, *(pages[(i + k) % len(pages)] for k in (1, 2, 3)))]
        texts = texts[i % 4 :] + texts[: i % 4]
        choices = {"text": texts, "label": list("ABCD")}
        records.append({"id": str(i), "question": page[:80], "choices": choices, "answerKey": "ABCD"[-i % 4]})
    splits = ("train", "validation", "test")
    for split in splits:
        (place / f"{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    files = "".join(f"  - {{split: {split}, path: {split}.jsonl}}\n" for split in splits)
    (place / "README.md").write_text(f"---\nconfigs:\n- config_name: ARC-Easy\n  data_files:\n{files}---\n")


@pytest.mark.proof
def test_lm_eval_s_hf_on_the_export_gives_the_same_numbers(there):
    """Three tasks of log-likelihoods, one of them lm-eval's own; every number of the run's last line to 1e-3."""
    transformers = pytest.importorskip("transformers", reason="pip install '.[peers]'")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    arc_from_the_manual(there)
    line = [*RUN, "--config.evaluate.tasks=('arc_easy', 'choices.yaml', 'words.yaml')", "--config.mesh.data=1"]
    longer = [word.replace("num_steps=4", "num_steps=60").replace("every=1", "every=60") for word in line]
    assert main.main([*longer, "--workdir=longer", "--config.train.export_to=longer_out"]) == 0
    mine = of_tasks(lines_of("longer")[-1])
    tokenizer = transformers.AutoTokenizer.from_pretrained("longer_out")
    theirs = HFLM("longer_out", tokenizer=tokenizer, device="cpu", dtype="float32", batch_size=4)
    found = simple_evaluate(theirs, tasks=["arc_easy", "choices.yaml", "words.yaml"], bootstrap_iters=0)
    compared = 0
    for task in ("arc_easy", "choices", "words"):
        assert mine[f"tasks/{task}/bits_per_byte"] == pytest.approx(bits_per_byte(found["samples"][task]), abs=1e-3)
        for key, value in found["results"][task].items():
            if "," in key and "_stderr" not in key:
                print(task, key, value, mine[f"tasks/{task}/{key.split(',')[0]}"])
                assert mine[f"tasks/{task}/{key.split(',')[0]}"] == pytest.approx(value, rel=1e-3, abs=1e-3)
                compared += 1
    assert compared == 6


@pytest.mark.proof
def test_two_processes_ask_their_share_and_say_what_one_says(there, monkeypatch):
    """To the bit, on the same mesh of two devices; each has half of every batch. The first one exports."""
    tasks = str([str(there / f"{name}.yaml") for name in ("choices", "words", "texts", "shots")])
    monkeypatch.setattr("helpers.ROOT", there)  # the folder in which processes start
    for mesh, name in (("--config.mesh.data=2", "data"), ("--config.mesh.fsdp=2", "fsdp")):
        line = [*RUN, f"--config.evaluate.tasks=({tasks[1:-1]})", mesh]
        for processes in (1, 2):
            place = f"{there}/{name}{processes}"
            start(there, [*line, f"--workdir={place}", f"--config.train.export_to={place}_out"], processes, 2)
        assert lines_of(f"{there}/{name}2") == lines_of(f"{there}/{name}1")
        assert_same_folders(there / f"{name}1_out", there / f"{name}2_out")
    close = {name: pytest.approx(value, rel=1e-4, abs=1e-4) for name, value in of_tasks(lines_of("run")[-1]).items()}
    assert of_tasks(lines_of(f"{there}/data2")[-1]) == close


@pytest.mark.proof
def test_a_mesh_that_splits_rows_and_heads_says_the_same(there):
    """The tokens of a row over `context`, the matrices over `fsdp` and `tensor`: the sums are others, so not to the bit."""
    mesh = ["--config.mesh.data=1", "--config.mesh.context=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"]
    assert main.main([*RUN, f"--config.evaluate.tasks={TASKS}", *mesh, "--workdir=split"]) == 0
    expected = of_tasks(lines_of("run")[-1])
    found = of_tasks(lines_of("split")[-1])
    assert found == {name: pytest.approx(value, rel=1e-3, abs=1e-3) for name, value in expected.items()}


def test_a_run_that_ended_before_its_export_does_it_alone(there, monkeypatch):
    """Nothing is evaluated again, and no line is written twice; another run's folder is never taken for its own."""
    shutil.copytree("run", "again")
    line = [*RUN, f"--config.evaluate.tasks={TASKS}", "--config.mesh.data=1", "--workdir=again"]
    line.append("--config.train.export_to=again_out")
    crash_at(monkeypatch, (of_run, "export"), 1)
    with pytest.raises(Crash):
        main.main(line)
    monkeypatch.undo()
    monkeypatch.chdir(there)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(there / "cache"))
    assert not pathlib.Path("again_out").exists()
    assert main.main(line) == 0
    assert pathlib.Path("again/metrics.jsonl").read_bytes() == pathlib.Path("run/metrics.jsonl").read_bytes()
    assert {path.name for path in pathlib.Path("again_out").iterdir()} == {
        path.name for path in pathlib.Path("out").iterdir()
    }
    (there / "again_out" / "lm_jax.json").write_text('{"model": "another", "step": 4}')
    with pytest.raises(UserError, match="not what this run will be"):
        main.main(line)


@pytest.mark.proof
@pytest.mark.parametrize("fault", ["kill@evaluation:4", "kill@step:4", "kill@end"])
def test_a_killed_run_asks_again_and_says_the_same(fault, there):
    place = pathlib.Path(fault.replace("@", "_").replace(":", "_"))
    line = [*RUN, f"--config.evaluate.tasks={TASKS}", "--config.mesh.data=1"]
    line = [sys.executable, "-m", "lm_jax.main", *line, f"--workdir={place}", f"--config.train.export_to={place}_out"]
    run = lambda **more: subprocess.run(
        line,
        env={**os.environ, **ONCE, "JAX_NUM_CPU_DEVICES": "8", **more},
        capture_output=True,
        timeout=LIMIT,
    )
    assert run(LM_JAX_FAULT=fault).returncode == -signal.SIGKILL
    assert not pathlib.Path(f"{place}_out").exists()
    assert run().returncode == 0
    assert_same_run(place, "run")
    assert_same_folders(pathlib.Path("out"), pathlib.Path(f"{place}_out"))
