"""Log-probabilities of tokens as a client reads them, in both dialects of OpenAI's."""

import math
from typing import Any

from lm_jax.convert import tokenizer_json
from lm_jax.data.hugging_face_tokenizer import HuggingFace
from lm_jax.data.tokenizer import Tokenizer, continuation

Entry = tuple[int, float | None, list[tuple[int, float]]]  # a token, its log-probability, the most probable ones there


class Spelling:
    """What single tokens stand for."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.lead = tokenizer, tokenizer.encode("a").tolist()  # behind it a token shows its space
        self.pieces = HuggingFace(tokenizer_json.of(tokenizer))
        self.special = {*self.pieces.special.values()}
        self.letters = {letter: byte for byte, letter in enumerate(tokenizer_json.letters())}

    def bytes_of(self, token: int) -> bytes:
        """The bytes of a token; of one that stands for no text its name."""
        text, piece = continuation(self.tokenizer, self.lead, [token]), self.pieces.piece(token)
        if text and "\ufffd" not in text:
            return text.encode()
        if piece.startswith("<0x") and len(piece) == 6:
            return bytes([int(piece[3:5], 16)])
        is_text = token not in self.special and set(piece) <= set(self.letters)
        return bytes(self.letters[letter] for letter in piece) if is_text else piece.encode()

    def name(self, token: int) -> str:
        """A token as a string; half a character as OpenAI writes its bytes."""
        spelled = self.bytes_of(token)
        try:
            return spelled.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)


def finite(log_probability: float) -> float:
    """JSON has no infinity: OpenAI says -9999 for what cannot come."""
    return log_probability if math.isfinite(log_probability) else -9999.0


class LogProbabilities:
    """Of the tokens of one choice, part by part; `num` alternatives beside each, -1: nobody asks."""

    def __init__(self, spelling: Spelling, chat: bool, num: int):
        self.spelling, self.chat, self.num, self.before = spelling, chat, num, b""

    def of(self, entries: list[Entry]) -> dict[str, Any] | None:
        """Of tokens that follow those of the last call; None where there is nothing to say."""
        name, bytes_of = self.spelling.name, self.spelling.bytes_of
        if self.num < 0 or not entries:
            return None
        if self.chat:
            one = lambda token, sure: {"token": name(token), "logprob": finite(sure), "bytes": [*bytes_of(token)]}
            return {"content": [one(x, sure) | {"top_logprobs": [one(*y) for y in best]} for x, sure, best in entries]}
        names, offsets = [name(token) for token, _, _ in entries], []
        for token, _, _ in entries:
            offsets.append(len(self.before.decode(errors="ignore")))
            self.before += b"" if token in self.spelling.special else bytes_of(token)
        best_of = lambda best: {name(token): finite(sure) for token, sure in reversed(best)}
        known = [
            (sure if sure is None else finite(sure), None if sure is None else best_of(x)) for _, sure, x in entries
        ]
        sure, best = map(list, zip(*known, strict=True))
        return {"tokens": names, "token_logprobs": sure, "top_logprobs": best, "text_offset": offsets}
