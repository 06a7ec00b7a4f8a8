"""Kills the real command again and again, at named points (LM_JAX_FAULT) and at any moment; the same command goes on each time.

    python tools/chaos.py --kills 25 [--processes 4] [--place gs] [--seed 1] [--json]

When a run is done, its whole log (but speeds) and the arrays of its last checkpoint are compared with those of a run that nobody
disturbed. Exit code 1 where a bit differs or something hangs. The seed decides what is killed, where, and how often it went by.
"""

import contextlib
import json
import shutil
import sys
import tempfile

import jax
from bucket_emulator import bucket

from lm_jax import cli
from lm_jax.trust.killed_runs import EVERY, KilledRuns, RecoveryError


def main(arguments: list[str]) -> int:
    parser = cli.Parser("tools/chaos.py", __doc__)
    for name, default in (("kills", 25), ("processes", 1), ("steps", 200), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--place", choices=("local", "gs"), default="local")
    parser.add_argument("--json", action="store_true")
    flags, log = parser.parse_args(arguments), lambda line: print(line, file=sys.stderr, flush=True)
    jax.config.update("jax_platforms", "cpu")  # this process only reads: an accelerator stays free
    for name, least in (("kills", 1), ("processes", 1), ("steps", 6 * EVERY)):
        if getattr(flags, name) < least:
            parser.error(f"--{name} {getattr(flags, name)}: at least {least}")
    with bucket("chaos") if flags.place == "gs" else contextlib.nullcontext() as place:
        folder = tempfile.mkdtemp(prefix="chaos-")
        chaos = KilledRuns(flags, folder, place or folder)
        try:
            chaos.run(log)
        except RecoveryError as error:
            log(f"after {len(chaos.kills)} kills (--seed {flags.seed}): {error}; all is kept in {folder}")
            return 1
    shutil.rmtree(folder)
    rows = chaos.table()
    if flags.json:
        print(json.dumps({"kills": len(chaos.kills), "runs": chaos.num_runs, "seed": flags.seed, "phases": rows}))
        return 0
    for row in ([*rows[0]], ["---"] * len(rows[0]), *[row.values() for row in rows]):
        print(f"| {' | '.join(map(str, row))} |")
    print(f"{len(chaos.kills)} kills in {chaos.num_runs} runs (--seed {flags.seed}): not a bit differs")
    return 0


if __name__ == "__main__":
    cli.run_command(main, sys.argv[1:])
