"""What a user is told when something is wrong: two exceptions, and how names and values are shown in their messages."""

import difflib
import reprlib
from typing import Any


class UserError(ValueError):
    """What a user can mend: reaches the terminal as one to five plain lines, exit code 2.

    Names of files stand in these lines and may hold anything: control characters are shown as escapes, and what is very
    long loses its middle.
    """

    def __str__(self) -> str:
        return plain_lines(super().__str__())


def plain_lines(text: str) -> str:
    """At most five lines of printable characters, none longer than 1,000."""
    plain = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
    lines = [line if len(line) <= 1000 else f"{line[:600]} ... {line[-300:]}" for line in plain.split("\n")]
    return "\n".join(lines if len(lines) <= 5 else [*lines[:4], f"... ({len(lines) - 4} more lines)"])


class PeerError(Exception):
    """Another process of the job is missing or gone: one to five plain lines, exit code 70. Starting again may help."""


def needs(what: str, package: str, extra: str) -> UserError:
    """The error of a missing package, with the command that installs it: from the clone, never by a name of an index."""
    return UserError(f"{what} needs the package {package}: in the clone, pip install -e '.[{extra}]'")


def nearest(word: str, words) -> str:
    """`; did you mean X?` for the most similar of `words`, or "" where none is near."""
    found = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f"; did you mean {found[0]}?" if found else ""


def shown(value: Any) -> str:
    """A value in a message: a few words of it, however long, deep or large it is."""
    if type(value) is int and value.bit_length() > 64:
        return f"a number of {value.bit_length():,} bits"
    if isinstance(value, (str, float, int)):
        text = repr(value if not isinstance(value, str) else value[:100])
        return text if len(text) <= 100 else f"{text[:60]}..."
    if value is not None and not isinstance(value, (tuple, list, dict)):
        return f"({type(value).__name__})"
    short = reprlib.Repr()
    short.maxtuple = short.maxlist = short.maxdict = 12
    short.maxlevel, short.maxstring, short.maxother = 4, 100, 100
    short.repr_int = lambda x, level: shown(x)  # type: ignore[method-assign]
    return short.repr(value)
