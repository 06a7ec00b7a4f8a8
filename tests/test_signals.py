"""SIGINT and SIGTERM at any moment: none is swallowed, none ends in a traceback, no step that was done is lost."""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
from helpers import LIMIT, ONCE, ROOT, Crash, crash_at, lines_of

from lm_jax import checkpoint, evaluator, main, step_folders, stop

EVERY, STEPS = 3, 8
RUN = [
    "-m", "lm_jax.main", "--config", "experiments/quickstart.py:smoke", f"--config.train.num_steps={STEPS}",
    f"--config.checkpoint.every={EVERY}", "--config.evaluate.every=4", "--config.evaluate.num_rows=400",
]  # fmt: skip
# {phase: (the line of its output after which it is, seconds until it is surely over)}; "": from the first import on
PHASES = {
    "imports": ("", 2.0),
    "tokenizer": ("training a tokenizer", 1.5),
    "corpus": ("training a tokenizer", 6.0),
    "header": ("corpus python", 0.5),
    "compile": ("fits:", 4.0),
    "first sample": ("start-up:", 1.5),
    "step": ("step +1 of", 0.3),
    "checkpoint": (f"step +{EVERY} of", 0.2),
    "evaluation": ("step +4 of", 1.0),
    "later step": ("step +7 of", 0.1),
    "last evaluation": ("training loss, nats", 1.5),
    "close": ("goodput", 0.2),
}


