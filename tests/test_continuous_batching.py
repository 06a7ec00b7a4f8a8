"""Continuous batching: an answer is the same bits alone and in a crowd, on any mesh; slots are free as soon as they can be."""

import random
import threading
import time

import jax
import numpy as np
import pytest
from helpers import FAMILIES, READER, tiny

from lm_jax.config import Mesh
from lm_jax.data.special_ids import SpecialIds
from lm_jax.data.tokenizer import Bytes
from lm_jax.generate import continuous_batching
from lm_jax.generate.continuous_batching import Engine, Request, Score
from lm_jax.generate.decoding import complete
from lm_jax.generate.likelihood import likelihoods
from lm_jax.generate.sampling import GREEDY, Sampling
from lm_jax.generate.slots import ALTERNATIVES
from lm_jax.mesh import make_mesh
from lm_jax.model.build import build

VOCABULARY, LENGTH, ENDS, START = 500, 64, (5, 6, 7), 3
MODELS = FAMILIES | {"t5": READER}


class Play:
    """Requests through an engine: those of `cut` leave after a few tokens."""

    def __init__(self, engine: Engine, cut=(), seed: int = 0):
        self.engine, self.cut, self.random = engine, set(cut), random.Random(seed)
        self.received: dict[Request, list] = {}
        engine.deliver, engine.closing = self.deliver, False

    def deliver(self, events) -> None:
        for request, token in events:
            self.received.setdefault(request, []).append(token)
            if request in self.cut and self.random.random() < 0.2:
                self.engine.cancel(request)

    def run(self, requests: list, pause: float = 0.0) -> list[list]:
        def join() -> None:
            for request in requests:
                self.engine.submit(request)
                time.sleep(pause * self.random.random())
            self.engine.close()

        thread = threading.Thread(target=join)
        thread.start()
        self.engine.run()
        thread.join()
        assert self.engine.busy == [] and self.engine.idle
        return [self.received.get(request, []) for request in requests]


def crowd(num: int, family: str = "llama") -> list[Request]:
    """Short and long ones; every other begins as others do; every third is sampled. An encoder-decoder has them as sources."""
    numbers, start = np.random.RandomState(1), np.random.RandomState(0).randint(8, VOCABULARY, 30)
    requests = []
    for i in range(num):
        own = numbers.randint(8, VOCABULARY, numbers.randint(1, 20))
        ids = np.concatenate([start[: numbers.randint(30)] if i % 2 else start[:0], own]).astype(np.int32)
        sampling = GREEDY if i % 3 else Sampling(0.8, 50, 0.9, 0.0, 1.0, i)
        start_ids, source = (np.array([START], np.int32), ids[:40]) if family == "t5" else (ids[:40], None)
        limit = int(numbers.randint(1, 24))
        requests.append(Request(start_ids, limit, ENDS, sampling, alternatives=i % 2, source=source))
    return requests


@pytest.fixture
def engine_of(monkeypatch, eight):
    monkeypatch.setattr(continuous_batching, "CHUNK", 8)
    before = jax.sharding.get_mesh()

    def make(family: str, mesh: Mesh, devices: int) -> Engine:
        graph = build(tiny(**(MODELS[family] | {"model__init_scale": 0.2})).model, VOCABULARY, LENGTH)
        jax.set_mesh(make_mesh(mesh, eight[:devices]))
        return Engine(graph, jax.jit(lambda: graph.init(jax.random.key(0), sharded=True))(), VOCABULARY, 8, LENGTH)

    yield make
    jax.set_mesh(before)


ONE = Mesh(data=1)
CASES = [("gpt2", ONE, 1), ("mistral", ONE, 1), ("t5", ONE, 1), ("llama", Mesh(data=2, fsdp=2, tensor=2), 8)]
PROOF = [(name, ONE, 1) for name in sorted(FAMILIES)] + [
    (name, Mesh(data=4, tensor=2), 8) for name in ("gpt2", "mixtral", "lstm", "gemma3", "t5")
]


