"""An encoder-decoder behind OpenAI's API: the prompt is what its encoder reads, the answer what its decoder writes."""

import pytest
from helpers import READER

pytest.importorskip("starlette", reason="pip install -e '.[serve]'")
from serving import serving  # noqa: E402

import lm_jax  # noqa: E402
from lm_jax import main  # noqa: E402

PROMPT, LONG = "import os", "def f(x):\n    return x\n" * 8


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    workdir = str(tmp_path_factory.mktemp("reader") / "run")
    reader = [f"--config.{name.replace('__', '.')}={value}" for name, value in READER.items()]
    more = ["--config.mesh.data=1", "--config.data.sequence_length=128", "--workdir", workdir]
    assert main.main(["--config", "experiments/quickstart.py:smoke", *reader, *more]) == 0
    return workdir


def test_an_encoder_decoder_answers_what_generate_writes(run):
    loaded = lm_jax.load(run)
    with serving(run, "--max_length", "128") as server:
        for prompt in (PROMPT, LONG):
            asked = {"prompt": prompt, "temperature": 0, "max_tokens": 12, "logprobs": 2}
            answer = server.post("/v1/completions", asked).json()
            assert "error" not in answer, answer
            assert answer["choices"][0]["text"] == loaded.generate(prompt, 12, temperature=0)
            counted = server.post("/tokenize", {"prompt": prompt}).json()["count"]
            assert answer["usage"]["prompt_tokens"] == counted >= len(loaded.tokenizer.encode(prompt))
            streamed = server.events("/v1/completions", asked)
            assert "".join(event["choices"][0]["text"] for event in streamed) == answer["choices"][0]["text"]
        refused = server.post("/v1/completions", {"prompt": PROMPT, "echo": True, "max_tokens": 0, "logprobs": 1})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "echo"
        longer = server.post("/v1/completions", {"prompt": "x = 1\n" * 400})
        assert longer.status_code == 400 and longer.json()["error"]["code"] == "context_length_exceeded"
        assert server.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 128}).status_code == 200
        assert server.stop() == 0
