"""A run as a Hugging Face folder; a Hugging Face folder as a run; a GGUF file of the Llama family as a Hugging Face folder.

    python tools/convert_checkpoint.py runs/x out/x                 # where transformers is installed, logits are compared
    python tools/convert_checkpoint.py out/x runs/from_x            # then --config.train.init_from=runs/from_x
    python tools/convert_checkpoint.py runs/x out/part --over runs/base   # what was trained alone: a MODEL that needs runs/base
    python tools/convert_checkpoint.py model.gguf out/model         # pip install -e '.[gguf]'

Tokenizer and chat template go along. Nothing is written where anything is missing, unknown or of another shape.
"""

import jax
import numpy as np
from etils import epath

from lm_jax import checkpoint, command, distributed
from lm_jax.config import Mesh, UserError
from lm_jax.convert import gguf, hugging_face, run
from lm_jax.model.attention import Context
from lm_jax.sharding import make_mesh
from lm_jax.terminal import Terminal

LIMIT = 1e-4  # of a logit, between what was written and what it was written from


def proof(graph, parameters: dict, num_pieces: int, say: Terminal):
    """Compares the logits of a written folder in `transformers` with ours, on a text of random pieces."""

    def prove(folder: str) -> None:
        try:
            import torch
            import transformers
        except ImportError:
            return say("unproven: transformers and torch are not installed (pip install -e '.[peers]')")
        tokens = np.random.RandomState(0).randint(0, num_pieces, (1, min(64, graph.sequence_length))).astype(np.int32)
        context = Context(np.arange(tokens.shape[1], dtype=np.int32)[None], np.ones_like(tokens))
        model = graph.module(parameters)
        ours = np.asarray(model.logits(model(tokens, context)[0]))[..., :num_pieces]
        theirs, told = transformers.AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, dtype="float32"
        )
        with torch.no_grad():
            found = theirs.eval()(torch.tensor(tokens).long()).logits.numpy()
        apart = float(np.abs(found - ours).max())
        if any(told.values()) or not apart <= LIMIT:
            raise UserError(
                f"not written: in transformers the logits are {apart:.1e} apart (limit {LIMIT:.0e}), {told}"
            )
        say(f"proven: in transformers {transformers.__version__} every logit is within {apart:.1e}")

    return prove


def main(arguments: list[str]) -> int:
    parser = command.Parser("tools/convert_checkpoint.py", __doc__)
    parser.add_argument(
        "model", help="a run (runs/x), a step of it (runs/x@12000), a Hugging Face folder, a .gguf file"
    )
    parser.add_argument("output", help="the folder to make")
    parser.add_argument("--unproven", action="store_true", help="write without comparing logits in transformers")
    parser.add_argument("--over", default="", help="write only what was trained, over this MODEL, which has the rest")
    flags, say = parser.parse_args(arguments), Terminal()
    with jax.set_mesh(make_mesh(Mesh(data=1), distributed.devices()[:1])):
        if flags.model.endswith(".gguf") and not flags.over:
            contents = gguf.read(flags.model)
            described = hugging_face.describe(contents.config, flags.model, "bytes")
            parameters = hugging_face.parameters(described, contents.tensors, flags.model)
            graph, carried = hugging_face.graph_of(described), contents.files
        else:
            found = checkpoint.locate(flags.model, say)
            if flags.over:
                run.write_part(epath.Path(flags.output), found, checkpoint.locate(flags.over, say))
                say(f"wrote {flags.output}, which needs {flags.over}")
                return 0
            graph, parameters = checkpoint.load_parameters(found)
            carried = hugging_face.carried_files(str(found.workdir))
            if found.described:
                run.write(epath.Path(flags.output), found, parameters, carried)
                say(f"wrote {flags.output}")
                return 0
            described = hugging_face.description_of(found.config, found.num_pieces, found.tokenizer.document_id)
        proven = proof(graph, parameters, described.num_pieces, say)
        prove = (lambda folder: say("unproven, as asked for")) if flags.unproven else proven
        hugging_face.write(flags.output, described, parameters, carried, prove)
    say(f"wrote {flags.output}, a {described.content['architectures'][0]}")
    return 0


if __name__ == "__main__":
    command.door(main)
