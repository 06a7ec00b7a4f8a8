"""Preference tuning (DPO, arXiv:2305.18290): of two answers to a prompt one is chosen; the model is to tell them as we do.

{"prompt": "Name a colour.", "chosen": " Blue.", "rejected": " Seven."}

A prompt is a text, which the answers continue, or a list of messages, which they answer in the chat template; other layouts
of such pairs are read by `conversations.py`. Both halves of a pair stand in one row as two segments; the loss is one of a pair
(`task_heads.preference_margins`). A long prompt loses its start, never an answer a part.
"""

import numpy as np

from lm_jax.config import Config
from lm_jax.data.tokenizer import Tokenizer
from lm_jax.errors import UserError
from lm_jax.generate import chat_tokens
from lm_jax.tasks.conversations import pair_of
from lm_jax.tasks.instruction import find_template, template_of, turns
from lm_jax.tasks.results import Result
from lm_jax.tasks.segments import Encoded, Segment, continued, next_tokens
from lm_jax.tasks.tables import Row
from lm_jax.tasks.task import Task


class Preference(Task):
    """Preference tuning (DPO): pairs of a chosen and a rejected answer to one prompt."""

    columns: tuple[str, ...] = ("prompt", "chosen", "rejected")
    other_columns = (("chosen", "rejected"),)
    compares = True

    def __init__(self, config: Config):
        super().__init__(config)
        self.beta = config.train.dpo_beta
        self.chat_template, self.has_chats = find_template(config), False

    def ends(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """The ids that end an answer: of the chat template where prompts are conversations."""
        if not self.has_chats:
            return super().ends(tokenizer)
        assert self.chat_template
        return chat_tokens.ends_of_turn(self.chat_template, tokenizer)

    def parse(self, row: Row) -> tuple:
        """(prompt, chosen, rejected, where the record is) of a record. Raises UserError."""
        prompt, chosen, rejected = pair_of(row)
        is_chat = isinstance(prompt, list)
        self.chat_template = self.chat_template or (template_of(self.config) if is_chat else None)
        self.has_chats |= is_chat
        if chosen.strip() == rejected.strip():
            raise UserError(f"{row.where}: chosen and rejected are the same text {chosen[:40]!r}")
        return prompt, chosen, rejected, row.where

    def text(self, values: tuple) -> str:
        """The prompt, the messages of a conversation joined by newlines."""
        prompt = values[0]
        return prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)

    def texts(self, values: tuple) -> tuple[str, ...]:
        """Prompt, chosen and rejected answer."""
        return self.text(values), *values[1:3]

    def encode(self, values: list[tuple], tokenizer: Tokenizer, room: int) -> list[Encoded]:
        """One segment for each pair: both answers, each after the prompt. Raises UserError where they do not fit."""
        return [self._encode(value, tokenizer, room) for value in values]

    def _encode(self, values: tuple, tokenizer: Tokenizer, room: int) -> Encoded:
        halves = [self._half(values[0], answer, tokenizer, values[-1]) for answer in values[1:3]]
        whole = sum(len(half["tokens"]) for half in halves)
        cut = max(0, -(-(whole - room) // 2))
        if cut > min(int(half["loss_mask"].argmax()) for half in halves):
            raise UserError(
                f"{values[-1]}: the two answers leave no room for their prompt in a row of {room} tokens ({whole:,} with it):\n"
                "raise config.data.sequence_length; an answer is never cut"
            )
        first, second = ({name: x[cut:] for name, x in half.items()} for half in halves)
        joined: Segment = {name: np.concatenate([first[name], second[name]]) for name in ("tokens", "targets")}
        weight = np.concatenate([self.beta * first["loss_mask"], -self.beta * second["loss_mask"]]).astype(np.float32)
        mask, nothing = np.zeros_like(weight), np.zeros_like(weight)
        mask[0] = 1
        segment = joined | {"loss_mask": mask, "weight": weight, "reference": nothing}
        return Encoded(segment, whole, first=len(first["tokens"]))

    def _half(self, prompt, answer: str, tokenizer: Tokenizer, where: str) -> Segment:
        if isinstance(prompt, str):
            before = np.append([tokenizer.document_id], tokenizer.encode(prompt))
            return continued(before, tokenizer.encode(answer), tokenizer.document_id)
        assert self.chat_template
        said = {"role": "assistant", "content": answer}
        ids, is_answer, unlearnt = turns(self.chat_template, [*prompt, said], tokenizer, where)
        if len(prompt) in unlearnt:
            raise UserError(f"{where}: the chat template writes an answer in another way than it lets it begin")
        stop = int(np.flatnonzero(is_answer)[-1]) + 1
        start = int(np.flatnonzero(~is_answer[:stop])[-1]) + 1  # of the last answer; earlier ones belong to the prompt
        return next_tokens(ids[:stop], np.arange(stop) >= start)

    def result(self, where: str, values: tuple, segment, logits_NC: np.ndarray) -> Result:
        """The prediction is the margin, beta (log pi(chosen) / pi(rejected) less that of the reference): right above 0."""
        return Result(where, "chosen", float(logits_NC[0, 0]))

    @property
    def measures(self) -> tuple[str, ...]:
        """The names of its `scores`."""
        return "accuracy", "margin"

    def scores(self, results: tuple) -> dict[str, float]:
        """Share of pairs whose margin is above 0 (accuracy), and the mean margin."""
        margins = np.array([result.prediction for result in results], np.float64)
        return {"accuracy": float((margins > 0).mean()), "margin": float(margins.mean())}
