"""What a file of a source holds: text, or something else; and the command that makes text of it."""

import gzip
import os
import re
import shlex
import zlib
from typing import Any

from lm_jax import regular_files
from lm_jax.data import lines
from lm_jax.errors import UserError

KINDS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet",
    ".html": "html", ".htm": "html", ".warc": "warc", ".wet": "warc",
}  # fmt: skip
HEAD = 2**16  # bytes of a file that tell whether it is text
BINARY, UTF_16 = "no text", "UTF-16, not UTF-8"
CONTROLS = re.compile(rb"[\0-\x06\x0e-\x1a\x1c-\x1f]")  # that no text has


def kind_of(path: str) -> str:
    """How a file is read: jsonl, json, csv, tsv, parquet, html, warc, python or text, by its name without .gz and .zst."""
    suffix = os.path.splitext(re.sub(r"\.(gz|zst)$", "", path.lower()))[1]
    return "python" if path == "python" else KINDS.get(suffix, "text")


def reason_unread(name: str) -> str:
    """What a file is that is not read as the text it seems to be, "" where it is text. Raises UserError."""
    kind = kind_of(name)
    try:
        with regular_files.opened(name) as file:
            head = file.read(HEAD)
    except OSError as error:
        raise unreadable(name, error) from None
    if name.lower().endswith((".gz", ".zst")):
        return "packed"
    if kind != "text":
        return {"html": "a web page", "warc": "an archive of web pages"}.get(kind, "a table of records")
    return UTF_16 if head.startswith(lines.UTF_16_MARKS) else BINARY if is_binary(head) else ""


def is_binary(content: bytes) -> bool:
    """Whether bytes are no text: a NUL in what is UTF-8, control characters in what is not."""
    try:
        content[:HEAD].decode()
        return b"\0" in content
    except UnicodeDecodeError:
        return bool(CONTROLS.search(content))


def unreadable(name: str, error: OSError) -> UserError:
    """The error of a file that the system does not let us read."""
    return UserError(
        f"config.data.sources: {regular_files.shown(name)} cannot be read: {error.strerror}; remove it, or mend it"
    )


def to_prepare(source: str, others: list[tuple[str, str]], num_files: int, tokenizer: str) -> UserError:
    """The error of a source that is no folder of text, with the command that makes it text, or a corpus of it.

    `others` are (name, reason) of the files that are not read as text, out of `num_files`; none where the source is a file.
    """
    where, reasons = f"config.data.sources: {regular_files.shown(repr(source))}", [reason for _, reason in others]
    first = f"{regular_files.shown(others[0][0])} is {reasons[0]}" if others else ""
    if reasons[:1] == [UTF_16]:
        name = shlex.quote(others[0][0])
        return UserError(
            f"{where}: {first}; this makes it that:\niconv -f UTF-16 -t UTF-8 {name} > new && mv new {name}"
        )
    if reasons.count(BINARY) == num_files:
        return UserError(
            f"{where} holds no text: {first}; a folder of UTF-8 text is expected, or what is packed unpacked"
        )
    output = os.path.join("corpora", os.path.basename(os.path.abspath(source)).split(".")[0] or "mine")
    words = ["python", "tools/prepare_data.py", "--output", output]
    words += ["--tokenizer", tokenizer] if tokenizer else []
    key = next((key for name, _ in others if (key := text_key(name))), "text")
    words += ["--text_key", key] if key != "text" else []
    words += ["--on_bad_record", "skip"] if {BINARY, UTF_16} & {*reasons} else []
    more = f", and {len(others) - 1:,} more of {num_files:,} files are none" if len(others) > 1 else ""
    wrong = (
        f"is not read as text: {first}{more}. Prepare it"
        if others
        else "is a file: give the folder it stands in, or prepare it"
    )
    found = [f"{where} {wrong}, and take --config.data.sources={output}"]
    found.append(shlex.join([*words, f"./{source}" if source.startswith("-") else source]))
    if any(os.path.basename(name).startswith("train.") for name, _ in others):
        found.append("records to finetune on instead: name their task, such as --config.train.task=classification")
    return UserError("\n".join(found))


def text_key(name: str) -> str:
    """Under which name the first row of a table has its text, "" where that is not known."""
    kind = kind_of(name)
    try:
        with regular_files.opened(name) as raw:
            file: Any = gzip.GzipFile(fileobj=raw) if name.lower().endswith(".gz") else raw
            row = next(lines.rows(file, kind), None) if kind in lines.KINDS else None
    except (OSError, EOFError, zlib.error):
        return ""
    if not isinstance(row, lines.Row):
        return ""
    return "text" if isinstance(row.content.get("text"), str) else lines.longest(row.content)
