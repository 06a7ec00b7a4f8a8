"""What is shown is what is trained on: `tools/inspect_data.py`."""

import json
import re
import shutil

import inspect_data
import pytest
from chat_templates import chat_folder
from etils import epath
from helpers import ROOT, made_up, tiny, write_shards

from lm_jax import step_folders
from lm_jax.batch_ramp import DataState
from lm_jax.data import mixture
from lm_jax.errors import UserError
from lm_jax.plan import inspection

CONFIG = ["--config", str(ROOT / "experiments" / "quickstart.py:smoke")]


@pytest.fixture
def sources(corpus, tmp_path):
    for name, seed in (("books", 1), ("code", 2)):
        write_shards(tmp_path / name, corpus, made_up(300, seed))
    return ((str(tmp_path / "books"), 0.75), (str(tmp_path / "code"), 0.25))


def test_a_step_is_shown_row_by_row(sources, capsys):
    data = tiny(data__sources=sources).data
    inspect_data.main([*CONFIG, f"--config.data.sources={sources!r}", "--step=3", "--rows=0"])
    shown = capsys.readouterr().out
    mixed = mixture.open_mixture(data)
    stream = mixed.stream(data)
    titles = re.findall(r"^row (\d+): (\S+), its row (\d+)", shown, re.MULTILINE)
    assert [int(i) for i, _, _ in titles] == list(range(24, 32))  # 8 rows a step
    for i, place, j in titles:
        source, expected = stream.quotas.locate(int(i))
        assert (place, int(j)) == (sources[source][0], expected)
    row = stream.row(24)
    assert mixed.tokenizer.decode(row["tokens"]) in shown.replace("¦", "")
    assert shown.count("¦") >= sum(int((stream.row(i)["positions"] == 0).sum()) for i in range(24, 32))


def test_what_is_not_trained_on_is_marked(sources):
    data = tiny(data__sources=sources).data
    mixed = mixture.open_mixture(data)
    stream = mixed.stream(data)
    row = stream.row(0)
    row["loss_mask"][10:20] = 0
    stream.row = lambda i: row
    text = inspection.show(mixed, stream, 0, colours=False)[1]
    assert f"[{mixed.tokenizer.decode(row['tokens'][10:20])}]" in text.replace("¦", "").replace("][", "")
    assert "\x1b[90m" in inspection.show(mixed, stream, 0, colours=True)[1]


def test_statistics_are_counted_against_the_weights(sources, capsys):
    inspect_data.main([*CONFIG, f"--config.data.sources={sources!r}", "--statistics=25"])
    lines = capsys.readouterr().out.strip().split("\n")
    assert lines[0] == "rows 0 to 200"
    found = {line.split()[0]: line.split()[1:] for line in lines[2:]}
    assert found["books"][:3] == ["0.7500", "0.7500", "+0.00%"] and found["code"][:2] == ["0.2500", "0.2500"]
    assert int(found["books"][3].replace(",", "")) == 150 * 64


def test_the_rows_of_a_run_are_those_that_it_took(finished, tmp_path, capsys):
    inspect_data.main([*CONFIG, "--step=1", "--rows=0"])
    of_config = capsys.readouterr().out
    inspect_data.main([f"--model={finished}", "--step=1", "--rows=0"])
    assert capsys.readouterr().out == of_config and of_config.startswith("row 8:")
    shutil.copytree(finished, tmp_path / "run")
    step_folders.go_back(epath.Path(tmp_path / "run"), DataState(2, 16, ((9, 20),)))
    inspect_data.main([f"--model={tmp_path / 'run'}@2", "--step=1", "--rows=0"])
    titles = re.findall(r"^row (\d+):", capsys.readouterr().out, re.MULTILINE)
    assert list(map(int, titles)) == [8, *range(20, 27)], "what a spike left out is not shown"


@pytest.mark.parametrize(("flags", "words"), [([], "give --config"), ([*CONFIG, "--model=x"], "or --model")])
def test_a_config_or_a_run_is_given(flags, words):
    with pytest.raises(UserError, match=words):
        inspect_data.main(flags)


def test_a_negative_step_is_refused():
    with pytest.raises(UserError, match="at least 0"):
        inspect_data.main([*CONFIG, "--step=-1"])


def test_what_is_learnt_of_a_conversation_or_a_pair_is_told_apart(tmp_path, capsys):
    chat_folder(tmp_path)
    turns = [("user", "hi"), ("assistant", "yes"), ("user", "now?"), ("assistant", "soon")]
    messages = [{"role": role, "content": content} for role, content in turns]
    given = [f"--config.data.{name}={tmp_path}" for name in ("sources", "tokenizer")]
    given += ["--config.data.packing=best_fit", "--config.data.global_batch_size=1", "--config.train.microbatch_rows=1"]
    given += ["--config.data.validation_fraction=0.0", "--config.data.test_fraction=0.0"]
    shown = {}
    for task, record in (
        ("instruction", {"messages": messages}),
        ("preference", {"prompt": messages[:1], "chosen": "yes", "rejected": "no"}),
    ):
        (tmp_path / "train.jsonl").write_text(json.dumps(record) + "\n")
        inspect_data.main([*CONFIG, *given, f"--config.train.task={task}"])
        shown[task] = capsys.readouterr().out.split("\n", 1)[1].rstrip("\n")
    asked = "[<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n]"
    assert shown["instruction"] == (f"¦{asked}yes<|im_end|>[\n{asked[1:].replace('hi', 'now?')}soon<|im_end|>[\n]")
    assert shown["preference"] == f"¦{asked}yes<|im_end|>\n¦{asked}-no<|im_end|>"
