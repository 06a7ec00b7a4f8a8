"""Debian's package descriptions -> the records of a task: a summary of each, or its translation, made by people.

    printf '#clear Acquire::Languages;\nAcquire::Languages { "en"; "de"; "zh_CN"; };\n' > lang.conf
    mkdir -p lists/partial cache/archives/partial
    apt-get -c lang.conf -o Dir::State::lists=$PWD/lists -o Dir::Cache=$PWD/cache update
    python tools/records_debian.py --lists lists --task synopsis --held 100 --output synopsis
    python tools/records_debian.py --lists lists --task de --held 500 --characters 300 --output english_german

`synopsis`: a long description and the line above it. `de`, `zh_CN`, ...: that line and each paragraph in English and in the other
language. foo, foo-dev and foo-doc share text: all packages of a source package stand in one split.
"""

from lm_jax import cli
from lm_jax.prepare.debian_records import digest, pairs_by_split
from lm_jax.tasks import tables


def main(arguments: list[str]) -> int:
    parser = cli.Parser("tools/records_debian.py", __doc__)
    parser.add_argument("--lists", required=True, help="the folder that apt-get update filled")
    parser.add_argument("--task", required=True, help="synopsis, or a language that was downloaded")
    parser.add_argument("--held", type=int, default=0, help="records of validation and of test, drawn by hash; 0 = all")
    parser.add_argument("--characters", type=int, default=0, help="the longest text of a record; 0 = any")
    parser.add_argument("--output", required=True, help="a folder")
    flags = parser.parse_args(arguments)
    found, too_long = pairs_by_split(flags.lists, flags.task, flags.characters)
    for split, pairs in found.items():
        order = sorted(pairs, key=digest)[: flags.held or None if split != "train" else None]
        tables.write(flags.output, split, ({"source": source, "target": pairs[source]} for source in order))
        print(f"{split}: {len(order):,} of {len(pairs):,} records in {flags.output}")
    if too_long:
        print(f"left out: {too_long:,} pairs with more than {flags.characters} characters in one text")
    return 0


if __name__ == "__main__":
    cli.run_command(main)
