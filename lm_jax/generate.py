"""Text from a model: prefill, then the whole decode as one device program; `python -m lm_jax.generate --model MODEL`.

Shape suffixes: B prompts, P padded prompt length, S slots of the cache, V vocabulary.
"""

import functools
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm_jax import checkpoint, command, distributed
from lm_jax.config import OBJECTIVES, Mesh, Model, UserError
from lm_jax.data.tokenizer import Tokenizer
from lm_jax.model.attention import Context
from lm_jax.model.graph import Graph
from lm_jax.model.layers import row_keys
from lm_jax.sharding import batch_shards, computed, constrain, make_mesh
from lm_jax.terminal import Terminal

BUCKET = 64  # prompts and outputs are padded to its multiples, so that few programs serve all lengths


def writes(config: Model) -> bool:
    """Whether a model of this config writes text from left to right."""
    return config.kind not in OBJECTIVES


class Sampling(NamedTuple):
    """Temperature 0 is greedy; top_k 0 and top_p 1 are off."""

    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 0.95
    seed: int | np.uint32 = 0


def sample(logits_BV: jax.Array, keys_B: jax.Array, temperature, top_k, top_p) -> jax.Array:
    """int32 [B] drawn from softmax(logits / temperature), cut to the top_k and to the nucleus top_p (arXiv:1904.09751)."""
    vocab_size = logits_BV.shape[-1]
    greedy_B = jnp.argmax(logits_BV, axis=-1)
    logits_BV = logits_BV.astype(jnp.float32) / jnp.maximum(temperature, 1e-6)
    ordered_BV = -jnp.sort(-logits_BV, axis=-1)
    weights_BV = jax.nn.softmax(ordered_BV, axis=-1)
    rank_V = jnp.arange(vocab_size)
    kept_BV = (jnp.cumsum(weights_BV, axis=-1) - weights_BV < top_p) & ((rank_V < top_k) | (top_k == 0))[None]
    kept_BV |= (rank_V == 0)[None]
    threshold_B = jnp.where(kept_BV, ordered_BV, jnp.inf).min(-1)
    logits_BV = jnp.where(logits_BV >= threshold_B[:, None], logits_BV, -jnp.inf)
    drawn_B = jax.vmap(jax.random.categorical)(keys_B, logits_BV)
    return jnp.where(temperature > 0, drawn_B, greedy_B).astype(jnp.int32)


def prefill(graph: Graph, parameters, tokens_BP, lengths_B, slots: int):
    """Logits [B, V] after each prompt's last token, and the caches."""
    batch, length = tokens_BP.shape
    positions_BP = constrain(jnp.broadcast_to(jnp.arange(length)[None], (batch, length)), "batch", "length")
    context = Context(positions_BP, (positions_BP < lengths_B[:, None]).astype(jnp.int32))
    model = graph.module(parameters)
    hidden, caches = model(tokens_BP, context, None, graph.empty_caches(batch, slots), filled(lengths_B, slots))
    last_BP = positions_BP == lengths_B[:, None] - 1
    hidden_B1D = jnp.where(last_BP[:, :, None], hidden, 0).sum(1, keepdims=True)
    return last_logits(model, hidden_B1D), caches


def filled(lengths_B: jax.Array, slots: int) -> Context:
    """What the slots of a cache hold: position = slot, and a segment where something is written."""
    slots_BS = constrain(jnp.broadcast_to(jnp.arange(slots)[None], (lengths_B.shape[0], slots)), "batch", "length")
    return Context(slots_BS, (slots_BS < lengths_B[:, None]).astype(jnp.int32))


def last_logits(model, hidden_B1D: jax.Array) -> jax.Array:
    return constrain(model.logits(hidden_B1D), "batch", "length", None)[:, 0]


@functools.partial(jax.jit, static_argnames=("graph", "slots", "limit", "document_id"))
def decode(
    graph: Graph, parameters, tokens_BP, lengths_B, sampling: Sampling, slots: int, limit: int, document_id: int
):
    """int32 [B, limit] new tokens, `document_id` from the end of each text on. One program: nothing returns to the host."""
    logits_BV, caches = prefill(graph, parameters, tokens_BP, lengths_B, slots)
    batch = tokens_BP.shape[0]
    rows_B = constrain(jnp.arange(batch, dtype=jnp.uint32), "batch")
    root = jax.random.key(sampling.seed)

    def draw(logits_BV, step):
        keys_B = row_keys(root, "generate", step, 0, rows_B)
        return sample(logits_BV, keys_B, sampling.temperature, sampling.top_k, sampling.top_p)

    def body(carry):
        step, out_BN, token_B, caches = carry
        lengths_now_B = lengths_B + step
        context = Context(lengths_now_B[:, None] - 1, jnp.ones_like(token_B)[:, None])
        model = graph.module(parameters)
        hidden, caches = model(token_B[:, None], context, None, caches, filled(lengths_now_B, slots))
        new_B = jnp.where(token_B == document_id, document_id, draw(last_logits(model, hidden), step))
        return step + 1, put(out_BN, new_B, step), new_B, caches

    def put(out_BN, token_B, step):
        return jnp.where((jnp.arange(limit) == step)[None], token_B[:, None], out_BN)

    first_B = draw(logits_BV, 0)
    start = jnp.full((batch, limit), document_id, jnp.int32, out_sharding=jax.typeof(tokens_BP).sharding)
    carry = (jnp.int32(1), put(start, first_B, 0), first_B, caches)
    going = lambda carry: (carry[0] < limit) & jnp.any(carry[2] != document_id)
    return jax.lax.while_loop(going, body, carry)[1]


