"""Text <-> token ids: SentencePiece, plain bytes, or a Hugging Face `tokenizer.json`; each keeps its one file.

Text is data: the name of a special token that stands in a text is encoded as text. Two parts of the ids do not decode to two
parts of the text: `continuation` gives what further ids add to a text. Opened by `tokenizer_files`, trained by
`tokenizer_training`.
"""

import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import sentencepiece

from lm_jax.errors import UserError, needs

DOCUMENT = "<|endoftext|>"  # stands before every document, and so after every document too
SPACE = "\u2581"  # how SentencePiece writes a space; the character itself is spelled in bytes
LOST = {  # by tokenizers that change a text before they read it; what each is, in a text
    "line breaks": "a\nb", "spaces beside each other": "a  b", "spaces at the ends": " a ", "tabs": "a\tb",
    "capital letters": "aB", "accents": "caf\u00e9", "full-width letters": "\uff41",
    "characters without a piece": "\u732b\U0001f642", "the character U+2581": "a\u2581b",
}  # fmt: skip


class Stated(NamedTuple):
    """What the folder of a tokenizer's file says of it."""

    document: int | str | None = None  # what ends a text, by id or by name
    vocab_size: int = 0  # rows of its model's table; 0 = as many as there are pieces


NOTHING = Stated()


class Tokenizer:
    """Text <-> int32 ids. `fingerprint` is the hash of the file: equal sizes are not equal tokenizers."""

    file_name: str  # under which runs and corpora keep `model`
    model: bytes  # the file
    fingerprint: str
    vocab_size: int  # that a text may have: none beyond its model's table
    bytes_per_piece: np.ndarray  # [vocab_size] int32: bytes of text that each piece stands for
    special: dict[str, int] = {}  # ids of pieces that stand for no text, such as [MASK], by name
    beside: bytes = b""  # `special_ids.json` of its corpora: what the file alone does not say
    known_document: int | None = None

    @property
    def document_id(self) -> int:
        """Stands before every document, and so after every one. Raises UserError where nothing says which piece that is."""
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
        """What of a text is not in its ids, in words; a text comes back whole where there is nothing."""
        return tuple(name for name, text in LOST.items() if self.decode(self.encode(text)) != text)

    @functools.cached_property
    def adds_up(self) -> bool:
        """Whether `bytes_per_piece` of a text's ids add up to the bytes of the text."""
        size = lambda text: int(self.bytes_per_piece[self.encode(text)].sum())
        return all(size(text) == len(text.encode()) for text in LOST.values())

    def _take(self, stated: Stated, vocab_size: int, own: int | None, otherwise: int | None = None) -> None:
        """Settles document and size: what the file has of `<|endoftext|>`, else what is stated, else what it hints at."""
        self.vocab_size = min(vocab_size, stated.vocab_size or vocab_size)
        found = [x for x in (own, self.id_of(stated.document), otherwise) if x is not None]
        self.known_document = found[0] if found else None
        kept: dict[str, int] = {}
        if found and found[0] not in (own, otherwise):
            kept["document"] = found[0]
        if self.vocab_size < vocab_size:
            kept["num_pieces"] = self.vocab_size
        self.beside = json.dumps(kept).encode() if kept else b""


def fingerprint(model: bytes) -> str:
    return hashlib.sha256(model).hexdigest()[:16]


