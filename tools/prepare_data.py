"""Raw text -> a corpus that `config.data.sources` can name.

    python tools/prepare_data.py --output corpora/mine texts/*.jsonl.gz                      # exact duplicates dropped
    python tools/prepare_data.py --output corpora/web crawl/*.warc.gz --filters gopher c4 fineweb --scrub --duplicates minhash
    python tools/prepare_data.py --output corpora/web ... --executor ray                     # the same shards, many machines

Sources: files, folders, globs, URLs (gs://, s3://, https://), data sets of the Hugging Face hub ("hf:OWNER/NAME"), or "python".
Killed, it goes on with the same command. See docs/data.md.
"""

import dataclasses

from lm_jax import cli
from lm_jax.errors import UserError
from lm_jax.prepare import clean, run
from lm_jax.terminal import Terminal


def main(arguments: list[str]) -> int:
    defaults = {field.name: field.default for field in dataclasses.fields(run.Settings)}
    parser = cli.Parser("tools/prepare_data.py", __doc__)
    parser.add_argument("sources", nargs="*", help="where the text is")
    parser.add_argument("--output", required=True, help="folder of the corpus")
    add = lambda name, **keywords: parser.add_argument(f"--{name}", default=defaults[name], **keywords)
    add("tokenizer", help='"bytes", sentencepiece:PIECES, unigram:PIECES, or a file or folder with one')
    add("text_key", help="of JSON records and Parquet columns")
    add("normalise", help="nfc or none")
    add("filters", nargs="+", help=f"rules of {', '.join(clean.FILTERS)} (for English web pages)")
    add("scrub", action="store_true", help="put stand-ins for e-mail addresses, IP addresses and phone numbers")
    add("duplicates", help="exact or minhash (exact and near ones)")
    add("decontaminate", nargs="+", help="evaluation sets whose overlap is reported")
    add("remove_contaminated", action="store_true", help="leave out documents that overlap")
    add("validation_fraction", type=float, help="of documents, by content hash")
    add("test_fraction", type=float, help="of documents, by content hash")
    add("on_bad_record", help="stop or skip (and count)")
    add("executor", help="local, ray or slurm")
    add("workers", type=int, help="tasks at once; 0 = one a core")
    add("work", help="folder for what lies in between; all workers must see it")
    add("slurm_partition", help="where --executor slurm submits to")
    add("slurm_time", help="limit of one task")
    flags = vars(parser.parse_args(arguments))
    if not flags["sources"]:
        raise UserError('no source: name files, folders or URLs, or "python" for the interpreter\'s own library')
    settings = run.Settings(**{k: tuple(v) if isinstance(v, list) else v for k, v in flags.items()})
    log = Terminal()
    told = run.run(settings, log)
    lost = sum(entry["documents"] for stage in told["stages"] for entry in stage["dropped"].values())
    log(f"{told['in']['documents']:,} documents in, {lost:,} left out, {told['out']['documents']:,} out")
    log(f"{told['out']['tokens']:,} tokens, {told['out']['bytes'] / max(1, told['out']['tokens']):.2f} bytes a token")
    log(f"report: {settings.output}/report.html; train: --config.data.sources={settings.output}")
    return 0


if __name__ == "__main__":
    cli.run_command(main)
