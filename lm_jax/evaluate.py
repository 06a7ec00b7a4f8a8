"""Evaluates a MODEL on a held-out split, every token once; `python -m lm_jax.evaluate --model MODEL`."""

import argparse
import json
from typing import Any

import jax

from lm_jax import cli, decide, distributed, load_model, run_folder, step_folders
from lm_jax.config import Mesh
from lm_jax.data import mixture
from lm_jax.data.tokenizer import tell_losses
from lm_jax.errors import UserError
from lm_jax.evaluator import Evaluator, added, by_source
from lm_jax.mesh import batch_shards, make_mesh
from lm_jax.multihost import peers
from lm_jax.open_data import check_scores, open_data
from lm_jax.summary import Summary
from lm_jax.terminal import Terminal


def check_tokenizer(found: load_model.ModelRef, mixed: mixture.Mixture) -> None:
    """Raises UserError where the corpus was tokenised by another tokenizer than the model's."""
    if found.tokenizer.fingerprint != mixed.tokenizer.fingerprint:
        raise UserError(
            f"the corpus {', '.join(mixed.sources)} was tokenised by another tokenizer than {found.workdir}'s"
        )


def parse(arguments: list[str]) -> argparse.Namespace:
    """The flags. Raises UserError."""
    parser = cli.Parser("lm_jax.evaluate", __doc__)
    load_model.add_flags(parser)
    parser.add_argument("--sources", default="", help="a folder of text, a corpus or records; default: the run's own")
    parser.add_argument("--columns", default="", help="of records, in the task's order: text,label")
    parser.add_argument("--split", default="validation", choices=("validation", "test", "train"))
    parser.add_argument("--rows", type=int, default=0, help="of each source, the first of the split; 0 = all")
    parser.add_argument("--beams", type=int, default=1, help="texts that beam search follows at once; 1 = greedy")
    parser.add_argument("--records", type=int, default=0, help="of written texts, the first of the split; 0 = all")
    parser.add_argument(
        "--batch_size", type=int, default=8, help="rows at a time on a device; the result does not depend on it"
    )
    parser.add_argument(
        "--json", action="store_true", help="the last line also says how it ended, as that of lm_jax.main"
    )
    flags = parser.parse_args(arguments)
    if flags.batch_size < 1:
        parser.error(f"--batch_size {flags.batch_size}: at least 1")
    if not 1 <= flags.beams <= 64 or min(flags.records, flags.rows) < 0:
        parser.error("--beams is from 1 to 64, --records and --rows at least 0")
    return flags


def of_other_text(found: load_model.ModelRef, flags: argparse.Namespace, log: Terminal) -> load_model.ModelRef:
    """The MODEL with what it is measured on as `--sources` says. Raises UserError where nothing says it."""
    config = found.config
    if flags.columns and not config.train.task:
        raise UserError(f"--columns are of the records of a task, and {flags.model} has none")
    if found.described and not flags.sources:
        if config.train.task:
            raise UserError(
                f"{flags.model} names no records: say --sources FOLDER, or evaluate the run that it came from"
            )
        log(f"{flags.model} names no text of its own: measured on the interpreter's library; --sources FOLDER is yours")
    given = {"data.sources": ((flags.sources, 1.0),)} if flags.sources else {}
    given |= {"data.columns": tuple(flags.columns.split(","))} if flags.columns else {}
    return found._replace(config=decide.replaced(config, given))


def main(arguments: list[str]) -> int:
    """Runs the command with its arguments. Returns the exit code; raises UserError."""
    log = Terminal()
    if "--json" not in arguments:
        log(json.dumps(evaluated(arguments, log)))
        return 0
    with Summary().at_the_end() as summary:
        summary.results = evaluated(arguments, log)
        summary.say(0, "done")
    return 0


def evaluated(arguments: list[str], log: Terminal) -> dict[str, Any]:
    """The command -> what it prints: about the model and its split, and the numbers. Raises UserError."""
    flags = parse(arguments)
    devices = distributed.devices()  # of several processes each verifies its share of the model
    found = of_other_text(load_model.of_flags(flags, log), flags, log)
    tell_losses(found.tokenizer, log)
    mesh = make_mesh(Mesh(slices=-1), devices)
    check_scores(found.config)
    if not found.config.evaluate.metrics and (flags.beams > 1 or flags.records):
        raise UserError(
            "--beams and --records are of the texts that a model writes, and config.evaluate.metrics says none here"
        )
    mixed = open_data(found.config, log)
    check_tokenizer(found, mixed)
    peers.compare(vars(flags) | {"step": found.step} | run_folder.outside() | peers.own_code() | mixed.alike)
    if mixed.task and mixed.task.compares:
        from lm_jax.tasks import dpo_reference

        dpo_reference.resume(mixed, found.config, found.workdir)
    rows = mixed.held(found.config.data, flags.split)
    with jax.set_mesh(mesh):
        graph, parameters = load_model.load_parameters(found)
        size = flags.batch_size * batch_shards(dict(mesh.shape))
        evaluator = Evaluator(graph, mesh, mixed.tokenizer, size)
        watch = lambda done, of: log.progress(f"row {done} of {of}")
        totals = {name: evaluator(parameters, held, flags.rows, watch) for name, held in rows.items()}
        kind, kept = mixed.task.kept(added(list(totals.values())).results) if mixed.task else ("", ())
        if found.config.evaluate.metrics:
            from lm_jax.tasks import generate_answers

            watch = lambda done, of: log.progress(f"writing: record {done} of {of}")
            kept = generate_answers.written(graph, parameters, mixed, flags.split, flags.records, flags.beams, watch)
    result = {"model": flags.model, "step": found.step, "split": flags.split}
    if flags.rows:
        result["rows"] = sum(min(flags.rows, held.num_rows) for held in rows.values())
    else:
        result["documents"] = sum(len(totals[name].results) or held.split.num_documents for name, held in rows.items())
    if not found.config.train.task:
        result["tokens"] = sum(int(part.tokens) for part in totals.values())
        result["bytes"] = sum(int(part.num_bytes) for part in totals.values())
    row = 0 if found.described else step_folders.read_data_state(found.workdir, found.step).cursor
    result |= by_source(totals, "eval", mixed.task, mixed.shares(found.config.data, row))
    kind = found.config.evaluate.metrics or kind
    if kind and kept:
        from lm_jax.tasks import results

        about = {"model": flags.model, "step": found.step}
        scored = results.write(found.workdir, flags.split, kind, kept, about)
        log(f"every record with its score: {found.workdir / 'results' / flags.split}.jsonl, in short .md")
        result |= {"records": len(kept)} | {f"eval/{name}": value for name, value in scored.items()}
    return result


if __name__ == "__main__":
    cli.run_command(main)