class SentencePiece(Tokenizer):
    """A SentencePiece model; with byte fallback its decoder gives back every byte.

    Many models put a space before a text (`add_dummy_prefix`), which is no part of it: `decode` takes it away again.
    """

    file_name = "tokenizer.model"
    NO_PREFIX = b"\x1a\x02\x18\x00"  # appended to a model: normalizer_spec.add_dummy_prefix = false (protobuf merges)

    def __init__(self, model: bytes, stated: Stated = NOTHING):
        self.model, self.fingerprint = model, fingerprint(model)
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            self._inner = sentencepiece.SentencePieceProcessor(model_proto=model + self.NO_PREFIX)  # inside of a text
        except RuntimeError as error:
            raise UserError(f"not a SentencePiece model: {error}") from error
        self.bos_id, self.eos_id = self._processor.bos_id(), self._processor.eos_id()
        eos = self.eos_id if self.eos_id >= 0 else None
        self._take(stated, self._processor.vocab_size(), self.id_of(DOCUMENT), eos)
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
        size = self._processor.vocab_size()
        index = self._processor.piece_to_id(piece) if isinstance(piece, str) else -1 if piece is None else piece
        known = 0 <= index < size and (not isinstance(piece, str) or self._processor.id_to_piece(index) == piece)
        return index if known else None

    def encode(self, text: str) -> np.ndarray:
        ids: list[int] = []
        for number, part in enumerate(text.split(SPACE) if self._has_bytes else [text]):
            if number:
                ids += self._spelled(SPACE)
            ids += (self._inner if number else self._processor).encode(part)
        return within(np.array(ids, np.int32), self, self._processor.id_to_piece)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        plain = [text for text in texts if SPACE not in text]
        of_plain = iter(self._processor.encode(plain, num_threads=os.cpu_count() or 1))
        of_one = lambda ids: within(np.array(ids, np.int32), self, self._processor.id_to_piece)
        return [self.encode(text) if SPACE in text else of_one(next(of_plain)) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        found = b"".join(self._bytes[i] for i in map(int, ids) if i < self.vocab_size).decode("utf-8", errors="replace")
        return found.removeprefix(" ") if self._has_prefix else found


def within(ids: np.ndarray, tokenizer: Tokenizer, name: Callable[[int], str | None]) -> np.ndarray:
    """The ids. Raises UserError where one is beyond the table of the tokenizer's model, with its name."""
    if len(ids) and ids.max() >= tokenizer.vocab_size:
        piece = int(ids.max())
        raise UserError(
            f"the text has the piece {name(piece)!r}, whose id {piece:,} is beyond the {tokenizer.vocab_size:,} rows of the "
            "model's table:\nleave it out of the text"
        )
    return ids


class Bytes(Tokenizer):
    """The 256 bytes of UTF-8 and one piece before documents: nothing to train, nothing unknown in any script."""

    file_name = "tokenizer.bytes"
    model = b"lm_jax bytes 1\n"  # ids 0-255 are bytes, 256 stands before documents

    def __init__(self, model: bytes = model, stated: Stated = NOTHING):
        if model != Bytes.model:
            raise UserError("not the byte tokenizer of this version")
        self.fingerprint, self.vocab_size, self.known_document = fingerprint(model), 257, 256
        self.bytes_per_piece = np.array([1] * 256 + [0], np.int32)

    def id_of(self, piece: int | str | None) -> int | None:
        return piece if isinstance(piece, int) and 0 <= piece < self.vocab_size else None

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in map(int, ids) if i < 256).decode("utf-8", errors="replace")


