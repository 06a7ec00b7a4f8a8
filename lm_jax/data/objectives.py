"""What a row asks for instead of its next tokens: masked tokens (BERT) or spans (T5), as pure functions of (row, key).

A key is a Philox counter of (objective, seed, row) on the host: neither step, batch, mesh nor worker enters, so that a row is
hidden in the same way wherever and whenever it is made. Segments of a packed row are treated each for itself.
"""

import dataclasses
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from lm_jax.config import Data
from lm_jax.data.packing import Batch, Hide, as_it_is, make_row
from lm_jax.data.tokenizer import Tokenizer, continuation
from lm_jax.model_config import NUM_SENTINELS

Key = np.random.Philox
EXTRA = {
    "causal": 0,
    "masked": 1,
    "masked_words": 1,
    "span_corruption": NUM_SENTINELS,
}  # pieces beyond a trained tokenizer's
SHORTEST_PAIR = 8  # tokens of a segment that is cut in two
FARTHEST = 1000  # rows from which another second text comes


class Specials(NamedTuple):
    """Ids of what an objective writes into rows: the tokenizer's own where it has them, else after its pieces."""

    document: int  # also BERT's [SEP], and what a decoder starts with
    classifier: int  # at the first place of a segment
    mask: int
    first_sentinel: int
    next_sentinel: int  # what it takes from one to the next: T5's tokenizers count down
    num_pieces: int  # with those that are added


def specials(tokenizer: Tokenizer, objective: str) -> Specials:
    num, known = tokenizer.num_pieces, tokenizer.known_document
    document = -1 if known is None else known  # a model whose texts nothing ends writes, but is not trained
    last = f"<extra_id_{NUM_SENTINELS - 1}>"
    has_its_own = ("[MASK]" if objective.startswith("masked") else last) in tokenizer.special
    extra = 0 if has_its_own else EXTRA[objective]
    mask, classifier = tokenizer.special.get("[MASK]", num), tokenizer.special.get("[CLS]", document)
    first = tokenizer.special["<extra_id_0>"] if last in tokenizer.special else num
    down = last in tokenizer.special and tokenizer.special[last] < first
    return Specials(document, classifier, mask, first, -1 if down else 1, num + extra)


@dataclasses.dataclass(frozen=True)
class Hidden:
    """`Hide` of an objective: (rows, i, how many there are or 0) -> row i of the batch contract."""

    objective: str
    seed: int
    ids: Specials
    starts_word: np.ndarray | None

    def __call__(self, rows: Callable[[int], Batch], i: int, num_rows: int) -> Batch:
        row, random = rows(i), key(self.objective, self.seed, i)
        if self.objective == "span_corruption":
            return span_corruption(row, random, self.ids.document, self.ids.first_sentinel, step=self.ids.next_sentinel)
        far = i + 1 + int(random.random_raw()) % FARTHEST
        row, labels = paired(row, rows(far % num_rows if num_rows else far), random, self.ids)
        own = self.ids.classifier, self.ids.document
        row = masked(row, random, self.ids.mask, self.ids.num_pieces, own, starts_word=self.starts_word)
        asked = labels >= 0
        row["targets"][asked], row["loss_mask"][asked] = labels[asked], 1
        return row


def make_hide(data: Data, tokenizer: Tokenizer) -> Hide:
    """What the config's objective does to rows."""
    if data.objective == "causal":
        return as_it_is
    words = starts_of_words(tokenizer) if data.objective == "masked_words" else None
    return Hidden(data.objective, data.seed, specials(tokenizer, data.objective), words)


def starts_of_words(tokenizer: Tokenizer) -> np.ndarray:
    """bool [num_pieces and those added]: pieces that begin a word; WordPiece marks the others with ##."""
    texts = [tokenizer.decode([i]) for i in range(tokenizer.num_pieces)] + [""] * EXTRA["masked_words"]
    if any(text.startswith("##") and text[2:].isalpha() for text in texts):
        return np.array([not text.startswith("##") for text in texts])
    after = tokenizer.encode("a")  # many a decoder leaves out the space that a text's first piece begins with
    inside = [continuation(tokenizer, after, [i]) for i in range(tokenizer.num_pieces)] + [""] * EXTRA["masked_words"]
    return np.array([not text[:1].isalnum() for text in inside])


def example(objective: str, length: int, head: str = "", task: str = "") -> Batch:
    """A row like those of an objective, of a task or its head, for its names, shapes and dtypes."""
    row = make_row([(0, np.zeros(length + 1, np.int32))], length, 0)
    if head == "value":
        row["targets"] = row["targets"].astype(np.float32)
    if objective == "span_corruption":
        return span_corruption(row, key(objective, 0, 0), 0, 0)
    if task == "preference":
        row |= {"weight": row["loss_mask"], "reference": row["loss_mask"]}
    return row if objective == "causal" else row | {"token_type_ids": row["tokens"]}


def key(name: str, seed: int, row: int) -> Key:
    """The random words of one row of one objective; `row` below 2**32, `seed` below 2**64."""
    return np.random.Philox(key=zlib.crc32(name.encode()) << 96 | seed << 32 | int(row))


def _uniform(key: Key, num: int) -> np.ndarray:
    """float64 [num] in [0, 1), from words whose bits no numpy release may change."""
    return (key.random_raw(num) >> np.uint64(11)) * 2.0**-53


def paired(row: Batch, other: Batch, key: Key, ids: Specials) -> tuple[Batch, np.ndarray]:
    """Two texts in each segment (Devlin et al., 3.1), and [length] the label at its first place, -1 elsewhere.

    A segment becomes [CLS] A [SEP] B [SEP], each of these in the place of a token, cut in its middle half; for one in two the
    tokens of B are those that `other` has at these places (label 1: B does not follow A). Short segments stay whole, A alone.
    """
    tokens, types = row["tokens"].copy(), np.zeros_like(row["tokens"])
    labels = np.full(len(tokens), -1, np.int32)
    for segment in range(1, int(row["segment_ids"].max(initial=0)) + 1):
        places = np.flatnonzero(row["segment_ids"] == segment)
        chance, coin = _uniform(key, 2)
        tokens[places[0]] = ids.classifier
        if len(places) < SHORTEST_PAIR:
            continue
        cut = len(places) // 4 + int(chance * (len(places) // 2))
        second = places[cut + 1 : -1]
        if coin < 0.5 and (other["segment_ids"][second] > 0).all() and other["row"] != row["row"]:
            tokens[second], labels[places[0]] = other["tokens"][second], 1
        else:
            labels[places[0]] = 0
        tokens[places[[cut, -1]]] = ids.document
        types[places[cut + 1 :]] = 1
    return row | {"tokens": tokens, "token_type_ids": types}, labels


def masked(
    row: Batch,
    key: Key,
    mask_id: int,
    num_pieces: int,
    special: tuple[int, ...] = (),
    rate: float = 0.15,
    starts_word: np.ndarray | None = None,
) -> Batch:
    """Masked language modelling (Devlin et al., arXiv:1810.04805, 3.1): `rate` of the tokens are chosen; of these 80% become
    `mask_id`, 10% a random piece below `num_pieces`, 10% stay; each predicts what it was.

    `special` ids are never chosen. With `starts_word` [num_pieces] bool, the pieces of a word are chosen together.
    """
    tokens, num = row["tokens"], len(row["tokens"])
    first = np.arange(num)  # the position whose draw decides
    if starts_word is not None:
        begins = starts_word[tokens] | np.isin(tokens, special) | (np.diff(row["segment_ids"], prepend=0) != 0)
        first = np.maximum.accumulate(np.where(begins, first, 0))
    chance, fate = _uniform(key, num), _uniform(key, num)
    replaced = (key.random_raw(num) % np.uint64(num_pieces)).astype(np.int32)
    chosen = (chance[first] < rate) & (row["segment_ids"] > 0) & ~np.isin(tokens, special)
    seen = np.where(chosen & (fate < 0.8), mask_id, np.where(chosen & (fate >= 0.9), replaced, tokens))
    return row | {
        "tokens": seen.astype(np.int32),
        "targets": np.where(chosen, tokens, 0).astype(np.int32),
        "loss_mask": chosen.astype(np.float32),
    }


def span_corruption(
    row: Batch,
    key: Key,
    start_id: int,
    first_sentinel: int,
    rate: float = 0.15,
    mean_span: float = 3.0,
    step: int = 1,
) -> Batch:
    """Span corruption (Raffel et al., arXiv:1910.10683, 3.1.4): spans of about `mean_span` tokens are taken out, in all `rate` of
    each segment.

    The encoder (`encoder_tokens`, `encoder_segment_ids`, `encoder_positions`) sees sentinel k = `first_sentinel` + k * `step`
    in the place of span k; the decoder, which starts with `start_id`, predicts each sentinel, its span, and one last sentinel.
    Segments of fewer than three tokens stay whole and predict nothing. Nothing becomes longer than the row was.
    """
    length = len(row["tokens"])
    encoder: list[np.ndarray] = []
    decoder: list[np.ndarray] = []
    for segment in range(1, int(row["segment_ids"].max(initial=0)) + 1):
        tokens = row["tokens"][row["segment_ids"] == segment]
        kept, hidden = _corrupt(tokens, key, first_sentinel, step, rate, mean_span)
        encoder.append(kept)
        decoder.append(hidden)
    shifted = [np.concatenate([[start_id], part[:-1]]) if len(part) else part for part in decoder]
    encoder_tokens, encoder_segments, encoder_positions = _lay_out(encoder, length)
    targets, segments, positions = _lay_out(decoder, length)
    return {
        "encoder_tokens": encoder_tokens,
        "encoder_segment_ids": encoder_segments,
        "encoder_positions": encoder_positions,
        "tokens": _lay_out(shifted, length)[0],
        "targets": targets,
        "loss_mask": (segments > 0).astype(np.float32),
        "segment_ids": segments,
        "positions": positions,
        "row": row["row"],
    }


def _corrupt(
    tokens: np.ndarray, key: Key, sentinel: int, step: int, rate: float, mean_span: float
) -> tuple[np.ndarray, np.ndarray]:
    """(what the encoder sees, what the decoder predicts) of one segment; kept and hidden spans take turns, kept first."""
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
    """Sizes of `num` parts of `total`, each at least 1, every way equally likely."""
    cuts = np.sort(np.argsort(key.random_raw(total - 1), kind="stable")[: num - 1]) + 1
    return np.diff(cuts, prepend=0, append=total)


def _lay_out(parts: list[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens, segment ids, positions) of segments one after the other, padded to `length`; int32."""
    out = np.zeros((3, length), np.int32)
    start = 0
    for segment, part in enumerate(parts, 1):
        out[:, start : start + len(part)] = part, np.full(len(part), segment), np.arange(len(part))
        start += len(part)
    return out[0], out[1], out[2]
