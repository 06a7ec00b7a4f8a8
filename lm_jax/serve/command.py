"""`python -m lm_jax.serve --model MODEL`: OpenAI's API, and a page for people, on one MODEL."""

import signal
import socket
import threading

import jax
import uvicorn

from lm_jax import cli, decide, distributed, load_model, regular_files
from lm_jax.config import Mesh
from lm_jax.data.tokenizer import tell_losses
from lm_jax.errors import UserError
from lm_jax.generate import chat_template
from lm_jax.generate.continuous_batching import Engine
from lm_jax.generate.decoding import writes
from lm_jax.mesh import batch_shards, make_mesh, preflight
from lm_jax.model.language_model import padded
from lm_jax.serve.answers import Served
from lm_jax.serve.app import Application, Limits
from lm_jax.stop import StopSignal, tell
from lm_jax.terminal import Terminal

BOUNDS = {
    "port": (0, 65535),
    "slots": (1, 4096),
    "max_length": (0, 2**20),
    "max_queue": (0, 10**6),
    "tensor": (1, 1024),
}
BOUNDS |= {"max_body": (1024, 2**30), "drain_seconds": (0, 3600)}


def parse(arguments: list[str]):
    """The flags, each within its bounds. Raises UserError."""
    parser = cli.Parser("lm_jax.serve", __doc__)
    load_model.add_flags(parser)
    parser.add_argument("--host", default="127.0.0.1", help="the address; 0.0.0.0: whoever reaches this machine")
    parser.add_argument("--port", type=int, default=8000, help="0: a free one")
    parser.add_argument("--name", default="", help="what clients call the model; default: its folder's name")
    parser.add_argument("--slots", type=int, default=8, help="texts that are written at the same time")
    parser.add_argument(
        "--max_length", type=int, default=2048, help="tokens of a prompt and its answer; 0: all it sees"
    )
    parser.add_argument("--tensor", type=int, default=1, help="devices over which the matrices are split")
    parser.add_argument(
        "--max_queue", type=int, default=64, help="requests that wait for a slot; more are answered 429"
    )
    parser.add_argument("--max_body", type=int, default=2**20, help="bytes of a request; more are answered 413")
    parser.add_argument(
        "--api_key_file", default="", help="a file with a key a line, one of which clients have to give"
    )
    parser.add_argument(
        "--drain_seconds", type=int, default=60, help="what is being written when SIGTERM comes may take"
    )
    parser.add_argument("--chat_variables", default="", help="JSON object for the chat template")
    flags = parser.parse_args(arguments)
    for name, (low, high) in BOUNDS.items():
        if not low <= getattr(flags, name) <= high:
            parser.error(f"--{name} {getattr(flags, name)}: from {low} to {high}")
    return flags


def main(arguments: list[str]) -> int:
    """The command. Returns its exit code; raises UserError."""
    flags, log = parse(arguments), Terminal()
    keys = read_keys(flags.api_key_file) if flags.api_key_file else ()
    listener = listen(flags.host, flags.port)
    found = load_model.of_flags(flags, log)
    if not writes(found.config.model):
        raise UserError(f"--model {flags.model}, of kind {found.config.model.kind}: served are models that write text")
    tell_losses(found.tokenizer, log)
    template = chat_template.find_template(found.workdir)
    if template and flags.chat_variables:
        template = chat_template.read_template(found.workdir, flags.chat_variables)
    served = Served(flags.name or found.workdir.name, found.tokenizer, found.special_ids, template)
    mesh = make_mesh(Mesh(slices=-1, tensor=flags.tensor), distributed.devices())
    alone = {"data.global_batch_size": batch_shards(dict(mesh.shape)), "data.batch_ramp": (0, 0)}
    preflight(decide.replaced(found.config, alone), padded(found.vocab_size), dict(mesh.shape))
    with jax.set_mesh(mesh):
        graph, parameters = load_model.load_parameters(found)
        max_length = min(flags.max_length or graph.sequence_length, graph.sequence_length)
        engine = Engine(graph, parameters, found.vocab_size, flags.slots, max_length)
        del parameters
        application = Application(engine, served, Limits(keys, flags.max_body, flags.max_queue))
        engine.warm_up()
        engine.deliver = application.deliver
        serve(engine, application, listener, flags, log)
    return 0


def serve(engine: Engine, application: Application, listener: socket.socket, flags, log: Terminal) -> None:
    """Answers until SIGTERM or SIGINT; then what is being written ends first."""
    settings = uvicorn.Config(application.asgi, log_level="error", timeout_graceful_shutdown=flags.drain_seconds)
    server = uvicorn.Server(settings)

    def answer() -> None:
        try:
            server.run(sockets=[listener])
        finally:
            engine.close()

    with Draining(server, application):
        thread = threading.Thread(target=answer)
        thread.start()
        host, port = listener.getsockname()[:2]
        where = f"http://{host}:{port}"
        log(
            f"{application.name} at {where}/v1 · {len(engine.slots)} slots of {engine.max_length} tokens · a page at {where}"
        )
        try:
            engine.run()
        finally:
            server.should_exit, server.force_exit = True, thread.is_alive()  # alive: the engine has failed
            thread.join()


class Draining(StopSignal):
    """A first signal stops the server once its answers are written; a second one ends it at once."""

    def __init__(self, server: uvicorn.Server, application: Application):
        super().__init__()
        self.server, self.application = server, application

    def wish(self, number: int) -> None:
        """What a signal does."""
        if number in (signal.SIGINT, signal.SIGTERM) and not self.requested:
            self.requested = self.application.stopping = self.server.should_exit = True
            tell("stopping: what is being written is finished; once more to leave at once")


def listen(host: str, port: int) -> socket.socket:
    """A socket. Raises UserError where the address is not to be had."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no address"
        raise UserError(f"--host {host} --port {port}: {reason}; --port 0 takes a free one") from None


def read_keys(path: str) -> tuple[str, ...]:
    """The lines of a file of keys. Raises UserError."""
    try:
        keys = tuple(filter(None, map(str.strip, regular_files.read_bytes(path).decode().splitlines())))
    except (OSError, UnicodeDecodeError):
        raise UserError(f"--api_key_file {path} cannot be read") from None
    if not keys:
        raise UserError(f"--api_key_file {path} holds no key: a key a line is expected")
    return keys
