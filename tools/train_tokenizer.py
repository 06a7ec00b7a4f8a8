"""A SentencePiece tokenizer from any text, raw or prepared, in bounded memory.

    python tools/train_tokenizer.py --output tokenizer.model --kind unigram --pieces 32768 texts/*.jsonl.gz
    python tools/train_tokenizer.py --output tokenizer.model corpora/mine              # a prepared corpus: its training split

The sample is the documents with the smallest content hashes: the same whatever the order of files. Text of every script comes
back to the byte: what has no piece is spelled in bytes.
"""

import os

from lm_jax import cli
from lm_jax.data import tokenizer_files, tokenizer_training
from lm_jax.errors import UserError
from lm_jax.files import write_whole
from lm_jax.prepare import run
from lm_jax.terminal import Terminal


def main(arguments: list[str]) -> int:
    parser = cli.Parser("tools/train_tokenizer.py", __doc__)
    parser.add_argument("sources", nargs="+", help='files, folders, patterns, URLs, "python", or a prepared corpus')
    parser.add_argument("--output", required=True, help="the file to write, such as tokenizer.model")
    parser.add_argument(
        "--kind", default="sentencepiece", choices=tuple(tokenizer_files.TRAINED), help="BPE, or unigram"
    )
    parser.add_argument("--pieces", default="32768", help="size of the vocabulary")
    parser.add_argument("--text_key", default="text", help="of JSON records and Parquet columns")
    parser.add_argument("--on_bad_record", default="stop", choices=("stop", "skip"))
    parser.add_argument(
        "--characters", type=int, default=tokenizer_training.SAMPLE_BYTES, help="of text that it is trained on"
    )
    flags = parser.parse_args(arguments)
    if not flags.output.endswith(".model") or os.path.exists(flags.output):
        raise UserError(f"--output {flags.output}: name a file that is not there yet and ends in .model")
    log = Terminal()
    texts = run.texts_of(tuple(flags.sources), flags.text_key, flags.on_bad_record)
    with tokenizer_files.named("--kind and --pieces"):
        made = tokenizer_training.make(f"{flags.kind}:{flags.pieces}", texts, flags.characters)
    write_whole(flags.output, made.model)
    log(
        f"{flags.output}: {made.vocab_size:,} pieces, {made.fingerprint}; use it: --config.data.tokenizer={flags.output}"
    )
    return 0


if __name__ == "__main__":
    cli.run_command(main)
