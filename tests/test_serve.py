"""The server: OpenAI's calls as its own client makes them, refusals in its form, clients that leave, the end by SIGTERM."""

import itertools
import json
import random
import string
import threading
import time

import jax
import numpy as np
import pytest
import requests
from helpers import LIMIT

pytest.importorskip("starlette", reason="pip install -e '.[serve]'")
from serving import Server, exported, serving  # noqa: E402

from lm_jax import load_model  # noqa: E402
from lm_jax.config import Mesh  # noqa: E402
from lm_jax.errors import UserError  # noqa: E402
from lm_jax.generate.decoding import complete  # noqa: E402
from lm_jax.generate.growing_text import GrowingText  # noqa: E402
from lm_jax.generate.likelihood import text_likelihoods  # noqa: E402
from lm_jax.generate.sampling import GREEDY  # noqa: E402
from lm_jax.mesh import make_mesh  # noqa: E402
from lm_jax.serve.__main__ import main  # noqa: E402

PROMPT = "import os"
GREEDILY = {"prompt": PROMPT, "temperature": 0, "max_tokens": 20}
SAYS = [{"role": "user", "content": "What is a class?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("tokenizers")
    return exported(tmp_path_factory.mktemp("exported") / "small")


@pytest.fixture(scope="module")
def server(folder):
    with serving(folder, "--max_queue", "40", "--max_body", "20000") as one:
        yield one
        assert one.stop() == 0, one.said


@pytest.fixture(scope="module")
def written(folder):
    """What `generate` writes, greedily; its text as it grows (bytes that are no UTF-8 spoil those before them at the end)."""
    found = load_model.locate(str(folder))
    with jax.set_mesh(make_mesh(Mesh(data=1), jax.devices()[:1])):
        graph, parameters = load_model.load_parameters(found)
        [one] = complete(graph, parameters, found.tokenizer, [PROMPT], 20, GREEDY, marks=found.special_ids)
    text = GrowingText(found.tokenizer, found.tokenizer.encode(PROMPT))
    for token in one.tokens:
        text.add(token)
    text.end()
    return one._replace(text=text.take(everything=True))


def test_completions_say_what_generate_writes(server, written):
    answer = server.post("/v1/completions", GREEDILY | {"logprobs": 3}).json()
    [choice] = answer["choices"]
    assert choice["text"] == written.text and choice["finish_reason"] == "length"
    assert answer["usage"] == {"prompt_tokens": 6, "completion_tokens": 20, "total_tokens": 26}
    np.testing.assert_allclose(choice["logprobs"]["token_logprobs"], written.log_probabilities, atol=1e-4)
    assert all(len(best) == 3 for best in choice["logprobs"]["top_logprobs"])
    events = server.events("/v1/completions", GREEDILY | {"stream_options": {"include_usage": True}, "logprobs": 3})
    assert "".join(event["choices"][0]["text"] for event in events[:-1]) == written.text
    streamed = [event["choices"][0]["logprobs"] for event in events[:-1] if event["choices"][0]["logprobs"]]
    for name, values in choice["logprobs"].items():
        assert [x for part in streamed for x in part[name]] == values
    assert [event["choices"][0]["finish_reason"] for event in events[:-1]] == [None] * (len(events) - 2) + ["length"]
    assert events[-1]["choices"] == [] and events[-1]["usage"] == answer["usage"]
    assert all(event["usage"] is None for event in events[:-1])


def test_prompts_in_every_form_and_several_at_once(server, written):
    ids = server.post("/tokenize", {"prompt": PROMPT}).json()["tokens"]
    assert server.post("/detokenize", {"tokens": ids}).json() == {"prompt": PROMPT}
    for prompt in ([PROMPT, "class"], [ids, ids[:1]], ids):
        choices = server.post("/v1/completions", GREEDILY | {"prompt": prompt}).json()["choices"]
        assert choices[0]["text"] == written.text
        assert [choice["index"] for choice in choices] == [*range(1 if prompt is ids else 2)]
    seeded = GREEDILY | {"temperature": 1.5, "seed": -7, "n": 3}
    first, again = (server.post("/v1/completions", seeded).json()["choices"] for _ in range(2))
    assert first == again and len({choice["text"] for choice in first}) == 3
    other = server.post("/v1/completions", seeded | {"seed": 8}).json()["choices"]
    assert other[0] != first[0]


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_a_text_across_tokens(server, written, stream):
    text = written.text.rstrip("\ufffd")
    stop = next(text[k : k + 3] for k in range(2, len(text)) if "\ufffd" not in text[k : k + 3])
    body = GREEDILY | {"stop": ["never", stop]}
    if stream:
        choices = [event["choices"][0] for event in server.events("/v1/completions", body)]
        found, finish = "".join(choice["text"] for choice in choices), choices[-1]["finish_reason"]
    else:
        answer = server.post("/v1/completions", body).json()
        found, finish = answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]
        assert 0 < answer["usage"]["completion_tokens"] < 20
    assert found == text[: text.index(stop)] and finish == "stop"


@pytest.mark.parametrize("limit", [0, 1])
def test_a_prompt_is_scored_as_lm_eval_asks_it(server, folder, limit):
    ids = server.post("/tokenize", {"prompt": "import os, sys"}).json()["tokens"]
    body = {"prompt": [ids, ids[:4]], "echo": True, "logprobs": 1, "max_tokens": limit, "temperature": 0, "seed": 1234}
    long, short = server.post("/v1/completions", body).json()["choices"]
    model = load_model.locate(str(folder))
    with jax.set_mesh(make_mesh(Mesh(data=1), jax.devices()[:1])):
        graph, parameters = load_model.load_parameters(model)
        [scored] = text_likelihoods(graph, graph.unstacked(parameters), [np.array(ids, np.int32)], 1)
    sure, best = long["logprobs"]["token_logprobs"], long["logprobs"]["top_logprobs"]
    assert len(sure) == len(ids) + limit and sure[0] is None and best[0] is None
    assert sure[1 : len(ids)] == scored.log_probabilities.tolist()
    assert short["logprobs"]["token_logprobs"][1:4] == pytest.approx(sure[1:4], abs=1e-5)
    assert all(len(one) == 1 for one in best[1:])
    assert long["text"].startswith("import os, sys") and (long["text"] == "import os, sys") == (limit == 0)
    assert long["finish_reason"] == "length"


def test_conversations(server):
    body = {"messages": SAYS, "max_completion_tokens": 6, "temperature": 0, "n": 2, "logprobs": True, "top_logprobs": 2}
    answer = server.post("/v1/chat/completions", body).json()
    first, second = answer["choices"]
    assert first["message"] == second["message"] and first["message"]["role"] == "assistant"
    assert len(first["logprobs"]["content"]) == 6 and answer["object"] == "chat.completion"
    assert bytes(b for one in first["logprobs"]["content"] for b in one["bytes"]).decode("utf-8", "replace")
    events = server.events("/v1/chat/completions", body)
    assert [event["choices"][0]["delta"]["role"] for event in events[:2]] == ["assistant"] * 2
    parts = [event["choices"][0] for event in events if event["choices"][0]["index"] == 1]
    assert "".join(part["delta"].get("content", "") for part in parts) == first["message"]["content"]
    assert parts[-1]["finish_reason"] == "length" and {event["object"] for event in events} == {"chat.completion.chunk"}
    ids = server.post("/tokenize", {"messages": SAYS}).json()["tokens"]
    assert answer["usage"]["prompt_tokens"] == len(ids)


def test_an_answer_fits_a_json_schema(server):
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "yes"]}}, "required": ["a"]}
    schema["additionalProperties"] = False
    form = {"type": "json_schema", "json_schema": {"name": "one", "strict": True, "schema": schema}}
    body = {"prompt": PROMPT, "max_tokens": 50, "response_format": form, "seed": 3, "temperature": 0.3}
    [choice] = server.post("/v1/completions", body).json()["choices"]
    if choice["finish_reason"] == "stop":
        assert json.loads(choice["text"])["a"] in ("x", "yes")
    else:
        assert choice["text"].startswith("{")
    form["json_schema"]["schema"] = {"type": "nonsense"}
    assert server.post("/v1/completions", body).status_code == 400


