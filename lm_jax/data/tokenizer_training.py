"""Trains a tokenizer on a sample of texts that does not depend on their order."""

import hashlib
import heapq
import io
import re
from collections.abc import Iterable, Iterator

import sentencepiece

from lm_jax.data.tokenizer import DOCUMENT, SentencePiece, Tokenizer
from lm_jax.data.tokenizer_files import TRAINED, load, vocab_size
from lm_jax.errors import UserError

SAMPLE_BYTES = 8_000_000  # characters of text that a tokenizer is trained on


def make(setting: str, texts: Iterable[str], size: int = SAMPLE_BYTES) -> Tokenizer:
    """The tokenizer of any setting, where it has to be trained then on `size` characters of the texts. Raises UserError."""
    num_pieces = vocab_size(setting)
    if not num_pieces:
        return load(setting)
    return train(sample(texts, size), num_pieces, TRAINED[setting.partition(":")[0]])


def sample(texts: Iterable[str], size: int = SAMPLE_BYTES) -> list[str]:
    """The texts with the smallest content hashes, just over `size` characters: whatever their order, in bounded memory."""
    kept: list[tuple[int, str]] = []  # a heap: the largest hash first
    total = 0
    for text in texts:
        digest = -int(hashlib.sha256(text.encode()).hexdigest(), 16)
        if total > size and digest < kept[0][0]:
            continue
        heapq.heappush(kept, (digest, text))
        total += len(text)
        while total - len(kept[0][1]) > size:
            total -= len(heapq.heappop(kept)[1])
    return [text for _, text in sorted(kept, reverse=True)]


def lines(texts: Iterable[str]) -> Iterator[str]:
    """Lines of a length that SentencePiece takes (it leaves out what is longer than 4192 bytes): long ones in parts."""
    for text in texts:
        for line in text.split("\n"):
            if line and len(line) < 4096:
                yield line
            else:
                yield from (line[start : start + 1000] for start in range(0, len(line), 1000))


def train(texts: Iterable[str], num_pieces: int, model_type: str = "bpe") -> SentencePiece:
    """SentencePiece with byte fallback: a newline is a piece of its own, runs of spaces may be pieces, nothing is normalised.

    `model_type` is "bpe" or "unigram". Raises UserError where the text is too small for so many pieces.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines(texts),
            model_writer=model,
            model_type=model_type,
            vocab_size=num_pieces,
            byte_fallback=True,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=["\n"],
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            normalization_rule_name="identity",
            unk_id=0,
            bos_id=-1,
            eos_id=1,
            eos_piece=DOCUMENT,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(
            f"config.data.tokenizer: {num_pieces:,} pieces cannot be trained: {why(str(error), model_type)}"
        ) from error
    return SentencePiece(on_grid(model.getvalue()) if model_type == "unigram" else model.getvalue())


def why(words: str, model_type: str) -> str:
    """What SentencePiece says of a text that has not as many pieces, and the setting that it would take."""
    setting = next(name for name, kind in TRAINED.items() if kind == model_type)
    if largest := re.search(r"too high .* <= (\d+)", words):
        return f"this text has at most {int(largest[1]):,}:\nsay {setting}:{largest[1]}, or give more text"
    if least := re.search(r"required_chars\. \d+ vs (\d+)", words):
        return f"this text has {int(least[1]):,} characters and bytes alone:\nsay {setting}:{int(least[1]) + 1000}"
    return "there is no text" if "sentences_.empty" in words else words.splitlines()[-1]


def on_grid(model: bytes) -> bytes:
    """A SentencePiece model whose scores are 64ths: float32 adds them without rounding (up to 2**18, some 30,000 pieces).

    Two ways to cut a run of spaces have the same sum; in float32 the order of adding would choose, and no other library could
    give the same ids.
    """
    from sentencepiece import sentencepiece_model_pb2

    message = sentencepiece_model_pb2.ModelProto.FromString(model)  # type: ignore[attr-defined]
    for piece in message.pieces:
        piece.score = round(piece.score * 64) / 64
    return message.SerializeToString()