def generate(
    graph: Graph, parameters: dict, tokenizer: Tokenizer, prompts: list[str], limit: int, sampling: Sampling
) -> list[str]:
    """The continuation of each prompt, at most `limit` tokens. Raises UserError where that is more than the model sees."""
    encoded = [
        np.concatenate([[tokenizer.document_id], tokenizer.encode(prompt)]).astype(np.int32) for prompt in prompts
    ]
    longest = max(map(len, encoded))
    room = graph.sequence_length - longest
    if limit > room:
        raise UserError(
            f"the prompt is {longest} tokens and the model sees {graph.sequence_length}: --max_new_tokens {limit} is too many"
            + (f", at most {room}" if room > 0 else "; shorten the prompt")
        )
    up = lambda n: min(-(-n // BUCKET) * BUCKET, graph.sequence_length)
    width, slots = up(longest), up(longest + limit)
    mesh = jax.sharding.get_mesh()
    shards = batch_shards(dict(mesh.shape))
    rows = encoded + encoded[:1] * (-len(encoded) % shards)
    tokens_BP = np.stack([np.pad(row, (0, width - len(row))) for row in rows])
    lay = lambda x: jax.device_put(x, jax.NamedSharding(mesh, computed(("batch", "length")[: x.ndim])))
    lengths_B = np.array([len(row) for row in rows], np.int32)
    rounded = min(-(-limit // BUCKET) * BUCKET, slots - longest)
    out = decode(graph, parameters, lay(tokens_BP), lay(lengths_B), sampling, slots, rounded, tokenizer.document_id)
    texts = []
    for row in np.asarray(out)[: len(prompts), :limit]:
        ends = np.flatnonzero(row == tokenizer.document_id)
        texts.append(tokenizer.decode(row[: ends[0] if len(ends) else limit]))
    return texts


def main(arguments: list[str]) -> int:
    parser = command.Parser("lm_jax.generate", __doc__)
    parser.add_argument(
        "--model", required=True, help="a run (runs/x), a step of it (runs/x@12000), or a Hugging Face folder"
    )
    parser.add_argument("--prompt", action="append", help="may stand several times; without it: interactive")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 = greedy")
    parser.add_argument("--top_k", type=int, default=50, help="0 = off")
    parser.add_argument("--top_p", type=float, default=0.95, help="1 = off")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args(arguments)
    bounds = {
        "max_new_tokens": (1, 1e6),
        "temperature": (0, 100),
        "top_k": (0, 1e6),
        "top_p": (0, 1),
        "seed": (0, 2**32 - 1),
    }
    for name, (low, high) in bounds.items():
        if not low <= getattr(flags, name) <= high:
            parser.error(f"--{name} {getattr(flags, name)}: from {low} to {high:.10g}")
    found = checkpoint.locate(flags.model, Terminal())
    if not writes(found.config.model):
        raise UserError(
            f"--model {flags.model} is an {found.config.model.kind}, which fills in what is hidden and writes no text\n"
            f"measure it with python -m lm_jax.evaluate --model {flags.model}"
        )
    with jax.set_mesh(make_mesh(Mesh(), distributed.devices())):
        graph, parameters = checkpoint.load_parameters(found)
        sampling = Sampling(flags.temperature, flags.top_k, flags.top_p, np.uint32(flags.seed))
        if flags.prompt:
            texts = generate(graph, parameters, found.tokenizer, flags.prompt, flags.max_new_tokens, sampling)
            print("\n\n".join(prompt + text for prompt, text in zip(flags.prompt, texts, strict=True)))
            return 0
        print("a prompt a line; an empty line ends", file=sys.stderr)
        for line in iter(lambda: command.ask("> "), ""):
            try:
                print(line + generate(graph, parameters, found.tokenizer, [line], flags.max_new_tokens, sampling)[0])
            except UserError as error:
                print(error, file=sys.stderr)
    return 0


if __name__ == "__main__":
    command.door(main)
