"""Text <-> token ids: SentencePiece, plain bytes, or a Hugging Face `tokenizer.json`; each keeps its one file.

A tokenizer is what `Tokenizer` says. `load` opens one from a file or from a folder that keeps one (a run, a corpus, a Hugging
Face model), `train` makes one. Text is data: a special token's name that stands in a text is encoded as text.
"""

import contextlib
import hashlib
import heapq
import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np
import sentencepiece
from etils import epath

from lm_jax import files
from lm_jax.config import UserError, needs

DOCUMENT = "<|endoftext|>"  # stands before every document, and so after every document too
SPACE = "\u2581"  # how SentencePiece writes a space; the character itself is spelled in bytes
SAMPLE_BYTES = 8_000_000  # characters of text that a tokenizer is trained on
TRAINED = {"sentencepiece": "bpe", "unigram": "unigram"}  # kind of a setting: what SentencePiece calls it
SETTINGS = (
    '"bytes", "sentencepiece:PIECES" (BPE), "unigram:PIECES", a tokenizer.model or tokenizer.json, or a folder with one'
)


class Tokenizer(Protocol):
    """Text <-> int32 ids. `fingerprint` is the hash of the file: equal sizes are not equal tokenizers."""

    file_name: str  # under which runs and corpora keep `model`
    model: bytes  # the file
    fingerprint: str
    num_pieces: int
    document_id: int  # stands before every document
    bytes_per_piece: np.ndarray  # [num_pieces] int32: bytes of text that each piece stands for
    special: dict[str, int]  # ids of pieces that stand for no text, such as [MASK], by name

    def encode(self, text: str) -> np.ndarray:
        """Ids of the text alone, int32."""
        ...

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """`encode` of each text, on all cores where the library can."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; bytes that are no UTF-8 (a sample may stop inside a character) become U+FFFD."""
        ...


def fingerprint(model: bytes) -> str:
    return hashlib.sha256(model).hexdigest()[:16]


