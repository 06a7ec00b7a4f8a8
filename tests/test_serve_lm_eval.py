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
        by_server = harness.run(asking(True), names, include, log_samples=True)
        texts_by_server = harness.run(asking(False), ["texts"], include, log_samples=True)
    inside, theirs = (harness.run(model, names, include, log_samples=True) for model in (inside, theirs))
    for name in names:
        # Of whole texts our adapter leaves out the first token, which stands before them anyway; `hf` scores it, too.
        exactly = texts_by_server if name == "texts" else by_server
        a, b, c, d = ([x["resps"] for x in result["samples"][name]] for result in (inside, exactly, by_server, theirs))
        if name == "answers":
            assert a == b == c == d
            continue
        number = lambda answer: answer[0] if isinstance(answer, (tuple, list)) else answer
        values = [np.array([number(x) for record in resps for [x] in record]) for resps in (a, b, c, d)]
        most, apart = np.abs(values[0]).max(), np.abs(values[2] - values[3]).max()
        assert np.abs(values[0] - values[1]).max() <= 1e-11 * most, name  # the same float32, added up in another order
        print(name, "from hf", apart, "nats of up to", most)
        assert apart < (1e-3 if name != "texts" else 1e-6 * most)
        if name != "texts":
            greedy = [[x[1] for record in resps for [x] in record] for resps in (a, b, d)]
            assert greedy[0] == greedy[1] == greedy[2]
        scores = [result["results"][name] for result in (inside, exactly, by_server, theirs)]
        scores = [{k: v for k, v in one.items() if isinstance(v, float)} for one in scores]
        assert scores[0] == pytest.approx(scores[1], rel=1e-12) and scores[2] == pytest.approx(scores[3], rel=1e-3)
