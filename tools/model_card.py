"""The card of a run, in the form that model hubs read: `python tools/model_card.py --model runs/quickstart [--output README.md]`.

Without --output it is printed. What only a person knows stands in it as a line to FILL IN.
"""

from lm_jax import checkpoint, cli, load_model, manifest, step_folders
from lm_jax.errors import UserError
from lm_jax.files import write_whole
from lm_jax.terminal import Terminal
from lm_jax.trust.card import card


def main(arguments: list[str]) -> int:
    parser = cli.Parser("tools/model_card.py", __doc__)
    load_model.add_flags(parser, "a run (runs/x) or a step of it (runs/x@12000, runs/x@best)")
    parser.add_argument("--output", default="", help="a file; without it the card is printed")
    flags, log = parser.parse_args(arguments), Terminal()
    found = load_model.of_flags(flags, log)
    if found.described:
        parser.error(f"--model {flags.model} is a Hugging Face folder: the run knows what it was trained on")
    step = step_folders.steps_folder(found.workdir) / str(found.step)
    if problem := manifest.invalid_reason(step, items=("data",)):  # the card says what was read of the text, too
        raise UserError(f"--model {flags.model}: step {found.step}: {problem}")
    text = card(found)
    if flags.output:
        write_whole(checkpoint.epath.Path(flags.output), text.encode())
    log(f"wrote {flags.output}: {text.count('FILL IN')} lines to fill in" if flags.output else text)
    return 0


if __name__ == "__main__":
    cli.run_command(main)
