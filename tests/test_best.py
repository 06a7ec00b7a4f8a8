"""The best step is the one whose evaluation was best: kept whatever is saved later, killed or not, and found as `@best`."""

import json

import pytest
from etils import epath
from helpers import ROOT, Crash, crash_at, lines_of

import lm_jax
from lm_jax import best, between_steps, checkpoint, evaluate, load_model, main, step_folders
from lm_jax.config import default_config
from lm_jax.config_check import resolve
from lm_jax.errors import UserError
from lm_jax.stop import NEVER
from lm_jax.tasks import records
from lm_jax.tasks.results import Result

LOSSES = {2: 3.0, 4: 1.0, 6: 2.0, 8: 2.5, 10: 1.5, 12: 0.5}  # by step
RUN = [
    "--config", str(ROOT / "experiments" / "quickstart.py:smoke"), "--config.train.num_steps=12", "--config.checkpoint.every=3",
    "--config.checkpoint.keep_last=1", "--config.checkpoint.keep_best=eval/loss", "--config.evaluate.every=2",
    "--config.evaluate.patience=3", "--config.evaluate.prompt=", "--config.data.tokenizer=bytes", "--config.mesh.data=1",
    "--config.model.num_layers=1", "--config.optimizer.name=sgd", "--config.data.validation_fraction=0.002",
]  # fmt: skip


def lines(*values: tuple[int, float | None], name: str = "eval/loss") -> list[dict]:
    return [{"step": 1, "train/loss": 0.0}, *({"step": step, name: value} for step, value in values)]


def test_which_evaluation_is_the_best():
    found = lines((2, 3.0), (4, 1.0), (6, None), (8, 1.0), (10, 2.0))
    assert best.best_step(found, "eval/loss", {2, 4, 6, 8, 10}) == 4, "of equal ones the first"
    assert best.best_step(found, "eval/loss", {2, 6, 10}) == 10 and best.best_step(found, "eval/loss", {6, 7}) == NEVER
    assert best.since_best(found, "eval/loss") == 3 and best.since_best([], "eval/loss") == 0
    assert best.since_best(lines((2, None), (4, None)), "eval/loss") == 1
    again = [*found, {"step": 10, "eval/loss": 0.5, "final/loss": 0.7}]
    assert best.best_step(again, "eval/loss", {4, 10}) == 10 and best.since_best(again, "eval/loss") == 0


def test_patience_counts_up_to_the_step_at_hand(tmp_path):
    """A run that was killed after evaluations which it will make again has their lines until it goes on."""
    found = lines((2, 1.0), (4, 2.0), (6, 2.5), (8, 3.0))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))
    config = default_config()
    config.evaluate.patience = 3
    over = lambda step: best.is_out_of_patience(epath.Path(tmp_path), resolve(config), step)
    assert not over(6) and over(8)


@pytest.mark.parametrize(
    ("name", "higher"),
    [("eval/accuracy", True), ("eval/rmse", False), ("eval/books/bits_per_byte", False), ("eval/pearson", True)]
    + [("eval/weighted_loss", False), ("eval/perplexity", False), ("eval/span_f1", True)],
)
def test_which_way_is_better(name, higher):
    assert best.best_step(lines((1, 0.5), (2, 0.7), name=name), name, {1, 2}) == 1 + higher


RESULTS = {
    "classification": ("x", "y"),
    "regression": (1.0, 2.0),
    "token_classification": (["O", "B-a"], ["O", "O"]),
    "question_answering": ("a", "b"),
    "preference": (1.0, 0.5),
    "text_to_text": ("a", "b"),
    "instruction": ("a", "b"),
}


@pytest.mark.parametrize("name", records.TASKS)
@pytest.mark.parametrize("labels", [("O", "B-a"), ("x", "y", "O", "B-a")])
def test_a_task_knows_the_names_of_its_scores(name, labels):
    task = object.__new__(records.TASKS[name])
    task.labels = labels
    assert tuple(task.scores((Result("1", *RESULTS[name]), Result("2", *RESULTS[name])))) == task.measures


@pytest.fixture
def scripted(monkeypatch):
    """Evaluations between steps say what LOSSES has."""
    real = between_steps.evaluate_now

    def said(run, *arguments):
        return real(run, *arguments) | {"eval/loss": LOSSES[run.data.step]}

    monkeypatch.setattr(between_steps, "evaluate_now", said)


