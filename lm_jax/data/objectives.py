"""Objectives other than the next token: masked tokens (BERT) and corrupted spans (T5), as pure functions of (row, key).

The key is a Philox generator seeded by (objective, seed, row number), on the host. Step, batch, mesh and worker do not enter,
so that row i is corrupted in the same way wherever and whenever it is made. Each segment of a packed row is treated alone.
"""

import dataclasses
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from lm_jax.config import Data
from lm_jax.data.packing import Batch, Corruption, identity, lay_out, make_row
from lm_jax.data.tokenizer import Tokenizer, continuation
from lm_jax.model_config import NUM_SENTINELS

Key = np.random.Philox
# Ids that an objective needs beside those of a tokenizer that is trained here.
EXTRA = {"causal": 0, "masked": 1, "masked_words": 1, "span_corruption": NUM_SENTINELS}
SHORTEST_PAIR = 8  # tokens of the shortest segment that is cut into two texts
FARTHEST = 1000  # rows: a false second text comes from one of so many next rows


class Specials(NamedTuple):
    """Ids of what an objective writes into rows: the tokenizer's own where it has them, else after its pieces."""

    document: int  # also BERT's [SEP], and what a decoder starts with
    classifier: int  # at the first position of a segment
    mask: int
    first_sentinel: int
    next_sentinel: int  # what it takes from one to the next: T5's tokenizers count down
    vocab_size: int  # with those that are added


def specials(tokenizer: Tokenizer, objective: str) -> Specials:
    """The ids that an objective writes into rows of a tokenizer's ids."""
    special, num, document = tokenizer.special, tokenizer.vocab_size, tokenizer.known_document
    document = -1 if document is None else document  # a model whose texts nothing ends writes, but is not trained
    if "<mask>" in special and "[MASK]" not in special:  # RoBERTa's names
        special = special | {"[MASK]": special["<mask>"], "[CLS]": special.get("<s>", document)}
    last = special.get(f"<extra_id_{NUM_SENTINELS - 1}>")
    first = num if last is None else special["<extra_id_0>"]
    step = -1 if last is not None and last < first else 1
    has_its_own = "[MASK]" in special if objective.startswith("masked") else last is not None
    size = num if has_its_own else num + EXTRA[objective]
    return Specials(document, special.get("[CLS]", document), special.get("[MASK]", num), first, step, size)


@dataclasses.dataclass(frozen=True)
class RowCorruption:
    """The `Corruption` of an objective."""

    objective: str
    seed: int
    ids: Specials
    starts_word: np.ndarray | None

    def __call__(self, rows: Callable[[int], Batch], i: int, num_rows: int) -> Batch:
        """Row i of `rows`, corrupted; there are `num_rows`, or endless ones where that is 0."""
        row, random = rows(i), key(self.objective, self.seed, i)
        if self.objective == "span_corruption":
            return span_corruption(row, random, self.ids.document, self.ids.first_sentinel, step=self.ids.next_sentinel)
        far = i + 1 + int(random.random_raw()) % FARTHEST
        row, labels = paired(row, rows(far % num_rows if num_rows else far), random, self.ids)
        own = self.ids.classifier, self.ids.document
        row = masked(row, random, self.ids.mask, self.ids.vocab_size, own, starts_word=self.starts_word)
        asked = labels >= 0
        row["targets"][asked], row["loss_mask"][asked] = labels[asked], 1
        return row


def make_corruption(data: Data, tokenizer: Tokenizer) -> Corruption:
    """What the config's objective does to every row."""
    if data.objective == "causal":
        return identity
    words = starts_of_words(tokenizer) if data.objective == "masked_words" else None
    return RowCorruption(data.objective, data.seed, specials(tokenizer, data.objective), words)


