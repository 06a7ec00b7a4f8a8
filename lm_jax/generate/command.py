"""`python -m lm_jax.generate --model MODEL`: a prompt, a file of prompts, or a conversation."""

import json
import os
import sys
from collections.abc import Callable, Sequence

import jax
import numpy as np

from lm_jax import cli, distributed, load_model, regular_files
from lm_jax.config import Mesh
from lm_jax.data.tokenizer import tell_losses
from lm_jax.errors import UserError
from lm_jax.generate import beam_search, chat_template, chat_tokens
from lm_jax.generate.decoding import SLICE, Completion, stream, writes
from lm_jax.generate.request_batches import request_batches
from lm_jax.generate.sampling import Sampling
from lm_jax.mesh import make_mesh
from lm_jax.model.build import ModelDef
from lm_jax.terminal import Terminal

TOGETHER = 16  # prompts of a file that are one batch
BOUNDS = {
    **{"max_new_tokens": (1, 1e6), "temperature": (0, 100), "top_k": (0, 1e6), "top_p": (0, 1), "min_p": (0, 1)},
    **{"repetition_penalty": (0.01, 100), "seed": (0, 2**32 - 1), "beams": (1, 64), "length_penalty": (-10, 10)},
}
Write = Callable[..., list[Completion]]  # what `writer` gives


def parse(arguments: list[str]):
    """The flags, each within its bounds. Raises UserError."""
    parser = cli.Parser("lm_jax.generate", __doc__)
    load_model.add_flags(parser)
    parser.add_argument("--prompt", action="append", help="may stand several times; without it: interactive")
    parser.add_argument(
        "--chat", action="store_true", help="prompts are what a user says, in the model's chat template"
    )
    parser.add_argument("--system", default="", help="with --chat: what stands before a conversation")
    parser.add_argument(
        "--chat_variables", default="", help='with --chat: of the template, such as {"enable_thinking": false}'
    )
    parser.add_argument("--prompts", default="", help="a file with a prompt a line; JSON lines come out")
    parser.add_argument("--json", action="store_true", help="a JSON line for each --prompt, as --prompts has them")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 = greedy")
    parser.add_argument("--top_k", type=int, default=50, help="0 = off")
    parser.add_argument("--top_p", type=float, default=0.95, help="1 = off")
    parser.add_argument("--min_p", type=float, default=0.0, help="least share of the best token's probability; 0 = off")
    parser.add_argument("--repetition_penalty", type=float, default=1.0, help="1 = off")
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt; each has the next number")
    parser.add_argument("--stop", action="append", default=[], help="a text ends before it; may stand several times")
    parser.add_argument("--beams", type=int, default=1, help="texts that beam search follows at once; 1 = off")
    parser.add_argument("--length_penalty", type=float, default=1.0, help="of beam search: above 0 longer texts win")
    drawn = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "stop")
    parser.reads({"beams": (1,)}, *drawn)  # what beam search neither draws nor stops at
    parser.reads({"beams": ()}, "length_penalty")
    parser.reads({"chat": ()}, "system", "chat_variables")
    parser.reads({"prompt": ()}, "json")
    flags = parser.parse_args(arguments)
    for name, (low, high) in BOUNDS.items():
        if not low <= getattr(flags, name) <= high:
            parser.error(f"--{name} {getattr(flags, name)}: from {low} to {high:.10g}")
    if flags.prompt and flags.prompts:
        parser.error("--prompt and --prompts: one of them")
    return flags


def main(arguments: list[str]) -> int:
    """The command. Returns its exit code; raises UserError."""
    flags, log = parse(arguments), Terminal()
    from_file = read_prompts(flags.prompts) if flags.prompts else []
    found = load_model.of_flags(flags, log)
    if not writes(found.config.model):
        does = f"answers with its {found.config.model.head}" if found.config.model.head else "fills in what is hidden"
        raise UserError(
            f"--model {flags.model}, of kind {found.config.model.kind}, {does} and writes no text\n"
            f"measure it with python -m lm_jax.evaluate --model {flags.model}{in_python(found, flags.model)}"
        )
    tell_losses(found.tokenizer, log)
    if found.config.train.task == "text_to_text" and (taught := found.config.data.prompt) and not flags.chat:
        log(f"it was taught with config.data.prompt = {taught!r}: write prompts in these words")
    with jax.set_mesh(make_mesh(Mesh(slices=-1), distributed.devices())):
        write = writer(*load_model.load_parameters(found), found, flags)
        if from_file or flags.json:
            continue_file(write, from_file or flags.prompt)
        elif flags.prompt:
            completions = write(flags.prompt)
            print("\n\n".join(prompt + found.text for prompt, found in zip(flags.prompt, completions, strict=True)))
        else:
            converse(write, flags.chat)
    return 0


