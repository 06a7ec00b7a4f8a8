"""Fills in chat templates: asks the process of jinja_process.py, which has limits of memory and time, for the texts."""

import atexit
import datetime
import importlib.util
import json
import pathlib
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

from lm_jax.errors import UserError, needs
from lm_jax.generate.chat_template import THOUGHTS, Message, Template


class Sandbox:
    """The process that fills in templates; it is started for the first text, and again after a template ended it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen | None = None

    def start(self) -> subprocess.Popen:
        """Starts the process. Raises UserError where jinja2 is not installed."""
        if not importlib.util.find_spec("jinja2"):
            raise needs("a chat template", "jinja2", "hf")
        line = [sys.executable, "-P", str(pathlib.Path(__file__).parent / "jinja_process.py")]
        pipe, none = subprocess.PIPE, subprocess.DEVNULL
        return subprocess.Popen(line, stdin=pipe, stdout=pipe, stderr=none, start_new_session=True)

    def ask(self, request: dict[str, Any]) -> list[str]:
        """The texts of a request's jobs. Raises UserError."""
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                self.process = self.start()
            assert self.process.stdin and self.process.stdout
            try:
                self.process.stdin.write(json.dumps(request).encode() + b"\n")
                self.process.stdin.flush()
                reply = self.process.stdout.readline()
            except BrokenPipeError:
                reply = b""
            if not reply:
                ended = self.process.wait()
                self.close()
                why = "it computes for too long" if ended == -signal.SIGXCPU else f"its process ended ({ended})"
                raise UserError(f"the chat template cannot be filled in: {why}")
        found = json.loads(reply)
        if "refusal" in found:
            raise UserError(f"the chat template refuses this conversation: {found['refusal']}")
        if "fault" in found:
            raise UserError(f"the chat template cannot be filled in: {found['fault']}")
        return found["texts"]

    def close(self) -> None:
        """Ends the process."""
        if self.process:
            self.process.kill()
            self.process.communicate()


SANDBOX = Sandbox()
atexit.register(SANDBOX.close)


class Job(NamedTuple):
    """A text that a template is to write; `around` are two characters to put around what {% generation %} marks."""

    messages: Sequence[Message]
    add_generation_prompt: bool
    around: str = ""


def render(template: Template, jobs: Sequence[Job], now: datetime.datetime | None = None) -> list[str]:
    """What a template writes for each job, as `apply_chat_template` of `transformers` does. Raises UserError."""
    asked = [job._replace(messages=[_as_shown(message) for message in job.messages])._asdict() for job in jobs]
    when = (now or datetime.datetime.now()).isoformat()
    return SANDBOX.ask({"source": template.source, "variables": template.variables, "now": when, "jobs": asked})


def _as_shown(message: Message) -> Message:
    """A message as a template gets it: without None, its thoughts under each name that templates know."""
    message = {name: value for name, value in message.items() if value is not None}
    thought = next((message[name] for name in THOUGHTS if name in message), None)
    return message if thought is None else {"thinking": thought} | message | {THOUGHTS[0]: thought}
