"""How a run ends: whether it is over, what a finished run logs and exports, and what a run logs that cannot go on."""

import gzip
import itertools
import lzma
import shlex
import time
from types import ModuleType

from lm_jax import (
    best,
    cli,
    fault_points,
    load_model,
    metrics,
    metrics_file,
    step_folders,
    terminal,
    update_histograms,
)
from lm_jax.batch_ramp import DataState
from lm_jax.config import Config
from lm_jax.data import mixture
from lm_jax.distributed import agree, is_main_process
from lm_jax.errors import UserError
from lm_jax.open_run import Run
from lm_jax.plan import counts
from lm_jax.remote import LocalMirror
from lm_jax.run_plan import Plan
from lm_jax.samples import Evaluation, answer_now, ask_benchmarks, evaluate_now, is_evaluated, show_sample

GENERATED = 64  # tokens, as `lm_jax.generate` writes them unasked
LARGER = {
    "steps": "train.num_steps",
    "time": "train.num_steps",
    "patience": "evaluate.patience",
}  # {why a run is over: with more of which it goes on}


def why_over(mirror: LocalMirror, plan: Plan, data: DataState) -> str:
    """Why no step is to follow: "steps" are done, the "time" or "patience" is over; "" where one is. Reads the metrics."""
    if data.step >= plan.num_steps:
        return "steps"
    if plan.seconds and data.seconds >= plan.seconds:
        return "time"
    return "patience" if best.is_out_of_patience(mirror.folder, plan.config, data.step) else ""


def why_finished(mirror: LocalMirror, mixed: mixture.Mixture, plan: Plan, data: DataState) -> str:
    """`why_over` where the last evaluation is done as well, which comes after the last step is saved, and then the export."""
    done = is_final(mirror, data.step) or data.step > plan.num_steps or not has_split(mixed, plan.config, "validation")
    of_run = exporting(plan.config)
    exported = not of_run or of_run.is_there(model_of(mirror, mixed, plan, data))
    return why_over(mirror, plan, data) if done and exported else ""


def is_final(mirror: LocalMirror, step: int) -> bool:
    """Whether the metrics have the last evaluation, at this step."""
    return any("final/loss" in line and line["step"] == step for line in metrics_file.read(mirror.folder))


def model_of(mirror: LocalMirror, mixed: mixture.Mixture, plan: Plan, data: DataState) -> load_model.ModelRef:
    """A step of the run as a MODEL, whether it is saved or not yet."""
    tokenizer, parts = mixed.tokenizer, plan.program.parts
    return load_model.ModelRef(mirror.workdir, data.step, plan.config, tokenizer, parts=parts)


def exporting(config: Config) -> ModuleType | None:
    """`convert.of_run` where the run is to be exported, None elsewhere: the one place where training looks it up."""
    if not config.train.export_to:
        return None
    from lm_jax.convert import of_run

    return of_run


def has_split(mixed: mixture.Mixture, config: Config, split: str) -> bool:
    """Whether a held-out split has a document."""
    try:
        return bool(mixed.held(config.data, split))
    except UserError:
        return False


def already_done(mirror: LocalMirror, log: terminal.Terminal, why: str) -> None:
    """Says the result of a run that is finished, for the reason `why`."""
    last = [line for line in metrics_file.read(mirror.folder, log) if "final/loss" in line][-1:]
    shown = lambda value: "not finite" if value is None else f"{value:.4f}"
    values = [f"{name} {shown(value)}" for line in last for name, value in line.items() if name != "step"]
    result = ", ".join(values) or "no result"
    log(f"this run is finished: {result}\ntrain on with a larger --config.{LARGER[why]}")


def give_up(run: Run, trouble: str) -> None:
    """Says it, and leaves the checkpoints as they are: those before are finite, but near what breaks them."""
    newest = max(step_folders.complete_steps(step_folders.steps_folder(run.workdir)), default=0)
    run.log(
        f"stopped: {trouble}\n"
        f"the same command goes on from step {newest:,} and comes here again, unless something changes: a lower\n"
        "config.optimizer.learning_rate, a smaller config.optimizer.clip_norm, or the text of the rows named above"
    )


def compare_with_compressors(mixed: mixture.Mixture, bits_per_byte: float) -> str:
    """Bits per byte of the model beside gzip's and xz's on the same validation text, up to 16 MB of it."""
    splits = [corpus.splits["validation"] for corpus in mixed.corpora.values()]
    line = f"validation text: yours {bits_per_byte:.2f} bits/byte"
    if sum(split.num_bytes for split in splits) > 16e6 or mixed.tokenizer.losses:  # else they would read another text
        return line
    documents = (split.tokens[a:b] for split in splits for a, b in itertools.pairwise(split.offsets.tolist()))
    text = "".join(map(mixed.tokenizer.decode, documents)).encode()
    of = lambda compressed: 8 * len(compressed) / max(1, len(text))
    return f"{line} · gzip -9 {of(gzip.compress(text, 9)):.2f} · xz -9 {of(lzma.compress(text, preset=9)):.2f}"


