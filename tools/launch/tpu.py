"""A run on Cloud TPU VMs: one machine, a slice of a pod, several slices. From nothing to a loss curve, and back to nothing:

  tools/launch/tpu.py up my-pod --zone us-west4-a --type v5litepod-16 --spot     create or attach, send this clone, install
  tools/launch/tpu.py run my-pod --zone us-west4-a --type v5litepod-16 --spot -- --config experiments/x.py --workdir gs://b/x
  tools/launch/tpu.py delete my-pod --zone us-west4-a

`run` trains on all workers, follows the log of process 0 and starts again what was preempted, or left with 70 or 75; at the
end it brings TensorBoard's files home. `follow`, `fetch` and `stop` do these steps alone. --dry_run prints what would run,
and runs nothing. Any Python from 3.9 on, and gcloud with a login and a project, are all that it needs here.
"""

import argparse
import sys

from pod import Pod

ONE_HOST = ("-1", "-4", "-8")  # ends of types whose slice may be one machine


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("up", "run", "follow", "fetch", "stop", "delete"))
    parser.add_argument("name", help="of the queued resource, and of its machines")
    parser.add_argument("--zone", required=True, help="such as us-west4-a")
    parser.add_argument("--project", default="", help="default: gcloud's")
    parser.add_argument("--type", default="v5litepod-8", help="of the accelerators of one slice (default: %(default)s)")
    parser.add_argument("--version", default="", help="of the machines' image; default: the one for the type")
    parser.add_argument("--slices", type=int, default=1, help="how many (default: 1)")
    parser.add_argument("--spot", action="store_true", help="cheaper, and taken away when somebody pays more")
    parser.add_argument("--restarts", type=int, default=100, help="of `run`, at most (default: 100)")
    parser.add_argument("--dry_run", action="store_true", help="print the commands, run nothing")
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    flags = parser.parse_args(sys.argv[1:at])
    flags.arguments = sys.argv[at + 1 :]
    flags.workdir = workdir_of(flags.arguments)
    if flags.step in ("run", "fetch") and not flags.workdir:
        parser.error(f"{flags.step} takes the words of lm_jax.main after --, with a --workdir: gs://BUCKET/NAME")
    if flags.step == "run" and not flags.workdir.startswith("gs://") and not flags.type.endswith(ONE_HOST):
        parser.error(f"the hosts of {flags.type} share no disk: --workdir gs://BUCKET/NAME")
    return getattr(Pod(flags), flags.step)() or 0


def workdir_of(words: list[str]) -> str:
    """What `--workdir` is among the words of `lm_jax.main`, "" where it is not there."""
    for i, word in enumerate(words):
        if word.startswith("--workdir="):
            return word.partition("=")[2]
        if word == "--workdir":
            return "".join(words[i + 1 : i + 2])
    return ""


if __name__ == "__main__":
    sys.exit(main())
