"""What users get wrong: exit 2, one to five plain lines with the nearest valid value or the mend, nothing done yet."""

import os
import re
import shutil
import subprocess
import sys
import time

import jax
import pytest
from helpers import ROOT, command

from lm_jax import cli as commands
from lm_jax import evaluate, main, verify
from lm_jax.generate import command as generate

SMOKE = "--config=experiments/quickstart.py:smoke"
CLASSES = ["--config.train.task=classification", "--config.model.labels=('a', 'b')", "--config.data.packing=best_fit"]
# (command, arguments, what the message must say); {run} is a finished run, {tmp} an empty folder
MISTAKES = [
    ("main", ["--config.optimizer.learning_rat=1"], "did you mean optimizer.learning_rate?"),
    ("main", ["--config.optimiser.learning_rate=1"], "no section 'optimiser'; did you mean optimizer.learning_rate?"),
    ("main", ["--config.train=5"], "config.train is a section"),
    ("main", ["--config", "experiments/quickstat.py"], "did you mean experiments/quickstart.py?"),
    ("main", ["--config", "experiments/quickstart.py:smok"], "there is modern, gpt3, smoke; did you mean smoke?"),
    ("main", [SMOKE, "--config.model.norm=layernrom"], "did you mean layernorm?"),
    ("main", [SMOKE, "--config.optimizer.learning_rate=nan"], "expected a finite number|expected a float"),
    ("main", [SMOKE, "--config.optimizer.learning_rate=fast"], "expected a float"),
    ("main", [SMOKE, "--config.model.num_layers=2.0"], "did you mean 2?"),
    ("main", [SMOKE, "--config.train.num_steps=3 weeks"], 'a string such as "375M tokens"'),
    ("main", [SMOKE, "--config.model.compute_dtype=float16"], "add --config.optimizer.loss_scale=1024"),
    ("main", [SMOKE, "--config.optimizer.moment_dtype=bfloat16", "--config.optimizer.beta1=0.999"], "most 0.99"),
    ("main", [SMOKE, "--config.optimizer.loss_scale=1000"], "no power of two up to 2^24; the nearest is 1024"),
    ("main", [SMOKE, "--config.optimizer.name=adamW"], "did you mean adamw?"),
    ("main", [SMOKE, "stray"], "unknown argument stray"),
    ("main", [SMOKE, "--wokdir=x"], "did you mean --workdir?"),
    ("main", [SMOKE, "--workdir=x", "--workdir=y"], "--workdir stands twice"),
    ("main", [SMOKE, "--config.train.seed=1", "--config.train.seed=2"], "--config.train.seed stands twice"),
    ("main", [SMOKE, "--config.train.seed"], "needs a value"),
    ("main", [SMOKE, "--config.model.model_dim=50", "--config.model.head_dim=0"], "the next that does is 52"),
    ("main", [SMOKE, "--config.model.num_kv_heads=3"], "does not divide num_heads = 4; the nearest is"),
    ("main", [SMOKE, "--config.mesh.tensor=8"], "num_heads = 4 does not divide over mesh axis tensor = 8"),
    (
        "main",
        [SMOKE, "--config.model.attention=splash"],
        "runs on a tpu, this is a cpu\n.*--config.model.attention=chunked",
    ),
    (
        "main",
        [SMOKE, "--config.data.global_batch_size=12", "--config.train.microbatch_rows=4"],
        "nearest size that does is 16",
    ),
    ("main", [SMOKE, "--config.mesh.data=16"], "is 16 devices, here are 8"),
    ("main", [SMOKE, "--config.mesh.stage=2"], "there are no stages of layers"),
    ("main", [SMOKE, "--config.mesh.sp=2"], "say mesh.context"),
    ("main", [SMOKE, "--config.data.source=x"], "did you mean data.sources?"),
    ("main", [SMOKE, "--config.data.sources={tmp}/nowhere"], "no such folder"),
    ("main", [SMOKE, "--config.data.sources=(({tmp}/nowhere, 0.7), ({tmp}/there, 0.3))"], "names in a list are quoted"),
    ("main", [SMOKE, "--config.data.sources={tmp}/empty"], "holds no text"),
    ("main", [SMOKE, "--config.train.task=classificaton"], "did you mean classification?"),
    ("main", [SMOKE, "--config.train.task=classification"], "tells at least two labels apart, each named once"),
    (
        "main",
        [SMOKE, *CLASSES, "--config.model.kind=encoder_decoder", "--config.data.objective=span_corruption"],
        "needs a model of kind encoder or transformer",
    ),
    ("main", [SMOKE, *CLASSES[:2], "--config.data.packing=split"], "would part records: take best_fit"),
    ("main", [SMOKE, *CLASSES, "--config.data.sources={tmp}/empty"], "a task needs a folder with train.jsonl"),
    ("main", [SMOKE, *CLASSES, "--config.data.sources={tmp}/records"], "has no column 'text', only 'Text', 'label'"),
    ("main", [SMOKE, "--config.model.labels=('a', 'b')"], "to have it read: --config.train.task=classification"),
    ("main", [SMOKE, "--config.data.columns=text"], "expected a tuple"),
    ("main", [SMOKE, "--config.data.tokenizer=gpt2"], 'expected "bytes", "sentencepiece:PIECES"'),
    ("main", [SMOKE, "--workdir={run}", "--config.model.num_layers=3"], "config.model.num_layers: 2 there, 3 here"),
    ("main", [SMOKE, "--workdir={run}", "--config.data.seed=3"], "use another --workdir"),
    ("main", [SMOKE, "--workdir={tmp}/file"], "is a file|not a folder"),
    ("main", [SMOKE, "--config.train.init_from={tmp}/nowhere"], "is not a run"),
    (
        "main",
        [SMOKE, "--config.train.init_from={run}", "--config.model.num_layers=3"],
        "another model:\nconfig.model.num_layers = 3 is given, 2 is the model's",
    ),
    ("main", ["--config=experiments/finetune.py:chat"], "config.train.init_from MODEL: MODEL is not a run"),
    ("main", ["--config={tmp}/broken.py"], "broken.py line 2: NameError: name 'undefined' is not defined"),
    (
        "main",
        ["--config={tmp}/typo.py"],
        'typo.py line 5: KeyError: Key "learning_rat" .* Did you mean "learning_rate"',
    ),
    ("evaluate", ["--model", "{run}x"], "is not a run.*did you mean {run}?"),
    ("evaluate", ["--model", "{run}@7"], "no step '7'; the run has 2"),
    ("evaluate", ["--model", "{run}", "--split", "tets"], "choose from"),
    ("main", ["--config=experiments/ademamix.py:smoke", "--config.optimizer.name=lion"], "is not read: leave it out"),
    ("generate", ["--model", "{run}", "--prompt=x", "--parts=x.py"], "trained with the ordinary parts; leave it out"),
    ("main", [SMOKE, "--lr=3e-4"], "--lr=3e-4: here that is --config.optimizer.learning_rate=3e-4"),
    ("evaluate", ["--model", "{tmp}/x.gguf"], "python tools/convert_checkpoint.py {tmp}/x.gguf {tmp}/x"),
    ("evaluate", ["--model", "{tmp}/x.safetensors"], "weights alone; give a folder that has config.json"),
    ("evaluate", ["--model", "{tmp}/x.bin"], "a pickle may run code and is not read"),
    ("evaluate", ["--model", "{run}/checkpoints/7"], "checkpoints/7 is not a run"),
    ("generate", ["--model", "{run}/log.txt", "--prompt=x"], "log.txt: a file; give a run"),
    ("generate", ["--prompt", "x"], "required: --model"),
    ("generate", ["--model", "{run}", "--prompt", "x", "--top_p", "1.5"], "--top_p 1.5: from 0 to 1"),
    ("generate", ["--model", "{run}", "--prompt", "x", "--max_new_tokens", "1000"], "at most"),
    (
        "generate",
        ["--model", "{run}", "--prompt", "x", "--system", "y"],
        "--system 'y' is read only where --chat is given",
    ),
    ("generate", ["--model", "{run}", "--prompt", "x", "--chat_variables", "x"], "is read only where --chat is given"),
    *[
        ("generate", ["--model", "{run}", "--prompt=x", "--beams=4", flag], "is read only where --beams is 1")
        for flag in ("--temperature=0.5", "--stop=x", "--top_k=3", "--top_p=0.5", "--min_p=0.1", "--seed=0")
    ],
    ("generate", ["--model", "{run}", "--prompt", "x", "--length_penalty", "2"], "only where --beams is given"),
    ("generate", ["--model", "{run}", "--prompt", "x", "--top_k=1", "--top_k=2"], "--top_k stands twice"),
    ("evaluate", ["--model", "{run}", "--beams", "4"], "config.evaluate.metrics says none here"),
    ("verify", [SMOKE, "--show", "--num_steps=2"], "--num_steps 2 is read only where --show is False"),
    ("generate", ["--model", "{run}", "--prompt", "x", "--chat"], "has no chat template.*leave --chat out"),
    ("generate", ["--model", "{run}", "--prompts", "{tmp}/file"], "is empty: a prompt a line is expected"),
    ("generate", ["--model", "{run}", "--prompts", "{tmp}/nowhere"], "No such file"),
    ("generate", ["--model", "{run}", "--prompt", "x", "--prompts", "y"], "one of them"),
    ("generate", ["--model", "{tmp}/folder", "--prompt", "x"], "config.json has no max_position_embeddings"),
    ("verify", [], "required: --config"),
    (
        "main",
        [SMOKE, "--config.data.sources=s3://b/text"],
        "needs the package s3fs: in the clone, pip install -e '.[s3]'",
    ),
    ("main", [SMOKE, "--workdir=s3://b/runs/x"], "needs the package s3fs: in the clone, pip install -e '.[s3]'"),
    ("main", [SMOKE, "--config.data.sources=(('x', 1), ('x', 2))"], "a path stands twice"),
    ("main", [SMOKE, "--config.data.sources=(('python', 0),)"], "no source has a weight from row 0 on"),
    ("main", [SMOKE, "--config.data.sources=(('python', -1),)"], "weight -1 of 'python': expected a number from 0 on"),
    (
        "main",
        [SMOKE, "--config.data.sources=(('python', ((5, 1), (5, 2))),)"],
        "the first rows of its stages must rise",
    ),
    ("main", [SMOKE, "--config.data.sources=3"], "expected a path, or pairs"),
    ("main", [SMOKE, "--config.data.packing=bestfit"], "did you mean best_fit?"),
    ("main", [SMOKE, "--config.data.packing=best_fit_whole"], "documents are longer than a row of 64 tokens"),
    ("main", [SMOKE, "--config.data.objective=masked"], "masked needs an encoder"),
    ("main", [SMOKE, "--config.optimizer.trainable=atention"], "found in none of the .* near are attention"),
    ("main", [SMOKE, "--config.optimizer.trainable=(mlp"], "is no regular expression"),
    (
        "main",
        [SMOKE, "--config.model.lora_rank=4", "--config.model.lora_pattern=querry"],
        "config.model.lora_pattern = 'querry' is found in none of the 6 .* near are .*query",
    ),
]
COMMANDS = {"main": main.main, "evaluate": evaluate.main, "generate": generate.main, "verify": verify.main}


