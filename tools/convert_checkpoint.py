"""A run as a Hugging Face folder; a Hugging Face folder as a run; GGUF files of the Llama family from and to both.

    python tools/convert_checkpoint.py runs/x out/x                 # where transformers is installed, proven before it is written
    python tools/convert_checkpoint.py out/x runs/from_x            # then --config.train.init_from=runs/from_x
    python tools/convert_checkpoint.py runs/x out/part --over runs/base   # what was trained alone: a MODEL that needs runs/base
    python tools/convert_checkpoint.py model.gguf out/model         # pip install -e '.[gguf]'
    python tools/convert_checkpoint.py runs/x out/x.gguf            # read again here, but not proven elsewhere

Tokenizer, first token, ends and chat template go along. "Proven" means: in `transformers` the same logits, and from the same
prompts and conversations the same greedy texts up to the same end; of a model with a task's head the same answers, and the same
ids of texts. Nothing is written where anything is missing or unknown.
"""

import shlex

from lm_jax import cli, distributed, job, load_model
from lm_jax.config import Mesh
from lm_jax.convert import export, hugging_face, run
from lm_jax.convert.transformers_peer import prover
from lm_jax.mesh import make_mesh
from lm_jax.terminal import Terminal

# isort: split
import jax
from etils import epath


def main(arguments: list[str]) -> int:
    parser = cli.Parser("tools/convert_checkpoint.py", __doc__)
    parser.add_argument(
        "model", help="a run (runs/x), a step of it (runs/x@12000, runs/x@best), a Hugging Face folder, a .gguf file"
    )
    parser.add_argument("output", help="the folder to make, or a .gguf file")
    parser.add_argument("--unproven", action="store_true", help="write without comparing it in transformers")
    parser.add_argument("--over", default="", help="write only what was trained, over this MODEL, which has the rest")
    parser.add_argument(
        "--parts", default="", help="the file of the parts that the run was trained with; it is executed"
    )
    flags, log = parser.parse_args(arguments), Terminal()
    again = shlex.join(["python", "tools/convert_checkpoint.py", *arguments, "--unproven"])
    to_gguf = flags.output.endswith(".gguf")
    if not job.does_it_alone():
        return 0
    with jax.set_mesh(make_mesh(Mesh(data=1), [distributed.own(distributed.devices())])):
        if flags.model.endswith(".gguf") and not flags.over:
            leaving = export.of_gguf(flags.model)
        else:
            found = load_model.of_flags(flags, log)
            if flags.over:
                run.write_part(epath.Path(flags.output), found, load_model.locate(flags.over, log, found.parts))
                log(f"wrote {flags.output}, which needs {flags.over}")
                return 0
            if found.described and not to_gguf:
                carried = hugging_face.carried_files(str(found.workdir))
                run.write(epath.Path(flags.output), found, load_model.load_parameters(found)[1], carried)
                log(f"wrote {flags.output}")
                return 0
            leaving = export.of_model(found)
        if to_gguf:
            export.write_gguf(flags.output, leaving)
            log(f"wrote {flags.output}; unproven: no other reader was asked")
            return 0
        export.write_folder(flags.output, leaving, prover(flags.unproven, again, log), log)
    log(f"wrote {flags.output}, a {leaving.described.content['architectures'][0]}")
    return 0


if __name__ == "__main__":
    cli.run_command(main)