def start(words: list[str], **environment: str) -> subprocess.Popen:
    given = ONCE | {"JAX_NUM_CPU_DEVICES": "1"} | environment
    return subprocess.Popen(
        [sys.executable, "-u", *words],
        env=os.environ | given, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


def is_listening(process: subprocess.Popen) -> bool:
    """Whether the process catches SIGTERM: from then on it is ours, and no longer the interpreter's own start."""
    with open(f"/proc/{process.pid}/status") as file:
        caught = int(re.search(r"SigCgt:\s*(\w+)", file.read())[1], 16)
    return bool(caught >> (signal.SIGTERM - 1) & 1)


def signalled(words, after: str, delay: float, numbers: tuple[int, ...], **environment: str) -> tuple[int, str, float]:
    """(exit code, output, seconds it took to end) of a command that gets signals `delay` s after a line of its output.

    All its processes get them, as from a terminal's Ctrl-C, or from `timeout`.
    """
    process, said = start(words, **environment), ""
    if not after:
        while process.poll() is None and not is_listening(process):
            time.sleep(0.001)
    while after and not re.search(after, said) and (line := process.stdout.readline()):
        said += line
    time.sleep(delay)
    began = time.monotonic()
    for number in numbers:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        time.sleep(0.05 * (len(numbers) > 1))
    rest, _ = process.communicate(timeout=LIMIT)
    return process.returncode, said + rest, time.monotonic() - began


def check(workdir, phase: str, numbers: tuple[int, ...], code: int, output: str) -> None:
    """What must hold however a signalled run ended."""
    told = f"{phase}, {numbers}, exit {code}:\n{output}"
    assert "Traceback" not in output and "Exception" not in output, told
    done = max([0, *(int(step.replace(",", "")) for step in re.findall(r"^step +([\d,]+) of", output, re.MULTILINE))])
    saved = max(step_folders.complete_steps(step_folders.steps_folder(checkpoint.epath.Path(workdir))), default=0)
    if code == 0:  # it was over before
        assert saved == STEPS, told
    elif code == stop.EXIT_PREEMPTED:
        assert saved and "the same command goes on from" in output, told
        assert saved >= done if len(numbers) == 1 else saved >= done - EVERY, told
    else:
        assert code == 128 + numbers[-1] or code == 128 + numbers[0], told
        assert "lm_jax: stopped" in output and not saved, told
        assert done < 1 or len(numbers) > 1, told


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The run that nobody interrupts."""
    workdir = tmp_path_factory.mktemp("reference") / "run"
    process = start([*RUN, "--workdir", str(workdir)])
    output, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, output
    return workdir


COMMANDS = {
    "main": (signal.SIGINT, [*RUN, "--workdir", "{folder}/run"]),
    "a tool": (signal.SIGTERM, ["tools/convert_checkpoint.py", "a", "b"]),
    "behind an ampersand": (signal.SIGINT, ["-m", "lm_jax.generate", "--model", "a"]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_from_the_first_import_on_a_signal_ends_a_command_in_one_line(name, tmp_path):
    """Also SIGINT that the shell lets a command ignore, as it does for what it starts in the background."""
    number, words = COMMANDS[name]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if "ampersand" in name else signal.getsignal(signal.SIGINT)
    try:
        process = start([word.format(folder=tmp_path) for word in words])
    finally:
        signal.signal(signal.SIGINT, before)
    while not is_listening(process):
        time.sleep(0.001)
    time.sleep(0.2)
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=LIMIT)
    assert (process.returncode, output) == (128 + number, "lm_jax: stopped\n")


@pytest.mark.parametrize("number", stop.SIGNALS)
def test_what_is_done_ends_with_its_own_code_whatever_comes_while_the_interpreter_ends(number, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, time\natexit.register(lambda: (print('ending', flush=True), time.sleep(1)))\n"
    )
    words = ["-m", "lm_jax.main", "--config", "experiments/quickstart.py", "--print_config"]
    code, output, _ = signalled(words, "ending", 0.0, (number,), PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert code == 0 and "ending" in output and "stopped" not in output, output


@pytest.mark.proof
def test_a_finetune_that_is_stopped_while_it_compiles_begins_again_where_it_would_have(finished, tmp_path):
    """Nothing is sampled, trained or saved; the next start is as the first: from the model, not from random parameters."""
    words = [*RUN[:4], f"--config.train.init_from={finished}", "--workdir", str(tmp_path / "run")]
    code, output, _ = signalled(words, "parameters from", 0.1, (signal.SIGTERM,))
    assert code == 143 and output.endswith("lm_jax: stopped\n") and "sample at" not in output, output
    assert not step_folders.has_steps(checkpoint.epath.Path(tmp_path / "run"))
    for workdir in (tmp_path / "run", tmp_path / "whole"):
        assert main.main([*words[2:-1], str(workdir), "--config.mesh.data=1"]) == 0
    assert lines_of(tmp_path / "run") == lines_of(tmp_path / "whole")
    assert "parameters from" in (tmp_path / "run" / "log.txt").read_text()


def test_a_run_that_is_stopped_in_its_last_evaluation_has_all_its_steps_and_evaluates_next_time(tmp_path):
    words = [*RUN[:4], "--config.train.num_steps=2", "--workdir", str(tmp_path / "run")]
    words += ["--config.evaluate.num_rows=0", "--config.evaluate.prompt=", "--config.model.num_layers=1"]
    words += ["--config.optimizer.name=sgd"]
    code, output, _ = signalled(words, "training loss, nats", 0.1, (signal.SIGINT,))
    assert code == 75 and "saved at step 2, the same command goes on from there" in output, output
    assert not any("final/loss" in line for line in lines_of(tmp_path / "run"))
    process = start(words)
    rest, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 0 and "resumed at step 2" in rest and "compile" not in rest.split("start-up")[0], rest
    steps = [line["step"] for line in lines_of(tmp_path / "run") if "train/loss" in line]
    assert steps == [1, 2] and lines_of(tmp_path / "run")[-1].keys() >= {"eval/loss", "final/loss"}


def evaluated(num_rows: int, workdir) -> list[str]:
    """A run of four steps that evaluates at the second and at its end: in two parts with 8 rows, with 0 in one."""
    words = ["--config", "experiments/quickstart.py:smoke", "--config.train.num_steps=4", "--config.checkpoint.every=2"]
    words += ["--config.evaluate.every=2", f"--config.evaluate.num_rows={num_rows}", "--config.evaluate.prompt="]
    words += ["--config.data.tokenizer=bytes", "--config.data.validation_fraction=0.002", "--config.mesh.data=1"]
    words += ["--config.model.num_layers=1", "--config.optimizer.name=sgd"]
    return [*words, "--workdir", str(workdir)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Such runs that nothing crashed, by their rows."""
    folder = tmp_path_factory.mktemp("whole")
    assert all(main.main(evaluated(num_rows, folder / str(num_rows))) == 0 for num_rows in (8, 0))
    return folder


def open_files() -> list[str]:
    """The paths of what this process has open."""
    found = []
    for link in os.scandir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # of the listing itself
            found.append(os.readlink(link.path))
    return found


EVALUATION, NEXT_STEP = (evaluator.Evaluator, "__call__"), (checkpoint.Saver, "poll")
CRASHES = [
    (8, EVALUATION, 1, 2),
    (8, EVALUATION, 2, 4),
    (8, EVALUATION, 3, 4),
    (0, EVALUATION, 1, 2),
    (0, EVALUATION, 2, 4),
]


# In the last part of the last evaluation of several, in the only part of the first of all, and in the step after one.
FEW = [(8, EVALUATION, 3, 4), (0, EVALUATION, 1, 2), (8, NEXT_STEP, 3, 2)]


@pytest.mark.parametrize(
    ("num_rows", "where", "call", "saved"),
    [*FEW, *(pytest.param(*crash, marks=pytest.mark.proof) for crash in CRASHES if crash not in FEW)],
)
def test_a_crash_in_any_evaluation_costs_no_step_and_leaves_no_hole(
    num_rows, where, call, saved, whole, tmp_path, monkeypatch
):
    """A call raises, in an evaluation or in the step after one; gone on with, the metrics are those of the whole run."""
    line = evaluated(num_rows, tmp_path)
    crash_at(monkeypatch, where, call)
    with pytest.raises(Crash) as error:
        main.main(line)
    assert error.tb and not [
        file for file in open_files() if file.startswith(str(tmp_path))
    ]  # its frames hold them yet
    assert step_folders.complete_steps(tmp_path / "checkpoints")[-1] == saved
    assert main.main(line) == 0
    assert lines_of(tmp_path) == lines_of(whole / str(num_rows))


@pytest.mark.proof
def test_sixty_signals_over_all_phases(reference, tmp_path):
    """LM_JAX_SIGNALS of them, every fourth twice; what was saved is gone on with to the bit."""
    wanted, chance, slowest, codes = int(os.environ.get("LM_JAX_SIGNALS", "60")), random.Random(14), 0.0, {}
    for index in range(wanted):
        phase = list(PHASES)[index % len(PHASES)]
        after, until = PHASES[phase]
        first = signal.SIGTERM if (index // len(PHASES)) % 2 else signal.SIGINT
        numbers = (first,) if index % 4 < 3 else (first, chance.choice([signal.SIGINT, signal.SIGTERM]))
        fresh = {"LM_JAX_CACHE": str(tmp_path / f"cache-{index}")} if phase in ("tokenizer", "corpus", "header") else {}
        workdir = tmp_path / f"run-{index}"
        words = [*RUN, f"--config.data.num_workers={index // len(PHASES) % 2}", "--workdir", str(workdir)]
        code, output, seconds = signalled(words, after, chance.uniform(0, until), numbers, **fresh)
        check(workdir, phase, numbers, code, output)
        slowest, codes[code] = max(slowest, seconds), codes.get(code, 0) + 1
        print(
            f"{index + 1}: {phase}, {[signal.Signals(n).name for n in numbers]}: {code} in {seconds:.1f} s", flush=True
        )
        if code == 75:
            process = start(words)
            rest, _ = process.communicate(timeout=LIMIT)
            assert process.returncode == 0, rest
            assert lines_of(workdir) == lines_of(reference), phase
    print(f"{wanted} signals: exit codes {codes}, the slowest end {slowest:.1f} s", flush=True)
    assert slowest < 30
