"""Answers that fit a JSON schema: of every next token, whether it may come, by `llguidance` (extra `serve`)."""

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
        self._matcher, self._ends = llguidance.LLMatcher, ends
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
        return Matcher(made)


class Matcher:
    """Where one text stands in its grammar."""

    def __init__(self, matcher: Any):
        self._matcher = matcher

    def fill(self, allowed_W: np.ndarray) -> None:
        """Sets the bits of the tokens that may come, int32 [W]."""
        allowed_W[:] = 0
        self._matcher.unsafe_compute_mask_ptr(allowed_W.ctypes.data, allowed_W.nbytes)

    def advance(self, token: int) -> None:
        """The token has come."""
        self._matcher.consume_token(token)