REFUSED = [
    ("/v1/completions", b"{", 400, "no JSON"),
    ("/v1/completions", b'{"prompt": "\\ud800"}', 400, "no JSON"),
    ("/v1/completions", b'{"prompt": NaN}', 400, "no JSON"),
    ("/v1/completions", b"[" * 15000, 400, "no JSON"),
    ("/v1/completions", b" " * 30000, 413, "longer than 20,000 bytes"),
    ("/v1/completions", [], 400, "the body is"),
    ("/v1/completions", {"prompt": "a" * 15000}, 400, "longer than the 64 tokens"),
    ("/v1/completions", {"prompt": "a", "max_tokens": 1000}, 400, "more than the 64 tokens"),
    ("/v1/completions", {"prompt": "a", "max_tokns": 1}, 400, "did you mean max_tokens?"),
    ("/v1/completions", {"prompt": "a", "frequency_penalty": 0.5}, 400, "frequency_penalty = 0.5 is not supported"),
    ("/v1/completions", {"prompt": "a", "temperature": "hot"}, 400, "a number from 0 to 2"),
    ("/v1/completions", {"prompt": "a", "n": True}, 400, "a whole number"),
    ("/v1/completions", {"prompt": [[1, 2], [-1]]}, 400, "prompt holds"),
    ("/v1/completions", {"prompt": [2**30]}, 400, "token ids are below"),
    ("/v1/completions", {"prompt": []}, 400, "prompt"),
    ("/v1/completions", {"prompt": ["a"] * 100}, 429, "try later"),
    ("/v1/completions", {"prompt": "a", "stop": ""}, 400, "none of them empty"),
    ("/v1/completions", {"prompt": "a", "model": "../etc/passwd"}, 404, "does not exist"),
    ("/v1/completions", {"prompt": "a", "stream_options": {"include_usage": True}}, 400, "stream_options"),
    ("/v1/chat/completions", {"messages": []}, 400, "at least one"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "parts"),
    ("/v1/chat/completions", {"messages": SAYS, "tools": [{"type": "function"}]}, 400, "tools"),
    ("/v1/chat/completions", {"messages": SAYS, "top_logprobs": 2}, 400, "logprobs is true"),
    ("/v1/nothing", {}, 404, "Not Found"),
    ("/detokenize", {"tokens": ["a"]}, 400, "token"),
]


