"""The tour: every command of it runs, what it names exists, and its two languages say the same.

All commands run one after the other in one process, each in miniature; as they stand they run as a proof. A block marked
`bash` is a command, the `text` after it what it printed.
"""

import ast
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import one_process
import pytest
from helpers import LIMIT, ROOT

PAGES = {name: (ROOT / "docs" / name).read_text() for name in ("tour.md", "tour.zh.md")}
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[([^\]]+)\]\(([^)\s]+)\)")
NAMED = re.compile(r"\[`([^`]+)`\]\(\.\./[^)]+\)((?:\s*(?:and|和|与|、|,|，|的)?\s*`[A-Za-z_][\w.]*`)+)")
PLACE = re.compile(r"`((?:lm_jax|tools|experiments|docs)/[\w/.]+\.\w+)")
# What takes the place of a training run's sizes where an experiment has variants, which `:smoke` does not shrink.
SMALL = (
    "model.num_layers=2 model.model_dim=64 model.mlp_dim=128 model.head_dim=16 model.num_heads=4 model.num_kv_heads=4 "
    "train.num_steps=2 optimizer.warmup=1 checkpoint.every=2 evaluate.metrics= evaluate.num_rows=8 log.every=1"
).split()


# Programs to compile: one body for all layers, a rule with one moment, no samples.
LEAST = ("model.unroll=false", "optimizer.name=sgd", "evaluate.prompt=")
DRY = ("bert_small", "lstm_baseline", "tour-classification", "tour-summaries", "tour-questions")


def blocks(page: str, kind: str) -> list[str]:
    return [content for found, content in BLOCK.findall(PAGES[page]) if found == kind]


def prose(page: str) -> str:
    return BLOCK.sub("", PAGES[page])


def miniature(command: str) -> list[str]:
    """The words of a command, for the same program in seconds."""
    words = shlex.split(command)
    if words[1:3] == ["-m", "lm_jax.main"]:
        words = [word for word in words if not re.match(r"--config\.(train\.num_steps|log\.every)=", word)]
        where = words.index("--config") + 1 if "--config" in words else 0
        place = words[where] if where else "experiments/quickstart.py"
        name = pathlib.Path(place.partition(":")[0]).stem + ("-" + place.partition(":")[2] if ":" in place else "")
        words = words if where else [*words, "--config", place]
        where = words.index("--config") + 1
        if place.endswith("quickstart.py:gpt3"):  # what its `:smoke` shrinks
            words[where] = place.replace(":gpt3", ":smoke")
        elif ":" in place:
            words += [f"--config.{change}" for change in SMALL]
            words += ["--config.data.tokenizer=bytes"] * name.startswith("gpt3")  # else one of 50,257 pieces is trained
        else:
            words[where] += ":smoke"
        # Nothing goes on from these, and other tests train their kinds of model and tasks: docs/notebook.md.
        if name in DRY or "--workdir" in words and "runs/learned" not in words:
            words += ["--dry_run"]
        shows = name == "quickstart" and "--workdir" not in words  # the model that the tour looks at shows samples
        words += [] if "--workdir" in words else ["--workdir", f"runs/{name}"]
        if "--dry_run" not in words:
            words += [f"--config.{change}" for change in LEAST if not shows or "prompt" not in change]
    elif words[1] == "tools/inspect_data.py":
        words[words.index("--config") + 1] += ":smoke"
    elif words[1] == "tools/prepare_data.py":
        words = [word for word in words if word not in ("--duplicates", "minhash", "--scrub")]
        words[-1] = "texts"
        words[words.index("--tokenizer") + 1] = "bytes"
    elif words[1] == "tools/convert_checkpoint.py":
        words += ["--unproven"]  # test_convert.py proves
    return words


