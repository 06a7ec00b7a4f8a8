"""How probable a model finds given continuations: log-probabilities of their tokens, in batches of few shapes.

Shape suffixes: B requests, T length, C last positions, S slices of these, P positions of a slice. Rows end together:
continuations stand in the last positions, and logits are made there alone.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax.errors import UserError
from lm_jax.generate.decoding import on_mesh
from lm_jax.generate.request_batches import Watch, request_batches
from lm_jax.loss import token_losses
from lm_jax.mesh import batch_shards
from lm_jax.model.attention import Context
from lm_jax.model.build import ModelDef
from lm_jax.sharding import computed, constrain, iota, on_each_device, reshape

SHORTEST = 64  # lengths are its doubles, so that few programs serve all
POSITIONS = 32  # of a row, whose logits exist at the same time

Pair = tuple[Sequence[int], Sequence[int]]  # ids of a context, at least one, and of what continues it


class Likelihood(NamedTuple):
    """How probable a continuation is."""

    log_probability: float  # of the continuation after its context, in nats
    greedy: bool  # every token of it was the most probable one


class TextLikelihood(NamedTuple):
    """How probable each token of a text is after those before it, from the second on; and the most probable ones there."""

    log_probabilities: np.ndarray  # float32 [T - 1], in nats
    best: np.ndarray  # int32 [T - 1, A], the most probable first
    best_log_probabilities: np.ndarray  # float32 [T - 1, A]


@functools.partial(jax.jit, static_argnames=("graph", "num_last", "num_best"))
def of_rows(
    graph: ModelDef,
    parameters: dict,
    tokens_BT: jax.Array,
    starts_B: jax.Array,
    targets_BC: jax.Array,
    num_last: int,
    num_best: int = 1,
):
    """(log-probabilities float32 [S, B, P] of targets after the last C tokens, what `best_of` says there).

    A row's text starts at `starts`; what is before is padding. Every process gets all of it.
    """
    model, batch = graph.module(parameters), len(tokens_BT)
    index_BT = iota(tokens_BT.shape, "batch", "length")
    is_text_BT = index_BT >= starts_B[:, None]
    context = Context(jnp.where(is_text_BT, index_BT - starts_B[:, None], 0), is_text_BT.astype(jnp.int32))
    hidden_BTD, _ = model(tokens_BT, context)
    slices = num_last // POSITIONS

    def sliced(x_BC, *rest: int):
        axes = ("batch", None, "length", *[None] * len(rest))
        return reshape(x_BC, (batch, slices, POSITIONS, *rest), *axes).swapaxes(0, 1)

    def of_slice(some):
        hidden_BPD, targets_BP = some
        logits_BPV = model.logits(hidden_BPD)
        return -token_losses(logits_BPV, targets_BP), best_of(logits_BPV, num_best)

    hidden_SBPD = sliced(hidden_BTD[:, -num_last:], hidden_BTD.shape[-1])
    found = jax.lax.map(of_slice, (hidden_SBPD, sliced(targets_BC)))
    return jax.tree.map(lambda x_SBP: constrain(x_SBP, *[None] * x_SBP.ndim), found)


def best_of(logits_BPV: jax.Array, num_best: int) -> tuple[jax.Array, jax.Array]:
    """(log-probabilities, ids) of the most probable tokens, [B, P, A] each; of one alone the logit stands for it."""
    logits_BPV = constrain(logits_BPV, "batch", "length", None)
    if num_best == 1:
        return logits_BPV.max(-1, keepdims=True), logits_BPV.argmax(-1, keepdims=True)
    layout = computed(("batch", "length", None))
    top = lambda logits_BPV: tuple(jax.lax.top_k(jax.nn.log_softmax(logits_BPV), num_best))
    sure_BPA, ids_BPA = on_each_device(top, (layout,), (layout, layout))(logits_BPV)
    return sure_BPA, ids_BPA


def likelihoods(
    graph: ModelDef,
    parameters: dict,
    pairs: Sequence[Pair],
    rows: int = 8,
    limit: int = 0,
    watch: Watch = lambda done, of: None,
) -> list[Likelihood]:
    """The likelihood of each pair; arguments and errors are those of `of_tokens`."""
    found = of_tokens(graph, parameters, pairs, rows, limit, watch)
    return [Likelihood(float(sure.sum(dtype=np.float64)), bool(best.all())) for sure, best in found]


def of_tokens(
    graph: ModelDef,
    parameters: dict,
    pairs: Sequence[Pair],
    rows: int = 8,
    limit: int = 0,
    watch: Watch = lambda done, of: None,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(log-probability float32, whether it was the most probable) of each token of each continuation.

    On the mesh that is set, `rows` pairs at a time on a device; neighbours in a batch do not change a pair. One that is longer
    than the model sees (or than `limit` tokens) loses the start of its context. Raises UserError where a continuation alone
    is longer.
    """
    sees = limit or graph.sequence_length
    for context, continuation in pairs:
        assert len(context) and len(continuation), "a context and a continuation have a token each"
        if len(continuation) > sees:
            raise UserError(f"a continuation of {len(continuation)} tokens is more than the {sees} that the model sees")
    whole = [np.array([*context, *continuation][-(sees + 1) :], np.int32) for context, continuation in pairs]
    lengths = [len(continuation) for _, continuation in pairs]
    found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for i, sure, _, best in scored(graph, parameters, whole, lengths, rows, 1, watch):
        found[i] = sure, best[:, 0] == whole[i][-lengths[i] :]
    return [found[i] for i in range(len(pairs))]


