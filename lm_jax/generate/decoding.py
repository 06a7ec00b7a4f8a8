"""Text from a model: prefill, then the whole decode as one device program.

Shape suffixes: B requests, P padded prompt length, N new tokens, V vocabulary. A prompt's last token is not read with the others:
it is the first that the decoder takes, so that every token is written in the same way.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax.config import Model
from lm_jax.data.special_ids import SpecialIds, of_documents
from lm_jax.data.tokenizer import Tokenizer, continuation
from lm_jax.errors import UserError
from lm_jax.generate.sampling import GREEDY, Sampling, draw
from lm_jax.mesh import batch_shards
from lm_jax.model.attention import Context
from lm_jax.model.build import ModelDef
from lm_jax.model.encoder_decoder import EncoderDecoder
from lm_jax.model.unstacked import Unstacked, is_unstacked
from lm_jax.model_config import OBJECTIVES
from lm_jax.sharding import computed, constrain, iota, on_each_device

BUCKET = 64  # prompts and outputs are padded to its multiples, so that few programs serve all lengths
SLICE = 16  # tokens that are decoded at once where somebody looks at them


def writes(config: Model) -> bool:
    """Whether a model of this config writes text from left to right."""
    return not config.head and (config.kind == "encoder_decoder" or config.kind not in OBJECTIVES)


class State(NamedTuple):
    """Between two tokens: `token` stands at `position` and is read next; what came before is in the caches."""

    caches: Any
    token_B: jax.Array
    position_B: jax.Array
    ended_B: jax.Array
    step: jax.Array  # tokens written so far
    used_BV: jax.Array | None = None  # tokens read or written, where repetition costs
    source: tuple[jax.Array, Context] | None = None  # what an encoder made of the prompt


@functools.partial(jax.jit, static_argnames=("graph", "slots", "start", "penalised"))
def prefill(
    graph: ModelDef, parameters, tokens_BP, lengths_B, slots: int, start: int = -1, penalised: bool = False
) -> State:
    """The state before the first new token; `slots` is what a text may have in all. An encoder reads the prompt whole."""
    model, (batch, length) = graph.module(parameters), tokens_BP.shape
    lengths_B = constrain(lengths_B, "batch")  # so that what is carried through the loop of `decode` keeps its layout
    caches, zeros_B = graph.empty_caches(batch, slots), jnp.zeros_like(lengths_B)
    caches = Unstacked.of(caches) if is_unstacked(parameters) else caches
    ended_B, step = zeros_B > 0, jnp.int32(0)
    used_BV = used_tokens(tokens_BP, lengths_B, model.padded_vocab_size) if penalised else None
    positions_BP = iota((batch, length), "batch", "length")
    within = lambda num_B: Context(positions_BP, (positions_BP < num_B[:, None]).astype(jnp.int32))
    if isinstance(model, EncoderDecoder):
        source = model.encode(tokens_BP, within(lengths_B)), within(lengths_B)
        return State(caches, zeros_B + start, zeros_B, ended_B, step, used_BV, source)
    _, caches = model(tokens_BP, within(lengths_B - 1), None, caches)
    last_B = jnp.where(positions_BP == lengths_B[:, None] - 1, tokens_BP, 0).sum(1)
    return State(caches, last_B, lengths_B - 1, ended_B, step, used_BV)


def used_tokens(tokens_BP: jax.Array, lengths_B: jax.Array, padded_vocab_size: int) -> jax.Array:
    """Which tokens are in each prompt, bool [B, V]."""
    valid_BP = iota(tokens_BP.shape, "batch", "length") < lengths_B[:, None]
    one = lambda ids_P, valid_P: jnp.zeros(padded_vocab_size, bool).at[ids_P].max(valid_P)
    layout = computed(("batch", None))
    return on_each_device(jax.vmap(one), (layout, layout), layout)(tokens_BP, valid_BP)


def next_logits(graph: ModelDef, parameters, state: State) -> tuple[jax.Array, Any]:
    """float32 logits [B, V] after the state's token, and the caches with it."""
    model, token_B1 = graph.module(parameters), state.token_B[:, None]
    context = Context(state.position_B[:, None], jnp.ones_like(token_B1))
    if isinstance(model, EncoderDecoder):
        assert state.source is not None
        hidden_B1D, caches = model.decode(token_B1, context, state.source, None, state.caches)
    else:
        hidden_B1D, caches = model(token_B1, context, None, state.caches)
    return constrain(model.logits(hidden_B1D), "batch", "length", None)[:, 0], caches


