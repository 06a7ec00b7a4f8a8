"""lm-eval against the server: exactly the numbers of our adapter in this process, and those of its own `hf` on the folder."""

import json
import pydoc_data.topics
import shutil

import jax
import numpy as np
import pytest

pytest.importorskip("starlette", reason="pip install -e '.[serve]'")
from helpers import ROOT  # noqa: E402
from serving import exported, serving  # noqa: E402

from lm_jax import load_model  # noqa: E402

pytestmark = pytest.mark.proof
LENGTH, ROWS = (
    256,
    8,
)  # of which lm-eval reads two fewer: it asks for one token, and leaves another one out of its windows
TOPICS = pydoc_data.topics.topics


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """Three tasks of log-likelihoods and one of texts, in the folder where they run."""
    shutil.copytree(ROOT / "tools" / "lm_eval_tasks", tmp_path / "tasks")
    described = (tmp_path / "tasks" / "choices.yaml").read_text()
    (tmp_path / "tasks" / "pairs.yaml").write_text(
        described.replace("choices.jsonl", "pairs.jsonl").replace("task: choices", "task: pairs")
    )
    names = sorted(TOPICS)
    question = lambda k, num: {
        "question": f"{names[k]} or {names[-k]}", "choices": [TOPICS[name][:40] for name in names[k : k + num]], "answer": 0,
    }  # fmt: skip
    records = {
        "choices": [question(k, 4) for k in range(1, 13)],
        "pairs": [question(k, 2) for k in range(20, 36)],
        "texts": [{"text": TOPICS[name][:1500]} for name in names[:3]],
        "answers": [{"question": f"What is {name}?", "answers": ["a"]} for name in names[:10]],
    }
    for name, some in records.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in some))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return [*records], str(tmp_path / "tasks")


def test_three_ways_to_ask_one_model(tasks, tmp_path):
    pytest.importorskip("lm_eval", reason="pip install -e '.[lm-eval]'")
    pytest.importorskip("transformers")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from lm_jax.generate import lm_eval as harness

    folder = exported(tmp_path / "small", f"--config.data.sequence_length={LENGTH}", "--config.train.num_steps=30")
    names, include = tasks
    inside = harness.HarnessModel(load_model.locate(str(folder)), ROWS, LENGTH - 2, jax.devices()[:1])
    theirs = HFLM(str(folder), device="cpu", dtype="float32", batch_size=ROWS, max_length=LENGTH - 2)
    with serving(folder) as server:
        asking = lambda first: LocalCompletionsAPI(
            model="small", base_url=f"{server.url}/v1/completions", tokenizer=str(folder), add_bos_token=first,
            batch_size=ROWS, max_length=LENGTH,
        )  # fmt: skip
        # Whole texts come after the first token anyway: with `add_bos_token` lm-eval would put it there twice.
        parts = [[name for name in names if (name == "texts") == whole] for whole in (False, True)]
        asked = [harness.run(asking(not k), part, include, log_samples=True) for k, part in enumerate(parts)]
        by_server = {key: asked[0][key] | asked[1][key] for key in ("samples", "results")}
    inside, theirs = (harness.run(model, names, include, log_samples=True) for model in (inside, theirs))
    found = inside, by_server, theirs
    for name in names:
        a, b, c = ([sample["resps"] for sample in result["samples"][name]] for result in found)
        if name == "answers":
            assert a == b == c
            continue
        number = lambda answer: answer[0] if isinstance(answer, (tuple, list)) else answer
        values = [np.array([number(x) for record in resps for [x] in record]) for resps in (a, b, c)]
        assert np.abs(values[0] - values[1]).max() <= 1e-11 * np.abs(values[0]).max(), (
            name
        )  # the same float32, added up
        apart = np.abs(values[0] - values[2]).max()
        print(name, "from hf", apart, "nats of up to", np.abs(values[0]).max())
        assert apart < (1e-3 if name != "texts" else 1e-5 * np.abs(values[0]).max())
        if name != "texts":
            greedy = [[x[1] for record in resps for [x] in record] for resps in (a, b, c)]
            assert greedy[0] == greedy[1] == greedy[2]
    for name in names:
        scores = [{k: v for k, v in result["results"][name].items() if isinstance(v, float)} for result in found]
        print(name, *scores)
        assert scores[0] == pytest.approx(scores[1], rel=1e-12) and scores[0] == pytest.approx(scores[2], rel=1e-3)
