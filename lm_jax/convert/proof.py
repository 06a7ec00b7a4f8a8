"""What leaves is what was trained: the same logits and the same greedy texts, to the same end, in another library.

The other library is a `Peer`, which `transformers_peer.py` makes of `transformers`: nothing here imports it. It reads the
small files of the folder and takes the arrays from memory, so that nothing large is written before it is proven.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from lm_jax.convert import description
from lm_jax.data.objectives import example
from lm_jax.data.special_ids import SpecialIds
from lm_jax.data.tokenizer import Tokenizer
from lm_jax.errors import UserError
from lm_jax.generate import chat_template, chat_tokens, decoding
from lm_jax.model.build import ModelDef
from lm_jax.model.task_heads import PER_TOKEN

# Of the largest logit, less the mean of its position: float32 leaves about 1e-5 in SmolLM2, 30 layers deep, in either library.
LIMIT = 5e-5
LONGEST = 24  # tokens of a greedy text
ROW = 64  # tokens of the row whose logits are compared; more where a window is longer
LONGEST_WINDOW = 1024  # that is compared; what lies beyond is the config's word alone
PROMPTS = ("The capital of France is", "def main(", "import os\n\n\n", "1, 2, 3, ")
CHATS: tuple[list[chat_template.Message], ...] = (
    [chat_template.user("What is the capital of France?")],
    [
        chat_template.user("Say yes."),
        {"role": "assistant", "content": "Yes."},
        chat_template.user("Now <say> no, twice."),
    ],
)


class Peer(Protocol):
    """A model and its tokenizer as another library has them."""

    name: str  # "transformers 5.24.0"
    remark: str  # what a user has to do there, "" = nothing
    ends: set[int]  # any of which ends its texts

    def logits(self, batch: dict[str, np.ndarray]) -> list[np.ndarray]:
        """[1, T, vocabulary] of a row, and what else the model's heads say of it."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt, with what stands around it."""
        ...

    def encode_chat(self, messages: Sequence[chat_template.Message]) -> list[int]:
        """Ids of a conversation up to where the assistant speaks."""
        ...

    def write(self, ids: list[int], limit: int) -> list[int]:
        """The at most `limit` ids that follow greedily, the end with them."""
        ...

    def decode(self, ids: list[int]) -> str:
        """The text of ids."""
        ...


class Exported(NamedTuple):
    """A model as it is here, and the text of the folder that it leaves in."""

    described: description.Description
    graph: ModelDef  # in float32, whatever it was trained in
    parameters: dict
    tokenizer: Tokenizer
    ids: SpecialIds
    template: chat_template.Template | None = None


def prove(ours: Exported, peer: Peer) -> str:
    """A sentence that says what was found equal. Raises UserError with what is not."""
    with jax.default_matmul_precision("highest"):
        apart, texts = distance(ours, peer), []
        if apart <= LIMIT and decoding.writes(ours.described.config.model):
            texts = compared_texts(ours, peer)
        elif apart <= LIMIT and ours.described.config.model.head:
            texts = compared_ids(ours, peer)
    problems = [f"logits are {apart:.1e} of their size apart (limit {LIMIT:.0e})"] if apart > LIMIT else []
    problems += [text.problem for text in texts if text.problem]
    if problems:
        raise UserError("\n".join([f"in {peer.name} this is another model:", *problems[:3]]))
    ended = sum(text.ended for text in texts)
    same = f"; {len(texts)} greedy texts are the same, {ended} of them up to their end" if texts else ""
    same = f"; {len(texts)} texts have the same ids" if ours.described.config.model.head else same
    remark = f"\n{peer.remark}" if peer.remark else ""
    return f"proven: in {peer.name} logits are within {apart:.1e} of their size{same}{remark}"


def distance(ours: Exported, peer: Peer) -> float:
    """The largest difference of a logit of a random row over the largest logit, that less the mean of its position."""
    batch = random_row(ours.described)
    mine = [np.asarray(x, np.float32) for x in heads(ours.graph, ours.parameters, batch)]
    mine[0] = mine[0] if ours.graph.config.head else mine[0][..., : ours.described.vocab_size]
    return max(relative(a, b) for a, b in zip(mine, peer.logits(batch), strict=True))