@pytest.mark.parametrize("path, body, status, says", REFUSED, ids=lambda x: str(x)[:40])
def test_what_is_not_supported_is_refused_in_openais_form(server, path, body, status, says):
    response = server.post(path, body)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and says in error["message"]


def test_the_official_client(server):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any")
    [model] = client.models.list().data
    assert client.models.retrieve(model.id).id == model.id
    for stream, n in itertools.product((False, True), (1, 2)):
        common = dict(model=model.id, n=n, stream=stream, temperature=0, max_tokens=5)
        text = client.completions.create(prompt=PROMPT, logprobs=1, **common)
        chat = client.chat.completions.create(messages=SAYS, logprobs=True, **common)
        if not stream:
            assert len(text.choices) == len(chat.choices) == n and chat.choices[0].message.role == "assistant"
            assert text.usage.completion_tokens == chat.usage.completion_tokens == 5 * n
            continue
        finishes = [c.finish_reason for chunk in text for c in chunk.choices if c.finish_reason]
        assert finishes == ["length"] * n
        finishes = [c.finish_reason for chunk in chat for c in chunk.choices if c.finish_reason]
        assert finishes == ["length"] * n
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="gpt-4", prompt="a")
    with pytest.raises(openai.BadRequestError, match="presence_penalty"):
        client.completions.create(model=model.id, prompt="a", presence_penalty=1)


def slots_are_free(server: Server) -> None:
    for _ in range(200):
        if not server.metric("slots_busy") + server.metric("requests_waiting"):
            return
        time.sleep(0.05)
    raise AssertionError("slots are taken")


def leave_in_the_middle(server: Server, num: int, seed: int = 0) -> None:
    """Clients that ask for a stream, read a little or nothing, and are gone."""
    numbers = random.Random(seed)
    for _ in range(num):
        connection = server.open_stream({"prompt": PROMPT, "max_tokens": 50, "ignore_eos": True})
        if numbers.random() < 0.7:
            connection.recv(numbers.randint(1, 400))
        connection.close()
    slots_are_free(server)


@pytest.mark.parametrize("num", [6, pytest.param(100, marks=pytest.mark.proof)])
def test_clients_that_leave_free_their_slots(server, written, num):
    leave_in_the_middle(server, num)
    assert server.post("/v1/completions", GREEDILY).json()["choices"][0]["text"] == written.text


def test_a_slow_reader_holds_nobody(server, written):
    slow = [server.open_stream({"prompt": PROMPT, "max_tokens": 50, "ignore_eos": True}) for _ in range(4)]
    try:
        assert server.post("/v1/completions", GREEDILY).json()["choices"][0]["text"] == written.text
        slots_are_free(server)
    finally:
        for connection in slow:
            connection.close()