@pytest.mark.parametrize(
    "family, mesh, devices", [*CASES, *(pytest.param(*case, marks=pytest.mark.proof) for case in PROOF)]
)
def test_an_answer_in_a_crowd_is_that_of_the_request_alone(family, mesh, devices, engine_of):
    """To the bit, log-probabilities too; every third request leaves in the middle."""
    engine, num = engine_of(family, mesh, devices), 32
    requests = crowd(num, family)
    together = Play(engine, requests[::3]).run(requests, pause=0.01)
    assert bool(engine.counts["shared"]) == engine.shares == (family not in ("mistral", "lstm") and engine.shares)
    engine.slots = [continuous_batching.Slot() for _ in engine.slots]  # nothing to share
    whole, lengths = 0, set()
    for i, request in enumerate(crowd(num, family)):
        [alone] = Play(engine).run([request])
        assert together[i] == alone[: len(together[i])], f"request {i}"
        whole += together[i] == alone
        lengths.add(len(alone))
        assert alone[-1].finish == ("stop" if alone[-1].token in ENDS else "length")
        assert (alone[-1].finish == "length") <= (len(alone) == request.limit)
    assert whole >= num * 2 // 3 and len(lengths) > 4
    assert any(len(tokens) < request.limit for tokens, request in zip(together[::3], requests[::3], strict=True))


@pytest.mark.parametrize("family", ["llama", "mistral", "t5"])
def test_what_is_written_is_what_generate_writes(family, engine_of):
    engine = engine_of(family, ONE, 1)
    requests = [request for request in crowd(6, family) if request.sampling is GREEDY]
    found = Play(engine).run(requests)
    for request, tokens in zip(requests, found, strict=True):
        rows = [request.ids if request.source is None else request.source], request.limit, GREEDY
        marks = SpecialIds((), (), START, ENDS)
        [expected] = complete(engine.graph, engine.parameters, Bytes(), *rows, marks=marks)
        written = [token.token for token in tokens if token.finish != "stop"]
        assert written == expected.tokens
        np.testing.assert_allclose(
            [x.log_probability for x in tokens][: len(written)], expected.log_probabilities, atol=1e-4
        )
    asked = next(tokens for request, tokens in zip(requests, found, strict=True) if request.alternatives)
    assert all(token.alternatives == [(token.token, token.log_probability)] for token in asked)


def test_a_slot_is_free_within_a_token_and_a_queue_moves_on(engine_of):
    engine = engine_of("gpt2", ONE, 1)
    endless = [Request(np.array([9 + i], np.int32), 60, ()) for i in range(12)]
    for request in endless:
        engine.submit(request)
    engine.deliver = lambda events: None
    engine.step()
    assert len(engine.busy) == 8 and len(engine.waiting) == 4
    for request in endless[2:11]:
        engine.cancel(request)
    assert list(engine.waiting) == [endless[11]], "who left the queue keeps nobody out of it"
    engine.step()
    assert engine.busy == [*endless[:2], endless[11]] and not engine.waiting
    received = endless[2].received
    engine.step()
    assert endless[2].received == received
    for request in endless:
        engine.cancel(request)
    engine.step()
    assert engine.busy == [] and engine.idle


def test_texts_are_scored_between_two_tokens(engine_of):
    engine = engine_of("gpt2", ONE, 1)
    text = np.random.RandomState(3).randint(8, VOCABULARY, 40).astype(np.int32)
    score, request = Score(text), Request(text[:5], 12, ())
    found = Play(engine).run([request, score])
    [[answer]] = [found[1]]
    [one] = likelihoods(engine.graph, engine.parameters, [(text[:10], text[10:])])
    assert float(answer.log_probabilities[9:].sum(dtype=np.float64)) == one.log_probability  # to the bit
    assert answer.best.shape == (39, ALTERNATIVES)
    at = answer.best == text[1:, None]
    np.testing.assert_array_equal(answer.best_log_probabilities[at], answer.log_probabilities[at.any(1)])
