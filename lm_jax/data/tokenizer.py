"""Text <-> token ids: SentencePiece or plain bytes (`hugging_face_tokenizer.py`: a `tokenizer.json`); each keeps its one file.

Text is data: the name of a special token that stands in a text is encoded as text. Ids in two parts do not decode to the text
in two parts: `continuation` gives what further ids add to a text. `tokenizer_files.py` opens, `tokenizer_training.py` trains.
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import sentencepiece

from lm_jax.errors import UserError

DOCUMENT = "<|endoftext|>"  # stands before every document, and so after every document too
SPACE = "\u2581"  # how SentencePiece writes a space; the character itself is spelled in bytes
LOST = {  # what a tokenizer may change in a text before it reads it: its name, and a text that has it
    "line breaks": "a\nb", "spaces beside each other": "a  b", "spaces at the ends": " a ", "tabs": "a\tb",
    "capital letters": "aB", "accents": "caf\u00e9", "full-width letters": "\uff41",
    "characters without a piece": "\u732b\U0001f642", "the character U+2581": "a\u2581b",
}  # fmt: skip


class Stated(NamedTuple):
    """What other files in the folder of a tokenizer say of it."""

    document: int | str | None = None  # what ends a text, by id or by name
    vocab_size: int = 0  # rows of its model's table; 0 = as many as there are pieces


NOTHING = Stated()


class Tokenizer:
    """Text <-> int32 ids; what the three kinds of tokenizers have in common."""

    file_name: str  # under which runs and corpora keep `model`
    model: bytes  # the file
    vocab_size: int  # that a text may have: none beyond its model's table
    bytes_per_piece: np.ndarray  # [vocab_size] int32: bytes of text that each piece stands for
    special: dict[str, int] = {}  # ids of pieces that stand for no text, such as [MASK], by name
    beside: bytes = b""  # `special_ids.json` of its corpora: what the file alone does not say
    known_document: int | None = None  # `document_id` where something says it

    @functools.cached_property
    def fingerprint(self) -> str:
        """The hash of the file: equal sizes are not equal tokenizers."""
        return hashlib.sha256(self.model).hexdigest()[:16]

    @property
    def document_id(self) -> int:
        """The id before every document, and so after every one. Raises UserError where nothing says which piece that is."""
        if self.known_document is None:
            raise UserError(
                f"config.data.tokenizer: nothing says which piece ends a text: the {self.file_name} alone does not;\n"
                "name a folder whose tokenizer_config.json says it (eos_token)"
            )
        return self.known_document

    def id_of(self, piece: int | str | None) -> int | None:
        """The id of a piece by its name or its id, None where there is none."""
        raise NotImplementedError

    def encode(self, text: str) -> np.ndarray:
        """Ids of the text alone, int32. Raises UserError where it needs a piece that its model's table has not."""
        raise NotImplementedError

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """`encode` of each text, on all cores where the library can."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; bytes that are no UTF-8 (a sample may stop inside a character) become U+FFFD."""
        raise NotImplementedError

    @functools.cached_property
    def losses(self) -> tuple[str, ...]:
        """Names of what the ids lose of a text, such as "tabs"; none where every text comes back as it was."""
        return tuple(name for name, text in LOST.items() if self.decode(self.encode(text)) != text)

    @functools.cached_property
    def adds_up(self) -> bool:
        """Whether `bytes_per_piece` of a text's ids add up to the bytes of the text."""
        size = lambda text: int(self.bytes_per_piece[self.encode(text)].sum())
        return all(size(text) == len(text.encode()) for text in LOST.values())

    def _set_ids(self, stated: Stated, vocab_size: int, own: int | None, hinted: int | None) -> None:
        """Sets size and document: the file's `<|endoftext|>` (`own`), else what the folder states, else the `hinted` id."""
        self.vocab_size = min(vocab_size, stated.vocab_size or vocab_size)
        found = [x for x in (own, self.id_of(stated.document), hinted) if x is not None]
        self.known_document = found[0] if found else None
        kept: dict[str, int] = {}
        if found and found[0] not in (own, hinted):
            kept["document"] = found[0]
        if self.vocab_size < vocab_size:
            kept["num_pieces"] = self.vocab_size
        self.beside = json.dumps(kept).encode() if kept else b""


