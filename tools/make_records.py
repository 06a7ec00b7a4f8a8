"""A table (CSV with a header) -> the records of a task: `train.jsonl` with the columns text and label.

python tools/make_records.py --csv reviews.csv --keep source=rotten_tomatoes --names 0=negative,1=positive --output records
"""

import csv
import json
import os

from lm_jax import command
from lm_jax.config import UserError, nearest


def main(arguments: list[str]) -> int:
    parser = command.Parser("tools/make_records.py", __doc__)
    parser.add_argument("--csv", required=True, help="the table")
    parser.add_argument("--text", default="text", help="its column with the text")
    parser.add_argument("--label", default="label", help="its column with the label")
    parser.add_argument("--keep", default="", help="COLUMN=VALUE: only rows that have it")
    parser.add_argument("--names", default="", help="VALUE=NAME,...: labels under other names")
    parser.add_argument("--output", required=True, help="a folder")
    flags = parser.parse_args(arguments)
    names = dict(pair.split("=", 1) for pair in flags.names.split(",") if "=" in pair)
    column, _, value = flags.keep.partition("=")
    with open(flags.csv, newline="", encoding="utf-8-sig") as file:
        table = csv.DictReader(file)
        there = table.fieldnames or []
        for name in filter(None, (flags.text, flags.label, column)):
            if name not in there:
                raise UserError(f"{flags.csv} has no column {name!r}, only {', '.join(there)}{nearest(name, there)}")
        rows = [row for row in table if not column or row[column] == value]
    os.makedirs(flags.output, exist_ok=True)
    with open(os.path.join(flags.output, "train.jsonl"), "w") as out:
        for row in rows:
            label = names.get(row[flags.label], row[flags.label])
            out.write(json.dumps({"text": row[flags.text], "label": label}, ensure_ascii=False) + "\n")
    print(f"{len(rows):,} records in {flags.output}/train.jsonl")
    return 0


if __name__ == "__main__":
    command.door(main)
