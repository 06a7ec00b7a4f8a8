"""Beam search: the most probable texts, for translation and summarisation; one device program, like sampling.

Shape suffixes: B prompts, K beams, C candidates, N new tokens, V vocabulary.

The rules are those of `transformers`: of the 2K best continuations (of (1 + E) K where a text has E > 1 ends) those that end are
finished texts if they are among the first K, the best K others go on; a finished text scores its log-probability /
length^penalty; a prompt is done once no running text scores better than the worst of its K finished ones.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax.data.special_ids import SpecialIds, of_documents
from lm_jax.data.tokenizer import Tokenizer
from lm_jax.generate.decoding import Completion, Prompt, State, contexts, is_any, lay, next_logits, prefill, written_by
from lm_jax.model.build import ModelDef
from lm_jax.model.unstacked import Unstacked
from lm_jax.sharding import iota, reshape

NEVER = -1e9


class Beams(NamedTuple):
    """Unfinished texts, best first, and finished ones with their scores (NEVER where there is none)."""

    tokens_BKN: jax.Array
    scores_BK: jax.Array
    finished_BKN: jax.Array
    finished_scores_BK: jax.Array
    going_B: jax.Array  # whether better texts may come


def pick(x, at_BJ: jax.Array):
    """x[b, at[b, j]] of an array [B, K, ...], by selects alone: any layout of the other dims serves."""
    spread = lambda y: y.reshape(*y.shape, *[1] * (x.ndim - 2))
    parts = [jnp.where(spread(at_BJ == k), x[:, k : k + 1], 0) for k in range(x.shape[1])]
    return functools.reduce(jnp.add if x.dtype != bool else jnp.logical_or, parts)


def reorder(caches, parents_BK: jax.Array):
    """Caches [L, B * K, ...], or unstacked [B * K, ...], whose texts continue other texts of the same prompt."""
    batch, beams = parents_BK.shape
    lead = () if isinstance(caches, Unstacked) else ("layers",)
    pick_one = jax.vmap(pick, (0, None)) if lead else pick

    def one(x):
        layers, of_text = x.shape[: len(lead)], x.shape[len(lead) + 1 :]
        rest = ("length", "kv_heads", "head_dim") if len(of_text) == 3 else (None,) * len(of_text)
        of_prompt = reshape(x, (*layers, batch, beams, *of_text), *lead, "batch", None, *rest)
        return reshape(pick_one(of_prompt, parents_BK), x.shape, *lead, "batch", *rest)

    return jax.tree.map(one, caches)


@functools.partial(jax.jit, static_argnames=("graph", "beams", "limit", "ends"))
def decode(
    graph: ModelDef, parameters, state: State, beams: int, limit: int, ends: tuple[int, ...], penalty: jax.Array
) -> Beams:
    """The best texts of each prompt; `state` has every prompt `beams` times, one after the other."""
    batch = len(state.token_B) // beams
    like_BK = iota((batch, beams), "batch", None)
    nothing_BKN = jnp.zeros_like(iota((batch, beams, limit), "batch", None, None)) + (ends[0] if ends else 0)
    never_BK = jnp.zeros_like(like_BK, jnp.float32) + NEVER
    start = Beams(nothing_BKN, jnp.where(like_BK == 0, 0, never_BK), nothing_BKN, never_BK, like_BK[:, 0] == 0)

    def body(carry):
        n, state, now = carry
        logits_BV, caches = next_logits(graph, parameters, state)
        padded_vocab_size = logits_BV.shape[-1]
        sure = reshape(jax.nn.log_softmax(logits_BV), (batch, beams, padded_vocab_size), "batch", None, None)
        sums = reshape(sure + now.scores_BK[:, :, None], (batch, beams * padded_vocab_size), "batch", None)
        scores_BC, places_BC = jax.lax.top_k(sums, max(2, 1 + len(ends)) * beams)
        parents_BC, ids_BC = places_BC // padded_vocab_size, places_BC % padded_vocab_size
        at_N = jnp.arange(limit)[None, None] == n
        tokens_BCN = jnp.where(at_N, ids_BC[:, :, None], pick(now.tokens_BKN, parents_BC))
        ends_BC = is_any(ids_BC, ends) | (n + 1 == limit)
        first_BC = iota(ends_BC.shape, "batch", None) < beams

        length = (n + 1).astype(jnp.float32) ** penalty
        ended_BC = jnp.where(ends_BC & first_BC & now.going_B[:, None], scores_BC / length, NEVER)
        merged = jnp.concatenate([now.finished_scores_BK, ended_BC], axis=1)
        finished_scores_BK, best_BK = jax.lax.top_k(merged, beams)
        finished_BKN = pick(jnp.concatenate([now.finished_BKN, tokens_BCN], axis=1), best_BK)

        running_BK, next_BK = jax.lax.top_k(jnp.where(ends_BC, NEVER, scores_BC), beams)
        full_B = jnp.all(finished_scores_BK > NEVER, axis=1)
        better_B = running_BK[:, 0] / length > jnp.where(full_B, finished_scores_BK.min(1), NEVER)
        now = Beams(pick(tokens_BCN, next_BK), running_BK, finished_BKN, finished_scores_BK, now.going_B & better_B)
        token_B = reshape(pick(ids_BC, next_BK), (batch * beams,), "batch")
        caches = reorder(caches, pick(parents_BC, next_BK))
        state = state._replace(caches=caches, token_B=token_B, position_B=state.position_B + 1, step=state.step + 1)
        return n + 1, state, now

    going = lambda carry: (carry[0] < limit) & jnp.any(carry[2].going_B)
    return jax.lax.while_loop(going, body, (jnp.int32(0), state, start))[2]


def search(
    graph: ModelDef,
    parameters,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    limit: int,
    beams: int,
    penalty: float = 1.0,
    marks: SpecialIds | None = None,
) -> list[Completion]:
    """The best text of each prompt; its one log-probability is the sum over text and end. Raises UserError."""
    marks, parameters = marks or of_documents(tokenizer), graph.unstacked(parameters)
    laid = lay(graph, tokenizer, marks, prompts, limit, beams)
    state = prefill(graph, parameters, laid.tokens_BP, laid.lengths_B, laid.slots, marks.start)
    found = decode(graph, parameters, state, beams, limit, marks.ends, np.float32(penalty))
    best = np.asarray(found.finished_BKN)[:, 0], np.asarray(found.finished_scores_BK)[:, 0]
    completions = []
    for before, row_N, score in zip(contexts(graph, laid), *best, strict=True):
        found, _ = written_by(tokenizer, before, row_N, row_N, limit, (), marks.ends)
        total = float(score) * min(len(found.tokens) + 1, limit) ** penalty  # its end is one of the tokens
        completions.append(found._replace(log_probabilities=[total]))
    return completions[: len(prompts)]