def text_likelihoods(
    graph: ModelDef, parameters: dict, texts: Sequence[np.ndarray], num_best: int, rows: int = 8
) -> list[TextLikelihood]:
    """The likelihood of every token of each text, at least two tokens and at most one more than the model sees."""
    found = scored(graph, parameters, texts, [len(ids) - 1 for ids in texts], rows, num_best)
    answers = {i: TextLikelihood(sure, best, best_sure) for i, sure, best_sure, best in found}
    return [answers[i] for i in range(len(texts))]


def scored(
    graph: ModelDef,
    parameters: dict,
    whole: Sequence[np.ndarray],
    lengths: Sequence[int],
    rows: int,
    num_best: int,
    watch: Watch = lambda done, of: None,
) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """(index of a text, what `of_rows` says of its last tokens, as many as `lengths` has), the longest texts first."""
    size = rows * batch_shards(dict(jax.sharding.get_mesh().shape))
    shape = shapes([len(x) - 1 for x in whole], lengths)
    order = sorted(range(len(shape)), key=lambda i: shape[i], reverse=True)
    for batch in request_batches(order, size, lambda i: shape[i], watch):
        chosen, (length, num_last) = batch.requests, shape[batch.requests[0]]
        right = lambda x, width: np.pad(x, (width - len(x), 0))
        nothing = np.zeros((size - len(chosen), length), np.int32)  # rows that are all padding
        tokens_BT = np.concatenate([[right(whole[i][:-1], length) for i in chosen], nothing]).astype(np.int32)
        targets_BC = np.concatenate(
            [[right(whole[i][1:][-num_last:], num_last) for i in chosen], nothing[:, :num_last]]
        )
        starts_B = np.array([length + 1 - len(whole[i]) for i in chosen] + [length] * len(nothing), np.int32)
        arrays = map(on_mesh, (tokens_BT, starts_B, targets_BC.astype(np.int32)))
        sure, (best_sure, best) = of_rows(graph, parameters, *arrays, num_last, num_best)
        by_row = (np.asarray(x).swapaxes(0, 1).reshape(size, -1, *x.shape[3:]) for x in (sure, best_sure, best))
        for i, *of_row in zip(chosen, *by_row, strict=False):
            yield i, *(x[-lengths[i] :] for x in of_row)


def shapes(lengths: Sequence[int], continuations: Sequence[int]) -> list[tuple[int, int]]:
    """Of each request the length that it is padded to, and how many last positions its continuation may take."""
    widths = [SHORTEST << max(0, (length - 1).bit_length() - SHORTEST.bit_length() + 1) for length in lengths]
    return [(width, POSITIONS if num <= POSITIONS else width) for width, num in zip(widths, continuations, strict=True)]