@pytest.fixture(scope="module")
def places(tmp_path_factory, finished):
    place = tmp_path_factory.mktemp("mistakes")
    (place / "empty").mkdir()
    for name in ("file", "x.gguf", "x.safetensors", "x.bin"):
        (place / name).write_text("")
    (place / "records").mkdir()
    (place / "records" / "train.jsonl").write_text('{"Text": "a", "label": "b"}\n')
    (place / "folder").mkdir()
    (place / "folder" / "config.json").write_text('{"model_type": "llama", "vocab_size": 7}')
    (place / "broken.py").write_text("def get_config():\n    return undefined\n")
    (place / "typo.py").write_text(
        "from lm_jax.config import default_config\n\ndef get_config():\n    config = default_config()\n"
        "    config.optimizer.learning_rat = 1.0\n    return config\n"
    )
    return {"tmp": str(place), "run": str(finished)}


def listing(*folders) -> dict:
    found = {}
    for folder in folders:
        for root, _, files in os.walk(folder):
            found |= {os.path.join(root, file): os.stat(os.path.join(root, file)).st_mtime_ns for file in files}
    return found


def check(code: int, error: str, words: str) -> None:
    assert code == 2, error
    lines = error.strip().split("\n")
    assert 1 <= len(lines) <= 5 and "Traceback" not in error, error
    assert lines[0].startswith("lm_jax: ") and max(map(len, lines)) < 300
    assert words in error or re.search(words, error), f"expected {words!r} in:\n{error}"


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    MISTAKES,
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else None,
)
def test_a_mistake_is_answered(name, arguments, words, places, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "experiments", tmp_path / "experiments", ignore=shutil.ignore_patterns("__pycache__"))
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
    )
    before, started = listing(tmp_path, places["tmp"], places["run"]), time.process_time()
    with pytest.raises(SystemExit) as stopped:
        commands.run_command(COMMANDS[name], [argument.format(**places) for argument in arguments])
    seconds = time.process_time() - started  # of work: what others do on the machine does not count
    words = words.replace("{run}", re.escape(places["run"])).replace("{tmp}", places["tmp"])
    check(stopped.value.code, capsys.readouterr().err, words)
    after = listing(tmp_path, places["tmp"], places["run"])
    assert {path for path in after if "__pycache__" not in path} == set(before) and all(
        after[path] == before[path] for path in before
    )
    if name == "main":
        assert compiled == [], "something was compiled before the mistake was found"
    assert seconds < 10