def starts_of_words(tokenizer: Tokenizer) -> np.ndarray:
    """Which ids begin a word, bool [tokenizer.vocab_size + the added ones]; WordPiece marks those that do not with ##."""
    texts = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)] + [""] * EXTRA["masked_words"]
    if any(text.startswith("##") and text[2:].isalpha() for text in texts):
        return np.array([not text.startswith("##") for text in texts])
    after = tokenizer.encode("a")  # many a decoder leaves out the space that a text's first piece begins with
    inside = [continuation(tokenizer, after, [i]) for i in range(tokenizer.vocab_size)] + [""] * EXTRA["masked_words"]
    return np.array([not text[:1].isalnum() for text in inside])


def example(objective: str, length: int, head: str = "", task: str = "") -> Batch:
    """A row of zeros with the names, shapes and dtypes that rows of this objective, head and task have."""
    row = make_row([(0, np.zeros(length + 1, np.int32))], length, 0)
    if head == "value":
        row["targets"] = row["targets"].astype(np.float32)
    if objective == "span_corruption":
        return span_corruption(row, key(objective, 0, 0), 0, 0)
    if task == "preference":
        row |= {"weight": row["loss_mask"], "reference": row["loss_mask"]}
    return row if objective == "causal" else row | {"token_type_ids": row["tokens"]}


def key(name: str, seed: int, row: int) -> Key:
    """The generator of one row: 64-bit random words that depend on (name, seed, row) alone. `row` < 2**32, `seed` < 2**64."""
    return np.random.Philox(key=zlib.crc32(name.encode()) << 96 | seed << 32 | int(row))


def _uniform(key: Key, num: int) -> np.ndarray:
    """The next `num` numbers of a generator, float64 in [0, 1): made from its raw words, which no numpy release may change."""
    return (key.random_raw(num) >> np.uint64(11)) * 2.0**-53


def paired(row: Batch, other: Batch, key: Key, ids: Specials) -> tuple[Batch, np.ndarray]:
    """The row with two texts in each segment (Devlin et al., 3.1), and the labels, int32 [length].

    A label stands at the first position of each segment, -1 at all others.
    A segment becomes [CLS] A [SEP] B [SEP]; the special ids replace the tokens there, so that its length stays. A ends at a
    random position in the middle half of the segment. In half of the segments, at random, B is replaced by the tokens of the row
    `other` at the same positions: label 1 (B does not follow A), else 0. A segment shorter than SHORTEST_PAIR gets only [CLS].
    """
    tokens, types = row["tokens"].copy(), np.zeros_like(row["tokens"])
    labels = np.full(len(tokens), -1, np.int32)
    for segment in range(1, int(row["segment_ids"].max(initial=0)) + 1):
        positions = np.flatnonzero(row["segment_ids"] == segment)
        chance, coin = _uniform(key, 2)
        tokens[positions[0]] = ids.classifier
        if len(positions) < SHORTEST_PAIR:
            continue
        cut = len(positions) // 4 + int(chance * (len(positions) // 2))
        second = positions[cut + 1 : -1]
        if coin < 0.5 and (other["segment_ids"][second] > 0).all() and other["row"] != row["row"]:
            tokens[second], labels[positions[0]] = other["tokens"][second], 1
        else:
            labels[positions[0]] = 0
        tokens[positions[[cut, -1]]] = ids.document
        types[positions[cut + 1 :]] = 1
    return row | {"tokens": tokens, "token_type_ids": types}, labels