def is_any(ids: jax.Array, ends: tuple[int, ...]) -> jax.Array:
    """bool, like `ids`: which of them end a text."""
    return functools.reduce(jnp.logical_or, [ids == end for end in ends], jnp.zeros_like(ids, bool))


@functools.partial(jax.jit, static_argnames=("graph", "num", "ends"), donate_argnames=("state",))
def decode(graph: ModelDef, parameters, state: State, sampling: Sampling, until, num: int, ends: tuple[int, ...]):
    """int32 [B, N] new tokens (the first of `ends` after each text), their log-probabilities [B, N], and the state after.

    The first `until` of the N positions are written. One program: nothing returns to the host between tokens.
    Log-probabilities are the model's, before temperature and cuts.
    """
    batch, after_end = len(state.token_B), ends[0] if ends else 0
    index_BN = iota((batch, num), "batch", None)

    def body(carry):
        i, state, out_BN, sure_BN = carry
        logits_BV, caches = next_logits(graph, parameters, state)
        drawn_B = draw(logits_BV, state.step, sampling, state.used_BV)
        new_B = jnp.where(state.ended_B, after_end, drawn_B)
        chosen_BV = iota(logits_BV.shape, "batch", None) == new_B[:, None]
        sure_B = jnp.where(chosen_BV, jax.nn.log_softmax(logits_BV), 0).sum(-1)
        out_BN = jnp.where(index_BN == i, new_B[:, None], out_BN)
        sure_BN = jnp.where((index_BN == i) & ~state.ended_B[:, None], sure_B[:, None], sure_BN)
        used_BV = None if state.used_BV is None else state.used_BV | chosen_BV
        ended_B = state.ended_B | is_any(new_B, ends)
        state = State(caches, new_B, state.position_B + 1, ended_B, state.step + 1, used_BV, state.source)
        return i + 1, state, out_BN, sure_BN

    going = lambda carry: (carry[0] < until) & ~jnp.all(carry[1].ended_B)
    start = jnp.int32(0), state, jnp.zeros_like(index_BN) + after_end, jnp.zeros_like(index_BN, jnp.float32)
    _, state, out_BN, sure_BN = jax.lax.while_loop(going, body, start)
    return out_BN, sure_BN, state


class Prompts(NamedTuple):
    """Requests on the mesh, padded to few lengths; `slots` is how many positions a text may have in all."""

    tokens_BP: jax.Array
    lengths_B: jax.Array
    slots: int
    encoded: list[np.ndarray]  # ids of each request


Prompt = str | np.ndarray  # a text, or all its ids