def saved(workdir) -> list[int]:
    return step_folders.complete_steps(epath.Path(workdir) / "checkpoints")


def test_the_best_step_is_kept_a_run_without_patience_ends_and_goes_on(scripted, tmp_path, capsys):
    line = [*RUN, "--workdir", str(tmp_path)]
    assert main.main(line) == 0
    told = capsys.readouterr().out
    assert (
        "stopped at step 10 of 12: eval/loss gets no better" in told and f"at step 4: --model {tmp_path}@best" in told
    )
    assert saved(tmp_path) == [4, 10], "saved when it was the best, though 3, 6 and 9 are when one is due"
    assert load_model.locate(f"{tmp_path}@best").step == 4 and load_model.locate(str(tmp_path)).step == 10
    steps = [found["step"] for found in lines_of(tmp_path) if "eval/loss" in found]
    assert steps == [2, 4, 6, 8, 10] and "final/loss" in lines_of(tmp_path)[-1]
    assert main.main(line) == 0
    assert "train on with a larger --config.evaluate.patience" in capsys.readouterr().out and saved(tmp_path) == [4, 10]
    line[line.index("--config.evaluate.patience=3")] = "--config.evaluate.patience=9"
    assert main.main(line) == 0
    assert saved(tmp_path) == [4, 12] and "final/loss" in lines_of(tmp_path)[-1]
    assert evaluate.main(["--model", f"{tmp_path}@best", "--split=train", "--rows=3", "--batch_size=1"]) == 0
    found = json.loads(capsys.readouterr().out.strip().split("\n")[-1])
    chosen, last = lm_jax.load(f"{tmp_path}@best"), lm_jax.load(tmp_path)
    assert (chosen.step, last.step) == (4, 12) and chosen.loss("class A:") != last.loss("class A:")
    assert (found["step"], found["split"], found["rows"], found["tokens"] <= 3 * 64) == (4, "train", 3, True)


WHERE = {
    "evaluation": (between_steps, "evaluate_now"),
    "commit": (checkpoint, "write_manifest"),
    "retention": (step_folders, "remove_step"),
    "next step": (checkpoint.Saver, "poll"),
}
CALLS = {"evaluation": 5, "commit": 5, "retention": 3, "next step": 5}  # that there are, or more


@pytest.mark.parametrize(
    ("name", "call"),
    [("evaluation", 3), ("retention", 2), ("commit", 2)]
    + [pytest.param(name, call, marks=pytest.mark.proof) for name in WHERE for call in (1, 2, 3, 4, 5)[: CALLS[name]]],
)
def test_the_best_survives_a_crash_anywhere(name, call, scripted, tmp_path, monkeypatch):
    crash_at(monkeypatch, WHERE[name], call)
    with pytest.raises(Crash):
        main.main([*RUN, "--workdir", str(tmp_path)])
    assert main.main([*RUN, "--workdir", str(tmp_path)]) == 0
    assert saved(tmp_path) == [4, 10] and load_model.locate(f"{tmp_path}@best").step == 4
    values = {found["step"]: found["eval/loss"] for found in lines_of(tmp_path) if "eval/loss" in found}
    assert values == {step: LOSSES[step] for step in (2, 4, 6, 8, 10)}


def test_what_asks_for_evaluations_that_nobody_makes_is_refused(tmp_path):
    for flags, words in (
        (["--config.checkpoint.keep_best=eval/los"], "no evaluation has it; did you mean eval/loss?"),
        (["--config.checkpoint.keep_best=eval/accuracy"], r"no evaluation has it.*\(of eval/loss, eval/perplexity"),
        (["--config.evaluate.every=0"], "evaluate.every = 0 makes none"),
        (["--config.data.validation_fraction=0.0"], "the validation split is empty"),
    ):
        with pytest.raises(UserError, match=words):
            main.main(
                [
                    *(word for word in RUN if word.split("=")[0] != flags[0].split("=")[0]),
                    *flags,
                    "--workdir",
                    str(tmp_path),
                ]
            )
    with pytest.raises(UserError, match="none of its saved steps"):
        config = default_config()
        config.checkpoint.keep_best = "eval/code/loss"
        best_of = load_model.ModelRef(epath.Path(tmp_path), NEVER, resolve(config), None)
        load_model.locate_step(best_of, str(tmp_path), "best", "", print)
