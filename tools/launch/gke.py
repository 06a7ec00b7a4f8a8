"""A run on GKE, in a cluster with JobSet and a node pool for each TPU slice:

  tools/launch/gke.py run my-run --image IMAGE --topology 4x4 --slices 2 -- --config experiments/x.py --workdir gs://bucket/x
  tools/launch/gke.py follow my-run
  tools/launch/gke.py delete my-run

`run` fills in tools/launch/jobset.yaml and gives it to kubectl; `follow` shows the log of process 0. --dry_run prints what would
run, and runs nothing. Any Python from 3.9 on, and kubectl with a cluster, are all that it needs here.
"""

import argparse
import json
import math
import pathlib
import shlex
import string
import subprocess
import sys

JOBSET = pathlib.Path(__file__).with_name("jobset.yaml")


def jobset(flags: argparse.Namespace, arguments: list[str]) -> str:
    """The JobSet of a run, as YAML. JSON of a string or a list is YAML, too, whatever characters are in it."""
    hosts = math.prod(int(length) for length in flags.topology.split("x")) // flags.chips
    words = {"name": flags.name, "image": flags.image, "accelerator": flags.accelerator, "topology": flags.topology}
    counts = {"slices": flags.slices, "hosts": max(1, hosts), "chips": flags.chips, "restarts": flags.restarts}
    quoted = {name: json.dumps(value) for name, value in (words | {"arguments": arguments}).items()}
    return string.Template(JOBSET.read_text()).substitute(quoted | counts)


def perform(line: list[str], dry_run: bool, text: str = "") -> int:
    """Runs a command with `text` as its input, or prints both."""
    print(shlex.join(line) + (f" <<'END'\n{text}END" if text else ""), flush=True)
    return 0 if dry_run else subprocess.run(line, input=text or None, text=True).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("run", "follow", "delete"))
    parser.add_argument("name", help="of the JobSet")
    parser.add_argument(
        "--image", default="", help="what tools/launch/Dockerfile makes of this clone, where it was pushed to"
    )
    parser.add_argument(
        "--accelerator", default="tpu-v5-lite-podslice", help="as node pools call it (default: %(default)s)"
    )
    parser.add_argument("--topology", default="2x4", help="of one slice (default: %(default)s)")
    parser.add_argument("--chips", type=int, default=4, help="of one host (default: %(default)s)")
    parser.add_argument("--slices", type=int, default=1, help="(default: 1)")
    parser.add_argument("--restarts", type=int, default=100, help="at most (default: %(default)s)")
    parser.add_argument("--dry_run", action="store_true", help="print the commands, run nothing")
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    flags, arguments = parser.parse_args(sys.argv[1:at]), sys.argv[at + 1 :]
    if flags.step == "run":
        if not (flags.image and arguments):
            parser.error("run takes --image, and the words of lm_jax.main after --")
        return perform(["kubectl", "apply", "-f", "-"], flags.dry_run, jobset(flags, arguments))
    if flags.step == "delete":
        return perform(["kubectl", "delete", "jobset", flags.name], flags.dry_run)
    first = f"batch.kubernetes.io/job-name={flags.name}-slice-0,batch.kubernetes.io/job-completion-index=0"
    perform(["kubectl", "wait", "--for=condition=Ready", "--timeout=30m", "pod", "-l", first], flags.dry_run)
    return perform(["kubectl", "logs", "--follow", "--tail=-1", "-l", first], flags.dry_run)


if __name__ == "__main__":
    sys.exit(main())