@functools.partial(jax.jit, static_argnames=("graph",))
def heads(graph: ModelDef, parameters: dict, batch: dict) -> list[jax.Array]:
    """Logits [B, T, V] of a batch, and [B, C] what a model says of each row's first position; of a task, its head's alone.

    A head that answers once a segment is asked at the first token, in a causal model at the last: [B, C], others [B, T, C].
    """
    model = graph.module(parameters)
    outputs = model.read(batch)
    if outputs.hidden_BTD is None:
        assert outputs.labels_BTC is not None
        asked = slice(None) if graph.config.head in PER_TOKEN else 0 if graph.config.kind == "encoder" else -1
        return [outputs.labels_BTC[:, asked]]
    return [model.logits(outputs.hidden_BTD), *([] if outputs.labels_BTC is None else [outputs.labels_BTC[:, 0]])]


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference over the size; infinite where the shapes differ or something is no number."""
    if found.shape != expected.shape:
        return float("inf")
    apart = float(np.abs(found - expected).max() / size(found))
    return apart if np.isfinite(apart) else float("inf")


def size(logits: np.ndarray) -> float:
    """The largest distance of a logit from the mean of its position, above 0; the largest size where there is but one."""
    logits = logits if logits.shape[-1] > 1 else np.stack([logits, -logits], -1)
    return float(max(np.abs(logits - logits.mean(-1, keepdims=True)).max(), np.finfo(np.float32).tiny))


def random_row(described: description.Description) -> dict[str, np.ndarray]:
    """A batch of one row that is one segment of random tokens, longer than the windows where they are not too long."""
    config, window = described.config, max(described.config.model.window)
    wanted = max(ROW, window + 32 if window <= LONGEST_WINDOW else 0)
    random, row = np.random.RandomState(0), example(config.data.objective, min(wanted, config.data.sequence_length))
    tokens = lambda x: random.randint(0, described.vocab_size, x.shape).astype(np.int32)
    value = lambda name, x: (
        tokens(x) if name.endswith("tokens") else np.arange(len(x)) if "positions" in name else np.ones_like(x)
    )
    types = {"token_type_ids": np.arange(len(row["tokens"])) // 32} if "token_type_ids" in row else {}
    whole = {name: value(name, x) for name, x in row.items() if x.ndim} | types
    return {name: x[None].astype(row[name].dtype) for name, x in whole.items()}


class Compared(NamedTuple):
    """A greedy text: what differs ("" = nothing), and whether the model ended it itself."""

    problem: str
    ended: bool = False


def compared_texts(ours: Exported, peer: Peer) -> list[Compared]:
    """Prompts and, where there is a template, conversations: their ids, what follows greedily, and where it ends."""
    if set(ours.ids.ends) != peer.ends:
        return [Compared(f"its texts end at {sorted(peer.ends)}, here at {sorted(ours.ids.ends)}")]
    reads, length = ours.described.config.model.kind == "encoder_decoder", ours.graph.sequence_length
    whole = lambda text: [*ours.ids.first, *ours.tokenizer.encode(text).tolist(), *ours.ids.last]
    asked: list[tuple[Any, list[int], list[int]]] = [(text, whole(text), peer.encode(text)) for text in PROMPTS]
    if ours.template:
        asked += [
            (said, chat_tokens.encode(ours.template, said, ours.tokenizer).tolist(), peer.encode_chat(said))
            for said in CHATS
        ]
    other = [Compared(f"{said!r} is read as {theirs}, here as {ids}") for said, ids, theirs in asked if ids != theirs]
    limit = min(LONGEST, length)
    asked = [(said, ids, theirs) for said, ids, theirs in asked if ids and len(ids) + limit * (not reads) <= length]
    if other or not asked:
        return other
    prompts = [np.array(ids, np.int32) for _, ids, _ in asked]
    mine = decoding.complete(
        ours.graph, ours.parameters, ours.tokenizer, prompts, limit, decoding.GREEDY, marks=ours.ids
    )
    return [compared(ours, peer, *one, limit) for one in zip(asked, mine, strict=True)]


def compared_ids(ours: Exported, peer: Peer) -> list[Compared]:
    """Prompts as a model with a head reads them, with what stands around them."""
    whole = lambda text: [*ours.ids.first, *ours.tokenizer.encode(text).tolist(), *ours.ids.last]
    differing = [(text, whole(text), peer.encode(text)) for text in PROMPTS]
    return [
        Compared(f"{text!r} is read as {theirs}, here as {ids}" if ids != theirs else "")
        for text, ids, theirs in differing
    ]


def compared(ours: Exported, peer: Peer, asked: tuple, mine: decoding.Completion, limit: int) -> Compared:
    """Compares one greedy text and the token that ended it; two tokens with equal logits are not told apart."""
    said, ids, _ = asked
    written = peer.write(ids, limit)
    stop = next((k for k, token in enumerate(written) if token in ours.ids.ends), len(written))
    same = next((k for k, (a, b) in enumerate(zip(mine.tokens, written, strict=False)) if a != b), len(mine.tokens))
    whole = same == len(mine.tokens) == stop
    if stop == len(written) < limit:
        return Compared(f"after {said!r} it stops without an end: {written}")
    if (not whole or stop < limit) and not likeliest(ours, ids, written[: same + 1]):
        return Compared(f"after {said!r} comes {written}, here {mine.tokens}")
    text = peer.decode(written[:stop])
    if whole and text != mine.text and "\ufffd" not in text + mine.text:
        return Compared(f"{written[:stop]} is {text!r}, here {mine.text!r}")
    return Compared("", whole and stop < limit)


def likeliest(ours: Exported, ids: list[int], written: list[int]) -> bool:
    """Whether the last written token has the largest logit here, to the limit."""
    *before, last = written
    if ours.described.config.model.kind == "encoder_decoder":
        position, batch = len(before), row_of(ids, "encoder_") | row_of([ours.ids.start, *before])
    else:
        position, batch = len(ids) + len(before) - 1, row_of([*ids, *before])
    logits = np.asarray(heads(ours.graph, ours.parameters, batch)[0])[0, position, : ours.described.vocab_size]
    return bool(logits.max() - logits[last] <= 2 * LIMIT * size(logits))


def row_of(ids: list[int], prefix: str = "") -> dict[str, np.ndarray]:
    """A batch of one row of these ids, padded to one of few lengths."""
    padding = -len(ids) % ROW
    tokens = np.pad(np.array([ids], np.int32), ((0, 0), (0, padding)))
    segments = (np.arange(tokens.shape[1]) < len(ids)).astype(np.int32)[None]
    positions = np.arange(tokens.shape[1], dtype=np.int32)[None] * segments
    return {f"{prefix}tokens": tokens, f"{prefix}segment_ids": segments, f"{prefix}positions": positions}
