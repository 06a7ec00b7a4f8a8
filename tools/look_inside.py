"""Inside a trained model: `python tools/look_inside.py VIEW --model runs/quickstart --text "def __init__(self"`.

embedding   the pieces whose vectors lie nearest to that of the text's last piece, by cosine
attention   who looks at whom in `--layer`: a line a query, a column a key, a square a head; darker is more
next        the likeliest next pieces; with --compare, how likely each of the given endings is after the text
"""

from lm_jax import cli, distributed, load_model
from lm_jax.config import Mesh
from lm_jax.data.tokenizer import continuation
from lm_jax.errors import UserError
from lm_jax.mesh import make_mesh
from lm_jax.model.attention import Context, attend
from lm_jax.model.layers import merge, split
from lm_jax.model.positions import rope_of_blocks
from lm_jax.terminal import Terminal

# isort: split
import jax
import jax.numpy as jnp
import numpy as np

SHADES, SHOWN = " .:-=+*#%@", 8


def as_batch(tokens: np.ndarray) -> tuple[np.ndarray, Context]:
    """One row [1, T] and its context."""
    tokens_BT = np.asarray(tokens, np.int32)[None]
    return tokens_BT, Context(np.arange(len(tokens), dtype=np.int32)[None], np.ones_like(tokens_BT))


def log_probabilities(model, tokens: np.ndarray) -> np.ndarray:
    """Of every piece after each token, in nats [T, V]."""
    hidden_BTD, _ = model(*as_batch(tokens))
    return np.asarray(jax.nn.log_softmax(model.logits(hidden_BTD).astype(jnp.float32))[0])


def attention_weights(model, tokens: np.ndarray, layer: int) -> np.ndarray:
    """[T, H, S] of one layer: what attention does to values that are the rows of the identity."""
    tokens_BT, context = as_batch(tokens)
    x_BTD, angles = model.embed(tokens_BT, context.positions), rope_of_blocks(model.config, context.positions)
    for i in range(layer + 1):
        graph, stack = split(getattr(model, f"block_{i % model.period}"))
        block, rope = merge(graph, jax.tree.map(lambda x, i=i: x[i // model.period], stack)), angles[i % model.period]
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
        weights.append(attend(q_BTHK, k_BSGK, values, context, context, own.window, "xla", *more))
    return np.concatenate(weights, axis=-1)[0, :, :, :num]


def main(arguments: list[str]) -> int:
    parser = cli.Parser("tools/look_inside.py", __doc__)
    parser.add_argument("view", choices=("embedding", "attention", "next"))
    parser.add_argument("--model", required=True, help="a run, a step of it, or a Hugging Face folder")
    parser.add_argument("--text", required=True)
    parser.add_argument("--layer", type=int, default=0, help="of attention, from 0 on")
    parser.add_argument("--compare", nargs="+", default=[], help="endings, each with its space before it")
    parser.reads({"view": ("attention",)}, "layer")
    parser.reads({"view": ("next",)}, "compare")
    flags, log = parser.parse_args(arguments), Terminal()
    found = load_model.locate(flags.model, log)
    if found.config.model.kind != "transformer":
        raise UserError(f"--model {flags.model} is of kind {found.config.model.kind}: this looks into a transformer")
    if not 0 <= flags.layer < found.config.model.num_layers:
        raise UserError(f"--layer {flags.layer}: the model has layers 0 to {found.config.model.num_layers - 1}")
    first = np.array(found.special_ids.first, np.int32)
    encode = lambda text: np.concatenate([first, found.tokenizer.encode(text)])
    tokens = encode(flags.text)
    name = lambda piece: repr(continuation(found.tokenizer, tokens, [piece]))
    with jax.set_mesh(make_mesh(Mesh(data=1), [distributed.own(distributed.devices())])):
        graph, parameters = load_model.load_parameters(found)
        model = graph.module(parameters)
        if flags.view == "embedding":
            table = np.asarray(parameters["embedding"]["table"])[: found.vocab_size]
            table = table / np.linalg.norm(table, axis=1, keepdims=True)
            cosines = table @ table[tokens[-1]]
            log("\n".join(f"{cosines[k]:6.3f}  {name(k)}" for k in np.argsort(-cosines)[:SHOWN]))
        elif flags.view == "attention":
            for piece, weights_HS in zip(tokens, attention_weights(model, tokens, flags.layer), strict=True):
                shades = [[SHADES[min(9, int(10 * weight))] for weight in weights_S] for weights_S in weights_HS]
                log(f"{name(piece):>16} " + " ".join(f"|{''.join(line)}|" for line in shades))
        elif flags.compare:
            for ending in flags.compare:
                whole = encode(flags.text + ending)  # apart it may be other pieces
                same = next((k for k, (a, b) in enumerate(zip(tokens, whole, strict=False)) if a != b), len(tokens))
                sure_TV = log_probabilities(model, whole)
                total = sure_TV[np.arange(same - 1, len(whole) - 1), whole[same:]].sum()
                log(f"{np.exp(total):8.1e}  {total:7.2f} nats  {ending!r}")
        else:
            last_V = log_probabilities(model, tokens)[-1]
            log("\n".join(f"{np.exp(last_V[k]):6.3f}  {name(k)}" for k in np.argsort(-last_V)[:SHOWN]))
    return 0


if __name__ == "__main__":
    cli.run_command(main)