class SentencePiece(Tokenizer):
    """A SentencePiece model; with byte fallback its decoder gives back every byte.

    Many models put a space before a text (`add_dummy_prefix`), which is no part of it: `decode` takes it away again.
    """

    file_name = "tokenizer.model"
    NO_PREFIX = b"\x1a\x02\x18\x00"  # appended to a model: normalizer_spec.add_dummy_prefix = false (protobuf merges)

    def __init__(self, model: bytes, stated: Stated = NOTHING):
        self.model = model
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            self._inner = sentencepiece.SentencePieceProcessor(model_proto=model + self.NO_PREFIX)  # inside of a text
        except RuntimeError as error:
            raise UserError(f"not a SentencePiece model: {error}") from error
        self.bos_id, self.eos_id = self._processor.bos_id(), self._processor.eos_id()
        self._set_ids(stated, self._processor.vocab_size(), self.id_of(DOCUMENT), self.id_of(self.eos_id))
        self._bytes = [self._bytes_of(i) for i in range(self.vocab_size)]
        self.bytes_per_piece = np.array([len(b) for b in self._bytes], np.int32)
        self._has_bytes = all(self._processor.is_byte(i) for i in self._spelled(SPACE))
        self._has_prefix = self._processor.encode("a") != self._inner.encode("a")

    def _bytes_of(self, index: int) -> bytes:
        if self._processor.is_control(index) or self._processor.is_unknown(index):
            return b""
        piece = self._processor.id_to_piece(index)
        if self._processor.is_byte(index):
            return bytes([int(piece[1:-1], 16)])
        return piece.replace(SPACE, " ").encode()

    def _spelled(self, text: str) -> list[int]:
        return [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in text.encode()]

    def id_of(self, piece: int | str | None) -> int | None:
        """As in `Tokenizer`: SentencePiece itself gives an unknown name the id of <unk>."""
        index = self._processor.piece_to_id(piece) if isinstance(piece, str) else piece
        if index is None or not 0 <= index < self._processor.vocab_size():
            return None
        return None if isinstance(piece, str) and self._processor.id_to_piece(index) != piece else index

    def encode(self, text: str) -> np.ndarray:
        """Ids of the text, int32; U+2581 is spelled in bytes where the model has pieces for them."""
        ids: list[int] = []
        for number, part in enumerate(text.split(SPACE) if self._has_bytes else [text]):
            if number:
                ids += self._spelled(SPACE)
            ids += (self._inner if number else self._processor).encode(part)
        return within(ids, self, self._processor.id_to_piece)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """`encode` of each text; those without U+2581 are encoded on all cores."""
        plain = [text for text in texts if SPACE not in text]
        found = iter(self._processor.encode(plain, num_threads=os.cpu_count() or 1))
        name = self._processor.id_to_piece
        return [self.encode(text) if SPACE in text else within(next(found), self, name) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids, without the space that the model puts before a text."""
        found = b"".join(self._bytes[i] for i in map(int, ids) if i < self.vocab_size).decode("utf-8", errors="replace")
        return found.removeprefix(" ") if self._has_prefix else found


def within(ids: Sequence[int], tokenizer: Tokenizer, name: Callable[[int], str | None]) -> np.ndarray:
    """The ids as int32. Raises UserError where one is beyond the table of the tokenizer's model, with its name."""
    largest = max(ids, default=0)
    if largest >= tokenizer.vocab_size:
        raise UserError(
            f"the text has the piece {name(largest)!r}, whose id {largest:,} is beyond the {tokenizer.vocab_size:,} rows of the "
            "model's table:\nleave it out of the text"
        )
    return np.array(ids, np.int32)


class Bytes(Tokenizer):
    """The 256 bytes of UTF-8 and one piece before documents: nothing to train, nothing unknown in any script."""

    file_name = "tokenizer.bytes"
    model = b"lm_jax bytes 1\n"  # ids 0-255 are bytes, 256 stands before documents

    def __init__(self, model: bytes = model, stated: Stated = NOTHING):
        if model != Bytes.model:
            raise UserError("not the byte tokenizer of this version")
        self.vocab_size, self.known_document = 257, 256
        self.bytes_per_piece = np.array([1] * 256 + [0], np.int32)

    def id_of(self, piece: int | str | None) -> int | None:
        """The id itself where it is one: no piece has a name."""
        return piece if isinstance(piece, int) and 0 <= piece < self.vocab_size else None

    def encode(self, text: str) -> np.ndarray:
        """The bytes of the text, int32."""
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the bytes among the ids."""
        return bytes(i for i in map(int, ids) if i < 256).decode("utf-8", errors="replace")


def continuation(tokenizer: Tokenizer, before: Iterable[int], ids: Iterable[int]) -> str:
    """The text that `ids` add to the text of the ids `before`: what the whole has more than its start.

    Half a character at the end of either is U+FFFD as long as it is half; where both halves are there it belongs to `ids`.
    """
    before, ids = [*map(int, before)], [*map(int, ids)]
    start, whole = tokenizer.decode(before), tokenizer.decode(before + ids)
    return whole[len(os.path.commonprefix([start, whole])) :]


def tell_losses(tokenizer: Tokenizer, log: Callable[[str], None]) -> None:
    """Logs one line on what a tokenizer loses of a text; none where it loses nothing."""
    if tokenizer.losses:
        log(f"the tokenizer loses text: {', '.join(tokenizer.losses)}; what is read and written is what it leaves")
