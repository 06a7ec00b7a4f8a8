"""Held-out stretches of documents that are few and long: of texts whose whole documents would leave nothing to evaluate on.

A document is cut into parts at blank lines. By the hash of its text a part is held out or not, so that equal parts never stand in
two splits, and no order or seed enters. What stands between two held-out parts is trained as a document of its own.
"""

import itertools
import re

from lm_jax.data.sources import SPLITS, share_of

SHORTEST = 2_000  # characters of a part
FEWEST = 20  # parts; a text that has fewer is too short for more than one split
WANTED = 8  # parts of the smallest held-out split, where the text is long enough

Documents = dict[str, list[str]]  # by split


def is_needed(shares: list[float], validation: float, test: float) -> bool:
    """Whether whole documents with these shares (`sources.share_of`) leave no validation text, or nothing to train on."""
    is_validation = [test <= share < test + validation for share in shares]
    return bool(validation and shares) and (
        not any(is_validation) or all(share < test + validation for share in shares)
    )


def cut(documents: Documents, validation: float, test: float) -> Documents | None:
    """The splits with parts of their documents held out, in the order of their hashes; None where there is too little text.

    A held-out split that has documents keeps them, as long as there are others to train on.
    """
    whole = {split: texts for split, texts in documents.items() if split != "train" and texts and documents["train"]}
    shares = {
        split: share for split, share in (("test", test), ("validation", validation)) if share and split not in whole
    }
    texts = [text for split in SPLITS if split not in whole for text in documents[split]]
    size = max(SHORTEST, int(sum(map(len, texts)) * min(shares.values()) / WANTED))
    parts = [parts_of(text, size) for text in texts]
    ranks = sorted({share_of(part)[0] for some in parts for part in some})
    if len(ranks) < FEWEST:
        return None
    split_of: dict[float, str] = {}
    for split, share in shares.items():
        first = len(split_of)
        split_of |= dict.fromkeys(ranks[first : first + max(1, round(share * len(ranks)))], split)
    found: Documents = {split: [] for split in SPLITS} | whole
    for some in parts:
        for split, group in itertools.groupby(some, lambda part: split_of.get(share_of(part)[0], "train")):
            found[split].append("".join(group))
    return {split: sorted(dict.fromkeys(texts), key=lambda text: share_of(text)[1]) for split, texts in found.items()}


def parts_of(text: str, size: int) -> list[str]:
    """A text as parts of about `size` characters, which end at a blank line, else at the end of a line, else of a word."""
    parts, start = [], 0
    while len(text) - start >= 2 * size:
        window = text[start + size : start + 2 * size - size // 2]
        ends = (re.search(pattern, window) for pattern in (r"\n\s*\n", r"\n", r"\s"))
        found = next((end for end in ends if end), None)
        stop = start + size + (found.end() if found else 0)
        parts.append(text[start:stop])
        start = stop
    return [*parts, text[start:]]
