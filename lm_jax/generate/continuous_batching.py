"""Continuous batching: requests join and leave the texts that one decode program writes, between two tokens.

A slot is a row of the caches. A prompt is read in chunks of one size that start at its multiples, a chunk between two tokens of
the others; chunks that another slot has read are copied from there. What an encoder reads is read whole. How a text is cut
depends on nothing but itself.
"""

import collections
import dataclasses
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from lm_jax.distributed import block_on_cpu, in_flight
from lm_jax.generate.decoding import on_mesh
from lm_jax.generate.likelihood import TextLikelihood, text_likelihoods
from lm_jax.generate.sampling import GREEDY, Sampling
from lm_jax.generate.slots import (
    ALTERNATIVES,
    Feed,
    Written,
    copy_rows,
    empty_caches,
    read_chunk,
    read_source,
    write_token,
)
from lm_jax.mesh import batch_shards
from lm_jax.model.build import ModelDef
from lm_jax.model.kv_cache import is_cache
from lm_jax.model.language_model import padded

CHUNK = 64  # tokens of a prompt that are read at once
SCORED = 8  # texts on a device whose given tokens are scored at once, as many as lm-eval's adapter takes by default
FREE = -1  # in the place of a slot, or of a position: none


def _drop(events: list[tuple[Any, Any]]) -> None:
    """What nobody listens for."""


class Token(NamedTuple):
    """What a request receives: a token with its log-probability in nats, the most probable ones if they were asked for."""

    token: int
    log_probability: float
    alternatives: list[tuple[int, float]]
    finish: str  # "" = more follow; "length": it was the last that was asked for; "stop": it ends the text and is no part of it


@dataclasses.dataclass(eq=False)
class Request:
    """A text to be written after the ids of a prompt; by an encoder-decoder after its start, with a `source` to read."""

    ids: np.ndarray
    limit: int
    ends: tuple[int, ...]
    sampling: Sampling = GREEDY  # numbers
    alternatives: int = 0
    grammar: Any = None  # a `grammar.Matcher`, which says what may come
    receive: Callable[[Any], None] = print
    source: np.ndarray | None = None
    encoded: bool = False  # whether the source is
    slot: int = FREE
    read: int = 0  # tokens of the prompt that are in the cache
    asked: int = 0  # tokens that were dispatched
    received: int = 0
    order: int = 0  # in which requests got their slots
    over: bool = False


@dataclasses.dataclass(eq=False)
class Score:
    """A text whose own tokens are scored."""

    ids: np.ndarray
    receive: Callable[[TextLikelihood], None] = print
    over: bool = False


@dataclasses.dataclass(eq=False)
class Slot:
    """A row of the caches: who writes there, and the tokens in it that whole chunks have read."""

    request: Request | None = None
    kept: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
    last_used: int = 0


