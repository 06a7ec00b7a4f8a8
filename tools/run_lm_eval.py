"""EleutherAI's lm-eval on a MODEL: `python tools/run_lm_eval.py --model MODEL --tasks choices --include_path
tools/lm_eval_tasks`, a folder with tasks over your own JSONL."""

import json
import sys

from lm_jax import cli, distributed, load_model
from lm_jax.data.tokenizer import tell_losses
from lm_jax.terminal import Terminal


def main(arguments: list[str]) -> int:
    parser = cli.Parser("tools/run_lm_eval.py", __doc__)
    load_model.add_flags(parser)
    parser.add_argument("--tasks", required=True, help="names with commas between them")
    parser.add_argument("--include_path", default="", help="a folder with task files (YAML) of your own")
    parser.add_argument(
        "--num_fewshot", type=int, default=-1, help="examples before each question; -1: as the task says"
    )
    parser.add_argument("--limit", type=int, default=0, help="of the questions of each task, the first; 0: all")
    parser.add_argument("--batch_size", type=int, default=8, help="requests at a time on a device")
    parser.add_argument(
        "--max_length", type=int, default=0, help="tokens that are read at once; 0: what the model sees"
    )
    parser.add_argument("--apply_chat_template", action="store_true", help="questions are what a user says")
    parser.add_argument("--output", default="", help="a JSON file for everything that lm-eval says")
    flags = parser.parse_args(arguments)
    if flags.batch_size < 1:
        parser.error(f"--batch_size {flags.batch_size}: at least 1")
    from lm_jax.generate import lm_eval  # takes seconds, and says so where lm-eval is missing

    log = Terminal()
    found = load_model.of_flags(flags, log)
    tell_losses(found.tokenizer, log)
    model = lm_eval.HarnessModel.load(found, flags.batch_size, flags.max_length, distributed.devices(), log.progress)
    if flags.apply_chat_template:
        model.in_chat()
    results = lm_eval.run(
        model,
        flags.tasks.split(","),
        flags.include_path,
        num_fewshot=None if flags.num_fewshot < 0 else flags.num_fewshot,
        limit=flags.limit or None,
        apply_chat_template=flags.apply_chat_template,
    )
    if flags.output:
        with open(flags.output, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1, default=str)
    print(lm_eval.table(results))
    return 0


if __name__ == "__main__":
    cli.run_command(main, sys.argv[1:])