def next_commands(run: Run, given: str) -> str:
    """What can be done with a finished run, as commands to paste; `given` is the one that trained it."""
    mixed, own = run.mixed, run.plan.program.parts
    model = ["--model", str(run.workdir), *(["--parts", own.path] if own.path else [])]
    splits = [split for split in ("test", "validation") if has_split(mixed, run.config, split)]
    chats = bool(mixed.task and mixed.task.chat_template)
    asked = ["--chat"] if chats else ["--prompt", run.config.evaluate.prompt]
    room = run.config.data.sequence_length - len(mixed.tokenizer.encode("" if chats else asked[1])) - 1
    asked += [f"--max_new_tokens={max(1, room // 2)}"] * (room < 2 * GENERATED)
    writes = run.config.data.objective == "causal" and (not run.config.train.task or chats)
    four_times = f"{run.plan.seconds / 15:g} min" if run.plan.seconds else 4 * run.num_steps
    longer = [f"--config.train.num_steps={four_times}", "--workdir", str(run.workdir)]  # the same run goes on
    logs = str(step_folders.steps_folder(run.workdir).parent.parent)
    lines = [
        f"done in {counts.duration(time.monotonic() - run.goodput.start)}; next:",
        *[f"  longer     {given} {shlex.join(longer)}"] * bool(given),
        *[f"  generate   {cli.as_typed('-m', 'lm_jax.generate', *model, *asked)}"] * writes,
        *[f"  evaluate   {cli.as_typed('-m', 'lm_jax.evaluate', *model, '--split', split)}" for split in splits[:1]],
        f"  look       {cli.as_typed('-m', 'tensorboard.main', '--logdir', logs)}",
    ]
    return "\n".join(lines)


def finish(run: Run, evaluation: Evaluation | None, writer: metrics.Writer | metrics.NullWriter) -> None:
    """The last evaluation where it is not written yet, then the export. Raises UserError where that fails."""
    fault_points.reach("end")
    update_histograms.look(run, writer)
    if not agree(is_final(run.mirror, run.data.step) if is_main_process() else False, "is final"):
        evaluate_last(run, evaluation, writer)
    if of_run := exporting(run.config):
        with run.goodput("export"):
            writer.flush()
            run.mirror.send()
            found = model_of(run.mirror, run.mixed, run.plan, run.data)
            if problem := agree(of_run.export(found, run.log) if is_main_process() else "", "export"):
                raise UserError(problem)


def evaluate_last(run: Run, evaluation: Evaluation | None, writer: metrics.Writer | metrics.NullWriter) -> None:
    """The last sample, the curve, the last evaluation (`eval` as those before, `final` on all rows), the compressors.

    The line with `final/loss` is the last one that a run writes: without it the run is not over.
    """
    show_sample(run, writer)
    if run.ended == "patience":
        run.log(f"stopped at step {run.data.step:,} of {run.plan.length}: {best.measure(run.config)} gets no better")
    lines = metrics_file.read(run.mirror.folder)
    run.log(terminal.curve(metrics_file.series(lines, "train/loss"), "training loss, nats per token"))
    if evaluation is None:
        return
    num_rows = run.config.evaluate.num_rows
    limited = 0 < num_rows < max(held.num_rows for held in evaluation[1].values())
    evaluated = is_evaluated(run)
    if limited and not evaluated:
        writer.scalars(run.data.step, evaluate_now(run, evaluation, num_rows, "eval"))
    values = evaluate_now(run, evaluation, 0, *["eval"] * (not limited and not evaluated), "final")
    if run.config.evaluate.metrics:
        values |= answer_now(run)
    values |= (asked := ask_benchmarks(run))
    writer.scalars(run.data.step, values)
    if "final/bits_per_byte" in values and not run.config.train.task:
        run.log(compare_with_compressors(run.mixed, values["final/bits_per_byte"]))
    if asked:
        run.log(f"tasks at step {run.data.step:,}:\n{run.benchmarks.table(asked)}")
    if run.config.checkpoint.keep_best and is_main_process():
        run.log(best_line(run))


def best_line(run: Run) -> str:
    """Which saved step is the best one, and how a command takes it."""
    lines, name = metrics_file.read(run.mirror.folder), best.measure(run.config)
    saved = step_folders.complete_steps(step_folders.steps_folder(run.workdir))
    step = best.best_step(lines, name, saved)
    value = next((line[name] for line in lines if line["step"] == step and line.get(name) is not None), None)
    return (
        f"best: {name} {value:.4f} at step {step:,}: --model {run.workdir}@best"
        if value is not None
        else f"no {name} is finite"
    )
