"""Streams through `python -m lm_jax.serve`, 1, 8 and 16 at a time, beside `transformers serve`: `python tools/benchmark serve
--model FOLDER`, a Hugging Face folder with a chat template.

Tokens are counted as they come. Told are tokens/s of all streams together, the time to the first token and between tokens.
"""

import asyncio
import contextlib
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

from lm_jax import cli
from lm_jax.errors import UserError

WORDS = "river stone light paper cloud engine garden window music letter bridge forest number winter silver".split()


@contextlib.contextmanager
def lm_jax_server(folder: str, slots: int) -> Iterator[tuple[int, str]]:
    """(port, name of the model) of ours."""
    line = [
        sys.executable,
        "-m",
        "lm_jax.serve",
        "--model",
        folder,
        "--port",
        "0",
        "--slots",
        str(slots),
        "--max_length",
        "512",
    ]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
        for text in process.stdout:
            if found := re.search(r"^(\S+) at http://[\d.]+:(\d+)", text):
                yield int(found[2]), found[1]
                process.terminate()
                return
    raise UserError("lm_jax.serve ended before it listened; its words stand above")


@contextlib.contextmanager
def transformers_server(folder: str, slots: int) -> Iterator[tuple[int, str]]:
    """The same of `transformers serve` with continuous batching."""
    port, tool = 8765, shutil.which("transformers")
    if not tool:
        raise UserError("no command transformers: pip install 'transformers[serving]'")
    line = [
        tool,
        "serve",
        folder,
        "--port",
        str(port),
        "--host",
        "127.0.0.1",
        "--continuous-batching",
        "--device",
        "cpu",
        "--dtype",
        "float32",
    ]
    with subprocess.Popen(line, stdout=subprocess.DEVNULL) as process:
        for _ in range(600):
            time.sleep(0.2)
            if process.poll() is not None:
                raise UserError("transformers serve ended; its words stand above")
            with (
                contextlib.suppress(OSError),
                contextlib.closing(socket.create_connection(("127.0.0.1", port))),
            ):
                break
        yield port, folder
        process.terminate()


async def ask(port: int, model: str, number: int, tokens: int) -> tuple[float, list[float]]:
    """(when it was asked, when each token came) of one stream."""
    words = " ".join(WORDS[(number * 7 + k * 3) % len(WORDS)] for k in range(24))
    body = {
        "model": model,
        "messages": [{"role": "user", "content": f"Tell me of {words}."}],
        "stream": True,
        "max_tokens": tokens,
    }
    body |= {"temperature": 0}
    data = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    kind, size = "Content-Type: application/json", f"Content-Length: {len(data)}"
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n{kind}\r\n{size}\r\n\r\n"
    asked, came = time.perf_counter(), []
    writer.write(head.encode() + data)
    while line := await reader.readline():
        if (
            line.startswith(b"data: ")
            and b'"content"' in line
            and b'"content": ""' not in line
            and b'"content":""' not in line
        ):
            came.append(time.perf_counter())
        if (
            line.startswith(b"data: [DONE]")
            or b'"finish_reason":"' in line.replace(b" ", b"")
            or line.startswith(b"0\r\n")
        ):
            break
    writer.close()
    return asked, came


async def crowd(port: int, model: str, streams: int, tokens: int, first: int) -> dict[str, float]:
    """Streams that are asked for at the same time."""
    start = time.perf_counter()
    found = await asyncio.gather(*(ask(port, model, first + k, tokens) for k in range(streams)))
    if not all(came for _, came in found):
        raise UserError("a stream brought no token")
    end = max(came[-1] for _, came in found)
    first_token = [came[0] - asked for asked, came in found]
    between = sorted(b - a for _, came in found for a, b in zip(came, came[1:], strict=False)) or [0.0]
    share = lambda values, p: sorted(values)[min(int(p * len(values)), len(values) - 1)]
    return {
        "tokens/s": sum(len(came) for _, came in found) / (end - start),
        "first token p50": share(first_token, 0.5), "first token p99": share(first_token, 0.99),
        "between p50": share(between, 0.5), "between p99": share(between, 0.99),
    }  # fmt: skip


def main(arguments: list[str]) -> int:
    parser = cli.Parser("tools/benchmark/serve.py", __doc__)
    parser.add_argument("--model", required=True, help="a Hugging Face folder")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48, help="of an answer at most")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--alone", action="store_true", help="without transformers")
    flags = parser.parse_args(arguments)
    servers = {"lm_jax": lm_jax_server} | ({} if flags.alone else {"transformers": transformers_server})
    for name, serve in servers.items():
        with serve(flags.model, flags.slots) as (port, model):
            asyncio.run(crowd(port, model, 1, 4, 900))  # what is compiled or read at the first request
            for streams in flags.streams:
                rounds = [asyncio.run(crowd(port, model, streams, flags.tokens, 100 * k)) for k in range(flags.rounds)]
                told = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
                numbers = "  ".join(
                    f"{key} {value:.1f}" if "tokens" in key else f"{key} {value * 1000:.0f} ms"
                    for key, value in told.items()
                )
                print(f"{name}, {streams} streams: {numbers}  (load {os.getloadavg()[0]:.1f})", flush=True)
    return 0


if __name__ == "__main__":
    cli.run_command(main, sys.argv[1:])
