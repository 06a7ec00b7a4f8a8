"""Instruction tuning: conversations in the chat template of the tokenizer's folder; what the assistant says is learnt.

{"messages": [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Blue."}]}

Other layouts are read by `conversations.py`. The loss is on the assistant's words and on the token that ends each of its turns
(`generate/chat_tokens.py`). A long conversation keeps its start in training; where it is answered, its end.
"""

import numpy as np
from etils import epath

from lm_jax.config import Config
from lm_jax.data.tokenizer import Tokenizer
from lm_jax.errors import UserError
from lm_jax.generate import chat_template as chat
from lm_jax.generate import chat_tokens
from lm_jax.tasks.conversations import LAYOUTS, messages_of
from lm_jax.tasks.segments import Encoded, next_tokens
from lm_jax.tasks.tables import Row
from lm_jax.tasks.task import Task


class Instruction(Task):
    """Instruction tuning on conversations in the chat template of the tokenizer's folder."""

    columns: tuple[str, ...] = ("messages",)
    other_columns = tuple(LAYOUTS)[1:]
    writes = True
    chat_template: chat.Template

    def __init__(self, config: Config):
        super().__init__(config)
        self.chat_template = template_of(config)

    def parse(self, row: Row) -> tuple:
        """(messages, where the record is) of a record. Raises UserError."""
        return messages_of(row), row.where

    def last(self, values: tuple) -> int:
        """The index of the message that is the answer."""
        return max(k for k, message in enumerate(values[0]) if message["role"] == "assistant")

    def text(self, values: tuple) -> str:
        """All messages before the last answer, joined by newlines."""
        return "\n".join(message["content"] for message in values[0][: self.last(values)])

    def texts(self, values: tuple) -> tuple[str, ...]:
        """The text of each message."""
        return tuple(message["content"] for message in values[0])

    def truth(self, values: tuple) -> str:
        """The assistant's last message."""
        return values[0][self.last(values)]["content"]

    def ends(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """The id of the token that ends the assistant's message in this chat template."""
        return chat_tokens.ends_of_turn(self.chat_template, tokenizer)

    def encode(self, values: list[tuple], tokenizer: Tokenizer, room: int) -> list[Encoded]:
        """One segment for each conversation, cut at `room` tokens. Raises UserError where no learnt token is left."""
        found = []
        for messages, where in values:
            ids, is_answer, unlearnt = turns(self.chat_template, messages, tokenizer, where)
            segment = next_tokens(ids, is_answer)
            if not segment["loss_mask"][:room].any():
                raise UserError(
                    f"{where}: the assistant begins after {int(is_answer.argmax()):,} tokens, beyond a row of {room}:\n"
                    "raise config.data.sequence_length"
                )
            found.append(Encoded({name: x[:room] for name, x in segment.items()}, len(ids) - 1, unlearnt=len(unlearnt)))
        return found

    def question(self, values: tuple, tokenizer: Tokenizer, room: int) -> np.ndarray:
        """int32 ids of the conversation up to its last answer, the last `room` of them."""
        return chat_tokens.encode(self.chat_template, values[0][: self.last(values)], tokenizer)[-room:]


def find_template(config: Config) -> chat.Template | None:
    """The chat template that stands beside the tokenizer, None where there is none."""
    path = epath.Path(config.data.tokenizer)
    folder = path if path.is_dir() else path.parent
    return chat.find_template(folder) if path.exists() else None


def template_of(config: Config) -> chat.Template:
    """The chat template that stands beside the tokenizer. Raises UserError."""
    if template := find_template(config):
        return template
    raise UserError(
        f"config.train.task = {config.train.task} needs a chat template, config.data.tokenizer = {config.data.tokenizer!r} has "
        f"none:\nname a folder with tokenizer.json and {chat.FILE} (or tokenizer_config.json), such as an imported model's"
    )


def turns(template: chat.Template, messages: list[chat.Message], tokenizer: Tokenizer, where: str) -> chat_tokens.Turns:
    """Encodes the conversation of a record. Raises UserError that says which record."""
    try:
        return chat_tokens.encode_turns(template, messages, tokenizer)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
