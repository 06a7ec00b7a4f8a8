"""A SentencePiece model, or plain bytes, as a `tokenizer.json` that gives the same ids, for readers who know no other file.

Spaces stand in it as they are: U+2581, which SentencePiece writes for them, is then a character like any other and is spelled in
bytes, as it is here. The format is that of the package `tokenizers`.
"""

import json
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from lm_jax.data.hugging_face_tokenizer import HuggingFace
from lm_jax.data.tokenizer import DOCUMENT, SPACE, Bytes, Tokenizer
from lm_jax.errors import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = (
    1,
    2,
    3,
    4,
    5,
    6,
)  # of a piece, in GGUF too; a control is no text
UNIGRAM, PAIRS = 1, 2  # the type of a model
NEVER = -1e5  # the score of a piece that no text may become, by itself: far below that of any text spelled in letters
# What is hard: runs of spaces, a piece that stands for a line's end, names of special tokens and bytes as text, other scripts.
SAMPLE = (
    "", " ", "\n", "a", "def add(a, b):\n    return  a +\tb\n\n\n", "   three   spaces   ", "\u2581\u2581 is no space \u2581",
    f"<unk> <s> {DOCUMENT} </s> <0x41><0x0A> [MASK]", "Grüße, où, Ελλάδα, здравствуй, नमस्ते, 你好，世界。こんにちは 안녕",
    "👩‍👩‍👧 ﬁn ½ Å Å \u00a0 \u2028 \x00 \r\n \x7f", "a\u2581b", "zzzzzzzzzzzzzzzzzzzzzzzz", "0123456789 3.14159e-10",
)  # fmt: skip


def of(tokenizer: Tokenizer) -> bytes:
    """The tokenizer.json of a tokenizer that keeps another file. Raises UserError where it has none."""
    if isinstance(tokenizer, HuggingFace):
        return tokenizer.model
    described = of_bytes() if isinstance(tokenizer, Bytes) else of_pieces(tokenizer.model)
    return json.dumps(described, ensure_ascii=False).encode()


def checked(tokenizer: Tokenizer, texts: list[str]) -> bytes:
    """`of`, after it gave the same ids and the same text on SAMPLE and on `texts`. Raises UserError where not."""
    made = of(tokenizer)
    again = HuggingFace(made)
    for text in [*SAMPLE, *texts]:
        wanted, found = tokenizer.encode(text).tolist(), again.encode(text).tolist()
        if wanted != found or again.decode(found) != tokenizer.decode(wanted):
            at = next((k for k, (a, b) in enumerate(zip(wanted, found, strict=False)) if a != b), 0)
            raise UserError(f"its ids are others, such as for {tokenizer.decode(wanted[max(0, at - 2) : at + 3])!r}")
    return made


def described(model: dict[str, Any], specials: dict[int, str], decoder: dict[str, Any], **parts: Any) -> dict[str, Any]:
    """The content of a tokenizer.json."""
    added = [special_token(i, name) for i, name in sorted(specials.items())]
    whole: dict[str, Any] = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
    whole |= {"normalizer": None, "pre_tokenizer": None, "post_processor": None} | parts
    return whole | {"decoder": decoder, "model": model}


def special_token(index: int, name: str) -> dict[str, Any]:
    """An entry of `added_tokens` for a special token."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": index, "content": name} | plain


def vocab_of(content: dict[str, Any]) -> dict[str, int]:
    """{piece: id} of a tokenizer.json, added tokens included."""
    vocab = content["model"]["vocab"]
    pieces = dict(vocab) if isinstance(vocab, dict) else {name: i for i, (name, _) in enumerate(vocab)}
    return pieces | {token["content"]: token["id"] for token in content["added_tokens"]}


def piece_names(tokenizer: Tokenizer) -> dict[int, str]:
    """{id: piece} as a tokenizer's own file has them; of bytes only the one that has a name."""
    if isinstance(tokenizer, HuggingFace):
        return {i: name for name, i in vocab_of(json.loads(tokenizer.model)).items()}
    if isinstance(tokenizer, Bytes):
        return {tokenizer.document_id: DOCUMENT}
    return {i: piece.piece for i, piece in enumerate(parsed(tokenizer.model).pieces)}


def parsed(model: bytes):
    """The protobuf message that a SentencePiece model is."""
    return sentencepiece_model_pb2.ModelProto.FromString(model)  # type: ignore[attr-defined]


def pairs_model(vocab: dict[str, int], merges: list, **more: Any) -> dict[str, Any]:
    """The `model` of a tokenizer.json of byte pairs, with the package's defaults."""
    plain = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    plain |= {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False} | more
    return {"type": "BPE", **plain, "vocab": vocab, "merges": merges}


def of_bytes() -> dict[str, Any]:
    """The byte tokenizer: each byte is a letter of the byte-level alphabet, and nothing is merged."""
    own = Bytes()
    vocab = {letter: byte for byte, letter in enumerate(letters())}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return described(pairs_model(vocab, []), {own.document_id: DOCUMENT}, level, pre_tokenizer=level)


def letters() -> list[str]:
    """The letter that stands for each byte: itself where it can be seen in Latin-1, else the next from U+0100 on (GPT-2)."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte if byte in visible else 0x100 + hidden.index(byte)) for byte in range(256)]


def of_pieces(model: bytes) -> dict[str, Any]:
    """A SentencePiece model of byte pairs or unigrams with byte fallback that leaves a text as it is."""
    proto = parsed(model)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type not in (UNIGRAM, PAIRS) or not trainer.byte_fallback:
        raise UserError("it is no SentencePiece model of byte pairs or unigrams with byte fallback")
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces or normalizer.add_dummy_prefix:
        raise UserError(
            "its SentencePiece model changes a text before it is cut (normalisation, or a space put before it)"
        )
    types = [piece.type for piece in proto.pieces]
    names = [
        piece.piece.replace(SPACE, " ") if piece.type in (NORMAL, USER_DEFINED) else piece.piece
        for piece in proto.pieces
    ]
    specials = {i: name for i, name in enumerate(names) if types[i] in (UNKNOWN, CONTROL)}
    decoder = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}
    if trainer.model_type == PAIRS:
        scores = {names[i]: piece.score for i, piece in enumerate(proto.pieces) if types[i] == NORMAL}
        vocab = {name: i for i, name in enumerate(names)}
        cut = pairs_model(vocab, merges_of(scores), byte_fallback=True, fuse_unk=True)
        return described(cut, specials, decoder)
    of_text = [kind in (NORMAL, USER_DEFINED) for kind in types]
    pieces = [
        [name, piece.score if is_text else NEVER]
        for name, piece, is_text in zip(names, proto.pieces, of_text, strict=True)
    ]
    unknown = types.index(UNKNOWN)
    return described({"type": "Unigram", "unk_id": unknown, "vocab": pieces, "byte_fallback": True}, specials, decoder)


def merges_of(scores: dict[str, float]) -> list[list[str]]:
    """Every pair of pieces that is a piece, in the order in which SentencePiece would join them: by the score of the whole."""
    ranked = sorted((name for name in scores if len(name) > 1), key=lambda name: -scores[name])
    cuts = ((name[:k], name[k:]) for name in ranked for k in range(1, len(name)))
    return [[a, b] for a, b in cuts if a in scores and b in scores]