class SentencePiece:
    """A SentencePiece model with byte fallback; the decoder gives back every byte."""

    file_name = "tokenizer.model"

    special: dict[str, int] = {}

    def __init__(self, model: bytes):
        self.model, self.fingerprint = model, fingerprint(model)
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError(f"not a SentencePiece model: {error}") from error
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
        ids: list[int] = []
        for number, part in enumerate(text.split(SPACE)):
            if number:
                ids += [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
            ids += self._processor.encode(part)
        return np.array(ids, np.int32)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        plain = [text for text in texts if SPACE not in text]
        of_plain = iter(self._processor.encode(plain, num_threads=os.cpu_count() or 1))
        return [self.encode(text) if SPACE in text else np.array(next(of_plain), np.int32) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(self._bytes[i] for i in map(int, ids) if i < self.num_pieces).decode("utf-8", errors="replace")


class Bytes:
    """The 256 bytes of UTF-8 and one piece before documents: nothing to train, nothing unknown in any script."""

    file_name = "tokenizer.bytes"
    special: dict[str, int] = {}
    model = b"lm_jax bytes 1\n"  # ids 0-255 are bytes, 256 stands before documents

    def __init__(self, model: bytes = model):
        if model != Bytes.model:
            raise UserError("not the byte tokenizer of this version")
        self.fingerprint, self.num_pieces, self.document_id = fingerprint(model), 257, 256
        self.bytes_per_piece = np.array([1] * 256 + [0], np.int32)

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in map(int, ids) if i < 256).decode("utf-8", errors="replace")


class HuggingFace:
    """A `tokenizer.json`, read by `tokenizers`; gives back every byte where that tokenizer does (byte-level BPE)."""

    file_name = "tokenizer.json"
    ENDS = (DOCUMENT, "<|end_of_text|>", "<|endofdocument|>", "</s>", "<eos>", "<|eos|>", "[SEP]")  # the first it has

    def __init__(self, model: bytes):
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
        self.num_pieces = max(pieces.values()) + 1
        self._special = {token["id"]: token["content"] for token in described["added_tokens"] if token["special"]}
        self.special = {content: index for index, content in self._special.items()}
        self.document_id = next((pieces[end] for end in self.ENDS if end in pieces), -1)
        if self.document_id < 0:
            raise UserError(f"the tokenizer.json has no piece for the end of a text (any of {', '.join(self.ENDS)})")
        self.bytes_per_piece = np.zeros(self.num_pieces, np.int32)
        added = {token["content"] for token in described["added_tokens"]}
        count = _piece_sizes(described)
        for piece, index in pieces.items():
            if index not in self._special:
                self.bytes_per_piece[index] = len(piece.encode()) if piece in added else count(piece)

    def encode(self, text: str) -> np.ndarray:
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        # A unigram or word model may hold a special token among its words: such a name is taken apart before it is encoded.
        names = [self._special[i] for i in {*ids} & self._special.keys() if len(self._special[i]) > 1]
        names = [name for name in names if name in text]
        if names:
            parts = re.split("|".join(f"(?<={re.escape(name[0])})(?={re.escape(name[1:])})" for name in names), text)
            ids = [i for part in parts for i in self._tokenizer.encode(part, add_special_tokens=False).ids]
        return np.array(ids, np.int32)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def encode_control(self, text: str) -> np.ndarray:
        """Ids of a text whose names of special tokens mean these tokens: of a template's own words, never of a user's."""
        self._tokenizer.encode_special_tokens = False
        try:
            return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
        finally:
            self._tokenizer.encode_special_tokens = True

    def around(self) -> tuple[list[int], list[int]]:
        """What the tokenizer's own post-processor puts before a text and after it."""
        bare, whole = (self._tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
        first = next(k for k in range(len(whole)) if whole[k : k + len(bare)] == bare)
        return whole[:first], whole[first + len(bare) :]

    def decode(self, ids: Iterable[int]) -> str:
        known = [i for i in map(int, ids) if i < self.num_pieces and i not in self._special]
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


KINDS: dict[str, Any] = {kind.file_name: kind for kind in (SentencePiece, Bytes, HuggingFace)}


def load(setting: str) -> Tokenizer:
    """The tokenizer of a setting that needs no training: "bytes", a file, or a folder that keeps one. Raises UserError."""
    if setting == "bytes":
        return Bytes()
    path = epath.Path(setting)
    if not path.exists():
        raise UserError(f"config.data.tokenizer = {setting!r}: no such file; sentencepiece:2048 trains one")
    if path.is_dir():
        kept = [path / name for name in KINDS if (path / name).exists()]
        if not kept:
            raise UserError(f"config.data.tokenizer = {setting!r}: the folder has none of {', '.join(KINDS)}")
        path = kept[0]
    kind = {".json": HuggingFace, ".bytes": Bytes}.get(path.suffix, SentencePiece)
    try:
        if not (model := files.read_bytes(path)):
            raise UserError("the file is empty")
        return kind(model)
    except (UserError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"config.data.tokenizer = {setting!r}: {reason}") from None


def num_pieces(setting: str) -> int:
    """2048 of "sentencepiece:2048", 0 where nothing is trained. Raises UserError for what is no setting."""
    kind, _, pieces = setting.partition(":")
    if kind not in TRAINED or epath.Path(setting).exists():
        known = setting == "bytes" or setting.endswith((".model", ".json", ".bytes")) or epath.Path(setting).is_dir()
        if not known:
            raise UserError(f"config.data.tokenizer = {setting!r}: expected {SETTINGS}")
        return 0
    if not pieces.isdigit() or not 300 <= int(pieces) <= 1_000_000:
        raise UserError(f'config.data.tokenizer = {setting!r}: expected 300 to 1000000 pieces, such as "{kind}:2048"')
    return int(pieces)


@contextlib.contextmanager
def named(flag: str):
    """Mistakes about a tokenizer that a command's own flag names, not a config."""
    try:
        yield
    except UserError as error:
        raise UserError(re.sub("config.data.tokenizer( =)?", flag, str(error))) from None


def make(setting: str, texts: Iterable[str], size: int = SAMPLE_BYTES) -> Tokenizer:
    """The tokenizer of any setting, where it has to be trained then on `size` characters of the texts. Raises UserError."""
    pieces = num_pieces(setting)
    return train(sample(texts, size), pieces, TRAINED[setting.partition(":")[0]]) if pieces else load(setting)


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
    """Lines of a length that SentencePiece takes (it leaves out what is longer than 4192 bytes): long ones in pieces."""
    for text in texts:
        for line in text.split("\n"):
            if line and len(line) < 4096:
                yield line
            else:
                yield from (line[start : start + 1000] for start in range(0, len(line), 1000))


def train(texts: Iterable[str], pieces: int, model_type: str = "bpe") -> SentencePiece:
    """SentencePiece with byte fallback: a newline is a piece of its own, runs of spaces may be pieces, nothing is normalised.

    `model_type` is "bpe" or "unigram". Raises UserError where the text is too small for so many pieces.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines(texts),
            model_writer=model,
            model_type=model_type,
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
    return SentencePiece(model.getvalue())