def workplace(folder: pathlib.Path) -> None:
    """A folder that looks like the clone to the tour."""
    for name in ("experiments", "tools", "docs"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "texts").mkdir()
    for name in ("README.md", "CONTRIBUTING.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "texts")


@pytest.fixture(scope="module")
def performed(tmp_path_factory) -> dict[str, dict]:
    """{command: its code and output} of the whole tour in miniature."""
    folder = tmp_path_factory.mktemp("tour")
    workplace(folder)
    commands = blocks("tour.md", "bash")
    return dict(
        zip(commands, one_process.performed([miniature(command)[1:] for command in commands], folder), strict=True)
    )


def test_every_command_runs_in_miniature(performed):
    commands = blocks("tour.md", "bash")
    assert len(commands) >= 20 and list(performed) == commands
    failed = {command: found for command, found in performed.items() if found["code"]}
    assert not failed, json.dumps(failed, indent=1)


def test_what_does_not_depend_on_the_machine_is_printed_as_it_stands_there(performed):
    told = dict(zip(blocks("tour.md", "bash"), outputs(), strict=True))
    exact = [command for command in told if "import jax" in command]
    assert len(exact) == 2
    assert {command: performed[command]["output"] for command in exact} == {command: told[command] for command in exact}


def outputs() -> list[str]:
    """The first `text` block after each command."""
    found: list[str] = []
    for kind, content in BLOCK.findall(PAGES["tour.md"]):
        if kind == "bash":
            found.append("")
        elif kind == "text" and found and not found[-1]:
            found[-1] = content
    return found


def test_the_two_languages_have_the_same_commands_outputs_formulas_and_headings():
    english, chinese = ("tour.md", "tour.zh.md")
    for kind in ("bash", "text", "sh"):
        assert blocks(english, kind) == blocks(chinese, kind)
    levels = lambda page: re.findall(r"^(#+) ", prose(page), re.MULTILINE)
    formulas = lambda page: re.findall(r"\$\$(.+?)\$\$", prose(page), re.DOTALL)
    plain = lambda formula: re.sub(
        r"\s+", " ", re.sub(r"\\text\{[^}]*\}", "", formula)
    ).strip()  # words in it are translated
    assert levels(english) == levels(chinese)
    assert [plain(x) for x in formulas(english)] == [plain(x) for x in formulas(chinese)]
    papers = lambda page: sorted(re.findall(r"arXiv:\d+\.\d+", prose(page)))
    assert papers(english) == papers(chinese)
    code = lambda page: [(place, re.findall(r"`([\w.]+)`", names)) for place, names in NAMED.findall(prose(page))]
    assert code(english) == code(chinese) and len(code(english)) >= 20


@pytest.mark.parametrize("page", PAGES)
def test_every_heading_has_a_formula_and_one_command(page):
    """All but those that only hold others."""
    parts = re.split(r"^#{2,3} (.+)$", PAGES[page], flags=re.MULTILINE)
    for title, body in zip(parts[1::2], parts[2::2], strict=True):
        num = len(re.findall(r"^```bash$", body, re.MULTILINE))
        assert ("$$" in body) == (num > 0) and num <= 2, title


@pytest.mark.parametrize("page", PAGES)
def test_every_file_function_and_link_exists(page):
    text, missing = prose(page), []
    for _, target in LINK.findall(text):
        if not target.startswith("http") and not (ROOT / "docs" / target).exists():
            missing.append(target)
    missing += [place for place in PLACE.findall(text) if not (ROOT / place).exists()]
    for place, names in NAMED.findall(text):
        for name in re.findall(r"`([\w.]+)`", names):
            if (ROOT / place).exists() and name not in defined(ROOT / place):
                missing.append(f"{place}: {name}")
    assert not missing


def defined(path: pathlib.Path) -> set[str]:
    """Functions, classes with their methods, and constants of a file."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
            inner = node.body if isinstance(node, ast.ClassDef) else []
            found |= {f"{node.name}.{one.name}" for one in inner if isinstance(one, ast.FunctionDef)}
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


@pytest.mark.proof
def test_every_command_runs_as_it_stands(tmp_path):
    workplace(tmp_path)
    path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1", "PATH": path}
    for command in blocks("tour.md", "bash"):
        result = subprocess.run(
            ["bash", "-c", command], capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=LIMIT
        )
        assert result.returncode == 0, command + result.stdout[-2000:] + result.stderr[-2000:]


def test_a_card_is_written_from_a_run(finished, tmp_path):
    """Tokens, hashes and the evaluation are the run's; the front matter can be read; what a person must say is marked."""
    results = tmp_path / "run"
    shutil.copytree(finished, results)
    line = [
        sys.executable,
        str(ROOT / "tools" / "model_card.py"),
        "--model",
        str(results),
        "--output",
        str(tmp_path / "card.md"),
    ]
    ran = subprocess.run(
        line, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=LIMIT
    )
    assert ran.returncode == 0, ran.stderr
    card = (tmp_path / "card.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert dict(entry.split(": ", 1) for entry in front.strip().split("\n"))["pipeline_tag"] == "text-generation"
    saved = json.loads((results / "config.json").read_text())
    last = json.loads((results / "metrics.jsonl").read_text().strip().split("\n")[-1])
    assert "| tokens seen | 1,024 |" in body and f"| validation | loss | {last['final/loss']:.4f} |" in body
    assert all(digest in body for digest in saved["shards"]["python"].values())
    assert f"{card.count('FILL IN')} lines to fill in" in ran.stdout and card.count("FILL IN") == 4
