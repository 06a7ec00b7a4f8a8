"""A run as a Hugging Face folder; a Hugging Face folder as a run; GGUF files of the Llama family from and to both.

    python tools/convert_checkpoint.py runs/x out/x                 # where transformers is installed, logits are compared
    python tools/convert_checkpoint.py out/x runs/from_x            # then --config.train.init_from=runs/from_x
    python tools/convert_checkpoint.py runs/x out/part --over runs/base   # what was trained alone: a MODEL that needs runs/base
    python tools/convert_checkpoint.py model.gguf out/model         # pip install -e '.[gguf]'
    python tools/convert_checkpoint.py runs/x out/x.gguf            # written, but no other reader has been seen to take it

Tokenizer and chat template go along. Nothing is written where anything is missing, unknown or of another shape.
"""

import os

from lm_jax import command  # first: Ctrl-C is answered while the others are imported

# isort: split
import jax
import numpy as np
from etils import epath

from lm_jax import checkpoint, distributed
from lm_jax.config import Mesh, UserError
from lm_jax.convert import gguf, hugging_face, run
from lm_jax.data.objectives import example
from lm_jax.sharding import make_mesh
from lm_jax.terminal import Terminal

LIMIT = 1e-4  # of a logit, between what was written and what it was written from
THEIR_NAMES = {
    "transformer": {"input_ids": "tokens"},
    "encoder": {"input_ids": "tokens", "token_type_ids": "token_type_ids"},
    "encoder_decoder": {"input_ids": "encoder_tokens", "decoder_input_ids": "tokens"},
}


def proof(described: hugging_face.Description, graph, parameters: dict, say: Terminal):
    """Compares what a written folder says in `transformers` with what we say, on rows of random pieces."""

    def prove(folder: str) -> None:
        try:
            import torch
            import transformers
        except ImportError:
            return say("unproven: transformers and torch are not installed (pip install -e '.[peers]')")
        batch = random_row(described, graph.sequence_length)
        model = graph.module(parameters)
        reading = model.read(batch)
        ours = [np.asarray(model.logits(reading.hidden_BTD))[..., : described.num_pieces]]
        ours += [] if reading.labels_BTC is None else [np.asarray(reading.labels_BTC[:, 0])]
        kind = getattr(transformers, described.content["architectures"][0])
        theirs, told = kind.from_pretrained(folder, output_loading_info=True, dtype="float32")
        names = THEIR_NAMES[described.config.model.kind]
        with torch.no_grad():
            found = theirs.eval()(
                **{its: torch.tensor(batch[own]).long() for its, own in names.items()}, return_dict=True
            )
        heads = [found[name] for name in ("logits", "prediction_logits", "seq_relationship_logits") if name in found]
        apart = max(float(np.abs(b.numpy() - a).max()) for a, b in zip(ours, heads, strict=True))
        if any(told.values()) or not apart <= LIMIT:
            raise UserError(
                f"not written: in transformers the logits are {apart:.1e} apart (limit {LIMIT:.0e}), {told}"
            )
        say(f"proven: in transformers {transformers.__version__} every logit is within {apart:.1e}")

    return prove


def random_row(described: hugging_face.Description, length: int) -> dict[str, np.ndarray]:
    """A batch of one row that is one segment of random pieces."""
    random, row = np.random.RandomState(0), example(described.config.data.objective, min(64, length))
    pieces = lambda x: random.randint(0, described.num_pieces, x.shape).astype(np.int32)
    value = lambda name, x: (
        pieces(x) if name.endswith("tokens") else np.arange(len(x)) if "positions" in name else np.ones_like(x)
    )
    types = {"token_type_ids": np.arange(len(row["tokens"])) // 32} if "token_type_ids" in row else {}
    whole = {name: value(name, x) for name, x in row.items() if x.ndim} | types
    return {name: x[None].astype(row[name].dtype) for name, x in whole.items()}


def write_gguf(path: str, found: checkpoint.Located, parameters: dict, carried: dict[str, bytes]) -> None:
    """A run or a folder of the Llama family as a GGUF file; one that is there is not replaced. Raises UserError."""
    if os.path.exists(path):
        raise UserError(f"{path} is there; name another file")
    end = found.tokenizer.document_id
    described = hugging_face.description_of(found.config, found.num_pieces, end)
    theirs = found.described.content if found.described else described.content
    first = lambda value: value[0] if isinstance(value, list) else value  # of the ends that a model may have
    config = described.content | {name: first(theirs.get(name)) for name in ("bos_token_id", "eos_token_id")}
    contents = gguf.Contents(config, hugging_face.their_tensors(described, parameters), carried)
    kind, model = found.tokenizer.file_name, found.tokenizer.model
    if kind == "tokenizer.bytes":
        raise UserError(f"{path}: a GGUF file has no tokenizer of plain bytes; train with one of SentencePiece")
    contents.files.setdefault(kind, model)
    gguf.write(path, contents, model if kind == "tokenizer.model" else b"")


def main(arguments: list[str]) -> int:
    parser = command.Parser("tools/convert_checkpoint.py", __doc__)
    parser.add_argument(
        "model", help="a run (runs/x), a step of it (runs/x@12000), a Hugging Face folder, a .gguf file"
    )
    parser.add_argument("output", help="the folder to make, or a .gguf file")
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
            if flags.output.endswith(".gguf"):
                write_gguf(flags.output, found, parameters, carried)
                say(f"wrote {flags.output}; unproven: no other reader was asked")
                return 0
            if found.described:
                run.write(epath.Path(flags.output), found, parameters, carried)
                say(f"wrote {flags.output}")
                return 0
            described = hugging_face.description_of(found.config, found.num_pieces, found.tokenizer.document_id)
        proven = proof(described, graph, parameters, say)
        prove = (lambda folder: say("unproven, as asked for")) if flags.unproven else proven
        hugging_face.write(flags.output, described, parameters, carried, prove)
    say(f"wrote {flags.output}, a {described.content['architectures'][0]}")
    return 0


if __name__ == "__main__":
    command.door(main)
