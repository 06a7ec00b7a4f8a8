"""Texts that answer texts: summaries, translations, answers. A model reads the prompt and writes the target.

{"source": "A long description of a thing", "target": "a thing"}

`data.prompt` is what is read, with any columns of the records in it. A decoder has prompt and target in one segment, and its
loss on the target and its end; an encoder-decoder reads the one and writes the other. What is too long loses the end of its
longest column, never a part of its target.
"""

import re

import numpy as np

from lm_jax.config import Config
from lm_jax.data.tokenizer import Tokenizer
from lm_jax.errors import UserError
from lm_jax.tasks.segments import Encoded, continued, two_lengths
from lm_jax.tasks.tables import Row
from lm_jax.tasks.task import Task, checked_text

COLUMN = re.compile(r"\{(\w+)\}")


class TextToText(Task):
    """Text to text: the model reads a prompt and generates the target."""

    writes = True

    def __init__(self, config: Config):
        self.reads = config.model.kind == "encoder_decoder"
        self.template = config.data.prompt or ("{source}" if self.reads else "{source}\n\n")
        asked = tuple(dict.fromkeys(COLUMN.findall(self.template)))
        if not asked or "target" in asked:
            wrong = "shows the target itself" if asked else "names no column: a model would not see what it is asked"
            raise UserError(
                f'config.data.prompt = {self.template!r} {wrong};\ntake such as "{{source}}\\n\\n" or '
                '"Question: {question}\\nAnswer:", with columns of the records'
            )
        self.columns = (*asked, "target")
        super().__init__(config)

    def parse(self, row: Row) -> tuple:
        """The texts of all columns, then where the record is (file and line). Raises UserError."""
        return *(checked_text(row, column) for column in self.columns), row.where

    def text(self, values: tuple) -> str:
        """The prompt."""
        given = dict(zip(self.columns, values[:-1], strict=True))
        return COLUMN.sub(lambda name: given[name[1]], self.template)

    def texts(self, values: tuple) -> tuple[str, ...]:
        """The texts of all columns, each by itself."""
        return values[:-1]

    def truth(self, values: tuple) -> str:
        """The target text."""
        return values[-2]

    def encode(self, values: list[tuple], tokenizer: Tokenizer, room: int) -> list[Encoded]:
        """One segment for each record: prompt and target. Raises UserError where a target does not fit into a row."""
        prompts = tokenizer.encode_batch([self.text(value) for value in values])
        targets = tokenizer.encode_batch([self.truth(value) for value in values])
        return [self._encode(*each, tokenizer, room) for each in zip(values, prompts, targets, strict=True)]

    def _encode(
        self, values: tuple, prompt: np.ndarray, target: np.ndarray, tokenizer: Tokenizer, room: int
    ) -> Encoded:
        remaining = room if self.reads else room - len(target)
        read = self._cut(values, prompt, tokenizer, remaining - 1) if len(target) < room else None
        if read is None:
            raise UserError(
                f"{values[-1]}: the target has {len(target):,} tokens, which leaves no room for its prompt in a row of "
                f"{room}:\nraise config.data.sequence_length; a target is never cut"
            )
        cut, mark = len(prompt) - len(read), np.array([tokenizer.document_id], np.int32)
        if self.reads:
            segment = two_lengths(np.concatenate([mark, read]), np.concatenate([mark, target]), tokenizer.document_id)
        else:
            segment = continued(np.concatenate([mark, read]), target, tokenizer.document_id)
        return Encoded(segment, len(segment["tokens"]) + cut)

    def _cut(self, values: tuple, prompt: np.ndarray, tokenizer: Tokenizer, room: int) -> np.ndarray | None:
        """The prompt in at most `room` tokens, its longest column without its end; None where that cannot be."""
        longest = max(range(len(values) - 2), key=lambda k: len(values[k]))
        kept = tokenizer.encode(values[longest]) if len(prompt) > room else prompt
        while len(prompt) > room:
            kept = kept[: max(0, len(kept) - (len(prompt) - room))]
            if not len(kept):
                return None
            text = tokenizer.decode(kept).rstrip("\ufffd")  # half a character may be at the end
            prompt = tokenizer.encode(self.text((*values[:longest], text, *values[longest + 1 :])))
        return prompt

    def question(self, values: tuple, tokenizer: Tokenizer, room: int) -> np.ndarray:
        """int32 ids: the document token, then the prompt in at most `room` tokens."""
        prompt = tokenizer.encode(self.text(values))
        read = self._cut(values, prompt, tokenizer, room - 1)
        return np.concatenate([[tokenizer.document_id], prompt[: room - 1] if read is None else read]).astype(np.int32)
