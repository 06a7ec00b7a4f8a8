"""Log-probabilities of tokens as a client reads them, in both dialects of OpenAI's."""

import math
from typing import Any

from lm_jax.generate.spelling import Spelling

Entry = tuple[int, float | None, list[tuple[int, float]]]  # a token, its log-probability, the most probable ones there


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