def lay(
    graph: ModelDef, tokenizer: Tokenizer, marks: SpecialIds, prompts: Sequence[Prompt], limit: int, copies: int = 1
) -> Prompts:
    """Encodes prompts, each `copies` times. Raises UserError where `limit` more tokens are more than the model sees."""
    reads = graph.config.kind == "encoder_decoder"  # the prompt has a length of its own
    last = marks.last if reads else ()
    whole = lambda text: np.concatenate([marks.first, tokenizer.encode(text), last]).astype(np.int32)
    encoded = [whole(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    if marks.start < 0 and not all(map(len, encoded)):
        raise UserError("the prompt is empty, and nothing says what a text of this model starts with: give a prompt")
    encoded = [ids if len(ids) else np.array([marks.start], np.int32) for ids in encoded]
    longest, sees = max(map(len, encoded)), graph.sequence_length
    room = sees - (0 if reads else longest) if longest <= sees else 0
    if limit > room:
        raise UserError(
            f"the prompt is {longest} tokens and the model sees {sees}: --max_new_tokens {limit} is too many"
            + (f", at most {room}" if room > 0 else "; shorten the prompt")
        )
    up = lambda n: min(-(-n // BUCKET) * BUCKET, sees)
    width, slots = up(longest), up(limit if reads else longest + limit)
    shards = batch_shards(dict(jax.sharding.get_mesh().shape))
    encoded += encoded[:1] * (-len(encoded) % shards)
    rows = [row for row in encoded for _ in range(copies)]
    tokens_BP = np.stack([np.pad(row, (0, width - len(row))) for row in rows])
    return Prompts(on_mesh(tokens_BP), on_mesh(np.array([len(row) for row in rows], np.int32)), slots, encoded)


def on_mesh(x: np.ndarray) -> jax.Array:
    """An array [B, ...] over the devices of the mesh that is set; of several processes, which all have it, each its share."""
    layout = jax.NamedSharding(jax.sharding.get_mesh(), computed(("batch", *[None] * (x.ndim - 1))))
    return jax.make_array_from_callback(x.shape, layout, lambda index: x[index])


class Completion(NamedTuple):
    """The text that follows one prompt."""

    text: str
    tokens: list[int]
    log_probabilities: list[float]  # of each token, in nats


def stream(
    graph: ModelDef,
    parameters: dict,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    limit: int,
    sampling: Sampling = GREEDY,
    stop: tuple[str, ...] = (),
    tokens_at_once: int = 0,
    marks: SpecialIds | None = None,
) -> Iterator[list[Completion]]:
    """What has been written after every `tokens_at_once` tokens (0: all at once), until every text has ended.

    A text ends before the first of the strings `stop`, at any of the ends in `marks`, or after `limit` tokens. Raises UserError.
    """
    marks, parameters = marks or of_documents(tokenizer), graph.unstacked(parameters)
    laid = lay(graph, tokenizer, marks, prompts, limit)
    penalised = bool(np.any(np.asarray(sampling.repetition_penalty) != 1))
    batch = len(laid.lengths_B)
    of_each = sampling.of_each(np.arange(batch) % len(prompts))
    of_each = jax.tree.map(on_mesh, of_each)
    state = prefill(graph, parameters, laid.tokens_BP, laid.lengths_B, laid.slots, marks.start, penalised)
    before = contexts(graph, laid)
    step = tokens_at_once or (SLICE if stop else limit)
    num = step if step < limit else -(-limit // BUCKET) * BUCKET
    tokens, sure = np.zeros((batch, 0), np.int32), np.zeros((batch, 0), np.float32)
    while tokens.shape[1] < limit:
        until = min(step, limit - tokens.shape[1])
        out_BN, sure_BN, state = decode(graph, parameters, state, of_each, until, num, marks.ends)
        tokens = np.concatenate([tokens, np.asarray(out_BN)[:, :until]], axis=1)
        sure = np.concatenate([sure, np.asarray(sure_BN)[:, :until]], axis=1)
        rows = zip(before, tokens, sure, strict=True)
        written = [written_by(tokenizer, *row, limit, stop, marks.ends) for row in rows]
        yield [completion for completion, _ in written[: len(prompts)]]
        over = np.array([ended for _, ended in written])
        if over.all():
            return
        state = state._replace(ended_B=state.ended_B | on_mesh(over))


def contexts(graph: ModelDef, laid: Prompts) -> list[np.ndarray]:
    """The ids before each generated text; none where an encoder reads the prompt."""
    return [ids[:0] if graph.config.kind == "encoder_decoder" else ids for ids in laid.encoded]


def written_by(
    tokenizer: Tokenizer, before, tokens, sure, limit: int, stop: tuple[str, ...], ends: tuple[int, ...]
) -> tuple[Completion, bool]:
    """A text so far, and whether it is finished."""
    found_ends = np.flatnonzero(np.isin(tokens[:limit], ends))
    num = int(found_ends[0]) if len(found_ends) else min(len(tokens), limit)
    text = continuation(tokenizer, before, tokens[:num])
    stops = [position for position in (text.find(word) for word in stop) if position >= 0]
    text = text[: min(stops)] if stops else text
    return Completion(text, tokens[:num].tolist(), sure[:num].tolist()), bool(len(found_ends) or stops or num == limit)


def complete(
    graph: ModelDef, parameters: dict, tokenizer: Tokenizer, prompts: Sequence[Prompt], limit: int, *settings, **more
):
    """The completions of prompts: the last that `stream` yields."""
    *_, last = stream(graph, parameters, tokenizer, prompts, limit, *settings, **more)
    return last
