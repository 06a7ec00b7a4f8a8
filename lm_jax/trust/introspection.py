"""Inside a Transformer: the log-probability of every next token, the attention weights of a layer, the nearest vectors.

Shape suffixes: B = 1 row, T query length, S key length, D model, H heads, K head, G key/value heads, V vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax.model.attention import Context, attend
from lm_jax.model.layers import merge, split
from lm_jax.model.positions import rope_of_blocks


def log_probabilities(model, tokens: np.ndarray) -> np.ndarray:
    """float32 [T, V]: of every token of the vocabulary after each of `tokens` int32 [T], in nats."""
    hidden_BTD, _ = model(*_as_batch(tokens))
    return np.asarray(jax.nn.log_softmax(model.logits(hidden_BTD).astype(jnp.float32))[0])


def attention_weights(model, tokens: np.ndarray, layer: int) -> np.ndarray:
    """[T, H, S] of one layer, counted from 0: what attention does to values that are the rows of the identity."""
    tokens_BT, context = _as_batch(tokens)
    x_BTD, angles = model.embed(tokens_BT, context.positions), rope_of_blocks(model.config, context.positions)
    for i in range(layer + 1):
        graph, stack = split(getattr(model, f"block_{i % model.period}"))
        block: Any = merge(graph, jax.tree.map(lambda x, i=i: x[i // model.period], stack))
        rope = angles[i % model.period]
        before_BTD = x_BTD
        x_BTD, _ = block(x_BTD, context, rope, i, None, None)
    own, post = block.attention, model.config.norm_place == "post"
    x_BTD = before_BTD if post or not block.attention_norm else block.attention_norm(before_BTD)
    q_BTHK, k_BSGK = own.queries_and_keys(x_BTD, x_BTD, rope)
    width, num = k_BSGK.shape[-1], len(tokens)
    identity = np.eye(num, -(-num // width) * width, dtype=np.float32)
    weights, more = [], (own.causal, None, own.softcap)
    for start in range(0, num, width):
        values = np.broadcast_to(identity[None, :, None, start : start + width], k_BSGK.shape)
        weights.append(attend(q_BTHK, k_BSGK, jnp.asarray(values), context, context, own.window, "xla", *more))
    return np.concatenate(weights, axis=-1)[0, :, :, :num]


def cosines(table_VD: np.ndarray, token: int) -> np.ndarray:
    """[V]: the cosine of each row of an embedding table with the row of `token`."""
    table_VD = table_VD / np.linalg.norm(table_VD, axis=1, keepdims=True)
    return table_VD @ table_VD[token]


def _as_batch(tokens: np.ndarray) -> tuple[np.ndarray, Context]:
    """One row [1, T] and its context."""
    tokens_BT = np.asarray(tokens, np.int32)[None]
    positions_BT = np.arange(len(tokens), dtype=np.int32)[None]
    return tokens_BT, Context(positions_BT, np.ones_like(tokens_BT))  # type: ignore[arg-type]
