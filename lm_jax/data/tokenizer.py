"""SentencePiece with the settings that code needs, and a decoder that gives back every byte."""

import hashlib
import io
import re
from collections.abc import Iterable

import numpy as np
import sentencepiece
from etils import epath

from lm_jax.config import UserError

DOCUMENT = "<|endoftext|>"  # stands before every document, and so after every document too
SPACE = "\u2581"  # how SentencePiece writes a space; the character itself is spelled in bytes
SAMPLE_BYTES = 8_000_000  # of text that a tokenizer is trained on


class Tokenizer:
    """Text <-> int32 ids. `fingerprint` is the hash of the model file: equal sizes are not equal tokenizers."""

    file_name = "tokenizer.model"  # under which `model` is kept beside shards and in a run

    def __init__(self, model: bytes):
        self.model = model
        self.fingerprint = hashlib.sha256(model).hexdigest()[:16]
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.num_pieces = self._processor.vocab_size()
        self.document_id = self._processor.piece_to_id(DOCUMENT)
        if self._processor.id_to_piece(self.document_id) != DOCUMENT:
            self.document_id = self._processor.eos_id()
        if self.document_id < 0:
            raise UserError(f"the tokenizer has neither a piece {DOCUMENT} nor an end-of-sentence piece")
        self._bytes = [self._bytes_of(i) for i in range(self.num_pieces)]
        self.bytes_per_piece = np.array([len(b) for b in self._bytes], np.int32)

    def _bytes_of(self, index: int) -> bytes:
        if self._processor.is_control(index) or self._processor.is_unknown(index):
            return b""
        piece = self._processor.id_to_piece(index)
        if self._processor.is_byte(index):
            return bytes([int(piece[1:-1], 16)])
        return piece.replace(SPACE, " ").encode()

    def encode(self, text: str) -> np.ndarray:
        """Ids of the text alone. Special pieces that stand in the text are encoded as text."""
        ids: list[int] = []
        for number, part in enumerate(text.split(SPACE)):
            if number:
                ids += [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
            ids += self._processor.encode(part)
        return np.array(ids, np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; bytes that are no UTF-8 (a sample may stop inside a character) become U+FFFD."""
        return b"".join(self._bytes[i] for i in map(int, ids) if i < self.num_pieces).decode("utf-8", errors="replace")


def load(place: str) -> Tokenizer:
    path = epath.Path(place)
    if not path.exists():
        raise UserError(f"config.data.tokenizer = {place!r}: no such file; sentencepiece:2048 trains one")
    try:
        return Tokenizer(path.read_bytes())
    except RuntimeError as error:
        raise UserError(f"config.data.tokenizer = {place!r} is not a SentencePiece model: {error}") from error


def num_pieces(setting: str) -> int:
    """2048 of "sentencepiece:2048", 0 for a file. Raises UserError for anything else."""
    kind, _, pieces = setting.partition(":")
    if kind != "sentencepiece":
        if setting.endswith(".model"):
            return 0
        raise UserError(f'config.data.tokenizer = {setting!r}: expected "sentencepiece:PIECES" or a .model file')
    if not pieces.isdigit() or not 300 <= int(pieces) <= 1_000_000:
        raise UserError(
            f'config.data.tokenizer = {setting!r}: expected 300 to 1000000 pieces, such as "sentencepiece:2048"'
        )
    return int(pieces)


def train(texts: Iterable[str], pieces: int) -> Tokenizer:
    """BPE with byte fallback: a newline is a piece of its own, runs of spaces may be pieces, nothing is normalised."""
    lines, taken = [], 0
    for text in texts:
        lines += [line for line in text.split("\n") if line and len(line) < 4096]
        taken += len(text)
        if taken > SAMPLE_BYTES:
            break
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=pieces,
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
        largest = re.search(r"<= (\d+)", str(error))
        hint = f"; at most {largest[1]} for this text" if largest else ""
        raise UserError(
            f"config.data.tokenizer: {pieces} pieces cannot be trained{hint}: {str(error).splitlines()[-1]}"
        ) from error
    return Tokenizer(model.getvalue())