@pytest.mark.parametrize("num", [8, pytest.param(32, marks=pytest.mark.proof)])
def test_a_crowd_hears_what_each_hears_alone(server, num):
    """Clients, long and short, that join and leave at random; a third is cut off."""
    numbers = random.Random(1)
    bodies = [
        {
            "prompt": "x" * numbers.randint(1, 20) + str(k),
            "temperature": 0,
            "max_tokens": numbers.randint(1, 30),
            "logprobs": 0,
        }
        for k in range(num)
    ]
    found: dict[int, dict] = {}

    def ask(k: int) -> None:
        time.sleep(numbers.random() * 0.3)
        if k % 3:
            found[k] = server.post("/v1/completions", bodies[k]).json()["choices"][0]
        else:
            connection = server.open_stream(bodies[k])
            connection.recv(numbers.randint(1, 500))
            connection.close()

    threads = [threading.Thread(target=ask, args=(k,)) for k in range(num)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    slots_are_free(server)
    assert len(found) == num - len(range(0, num, 3))
    for k, choice in found.items():
        assert server.post("/v1/completions", bodies[k]).json()["choices"][0] == choice


def fuzzed(number: int) -> tuple[str, bytes]:
    """A body that asks for something odd."""
    numbers = random.Random(number)
    odd = [
        None,
        True,
        -1,
        1.5,
        2**70,
        1e308,
        "",
        "x",
        [],
        {},
        [[]],
        {"a": 1},
        ["x"] * 3,
        [1, "x"],
        "\x00",
        [None],
        "é" * 50,
    ]
    names = [
        "prompt",
        "messages",
        "max_tokens",
        "temperature",
        "top_p",
        "n",
        "stop",
        "stream",
        "logprobs",
        "echo",
        "seed",
    ]
    names += [
        "response_format",
        "stream_options",
        "top_logprobs",
        "model",
        "logit_bias",
        "tools",
        "user",
        "best_of",
        "x",
    ]
    path = numbers.choice(["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
    body = {"max_tokens": 1, "messages" if "chat" in path else "prompt": SAYS if "chat" in path else "a"} | {
        numbers.choice(names): numbers.choice(odd) for _ in range(numbers.randint(1, 4))
    }
    data = json.dumps(body).encode()
    for _ in range(numbers.choice([0, 0, 0, 1, 5])):
        at = numbers.randrange(len(data))
        data = data[:at] + numbers.choice(string.printable).encode() + data[at + numbers.choice([0, 1]) :]
    return path, data


@pytest.mark.parametrize("num", [60, pytest.param(1000, marks=pytest.mark.proof)])
def test_no_body_is_a_fault_of_ours(server, num):
    session, statuses, seconds = requests.Session(), [], []
    for number in range(num):
        path, data = fuzzed(number)
        start = time.perf_counter()
        response = session.post(server.url + path, data=data, timeout=LIMIT)
        statuses.append(response.status_code)
        if response.status_code != 200:
            seconds.append(time.perf_counter() - start)
            assert response.json()["error"]["message"], data
    assert {status // 100 for status in statuses} <= {2, 4} and num // 3 < statuses.count(400) < num, statuses
    assert server.process.poll() is None
    print(
        f"{len(seconds)} refused, the slowest after {1000 * max(seconds):.1f} ms, half within {1000 * np.median(seconds):.1f} ms"
    )


def test_a_key_is_asked_for_and_sigterm_lets_answers_end(folder, tmp_path):
    (tmp_path / "keys").write_text("one\n\ntwo words\n")
    with serving(folder, "--api_key_file", str(tmp_path / "keys"), "--name", "mine") as server:
        assert requests.get(f"{server.url}/health", timeout=LIMIT).json() == {"status": "ok"}
        for headers, status in (
            ({}, 401),
            ({"Authorization": "Bearer onetwo"}, 401),
            ({"Authorization": "Bearer one"}, 200),
        ):
            response = requests.get(f"{server.url}/v1/models", headers=headers, timeout=LIMIT)
            assert response.status_code == status and (status == 401) == ("error" in response.json())
        key = {"Authorization": "Bearer two words"}
        found = []
        body = {"prompt": PROMPT, "max_tokens": 58, "ignore_eos": True}
        ask = lambda: found.append(server.post("/v1/completions", body, headers=key))
        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        while not server.metric("slots_busy", headers=key):
            time.sleep(0.01)
        assert server.stop() == 0
        for thread in threads:
            thread.join()
        assert all(one.json()["usage"]["completion_tokens"] == 58 for one in found if one.status_code == 200)
        assert any(one.status_code == 200 for one in found)
        assert "stopping: what is being written is finished" in "".join(server.said)


def test_mistakes_are_told_before_anything_is_loaded(folder, tmp_path):
    for line, says in (
        (["--port", "70000"], "--port 70000"),
        (["--api_key_file", str(tmp_path / "none")], "cannot be read"),
        (["--host", "256.0.0.1"], "--host 256.0.0.1"),
        (["--slots", "0"], "--slots 0: from 1"),
    ):
        with pytest.raises(UserError, match=says):
            main(["--model", str(folder), *line])
