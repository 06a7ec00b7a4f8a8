"""Answers that fit a JSON schema: of every next token, whether it may come, by `llguidance` (extra `serve`)."""

import contextlib
import json
from typing import Any

import numpy as np

from lm_jax.convert import tokenizer_json
from lm_jax.data.tokenizer import Tokenizer
from lm_jax.errors import UserError, needs


class Grammars:
    """What the matchers of one tokenizer share."""

    def __init__(self, tokenizer: Tokenizer, ends: tuple[int, ...]):
        try:
            import llguidance
        except ImportError:
            raise needs("response_format", "llguidance", "serve") from None
        if not ends:
            raise UserError("response_format needs a model that says what ends a text")
        self._matcher, self._words = llguidance.LLMatcher, -(-tokenizer.vocab_size // 32)
        self._ends = np.zeros(self._words, np.int32)  # the bits of the tokens that end a text
        np.bitwise_or.at(
            self._ends.view(np.uint32), np.array(ends) // 32, np.uint32(1) << np.array(ends, np.uint32) % 32
        )
        described = tokenizer_json.of(tokenizer).decode()
        self._tokenizer = llguidance.LLTokenizer(described, tokenizer.vocab_size, list(ends))

    def matcher(self, schema: dict[str, Any]) -> "Matcher":
        """Of one text. Raises UserError for a schema that is none, or asks for what is not supported."""
        try:
            made = self._matcher(self._tokenizer, self._matcher.grammar_from_json_schema(json.dumps(schema)))
            problem = made.get_error()
        except ValueError as error:
            problem = str(error)
        if problem:
            raise UserError(f"response_format: {problem.splitlines()[0][:300]}")
        return Matcher(made, self._ends)


class Matcher:
    """Where one text stands in its grammar."""

    def __init__(self, matcher: Any, ends: np.ndarray):
        self._matcher, self._ends = matcher, ends

    def fill(self, allowed_W: np.ndarray) -> None:
        """Sets the bits of the tokens that may come, int32 [W]; where the grammar has become too much of one, the end alone."""
        allowed_W[:], its = 0, allowed_W[: len(self._ends)]
        its[:] = self._ends
        if not self._matcher.is_error():
            with contextlib.suppress(ValueError):  # it exceeds the limits that llguidance has for a grammar
                self._matcher.unsafe_compute_mask_ptr(its.ctypes.data, its.nbytes)

    def advance(self, token: int) -> None:
        """The token has come."""
        self._matcher.consume_token(token)
