"""Records for trying tasks, from what every machine has: the interpreter's own library, and numbers. Nothing is downloaded.

    python tools/records_python.py --output records

records/classification   a docstring, and the package that it stands in
records/questions        the head of a function, made of the library's arguments, and a default value in it that is asked for
records/summaries        the body of a docstring, and its first line
records/translation      a number in English words and in Chinese characters, which group it differently: 10,000 is one word
"""

import os

from lm_jax import cli
from lm_jax.prepare.python_records import of_library, of_numbers
from lm_jax.tasks import tables


def main(arguments: list[str]) -> int:
    parser = cli.Parser("tools/records_python.py", __doc__)
    parser.add_argument("--output", required=True, help="a folder; each task has one in it")
    flags = parser.parse_args(arguments)
    found: dict[str, dict[tuple, dict[str, str]]] = {}  # the same record once, in order
    for task, record in (*of_library(), *of_numbers()):
        found.setdefault(task, {})[tuple(record.items())] = record
    for task, records in found.items():
        tables.write(os.path.join(flags.output, task), "train", records.values())
        print(f"{len(records):,} records in {flags.output}/{task}/train.jsonl")
    return 0


if __name__ == "__main__":
    cli.run_command(main)