def in_python(found: load_model.ModelRef, model: str) -> str:
    """The end of a message: how a new text gets a classifier's labels."""
    if found.config.model.head != "labels":
        return ""
    return f"\nlabels of a new text, in Python: lm_jax.load({model!r}).predict(TEXT)"


def continue_file(write: Write, prompts: list[str]) -> None:
    """Prints a JSON line for each prompt, as soon as its batch is done."""
    for numbers, _ in request_batches(range(len(prompts)), TOGETHER):
        some = [prompts[k] for k in numbers]
        for prompt, completion in zip(some, write(some, numbers[0]), strict=True):
            print(json.dumps({"prompt": prompt, **completion._asdict()}, ensure_ascii=False), flush=True)


def converse(write: Write, chat: bool) -> None:
    """Continues prompts from the terminal as they are typed; in a chat the conversation stands before the next."""
    print("a prompt a line; an empty line ends", file=sys.stderr)
    said: list[chat_template.Message] = []  # the conversation so far
    for line in iter(lambda: cli.ask("> "), ""):
        try:
            print("" if chat else line, end="", flush=True)
            [answer] = write([line], show=lambda text: print(text, end="", flush=True), said=said)
            said += [chat_template.user(line), {"role": "assistant", "content": answer.text}]
            print()
        except UserError as error:
            print(error, file=sys.stderr)


def read_prompts(path: str) -> list[str]:
    r"""The lines of a file of prompts, which end at \n or \r\n and at nothing else. Raises UserError."""
    try:
        text = regular_files.read_bytes(path).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {path}: {error.strerror if isinstance(error, OSError) else 'not UTF-8'}") from None
    if not text:
        raise UserError(f"--prompts {path} is empty: a prompt a line is expected")
    if "\0" in text:
        raise UserError(f"--prompts {path} holds a NUL character (a binary file?): a prompt a line is expected")
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


def writer(graph: ModelDef, parameters: dict, located: load_model.ModelRef, flags) -> Write:
    """(prompts, number of the first) -> completions, as the flags say; `show` gets a text's new parts while it grows."""
    parameters, tokenizer, marks = graph.unstacked(parameters), located.tokenizer, located.special_ids
    template = chat_template.read_template(located.workdir, flags.chat_variables) if flags.chat else None
    marks = marks.also(*chat_tokens.ends_of_turn(template, tokenizer)) if template else marks
    before = [{"role": "system", "content": flags.system}] if flags.system else []

    def write(
        prompts: list[str],
        first: int = 0,
        show: Callable[[str], None] | None = None,
        said: Sequence[chat_template.Message] = (),
    ) -> list[Completion]:
        told = [*before, *said]
        turn = lambda text: (
            chat_tokens.encode(template, [*told, chat_template.user(text)], tokenizer) if template else text
        )
        given = [turn(prompt) for prompt in prompts]
        if flags.beams > 1:
            found = beam_search.search(
                graph, parameters, tokenizer, given, flags.max_new_tokens, flags.beams, flags.length_penalty, marks
            )
        else:
            named = {name: getattr(flags, name) for name in Sampling._fields}
            sampling = Sampling(**named | {"seed": np.uint32((flags.seed + first) % 2**32)})
            shown, settings = "", (flags.max_new_tokens, sampling, tuple(flags.stop), SLICE if show else 0, marks)
            for found in stream(graph, parameters, tokenizer, given, *settings):
                shown += grown(shown, found[0].text.rstrip("\ufffd"), show)  # half a character may be at the end
            grown(shown, found[0].text, show)
        if show and flags.beams > 1:
            show(found[0].text)
        return found

    return write


def grown(shown: str, text: str, show: Callable[[str], None] | None) -> str:
    """The part of a text that was not shown yet; `show` is called with it."""
    new = text[len(os.path.commonprefix([shown, text])) :]
    if show and new:
        show(new)
    return new
