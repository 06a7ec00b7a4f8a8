"""Inside a trained model: `python tools/look_inside.py VIEW --model runs/quickstart --text "def __init__(self"`.

embedding   the tokens whose vectors lie nearest to that of the text's last token, by cosine
attention   who looks at whom in `--layer`: a line a query, a column a key, a square a head; darker is more
next        the likeliest next tokens; with --compare, how likely each of the given endings is after the text
"""

from lm_jax import cli, distributed, load_model
from lm_jax.config import Mesh
from lm_jax.data.tokenizer import continuation
from lm_jax.errors import UserError
from lm_jax.mesh import make_mesh
from lm_jax.terminal import Terminal
from lm_jax.trust.introspection import attention_weights, cosines, log_probabilities

# isort: split
import jax
import numpy as np

SHADES, SHOWN = " .:-=+*#%@", 8


def main(arguments: list[str]) -> int:
    parser = cli.Parser("tools/look_inside.py", __doc__)
    parser.add_argument("view", choices=("embedding", "attention", "next"))
    load_model.add_flags(parser)
    parser.add_argument("--text", required=True)
    parser.add_argument("--layer", type=int, default=0, help="of attention, from 0 on")
    parser.add_argument("--compare", nargs="+", default=[], help="endings, each with its space before it")
    parser.reads({"view": ("attention",)}, "layer")
    parser.reads({"view": ("next",)}, "compare")
    flags, log = parser.parse_args(arguments), Terminal()
    found = load_model.of_flags(flags, log)
    if found.config.model.kind != "transformer":
        raise UserError(f"--model {flags.model} is of kind {found.config.model.kind}: this looks into a transformer")
    if not 0 <= flags.layer < found.config.model.num_layers:
        raise UserError(f"--layer {flags.layer}: the model has layers 0 to {found.config.model.num_layers - 1}")
    first = np.array(found.special_ids.first, np.int32)
    encode = lambda text: np.concatenate([first, found.tokenizer.encode(text)])
    tokens = encode(flags.text)
    name = lambda token: repr(continuation(found.tokenizer, tokens, [token]))
    with jax.set_mesh(make_mesh(Mesh(data=1), [distributed.own(distributed.devices())])):
        graph, parameters = load_model.load_parameters(found)
        model = graph.module(parameters)
        if flags.view == "embedding":
            near_V = cosines(np.asarray(parameters["embedding"]["table"])[: found.vocab_size], tokens[-1])
            log("\n".join(f"{near_V[k]:6.3f}  {name(k)}" for k in np.argsort(-near_V)[:SHOWN]))
        elif flags.view == "attention":
            for token, weights_HS in zip(tokens, attention_weights(model, tokens, flags.layer), strict=True):
                shades = [[SHADES[min(9, int(10 * weight))] for weight in weights_S] for weights_S in weights_HS]
                log(f"{name(token):>16} " + " ".join(f"|{''.join(line)}|" for line in shades))
        elif flags.compare:
            for ending in flags.compare:
                whole = encode(flags.text + ending)  # by itself the ending may be other tokens
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
