"""Runs as one page to look at and to send: `python tools/report.py runs/quickstart [runs/other ...] [--output report.html]`.

Numbers, curves, what was set, what it cost, where the time went, and what the model wrote, over time.
"""

import math
import sys

from etils import epath

from lm_jax import cli
from lm_jax.files import write_whole
from lm_jax.trust.report import read, report


def main(arguments: list[str]) -> int:
    parser = cli.Parser("tools/report.py", __doc__)
    parser.add_argument("runs", nargs="+", help="work folders, such as runs/quickstart")
    parser.add_argument("--output", default="report.html")
    parser.add_argument("--price-per-hour", type=float, default=0.0, help="of one device, in any currency")
    flags = parser.parse_args(arguments)
    if not 0 <= flags.price_per_hour < math.inf:
        parser.error(f"--price-per-hour {flags.price_per_hour}: expected a price, 0 or more")
    write_whole(epath.Path(flags.output), report(read(flags.runs), flags.price_per_hour).encode())
    print(f"wrote {flags.output}")
    return 0


if __name__ == "__main__":
    cli.run_command(main, sys.argv[1:])
