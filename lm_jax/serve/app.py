"""The HTTP application: OpenAI's calls, a page for people, and how the server is; limits before anything is tokenised."""

import asyncio
import concurrent.futures
import contextlib
import functools
import hmac
import importlib.resources
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from typing import Any, NamedTuple

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from lm_jax.errors import UserError
from lm_jax.generate.continuous_batching import Engine
from lm_jax.serve import protocol
from lm_jax.serve.answers import Piece, Served, Writer
from lm_jax.serve.metrics import Metrics
from lm_jax.serve.protocol import Answer, Asked, Refusal

BODY_SECONDS = 30  # in which a body has to come


class Limits(NamedTuple):
    """What is accepted."""

    keys: tuple[str, ...]  # of which one has to be given; () = none
    max_body: int  # bytes
    max_queue: int  # requests that wait


class Application:
    """Routes to handlers; `deliver` is what the engine calls."""

    def __init__(self, engine: Engine, served: Served, limits: Limits):
        self.engine, self.name, self.limits, self.metrics = engine, served.name, limits, Metrics(engine)
        self.writer, self.one_thread = Writer(engine, served, self.metrics), concurrent.futures.ThreadPoolExecutor(1)
        self.loop: asyncio.AbstractEventLoop | None = None
        self.stopping, self.created = False, int(time.time())
        guarded: dict[str, tuple[Callable, str]] = {
            "/v1/completions": (functools.partial(self.complete, chat=False), "POST"),
            "/v1/chat/completions": (functools.partial(self.complete, chat=True), "POST"),
            **{"/tokenize": (self.tokenize, "POST"), "/detokenize": (self.detokenize, "POST")},
            **{path: (self.models, "GET") for path in ("/v1/models", "/v1/models/{name:path}")},
            "/metrics": (self.show_metrics, "GET"),
        }
        routes = [Route(path, self.guarded(call), methods=[method]) for path, (call, method) in guarded.items()]
        routes += [Route("/", show_page, methods=["GET"]), Route("/health", self.health, methods=["GET"])]
        refused = lambda request, error: JSONResponse(error.body, error.status)
        handlers: dict[Any, Callable] = {Refusal: refused, HTTPException: no_route, Exception: failed}
        self.asgi = Starlette(routes=routes, exception_handlers=handlers)

    def deliver(self, events: list[tuple[Any, Any]]) -> None:
        """Hands events of the engine over to the thread of the handlers."""
        if self.loop and events:
            self.loop.call_soon_threadsafe(lambda: [job.receive(event) for job, event in events])

    def guarded(self, handler: Callable[[Request], Coroutine]) -> Callable:
        """A handler for those who have a key."""

        async def guard(request: Request) -> Response:
            self.loop = asyncio.get_running_loop()
            given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
            known = [hmac.compare_digest(given, key.encode()) for key in self.limits.keys]
            if known and not any(known):
                raise Refusal("a valid key is expected: Authorization: Bearer KEY", None, 401, "invalid_api_key")
            return await handler(request)

        return guard

    async def body(self, request: Request) -> bytes:
        """The body of a request. Raises Refusal where it is too long, or too slow."""
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    body += part
                    if len(body) > self.limits.max_body:
                        raise Refusal(f"the body is longer than {self.limits.max_body:,} bytes", None, 413)
        except TimeoutError:
            raise Refusal(f"the body did not come within {BODY_SECONDS} seconds", None, 408) from None
        return bytes(body)

    async def apart(self, function: Callable, *arguments: Any) -> Any:
        """`function(*arguments)` in the one thread that asks tokenizers. Raises Refusal."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self.one_thread, function, *arguments)
        except UserError as error:
            raise Refusal(str(error)) from None

    async def complete(self, request: Request, chat: bool) -> Response:
        """/v1/completions and /v1/chat/completions."""
        asked = protocol.parse(await self.body(request), chat, self.name)
        waiting, more = len(self.engine.waiting) + len(self.engine.scoring), asked.num * len(asked.prompts)
        if self.stopping:
            raise Refusal("the server is stopping", None, 503)
        if waiting + more > self.limits.max_queue + len(self.engine.slots):
            raise Refusal(f"{waiting} requests wait, and these are {more}: try later", None, 429, "rate_limit_exceeded")
        jobs, answer = await self.apart(self.writer.jobs, asked), Answer(asked, self.name)
        answer.prompt_tokens = sum(len(job.ids if job.source is None else job.source) for job in jobs[:: asked.num])
        pieces = self.writer.pieces(asked, jobs, answer)
        if asked.switches["stream"]:
            return StreamingResponse(events(asked, answer, pieces), media_type="text/event-stream")
        return await unless_gone(request, in_one(answer, pieces, len(jobs)))

    async def tokenize(self, request: Request) -> Response:
        """A text, or messages, as ids (as vLLM has it)."""
        given = protocol.read_object(await self.body(request))
        protocol.only(given, {"model", "prompt", "messages", "add_special_tokens"})
        prompt = (
            protocol.messages(given) if "messages" in given else protocol.of_kind(given.get("prompt"), str, "prompt")
        )
        special = protocol.of_kind(given.get("add_special_tokens", True), bool, "add_special_tokens")
        ids = await self.apart(self.writer.encode, prompt, special)
        return JSONResponse({"count": len(ids), "max_model_len": self.engine.max_length, "tokens": ids.tolist()})

    async def detokenize(self, request: Request) -> Response:
        """Ids as a text."""
        given = protocol.read_object(await self.body(request))
        protocol.only(given, {"model", "tokens"})
        [tokens] = protocol.prompts([protocol.of_kind(given.get("tokens"), list, "tokens")])
        ids = await self.apart(self.writer.encode, tokens)
        return JSONResponse({"prompt": await self.apart(self.writer.served.tokenizer.decode, ids)})

    async def models(self, request: Request) -> Response:
        """The one model."""
        one = {"id": self.name, "object": "model", "created": self.created, "owned_by": "lm_jax"}
        one |= {"max_model_len": self.engine.max_length, "chat": self.writer.served.template is not None}
        if "name" not in request.path_params:
            return JSONResponse({"object": "list", "data": [one]})
        if request.path_params["name"] != self.name:
            raise Refusal(f"there is one model: {self.name}", "model", 404, "model_not_found")
        return JSONResponse(one)

    async def show_metrics(self, request: Request) -> Response:
        """For Prometheus."""
        return PlainTextResponse(self.metrics.page())

    async def health(self, request: Request) -> Response:
        """Whether new requests are taken."""
        return JSONResponse({"status": "stopping" if self.stopping else "ok"}, 503 if self.stopping else 200)


async def events(asked: Asked, answer: Answer, pieces: AsyncGenerator[Piece]) -> AsyncIterator[str]:
    """An answer as server-sent events."""
    async with contextlib.aclosing(pieces):
        for index in range(asked.num if asked.chat else 0):
            yield answer.chunk([answer.choice(index, "", None, "", first=True)])
        async for piece in pieces:
            if piece.text or piece.logprobs:
                yield answer.chunk([answer.choice(piece.choice, piece.text, piece.logprobs, "")])
            if piece.finish:
                yield answer.chunk([answer.choice(piece.choice, "", None, piece.finish)])
        if asked.switches["usage"]:
            yield answer.chunk([], answer.usage())
        yield "data: [DONE]\n\n"


async def in_one(answer: Answer, pieces: AsyncGenerator[Piece], num: int) -> Response:
    """An answer in one."""
    choices: list[list] = [["", None, ""] for _ in range(num)]
    async with contextlib.aclosing(pieces):
        async for piece in pieces:
            choice = choices[piece.choice]
            said = {name: (choice[1] or {}).get(name, []) + more for name, more in (piece.logprobs or {}).items()}
            choice[:] = choice[0] + piece.text, said or choice[1], piece.finish
    return JSONResponse(answer.whole([answer.choice(k, *choice) for k, choice in enumerate(choices)]))


async def unless_gone(request: Request, answer: Coroutine) -> Response:
    """The answer; given up where the client leaves."""

    async def leaves() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(answer), asyncio.ensure_future(leaves())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else Response(status_code=499)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def show_page(request: Request) -> Response:
    """The page for people."""
    return HTMLResponse((importlib.resources.files("lm_jax.serve") / "page.html").read_text("utf-8"))


async def no_route(request: Request, error: Exception) -> Response:
    """An error of the routes, such as an unknown path, in OpenAI's form."""
    assert isinstance(error, HTTPException)
    refusal = Refusal(f"{request.method} {request.url.path[:200]}: {error.detail}", None, error.status_code)
    return JSONResponse(refusal.body, refusal.status, error.headers)


async def failed(request: Request, error: Exception) -> Response:
    """A fault of ours, of which the client hears nothing more; the log has it."""
    return JSONResponse(Refusal("the server failed", None, 500).body, 500)
