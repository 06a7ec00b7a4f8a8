"""A server as a real process, and folders that it serves."""

import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import requests
from helpers import ONCE
from one_process import LIMIT, ROOT

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}a: {% endif %}"


class Server:
    """`python -m lm_jax.serve`: where it listens, what it said, how it ended."""

    def __init__(self, model, *flags: str):
        line = [sys.executable, "-m", "lm_jax.serve", "--model", str(model), "--port", "0", "--slots", "4", *flags]
        environment = os.environ | ONCE | {"JAX_NUM_CPU_DEVICES": "1"}
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.process = subprocess.Popen(line, env=environment, cwd=ROOT, **pipes)
        self.said, self.url = [], ""
        for text in self.process.stdout:
            self.said.append(text)
            if found := re.search(r"(http://[\d.:]+)/v1", text):
                self.url = found[1]
                break
        assert self.url, "".join(self.said)
        self.port = int(self.url.rpartition(":")[2])
        threading.Thread(target=lambda: self.said.extend(self.process.stdout), daemon=True).start()

    def post(self, path: str, body, **more) -> requests.Response:
        """A POST of JSON, or of bytes as they are."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return requests.post(self.url + path, data=data, timeout=LIMIT, **more)

    def events(self, path: str, body: dict) -> list[dict]:
        """The events of a stream, which ends with [DONE]."""
        response = self.post(path, body | {"stream": True})
        assert response.headers["content-type"].startswith("text/event-stream"), response.text
        parts = response.content.decode().split("\n\n")
        assert parts[-2:] == ["data: [DONE]", ""]
        return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]

    def metric(self, name: str, **more) -> float:
        """A number of /metrics."""
        text = requests.get(self.url + "/metrics", timeout=LIMIT, **more).text
        return float(re.search(rf"^lm_jax_{name} (\S+)$", text, re.MULTILINE)[1])

    def open_stream(self, body: dict) -> socket.socket:
        """A connection on which a stream has been asked for; whoever has it may leave."""
        data = json.dumps(body | {"stream": True}).encode()
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=LIMIT)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
        connection.sendall(head.encode() + data)
        return connection

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Sends a signal; the exit code."""
        self.process.send_signal(number)
        return self.process.wait(LIMIT)


@contextlib.contextmanager
def serving(model, *flags: str) -> Iterator[Server]:
    """A server, which ends at the end."""
    server = Server(model, *flags)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()


LLAMA = "positions=rotary norm=rmsnorm activation=silu gated=True bias=False num_kv_heads=2 tie_embedding=False".split()


def exported(folder: pathlib.Path, *more: str) -> pathlib.Path:
    """A run of a few steps, of Llama's family, as a Hugging Face folder with a chat template; the run lies beside it."""
    run = folder.parent / f"{folder.name}_run"
    smoke = [
        "-m",
        "lm_jax.main",
        "--config",
        "experiments/quickstart.py:smoke",
        "--workdir",
        str(run),
        "--config.mesh.data=1",
    ]
    convert = ["tools/convert_checkpoint.py", str(run), str(folder), "--unproven"]
    for line in ([*smoke, *(f"--config.model.{setting}" for setting in LLAMA), *more], convert):
        environment = os.environ | ONCE | {"JAX_NUM_CPU_DEVICES": "1"}
        done = subprocess.run(
            [sys.executable, *line], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT
        )
        assert done.returncode == 0, done.stderr
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder
