"""Segments: the tokens of one record with a target and a mask for each, as they stand in a packed row.

A segment is a dict of arrays of one length n: `tokens` and `targets` (int32; float32 targets of a head that gives a number),
`loss_mask` (float32, 1 where the target counts), and what else a row of its task has.
"""

from typing import NamedTuple

import numpy as np

Segment = dict[str, np.ndarray]


class Encoded(NamedTuple):
    """One record as a segment, and what was cut from it or left out of the loss."""

    segment: Segment
    whole: int  # tokens that the record has; the segment holds fewer where it was cut
    first: int = 0  # of its tokens, those of a segment of their own; 0 = all are one
    unlearnt: int = 0  # of its answers, those that are read and not learnt


def for_head(tokens: np.ndarray, asked, targets, dtype: type = np.int32, second: int | None = None) -> Segment:
    """A segment with targets at the positions `asked` alone, for a task head.

    `second` is the first position of the second of two texts; None for a model that has no `token_type_ids`.
    """
    n = len(tokens)
    segment = {"tokens": tokens, "targets": np.zeros(n, dtype), "loss_mask": np.zeros(n, np.float32)}
    segment["targets"][asked], segment["loss_mask"][asked] = targets, 1
    types = {} if second is None else {"token_type_ids": (np.arange(n) >= second).astype(np.int32)}
    return segment | types


def next_tokens(ids: np.ndarray, is_learnt: np.ndarray) -> Segment:
    """The segment [n] in which each of n + 1 ids predicts the next; those with bool `is_learnt` [n + 1] count."""
    return {"tokens": ids[:-1], "targets": ids[1:], "loss_mask": is_learnt[1:].astype(np.float32)}


def continued(prompt: np.ndarray, target: np.ndarray, end: int) -> Segment:
    """The segment of a decoder: from the prompt's last token on it predicts the target, then the id `end`."""
    ids = np.concatenate([prompt, target, [end]]).astype(np.int32)
    return next_tokens(ids, np.arange(len(ids)) >= len(prompt))


def two_lengths(source: np.ndarray, written: np.ndarray, end: int) -> Segment:
    """The segment of an encoder-decoder, as long as the longer of its texts; `encoder_segment_ids` is 1 where a source is.

    A row that has room for such segments has room for their sources and for their targets.
    """
    num = max(len(source), len(written))
    pad = lambda x, dtype=np.int32: np.pad(np.asarray(x, dtype), (0, num - len(x)))
    return {
        "tokens": pad(written),
        "targets": pad(np.append(written[1:], end)),
        "loss_mask": pad(np.ones(len(written)), np.float32),
        "encoder_tokens": pad(source),
        "encoder_segment_ids": pad(np.ones(len(source))),
    }


def with_two_lengths(row: dict) -> dict:
    """A row of segments of `two_lengths`, with segment ids and positions for the encoder and for the decoder."""
    segments, positions = row["segment_ids"], row["positions"]
    is_source, is_target = row["encoder_segment_ids"] > 0, row["loss_mask"] > 0
    return row | {
        "encoder_segment_ids": segments * is_source,
        "encoder_positions": positions * is_source,
        "segment_ids": segments * is_target,
        "positions": positions * is_target,
    }
