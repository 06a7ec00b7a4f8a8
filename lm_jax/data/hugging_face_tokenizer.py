"""A Hugging Face `tokenizer.json` as a tokenizer of ours: the same ids, and no name in a text becomes a special token."""

import functools
import json
import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from lm_jax.data.tokenizer import DOCUMENT, NOTHING, SPACE, Stated, Tokenizer, within
from lm_jax.errors import UserError, needs


class HuggingFace(Tokenizer):
    """A `tokenizer.json`, read by `tokenizers`; gives back every byte where that tokenizer does (byte-level BPE)."""

    file_name = "tokenizer.json"

    def __init__(self, model: bytes, stated: Stated = NOTHING):
        self.model = model
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
        self._set_ids(stated, max(pieces.values()) + 1, pieces.get(DOCUMENT), hinted[0] if hinted else None)
        self.bytes_per_piece = np.zeros(self.vocab_size, np.int32)
        self.added = {token["content"]: token["id"] for token in described["added_tokens"]}
        count = _piece_sizes(described)
        for piece, index in pieces.items():
            if index not in self._special and index < self.vocab_size:
                self.bytes_per_piece[index] = len(piece.encode()) if piece in self.added else count(piece)

    def id_of(self, piece: int | str | None) -> int | None:
        """The id of a piece by its name or its id, None where there is none."""
        if isinstance(piece, str):
            return self._tokenizer.token_to_id(piece)
        return None if piece is None or self._tokenizer.id_to_token(piece) is None else piece

    def piece(self, index: int) -> str:
        """The name of an id, "" where it has none."""
        return self._tokenizer.id_to_token(index) or ""

    def encode(self, text: str) -> np.ndarray:
        """Ids of the text alone, int32; a special token's name is text. Raises UserError as in `Tokenizer`."""
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if not self._special.keys().isdisjoint(ids):  # a model may hold a special token among its words
            ids = self._nameless.encode(text, add_special_tokens=False).ids
        return within(ids, self, self._tokenizer.id_to_token)

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
        return within(found.ids, self, self._tokenizer.id_to_token), np.array(found.offsets, int).reshape(-1, 2)

    @functools.cached_property
    def _nameless(self) -> Any:
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
        """Ids that the tokenizer's own post-processor puts before a text and after it."""
        whole = self._tokenizer.encode("a", add_special_tokens=True)
        text = [k for k, is_put in enumerate(whole.special_tokens_mask) if not is_put]
        first, stop = (text[0], text[-1] + 1) if text else (len(whole.ids), len(whole.ids))
        return whole.ids[:first], whole.ids[stop:]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids, without special tokens."""
        known = [i for i in map(int, ids) if i < self.vocab_size and i not in self._special]
        return self._tokenizer.decode(known, skip_special_tokens=False)


def _piece_sizes(described: dict[str, Any]) -> Callable[[str], int]:
    """How many bytes of text a piece of a tokenizer.json stands for, by the decoder that it names."""
    kinds = json.dumps(described.get("decoder") or {})
    if '"ByteLevel"' in kinds:  # one character a byte
        return len
    if '"WordPiece"' in kinds:  # a word's first piece stands for the space before it, too
        return lambda piece: len(piece[2:].encode()) if piece.startswith("##") else len(piece.encode()) + 1
    byte = re.compile(r"<0x[0-9A-F]{2}>")
    return lambda piece: 1 if byte.fullmatch(piece) else len(piece.replace(SPACE, " ").encode())
