"""From a request to its answer: prompts are encoded, texts are written, and what comes is given on as it comes."""

import asyncio
import functools
import secrets
import time
from collections.abc import AsyncGenerator
from typing import Any, NamedTuple

import numpy as np

from lm_jax.data.special_ids import SpecialIds
from lm_jax.data.tokenizer import Tokenizer
from lm_jax.generate import chat_tokens
from lm_jax.generate.chat_template import Template
from lm_jax.generate.continuous_batching import Engine, Request, Score, Token
from lm_jax.generate.grammar import Grammars
from lm_jax.generate.growing_text import GrowingText
from lm_jax.generate.spelling import Spelling
from lm_jax.serve.log_probabilities import Entry, LogProbabilities
from lm_jax.serve.metrics import Metrics
from lm_jax.serve.protocol import Answer, Asked, Refusal


class Served(NamedTuple):
    """What is served."""

    name: str
    tokenizer: Tokenizer
    marks: SpecialIds
    template: Template | None


class Piece(NamedTuple):
    """What is added to a choice; `finish` "" = more follows."""

    choice: int
    text: str
    logprobs: dict[str, Any] | None
    finish: str


class Writer:
    """Answers of one model. `jobs` asks tokenizers and is called in one thread; the rest in that of the event loop."""

    def __init__(self, engine: Engine, served: Served, metrics: Metrics):
        self.engine, self.served, self.metrics = engine, served, metrics
        self.spelling, self.grammars = Spelling(served.tokenizer), dict[tuple[int, ...], Grammars]()
        widest = int(served.tokenizer.bytes_per_piece.max())
        self.longest = widest * engine.max_length  # bytes that may be few enough tokens

    def encode(self, prompt: Any, special: bool = True) -> np.ndarray:
        """int32 ids of a text, of messages, or of ids. Raises Refusal and UserError."""
        served, messages = self.served, isinstance(prompt, list) and isinstance(prompt[0], dict)
        texts = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt] if messages else []
        if max(len(prompt), sum(len(text.encode()) for text in texts)) > self.longest:
            raise self.too_long("the prompt is longer")
        if isinstance(prompt, str):
            ids, last = served.tokenizer.encode(prompt), served.marks.last if self.engine.reads else ()
            return np.concatenate([served.marks.first, ids, last]).astype(np.int32) if special else ids
        if messages:
            if served.template is None:
                raise Refusal(f"{served.name} has no chat template: ask /v1/completions", "messages")
            return chat_tokens.encode(served.template, prompt, served.tokenizer)
        if max(prompt) >= served.tokenizer.vocab_size:
            raise Refusal(f"token ids are below {served.tokenizer.vocab_size}", "prompt")
        return np.array(prompt, np.int32)

    def too_long(self, what: str) -> Refusal:
        """The refusal of what has no room."""
        return Refusal(
            f"{what} than the {self.engine.max_length} tokens that fit", "prompt", 400, "context_length_exceeded"
        )

    def jobs(self, asked: Asked) -> list[Request]:
        """A request of the engine for each choice. Raises Refusal and UserError."""
        marks, made = self.served.marks, list[Request]()
        if asked.chat and self.served.template:
            marks = marks.also(*self.ends_of_turn)
        ends = () if asked.switches["ignore_eos"] else marks.ends
        if asked.schema is not None and ends not in self.grammars:
            self.grammars[ends] = Grammars(self.served.tokenizer, ends)
        seed = secrets.randbits(32) if asked.seed is None else asked.seed
        if self.engine.reads and asked.switches["echo"]:
            raise Refusal(f"{self.served.name} reads a prompt and does not write it: it has no echo", "echo")
        for prompt in asked.prompts:
            given = self.encode(prompt)
            source, ids = (given, given[:0]) if self.engine.reads else (None, given)
            ids = ids if len(ids) or marks.start < 0 else np.array([marks.start], np.int32)
            room = self.engine.max_length - (0 if self.engine.reads else len(ids))
            if len(given) > self.engine.max_length:
                raise self.too_long(f"the prompt is {len(given)} tokens, more")
            limit = max(room, 1) if asked.limit < 0 else asked.limit
            if not len(ids):
                raise Refusal("the prompt is empty, and nothing says what a text of this model starts with", "prompt")
            if limit > room:
                raise self.too_long(f"the prompt is {len(ids)} tokens and {limit} are to follow, more")
            for _ in range(asked.num):
                sampling = asked.sampling._replace(seed=np.uint32((seed + len(made)) % 2**32))
                matcher = None if asked.schema is None else self.grammars[ends].matcher(asked.schema)
                made.append(Request(ids, limit, ends, sampling, max(asked.alternatives, 0), matcher, source=source))
        return made

    @functools.cached_property
    def ends_of_turn(self) -> tuple[int, ...]:
        """What ends a turn of the assistant."""
        return chat_tokens.ends_of_turn(self.served.template, self.served.tokenizer) if self.served.template else ()

    async def pieces(self, asked: Asked, jobs: list[Request], answer: Answer) -> AsyncGenerator[Piece]:
        """What is written, as it comes. However it ends, its slots are free then."""
        queue: asyncio.Queue[tuple[int, Token]] = asyncio.Queue()
        before = lambda job: job.ids[:0] if self.engine.reads else job.ids
        texts = [GrowingText(self.served.tokenizer, before(job), asked.stops) for job in jobs]
        said = [LogProbabilities(self.spelling, asked.chat, asked.alternatives) for _ in jobs]
        open_choices = {index for index, job in enumerate(jobs) if job.limit}
        start, last = time.perf_counter(), dict[int, float]()
        try:
            given = await self.given(asked, jobs) if asked.switches["echo"] else {}
            for index, job in enumerate(jobs):
                job.receive = functools.partial(lambda index, token: queue.put_nowait((index, token)), index)
                if job.limit:
                    self.engine.submit(job)
                if given or not job.limit:
                    echo, entries = given.get(index // asked.num, ("", []))
                    yield Piece(index, echo, said[index].of(entries), "" if job.limit else "length")
            while open_choices:
                index, token = await queue.get()
                if index not in open_choices:
                    continue
                now = time.perf_counter()
                self.metrics.token(now - last.get(index, start), first=index not in last)
                last[index] = now
                text, entries, finish = texts[index], list[Entry](), token.finish
                if finish != "stop":
                    answer.tokens += 1
                    text.add(token.token)
                    entries.append((token.token, token.log_probability, token.alternatives))
                if finish:
                    text.end()
                finish = "stop" if text.stopped else finish
                if finish:
                    open_choices.remove(index)
                    self.engine.cancel(jobs[index])
                yield Piece(index, text.take(bool(finish)), said[index].of(entries), finish)
        finally:
            for job in jobs:
                self.engine.cancel(job)

    async def given(self, asked: Asked, jobs: list[Request]) -> dict[int, tuple[str, list[Entry]]]:
        """By prompt: its text, and the log-probabilities of its tokens, of which the first has none."""
        found = {}
        scores = [Score(job.ids) for job in jobs[:: asked.num]]
        waits = [asyncio.get_running_loop().create_future() for _ in scores]
        try:
            for score, wait in zip(scores, waits, strict=True):
                score.receive = functools.partial(
                    lambda wait, scored: wait.cancelled() or wait.set_result(scored), wait
                )
                if len(score.ids) > 1 and asked.alternatives >= 0:
                    self.engine.submit(score)
            for number, (score, wait) in enumerate(zip(scores, waits, strict=True)):
                entries: list[Entry] = [(int(score.ids[0]), None, [])]
                if len(score.ids) > 1 and asked.alternatives >= 0:
                    for token, sure, best, best_sure in zip(score.ids[1:], *await wait, strict=True):
                        tops = list(zip(best.tolist(), best_sure.tolist(), strict=True))[: asked.alternatives]
                        entries.append((int(token), float(sure), tops))
                found[number] = self.served.tokenizer.decode(score.ids), entries
        finally:
            for score in scores:
                self.engine.cancel(score)
        return found