def masked(
    row: Batch,
    key: Key,
    mask_id: int,
    vocab_size: int,
    special: tuple[int, ...] = (),
    rate: float = 0.15,
    starts_word: np.ndarray | None = None,
) -> Batch:
    """Masked language modelling (Devlin et al., arXiv:1810.04805, 3.1).

    Each token is chosen with probability `rate`. Of the chosen ones 80% become `mask_id`, 10% a random id below `vocab_size`,
    10% stay as they are; each has the token that it was as its target. `special` ids are never chosen. With `starts_word`
    (bool [vocab_size], which ids begin a word) the tokens of a word are chosen together.
    """
    tokens, num = row["tokens"], len(row["tokens"])
    first = np.arange(num)  # the position whose draw decides
    if starts_word is not None:
        begins = starts_word[tokens] | np.isin(tokens, special) | (np.diff(row["segment_ids"], prepend=0) != 0)
        first = np.maximum.accumulate(np.where(begins, first, 0))
    chance, fate = _uniform(key, num), _uniform(key, num)
    replaced = (key.random_raw(num) % np.uint64(vocab_size)).astype(np.int32)
    chosen = (chance[first] < rate) & (row["segment_ids"] > 0) & ~np.isin(tokens, special)
    inputs = np.where(chosen & (fate < 0.8), mask_id, np.where(chosen & (fate >= 0.9), replaced, tokens))
    return row | {
        "tokens": inputs.astype(np.int32),
        "targets": np.where(chosen, tokens, 0).astype(np.int32),
        "loss_mask": chosen.astype(np.float32),
    }


def span_corruption(
    row: Batch, key: Key, start_id: int, first_sentinel: int, rate: float = 0.15, mean_span: float = 3.0, step: int = 1
) -> Batch:
    """Span corruption (Raffel et al., arXiv:1910.10683, 3.1.4).

    Spans of about `mean_span` tokens are taken out of each segment, together `rate` of its tokens. The encoder
    (`encoder_tokens`, `encoder_segment_ids`, `encoder_positions`) reads the rest, with sentinel k instead of span k; its id is
    `first_sentinel` + k * `step`. The decoder starts with `start_id` and predicts sentinel 0, span 0, sentinel 1, ..., and one
    last sentinel. A segment of fewer than three tokens stays whole, and nothing is predicted for it. All arrays have the
    length of the row.
    """
    length = len(row["tokens"])
    encoder: list[np.ndarray] = []
    inputs: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    for segment in range(1, int(row["segment_ids"].max(initial=0)) + 1):
        tokens = row["tokens"][row["segment_ids"] == segment]
        kept, hidden = _corrupt(tokens, key, first_sentinel, step, rate, mean_span)
        encoder.append(kept)
        inputs.append(np.concatenate([[start_id], hidden[:-1]]) if len(hidden) else hidden)
        targets.append(hidden)
    whole = lambda parts: np.concatenate([np.zeros(0, np.int32), *parts])  # a row of padding alone has no part
    rows = [
        lay_out(whole(parts), whole(asked), [len(part) for part in parts], length, row["row"])
        for parts, asked in ((encoder, encoder), (inputs, targets))
    ]
    return {f"encoder_{name}": rows[0][name] for name in ("tokens", "segment_ids", "positions")} | rows[1]


def _corrupt(
    tokens: np.ndarray, key: Key, sentinel: int, step: int, rate: float, mean_span: float
) -> tuple[np.ndarray, np.ndarray]:
    """(what the encoder reads, what the decoder predicts) of one segment: kept and hidden spans alternate, a kept one first."""
    num = len(tokens)
    if num < 3:
        return tokens, tokens[:0]
    num_hidden = min(max(1, round(num * rate)), num - 1)
    num_spans = min(max(1, round(num_hidden / mean_span)), num_hidden, num - num_hidden)
    sizes = np.stack([_split(num - num_hidden, num_spans, key), _split(num_hidden, num_spans, key)], axis=1)
    parts = np.split(tokens, np.cumsum(sizes.ravel())[:-1])
    marks = [np.array([sentinel + k * step]) for k in range(num_spans + 1)]
    kept = [x for k in range(num_spans) for x in (parts[2 * k], marks[k])]
    hidden = [x for k in range(num_spans) for x in (marks[k], parts[2 * k + 1])]
    return np.concatenate(kept), np.concatenate([*hidden, marks[-1]])


def _split(total: int, num: int, key: Key) -> np.ndarray:
    """Int [num]: random sizes, each at least 1, whose sum is `total`; all such lists of sizes are equally likely."""
    cuts = np.sort(np.argsort(key.random_raw(total - 1), kind="stable")[: num - 1]) + 1
    return np.diff(cuts, prepend=0, append=total)
