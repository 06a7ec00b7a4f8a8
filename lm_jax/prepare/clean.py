"""Cleaning: datatrove's filters, scrubbing and near-duplicates, set up so that they need no network and no luck.

What a block does to a document depends on that document alone. datatrove's word tokenizers want models from the network or
spaCy; `Words` splits by rule. Its replacements for personal data rotate from document to document; here there is one of each.
"""

import ipaddress
import os
import re
import unicodedata
from typing import Any

from lm_jax.errors import needs

FILTERS = ("gopher", "c4", "fineweb")
EMAIL, ADDRESS, ADDRESS6, PHONE = "email@example.com", "192.0.2.1", "2001:db8::1", "555-0100"  # stand for nobody
NGRAM = 13  # words: the length that GPT-3's authors took (arXiv:2005.14165, appendix C)

_IDEOGRAPH = re.compile("[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")
_SENTENCE = re.compile(r"(?<=[.!?。！？…])[\"'”’)]*\s+|(?<=[。！？])|\n+")
_PHONE = r"(?<![\w.])(?:\+\d{1,3}[ .-]?)?(?:\(\d{2,4}\) ?|\d{2,4}[ .-])\d{3,4}[ .-]\d{3,4}(?!\w|[.-]\d)|(?<!\w)\+\d{9,14}(?!\w)"
_ADDRESS6 = r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])"


def words(text: str) -> list[str]:
    """Words of any script: runs of letters and digits, single ideographs and kana, single marks."""
    if _IDEOGRAPH.search(text):
        text = _IDEOGRAPH.sub(r" \g<0> ", text)
    return _WORD.findall(text)


def ngrams(text: str) -> list[str]:
    """Runs of NGRAM words, in lower case and without marks."""
    found = [word for word in words(text.lower()) if word[0].isalnum()]
    return [" ".join(found[i : i + NGRAM]) for i in range(len(found) - NGRAM + 1)]


def normalise(text: str) -> str:
    r"""Text with \n as its only newline, no byte-order mark, and characters composed (NFC keeps full-width marks)."""
    return unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n").removeprefix("\ufeff"))


def require(what: str) -> None:
    """Raises UserError, with the command that installs it, where datatrove is missing."""
    try:
        import datatrove.utils.hashes.xxhash  # noqa: F401
        import regex  # noqa: F401
    except ImportError:
        raise needs(what, "datatrove", "prep") from None


def quiet() -> None:
    """Switches datatrove's log off: what matters to a user is in our progress and report."""
    from loguru import logger

    logger.disable("datatrove")
    os.environ["TQDM_DISABLE"] = "1"


def word_tokenizer() -> Any:
    """The function `words` as a word tokenizer of datatrove."""
    from datatrove.utils.word_tokenizers import WordTokenizer

    class Words(WordTokenizer):
        def word_tokenize(self, text: str) -> list[str]:
            return words(text)

        def sent_tokenize(self, text: str) -> list[str]:
            return [part.strip() for part in _SENTENCE.split(text) if part.strip()]

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            ends = [match.end() for match in _SENTENCE.finditer(text) if match.end()]
            return list(zip([0, *ends], [*ends, len(text)], strict=True))

    return Words()


def filters(names: tuple[str, ...], dropped) -> list:
    """The blocks of datatrove for each set of rules; `dropped(rule)` gives the writer for what a block leaves out."""
    if not names:
        return []
    from datatrove.pipeline import filters as blocks

    kinds = {
        "gopher": (blocks.GopherRepetitionFilter, blocks.GopherQualityFilter),
        "c4": (blocks.C4QualityFilter,),
        "fineweb": (blocks.FineWebQualityFilter,),
    }
    language = word_tokenizer()
    return [kind(language=language, exclusion_writer=dropped(name)) for name in names for kind in kinds[name]]


def scrubbers() -> list:
    """Blocks that put EMAIL, ADDRESS, ADDRESS6 and PHONE in place of e-mail addresses, IP addresses and phone numbers."""
    from datatrove.pipeline.formatters import PIIFormatter

    emails_and_addresses = PIIFormatter(only_remove_public_ips=False, email_replacement=EMAIL, ip_replacement=ADDRESS)
    return [emails_and_addresses, Scrub()]


class Scrub:
    """Replaces what datatrove's formatter does not: IPv6 addresses and phone numbers."""

    def __call__(self, data, rank: int = 0, world_size: int = 1):
        """Documents with IPv6 addresses and phone numbers replaced."""
        for document in data:
            document.text = re.sub(_PHONE, PHONE, re.sub(_ADDRESS6, _address6, document.text))
            yield document


def _address6(match: re.Match) -> str:
    try:
        address = ipaddress.ip_address(match[0])
    except ValueError:
        return match[0]
    digits = match[0].replace(":", "")  # a::b of a programming language is no address
    named = len(digits) >= 4 and any(digit.isdecimal() for digit in digits) and not address.is_loopback
    return ADDRESS6 if named else match[0]


def minhash(step: str, folder: str, dropped=None) -> list:
    """Blocks of datatrove's MinHash, a step at a time: 5-grams of words, 14 bands of 8 (from about 0.72 alike on)."""
    from datatrove.pipeline.dedup import minhash as blocks

    made = {
        "signatures": lambda: blocks.MinhashDedupSignature(f"{folder}/signatures", language=word_tokenizer()),
        "pairs": lambda: blocks.MinhashDedupBuckets(f"{folder}/signatures", f"{folder}/pairs"),
        "clusters": lambda: blocks.MinhashDedupCluster(f"{folder}/pairs", f"{folder}/clusters", save_cluster_id=True),
        "remove": lambda: blocks.MinhashDedupFilter(f"{folder}/clusters", exclusion_writer=dropped),
    }
    return [made[step]()]


PAIR_TASKS = 14  # one for each of MinHash's bands
