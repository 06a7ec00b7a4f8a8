"""Google's metadata server of one machine, as JAX asks it. As a command: attributes as JSON -> it prints its port."""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ATTRIBUTES = "/computeMetadata/v1/instance/attributes/"


def serve(attributes: dict[str, str], asked: list[str]) -> ThreadingHTTPServer:
    """A server on a free port of localhost; what it is asked for is appended to `asked`. The caller starts it."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.removeprefix(ATTRIBUTES)
            known = self.headers.get("Metadata-Flavor") == "Google" and name in attributes
            asked.append(name)
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(attributes[name].encode() if known else b"<html>not found</html>")

        def log_message(self, *arguments):
            pass

    return ThreadingHTTPServer(("127.0.0.1", 0), Handler)


def of_worker(worker: int, hosts: list[str], slices: int = 1, own: int = 0, first: str = "") -> dict[str, str]:
    """What the server of one host of a slice says; of several slices also which one, and where process 0 is."""
    lines = ["ACCELERATOR_TYPE: 'v5litepod-16'", "ZONE: 'us-west4-a'", f"WORKER_ID: '{worker}'"]
    if slices > 1:
        lines += [f"MEGASCALE_NUM_SLICES: '{slices}'", f"MEGASCALE_SLICE_ID: '{own}'"]
        lines.append(f"MEGASCALE_COORDINATOR_ADDRESS: '{first}:8080'")
    return {
        "accelerator-type": "v5litepod-16",
        "agent-worker-number": str(worker),
        "worker-network-endpoints": ",".join(hosts),
        "tpu-env": "\n".join(lines),
    }


if __name__ == "__main__":
    server = serve(json.loads(sys.argv[1]), [])
    print(server.server_port, flush=True)
    server.serve_forever()