@pytest.mark.parametrize("index", [0, 27, *(pytest.param(x, marks=pytest.mark.proof) for x in (23, 33))])
def test_a_mistake_as_a_real_command(index, places, tmp_path):
    name, arguments, words = MISTAKES[index]
    shutil.copytree(ROOT / "experiments", tmp_path / "experiments", ignore=shutil.ignore_patterns("__pycache__"))
    result = command(name, *(argument.format(**places) for argument in arguments), devices=8, cwd=tmp_path)
    check(result.returncode, result.stderr, words.replace("{run}", re.escape(places["run"])))


def test_all_checkpoints_broken_is_said(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints" / "2" / "parameters").rglob("*"):
        if path.is_file():
            path.write_text("{}")
    result = command("evaluate", "--model", str(tmp_path / "run"))
    assert result.returncode == 2 and "is broken" in result.stdout + result.stderr and "Traceback" not in result.stderr


def test_no_such_platform():
    script = "import os; os.environ['JAX_PLATFORMS'] = 'tpuu'; from lm_jax import cli, main; cli.run_command(main.main)"
    line = [sys.executable, "-c", script, "--config", "experiments/quickstart.py:smoke"]
    result = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    check(result.returncode, result.stderr, "no devices of JAX_PLATFORMS='tpuu'")


def test_the_nearest_value_can_be_pasted():
    """`--print_config` of what an error proposes works."""
    result = command("main", SMOKE, "--print_config", "--config.model.norm=rmsnorm", cwd=ROOT)
    assert result.returncode == 0 and "model.norm" in result.stdout and "command line" in result.stdout
