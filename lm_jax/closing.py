"""How a run ends: whether it is over, what a finished run logs, and what a run logs that cannot go on."""

import gzip
import itertools
import lzma
import shlex
import time

from lm_jax import cli, metrics_file, step_folders, terminal
from lm_jax.config import Config
from lm_jax.data import mixture
from lm_jax.errors import UserError
from lm_jax.open_run import Run
from lm_jax.plan import counts
from lm_jax.remote import LocalMirror
from lm_jax.run_plan import Plan

GENERATED = 64  # tokens, as `lm_jax.generate` writes them unasked


def is_over(mirror: LocalMirror, mixed: mixture.Mixture, plan: Plan, step: int) -> bool:
    """Whether all steps are done, and the last evaluation as well, which comes after the last step is saved."""
    if step < plan.num_steps:
        return False
    evaluated = any("final/loss" in line and line["step"] == step for line in metrics_file.read(mirror.folder))
    return evaluated or step > plan.num_steps or not has_split(mixed, plan.config, "validation")


def has_split(mixed: mixture.Mixture, config: Config, split: str) -> bool:
    """Whether a held-out split has a document."""
    try:
        return bool(mixed.held(config.data, split))
    except UserError:
        return False


def already_done(mirror: LocalMirror, log: terminal.Terminal) -> int:
    """Says the result of a run that is over. Returns the exit code."""
    last = [line for line in metrics_file.read(mirror.folder, log) if "final/loss" in line][-1:]
    shown = lambda value: "not finite" if value is None else f"{value:.4f}"
    values = [f"{name} {shown(value)}" for line in last for name, value in line.items() if name != "step"]
    result = ", ".join(values) or "no result"
    log(f"this run is finished: {result}\ntrain on with a larger --config.train.num_steps")
    return 0


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
    longer = [f"--config.train.num_steps={4 * run.num_steps}", "--workdir", str(run.workdir)]  # the same run goes on
    logs = str(step_folders.steps_folder(run.workdir).parent.parent)
    lines = [
        f"done in {counts.duration(time.monotonic() - run.goodput.start)}; next:",
        *[f"  longer     {given} {shlex.join(longer)}"] * bool(given),
        *[f"  generate   {cli.as_typed('-m', 'lm_jax.generate', *model, *asked)}"] * writes,
        *[f"  evaluate   {cli.as_typed('-m', 'lm_jax.evaluate', *model, '--split', split)}" for split in splits[:1]],
        f"  look       {cli.as_typed('-m', 'tensorboard.main', '--logdir', logs)}",
    ]
    return "\n".join(lines)
