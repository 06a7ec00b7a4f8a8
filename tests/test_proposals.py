"""What a run proposes at its end works as pasted: every line of several kinds of runs is run."""

import shlex

import pytest
from helpers import ROOT
from one_process import performed
from task_runs import line_of

SMOKE = ["--config", str(ROOT / "experiments" / "quickstart.py:smoke")]
HARD = """it's "a" $HOME `b` \\ !"""  # a prompt that a shell would take apart
# {kind: (case of task_runs, or "" for text; flags; lines that must be there; words that must not)}
KINDS = {
    "hard to quote, no test split": (
        "",
        [f"--config.evaluate.prompt={HARD}", "--config.data.test_fraction=0.0"],
        ("longer", "generate", "evaluate", "look"),
        "--split test",
    ),
    "nothing held out": (
        "",
        ["--config.data.test_fraction=0.0", "--config.data.validation_fraction=0.0"],
        ("longer", "generate", "look"),
        "lm_jax.evaluate",
    ),
    "no prompt": ("", ["--config.evaluate.prompt="], ("longer", "generate", "evaluate", "look"), ""),
    "instruction": ("instruction", [], ("longer", "generate", "evaluate", "look"), "--prompt"),
    "classification": ("classification", [], ("longer", "evaluate", "look"), "lm_jax.generate"),
    "regression": ("regression", [], ("longer", "evaluate", "look"), "lm_jax.generate"),
    "preference": ("preference", [], ("longer", "evaluate", "look"), "lm_jax.generate"),
    "text_to_text": ("text_to_text", [], ("longer", "evaluate", "look"), "lm_jax.generate"),
    "masked": (
        "",
        ["--config.model.kind=encoder", "--config.data.objective=masked", "--config.model.norm_place=post"],
        ("longer", "evaluate", "look"),
        "lm_jax.generate",
    ),
    "recurrent": (
        "",
        ["--config.model.kind=lstm", "--config.model.positions=none"],
        ("longer", "generate", "evaluate", "look"),
        "",
    ),
}
QUICK = ("hard to quote, no test split",)


def proposed(output: str) -> dict[str, list[str]]:
    """{name: words of its command} of the lines below `next:`, as a shell takes them apart."""
    lines = output.split("next:\n")[1].rstrip().split("\n")
    return {line.split()[0]: shlex.split(line.strip().partition(" ")[2]) for line in lines}


def check_proposals(kinds: list[str], folder) -> None:
    trained = []
    for kind in kinds:
        case, more, _, _ = KINDS[kind]
        place = folder / f"a run, {kind}"
        place.mkdir()
        given = line_of(place, case) if case else [*SMOKE, "--config.data.tokenizer=bytes"]
        given = [word for word in given if "train.num_steps" not in word and "checkpoint.every" not in word]
        given = [str(ROOT / word) if word.startswith("experiments/") else word for word in given]
        small = ["--config.train.num_steps=1", "--config.model.num_layers=1", "--config.optimizer.name=sgd"]
        trained.append(["-m", "lm_jax.main", *given, *more, *small, "--workdir", str(place / "run")])
    next_ones = []
    for kind, done in zip(kinds, performed(trained, folder), strict=True):
        assert done["code"] == 0, f"{kind}:\n{done['output']}"
        found = proposed(done["output"])
        _, _, expected, never = KINDS[kind]
        assert tuple(found) == expected, f"{kind}: {found}"
        assert not never or never not in shlex.join(sum(found.values(), [])), f"{kind}: {found}"
        assert kind != "instruction" or "--chat" in found["generate"]
        assert found["longer"][-1] == str(folder / f"a run, {kind}" / "run")  # the same run goes on
        next_ones += [(kind, words[1:]) for name, words in found.items() if name != "look"]
        next_ones.append((kind, [*found["look"][1:], "--inspect"]))
    for (kind, words), done in zip(next_ones, performed([words for _, words in next_ones], folder), strict=True):
        assert done["code"] == 0, f"{kind}: {shlex.join(words)}\n{done['output']}"


def test_what_is_proposed_works_as_pasted(tmp_path):
    check_proposals(list(QUICK), tmp_path)


@pytest.mark.proof
def test_what_any_kind_of_run_proposes_works_as_pasted(tmp_path):
    check_proposals([kind for kind in KINDS if kind not in QUICK], tmp_path)