class Engine:
    """`run` works until `close`, in one thread; `submit` and `cancel` are called from any. The mesh is the one that is set.

    `deliver`, which is to be set, gets [(request, what it receives)] after every step, in the thread of `run`.
    """

    def __init__(self, graph: ModelDef, parameters: dict, vocab_size: int, num_slots: int, max_length: int):
        self.graph, self.parameters = graph, graph.unstacked(parameters)
        self.max_length, self.deliver = max_length, _drop
        self.shards = batch_shards(dict(jax.sharding.get_mesh().shape))
        num_slots = -(-num_slots // self.shards) * self.shards
        self.slots = [Slot() for _ in range(num_slots)]
        self.caches = empty_caches(graph, self.parameters, num_slots, max_length)
        of_layers = jax.tree.leaves(self.caches, is_leaf=is_cache)
        self.shares = all(is_cache(x) and x.keys.shape[-2] == max_length for x in of_layers)  # no windows
        self.reads = graph.config.kind == "encoder_decoder"
        widths = [min(CHUNK * 4**k, max_length) for k in range(8)]
        self.widths = sorted(set(widths)) if self.reads else []  # in which a source is read
        self.drawn_B = on_mesh(np.zeros(num_slots, np.int32))
        self.allowed_BW = np.full((num_slots, padded(vocab_size) // 32), -1, np.int32)
        self.everything_BW = on_mesh(self.allowed_BW)
        self.waiting: collections.deque[Request] = collections.deque()
        self.scoring: collections.deque[Score] = collections.deque()
        self.flying: tuple[Written, list[Request]] | None = None
        self.work, self.closing = threading.Condition(), False
        self.counts: collections.Counter[str] = collections.Counter()  # prompt tokens read, and shared; requests so far

    def submit(self, job: "Request | Score") -> None:
        """Puts a request, or a text to score, into the queue."""
        with self.work:
            (self.waiting if isinstance(job, Request) else self.scoring).append(job)  # type: ignore[arg-type]
            self.work.notify()

    def cancel(self, job: "Request | Score") -> None:
        """Ends a request; its slot is free before the next token, its place in the queue at once."""
        with self.work:
            job.over = True
            if job in (queue := self.waiting if isinstance(job, Request) else self.scoring):
                queue.remove(job)  # type: ignore[arg-type]
            self.work.notify()

    def close(self) -> None:
        """Makes `run` return when nothing is left to do."""
        with self.work:
            self.closing = True
            self.work.notify()

    @property
    def busy(self) -> list[Request]:
        """The requests that have a slot, those that came first at the head."""
        return sorted((slot.request for slot in self.slots if slot.request), key=lambda request: request.order)

    @property
    def idle(self) -> bool:
        """Whether nothing is left to do."""
        return not (self.waiting or self.scoring or self.busy or self.flying)

    def run(self) -> None:
        """Works until `close`."""
        while True:
            with self.work:
                self.work.wait_for(lambda: self.closing or not self.idle)
            if self.idle:
                return
            self.step()

    def warm_up(self) -> None:
        """Compiles what every request needs: by two that share a chunk and a short one, by a source of each width."""
        for width in self.widths:
            self.submit(Request(np.zeros(1, np.int32), 1, (), source=np.zeros(width, np.int32)))
        for length in () if self.reads else (CHUNK + 2, CHUNK + 2, 2):
            self.submit(Request(np.zeros(min(length, self.max_length - 1), np.int32), 1, ()))
        while not self.idle:
            self.step()
        self.counts.clear()

    def step(self) -> None:
        """What waits is seated and scored, a chunk is read, a token is written."""
        with self.work:
            self._seat()
            scoring = [self.scoring.popleft() for _ in range(min(len(self.scoring), SCORED * self.shards))]
        if scoring := [job for job in scoring if not job.over]:
            found = text_likelihoods(self.graph, self.parameters, [job.ids for job in scoring], ALTERNATIVES, SCORED)
            self.deliver(list(zip(scoring, found, strict=True)))
        self._encode()
        self._read()
        self._write()

    def _seat(self) -> None:
        """Frees the slots of requests that are over; gives free ones to those that wait, in their order."""
        for slot in self.slots:
            slot.request = None if slot.request and slot.request.over else slot.request
        while self.waiting:
            request = self.waiting[0]
            free = [k for k, slot in enumerate(self.slots) if slot.request is None]
            if not free:
                return
            self.waiting.popleft()
            self.counts["requests"] += 1
            self._take_slot(request, free)

    def _take_slot(self, request: Request, free: list[int]) -> None:
        """The free slot whose part of the batch has most of the prompt's chunks; the least recently used where that is equal."""
        size = len(self.slots) // self.shards
        shared = [self._shared(slot, request) for slot in self.slots]
        best = lambda k: max(range(k // size * size, (k // size + 1) * size), key=lambda j: (shared[j], j == k))
        k = max(free, key=lambda k: (shared[best(k)], best(k) == k, -self.slots[k].last_used))
        if (source := best(k)) != k and shared[source]:
            at = lambda j: np.where(np.arange(self.shards) == k // size, j % size, 0).astype(np.int32)
            self.caches = block_on_cpu(copy_rows(self.caches, at(source), at(k)))
        request.slot, request.order, request.read = k, self.counts["requests"], shared[source]
        self.counts["shared"] += request.read
        self.slots[k] = Slot(request, request.ids[: request.read], request.order)

    def _shared(self, slot: Slot, request: Request) -> int:
        """How many tokens of a prompt are in a slot, in whole chunks."""
        num = min(len(slot.kept), (len(request.ids) - 1) // CHUNK * CHUNK) if self.shares else 0
        differs = np.flatnonzero(slot.kept[:num] != request.ids[:num])
        return int(differs[0]) // CHUNK * CHUNK if len(differs) else num

    def _read(self) -> None:
        """A chunk of one prompt on each part of the batch, all of the width of the first: a quarter where few tokens are left."""
        size, tokens, width = len(self.slots) // self.shards, np.zeros((self.shards, CHUNK), np.int32), 0
        start, num, row = (np.zeros(self.shards, np.int32) for _ in range(3))
        for request in self.busy:
            part, ids = request.slot // size, request.ids[request.read : -1][:CHUNK]
            its = CHUNK if len(ids) > CHUNK // 4 else CHUNK // 4
            if len(ids) and not num[part] and width in (0, its):
                tokens[part, : len(ids)], width = ids, its
                start[part], num[part], row[part] = request.read, len(ids), request.slot % size
                request.read += len(ids)
                self.slots[request.slot].kept = request.ids[: request.read // CHUNK * CHUNK]
        if width:
            self.counts["read"] += int(num.sum())
            read = read_chunk(self.graph, self.parameters, self.caches, tokens[:, :width], start, num, row)
            self.caches = block_on_cpu(read)

    def _encode(self) -> None:
        """A source of one width on each part of the batch: that of the first request that waits."""
        size, chosen = len(self.slots) // self.shards, dict[int, tuple[Request, np.ndarray]]()
        width_of = lambda source: next(width for width in self.widths if width >= len(source))
        for request in [x for x in self.busy if not x.encoded]:
            source = request.source
            if source is not None and all(width_of(other) == width_of(source) for _, other in chosen.values()):
                chosen.setdefault(request.slot // size, (request, source))
        if chosen:
            tokens = np.zeros((self.shards, max(width_of(source) for _, source in chosen.values())), np.int32)
            num, row = (np.zeros(self.shards, np.int32) for _ in range(2))
            for part, (request, source) in chosen.items():
                tokens[part, : len(source)] = source
                num[part], row[part], request.encoded = len(source), request.slot % size, True
            self.counts["read"] += int(num.sum())
            self.caches = block_on_cpu(read_source(self.graph, self.parameters, self.caches, tokens, num, row))

    def _write(self) -> None:
        """A token of every text whose prompt is read; what was dispatched before is delivered while this one is computed."""
        is_read = lambda x: x.read == len(x.ids) - 1 and (x.encoded or x.source is None)
        asked = [x for x in self.busy if is_read(x) and x.asked < x.limit]
        before, self.flying = self.flying, None
        if asked:
            self.caches, written = write_token(
                self.graph, self.parameters, self.caches, self.drawn_B, self._feed(asked)
            )
            self.drawn_B, self.flying = written.token_B, (written, asked)
            for request in asked:
                request.asked += 1
        self._deliver(before)
        if not in_flight() or any(request.grammar for request in asked):  # whose next token depends on this one
            self._deliver(self.flying)
            self.flying = None

    def _feed(self, asked: list[Request]) -> Feed:
        """What the program is told of these requests; other slots are idle."""
        num = len(self.slots)
        token, position, step = np.full(num, -1, np.int32), np.full(num, FREE, np.int32), np.zeros(num, np.int32)
        sampling = GREEDY.of_each(np.zeros(num))
        sampling = Sampling._make(np.array(x) for x in sampling)
        allowed: Any = self.everything_BW
        for request in asked:
            k = request.slot
            token[k] = -1 if request.asked else request.ids[-1]
            position[k], step[k] = len(request.ids) - 1 + request.asked, request.asked
            for array, value in zip(sampling, request.sampling, strict=True):
                array[k] = value
        if any(request.grammar for request in asked):
            self.allowed_BW[:] = -1
            for request in asked:
                if request.grammar:
                    request.grammar.fill(self.allowed_BW[request.slot])
            allowed = self.allowed_BW
        return Feed(token, position, step, sampling, allowed, any(x.alternatives for x in asked))

    def _deliver(self, flown: tuple[Written, list[Request]] | None) -> None:
        """Hands tokens to their requests, but to those that are over."""
        if flown is None:
            return
        token_B, sure_B, best_BA, best_sure_BA = map(np.asarray, flown[0])
        received = []
        for request in flown[1]:
            if not request.over:
                k, num = request.slot, request.alternatives
                request.received += 1
                token, length = int(token_B[k]), request.received == request.limit
                finish = "stop" if token in request.ends else "length" if length else ""
                request.over = bool(finish)
                if request.grammar and not finish:
                    request.grammar.advance(token)
                others = list(zip(best_BA[k, :num].tolist(), best_sure_BA[k, :num].tolist(), strict=True))
                received.append((request, Token(token, float(sure_B[k]), others, finish)))
        self.deliver(received)
