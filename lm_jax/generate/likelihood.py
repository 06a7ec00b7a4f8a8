"""How probable a model finds given continuations: log-probabilities of their tokens, in batches of few shapes.

Shape suffixes: B requests, T length, C last positions, S slices of these, P positions of a slice. Rows end together:
continuations stand in the last positions, and logits are made there alone.
"""

import functools
from collections.abc import Sequence
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
from lm_jax.sharding import constrain, iota, reshape

SHORTEST = 64  # lengths are its doubles, so that few programs serve all
POSITIONS = 32  # of a row, whose logits exist at the same time

Pair = tuple[Sequence[int], Sequence[int]]  # ids of a context, at least one, and of what continues it


class Likelihood(NamedTuple):
    """How probable a continuation is."""

    log_probability: float  # of the continuation after its context, in nats
    greedy: bool  # every token of it was the most probable one


@functools.partial(jax.jit, static_argnames=("graph", "num_last"))
def of_rows(
    graph: ModelDef, parameters: dict, tokens_BT: jax.Array, starts_B: jax.Array, targets_BC: jax.Array, num_last: int
):
    """(log-probabilities float32, whether each is the most probable), [S, B, P] each, of targets after the last C tokens.

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
        best_BP = constrain(logits_BPV, "batch", "length", None).argmax(-1)
        return -token_losses(logits_BPV, targets_BP), best_BP == targets_BP

    hidden_SBPD = sliced(hidden_BTD[:, -num_last:], hidden_BTD.shape[-1])
    found = jax.lax.map(of_slice, (hidden_SBPD, sliced(targets_BC)))
    return jax.tree.map(lambda x_SBP: constrain(x_SBP, None, None, None), found)


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
    found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    size = rows * batch_shards(dict(jax.sharding.get_mesh().shape))
    shape = shapes([len(x) - 1 for x in whole], [len(continuation) for _, continuation in pairs])
    order = sorted(range(len(shape)), key=lambda i: shape[i], reverse=True)  # the longest first
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
        sure, best = (
            np.asarray(x).swapaxes(0, 1).reshape(size, num_last) for x in of_rows(graph, parameters, *arrays, num_last)
        )
        for row, i in enumerate(chosen):
            last = slice(-len(pairs[i][1]), None)
            found[i] = sure[row, last], best[row, last]
    return [found[i] for i in range(len(pairs))]


def shapes(lengths: Sequence[int], continuations: Sequence[int]) -> list[tuple[int, int]]:
    """Of each request the length that it is padded to, and how many last positions its continuation may take."""
    widths = [SHORTEST << max(0, (length - 1).bit_length() - SHORTEST.bit_length() + 1) for length in lengths]
    return [(width, POSITIONS if num <= POSITIONS else width) for width, num in zip(widths, continuations, strict=True)]
