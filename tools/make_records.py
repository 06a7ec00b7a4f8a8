"""A table (CSV, TSV, JSON lines, Parquet) -> the records of a task: `train.jsonl` with the columns text and label.

python tools/make_records.py --csv reviews.csv --keep source=rotten_tomatoes --names 0=negative,1=positive --output records
"""

from etils import epath

from lm_jax import cli
from lm_jax.errors import UserError
from lm_jax.tasks import tables


def main(arguments: list[str]) -> int:
    parser = cli.Parser("tools/make_records.py", __doc__)
    parser.add_argument("--csv", required=True, help="the table: .csv, .tsv, .jsonl or .parquet")
    parser.add_argument("--text", default="text", help="its column with the text")
    parser.add_argument("--label", default="label", help="its column with the label")
    parser.add_argument("--keep", default="", help="COLUMN=VALUE: only rows that have it")
    parser.add_argument("--names", default="", help="VALUE=NAME,...: labels under other names")
    parser.add_argument("--output", required=True, help="a folder")
    flags = parser.parse_args(arguments)
    column, equals, value = flags.keep.partition("=")
    pairs = [pair.split("=", 1) for pair in filter(None, flags.names.split(","))]
    if flags.keep and not (column and equals) or any(len(pair) < 2 for pair in pairs):
        raise UserError("--keep COLUMN=VALUE and --names VALUE=NAME,... have a = in each part")
    names = dict(pairs)
    found = list(tables.rows(epath.Path(flags.csv), ()))
    for row in found:
        for name in filter(None, (flags.text, flags.label, column)):
            if name not in row.content:
                raise UserError(f"{row.where} {tables.without(name, row.content)}")
    rows = [row.content for row in found if not column or str(row.content[column]) == value]
    if not rows:
        raise UserError(
            f"{flags.csv}: of {len(found):,} rows none has {flags.keep}" if found else f"{flags.csv} has no rows"
        )
    label = lambda row: names.get(str(row[flags.label]), row[flags.label])
    tables.write(flags.output, "train", ({"text": row[flags.text], "label": label(row)} for row in rows))
    print(f"{len(rows):,} records in {flags.output}/train.jsonl")
    return 0


if __name__ == "__main__":
    cli.run_command(main)