class HuggingFace(Tokenizer):
    """A `tokenizer.json`, read by `tokenizers`; gives back every byte where that tokenizer does (byte-level BPE)."""

    file_name = "tokenizer.json"

    def __init__(self, model: bytes, stated: Stated = NOTHING):
        self.model, self.fingerprint = model, fingerprint(model)
        try:
            import tokenizers
        except ImportError:
            raise needs("a tokenizer.json", "tokenizers", "hf") from None
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(model)
            described = json.loads(model)
        except Exception as error:  # the package raises bare Exception
            raise UserError(f"not a tokenizer.json that tokenizers {tokenizers.__version__} reads: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # a name of one in a text is text
        pieces = self._tokenizer.get_vocab(with_added_tokens=True)
        self._special = {token["id"]: token["content"] for token in described["added_tokens"] if token["special"]}
        self.special = {content: index for index, content in self._special.items()}
        hinted = [i for ids in reversed(self.around()) for i in reversed(ids)]  # what it puts after a text, else before
        self._take(stated, max(pieces.values()) + 1, pieces.get(DOCUMENT), hinted[0] if hinted else None)
        self.bytes_per_piece = np.zeros(self.vocab_size, np.int32)
        self.added = {token["content"]: token["id"] for token in described["added_tokens"]}
        count = _piece_sizes(described)
        for piece, index in pieces.items():
            if index not in self._special and index < self.vocab_size:
                self.bytes_per_piece[index] = len(piece.encode()) if piece in self.added else count(piece)

    def id_of(self, piece: int | str | None) -> int | None:
        if isinstance(piece, str):
            return self._tokenizer.token_to_id(piece)
        return None if piece is None or self._tokenizer.id_to_token(piece) is None else piece

    def encode(self, text: str) -> np.ndarray:
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if not self._special.keys().isdisjoint(ids):  # a model may hold a special token among its words
            ids = self._nameless.encode(text, add_special_tokens=False).ids
        return within(np.array(ids, np.int32), self, self._tokenizer.id_to_token)

    def encode_control(self, text: str) -> np.ndarray:
        """Ids of a text whose names of special tokens mean these tokens: of a template's own words, never of a user's."""
        return self.place_control(text)[0]

    def place_control(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """`encode_control`, and [N, 2] from which character to which each id stands."""
        self._tokenizer.encode_special_tokens = False
        try:
            found = self._tokenizer.encode(text, add_special_tokens=False)
        finally:
            self._tokenizer.encode_special_tokens = True
        ids = within(np.array(found.ids, np.int32), self, self._tokenizer.id_to_token)
        return ids, np.array(found.offsets, int).reshape(-1, 2)

    @functools.cached_property
    def _nameless(self):
        """The tokenizer with special tokens whose names no text spells, whatever its model would make of them."""
        import tokenizers

        described = json.loads(self.model)
        model = described["model"]
        hidden = {name: f"\U0010fffe{name}\U0010fffe" for name in self.special if len(name) > 1}
        if isinstance(model["vocab"], dict):
            model["vocab"] = {hidden.get(piece, piece): index for piece, index in model["vocab"].items()}
        else:
            model["vocab"] = [[hidden.get(piece, piece), score] for piece, score in model["vocab"]]
        model |= {"unk_token": hidden.get(unknown, unknown)} if (unknown := model.get("unk_token")) else {}
        parts = lambda merge: merge.split(" ") if isinstance(merge, str) else merge
        if "merges" in model:
            known = lambda merge: hidden.keys().isdisjoint([*parts(merge), "".join(parts(merge))])
            model["merges"] = [merge for merge in model["merges"] if known(merge)]
        for token in described["added_tokens"]:
            token["content"] = hidden.get(token["content"], token["content"])
        nothing = dict.fromkeys(("truncation", "padding", "post_processor"))
        made = tokenizers.Tokenizer.from_str(json.dumps(described | nothing))
        made.encode_special_tokens = True
        return made

    def around(self) -> tuple[list[int], list[int]]:
        """What the tokenizer's own post-processor puts before a text and after it."""
        whole = self._tokenizer.encode("a", add_special_tokens=True)
        text = [k for k, is_put in enumerate(whole.special_tokens_mask) if not is_put]
        first, stop = (text[0], text[-1] + 1) if text else (len(whole.ids), len(whole.ids))
        return whole.ids[:first], whole.ids[stop:]

    def decode(self, ids: Iterable[int]) -> str:
        known = [i for i in map(int, ids) if i < self.vocab_size and i not in self._special]
        return self._tokenizer.decode(known, skip_special_tokens=False)


def _piece_sizes(described: dict[str, Any]):
    """How many bytes of text a piece of a tokenizer.json stands for, by the decoder that it names."""
    kinds = json.dumps(described.get("decoder") or {})
    if '"ByteLevel"' in kinds:  # one character a byte
        return len
    if '"WordPiece"' in kinds:  # a word's first piece stands for the space before it, too
        return lambda piece: len(piece[2:].encode()) if piece.startswith("##") else len(piece.encode()) + 1
    byte = re.compile(r"<0x[0-9A-F]{2}>")
    return lambda piece: 1 if byte.fullmatch(piece) else len(piece.replace(SPACE, " ").encode())


def continuation(tokenizer: Tokenizer, before: Iterable[int], ids: Iterable[int]) -> str:
    """The text that `ids` add to the text of the ids `before`: what the whole has more than its start.

    Half a character at the end of either is U+FFFD as long as it is half; where both halves are there it belongs to `ids`.
    """
    before, ids = [*map(int, before)], [*map(int, ids)]
    start, whole = tokenizer.decode(before), tokenizer.decode(before + ids)
    return whole[len(os.path.commonprefix([start, whole])) :]


def tell_losses(tokenizer: Tokenizer, log: Callable[[str], None]) -> None:
    """One line on what of a text a tokenizer loses; none where a text comes back as it was."""
    if tokenizer.losses:
        log(f"the tokenizer loses text: {', '.join(tokenizer.losses)}; what is read and written is what it leaves")
