"""What is seen of a model that is trained: its loss on held-out rows, a sample, answers to held-out records."""

import jax

from lm_jax import fault_points, metrics
from lm_jax.data import mixture
from lm_jax.distributed import agree, is_main_process
from lm_jax.errors import UserError
from lm_jax.evaluate import Evaluator, by_source
from lm_jax.run import Run

SAMPLE_TOKENS = 96
Evaluation = tuple[Evaluator, mixture.HeldOut]  # what evaluates a run, and the validation rows of each source


def make_evaluator(this: Run) -> Evaluator:
    return Evaluator(this.plan.program.graph, this.plan.mesh, this.mixed.tokenizer, this.plan.microbatch)


def make_evaluation(this: Run) -> Evaluation | None:
    """None where there is no validation text."""
    try:
        return make_evaluator(this), this.mixed.held(this.config.data, "validation")
    except UserError as error:
        this.say(f"no evaluation: {error}")
        return None


def evaluate_now(this: Run, evaluation: Evaluation, num_rows: int, *prefixes: str) -> dict[str, float]:
    """Metrics of the first `num_rows` validation rows (0: all) of each source, under each prefix. Raises Stopped."""
    evaluator, rows = evaluation

    def watch(done: int, of: int) -> None:
        this.progress(f"evaluating: row {done} of {of}")
        fault_points.reach("evaluation")

    with this.goodput("evaluation"):
        totals = {name: evaluator(this.parameters, held, num_rows, watch) for name, held in rows.items()}
    values = {name: value for prefix in prefixes for name, value in by_source(totals, prefix, this.mixed.task).items()}
    shown = {name.split("/", 1)[1]: value for name, value in values.items() if name.startswith(f"{prefixes[0]}/")}
    loss = shown.pop("loss")
    of_text = f", {shown['bits_per_byte']:.3f} bits/byte" if "bits_per_byte" in shown else ""
    if this.config.train.task:
        of_text = "".join(f", {name} {value:.4f}" for name, value in list(shown.items())[:2])
    this.say(f"step {this.data.step:>6,} validation loss {loss:.4f}{of_text}")
    return values


def is_evaluated(this: Run) -> bool:
    """Whether the metrics have an evaluation of the step at hand: a run may have been stopped before or after it."""
    lines = metrics.read(this.desk.folder) if is_main_process() else []
    return bool(agree(any("eval/loss" in line and line["step"] == this.data.step for line in lines), "is evaluated"))


def show_sample(this: Run, writer: metrics.Writer | metrics.NullWriter) -> None:
    """A text that the model writes after `evaluate.prompt`, where it can write one. Raises Stopped.

    The one place where training looks up `generate` for a text.
    """
    prompt, tokenizer = this.config.evaluate.prompt, this.mixed.tokenizer
    if not prompt or jax.process_count() > 1 or this.config.data.objective != "causal" or this.config.train.task:
        return
    from lm_jax.generate.decoding import SLICE, stream
    from lm_jax.generate.sampling import Sampling

    limit = min(SAMPLE_TOKENS, this.config.data.sequence_length - len(tokenizer.encode(prompt)) - 1)
    if limit < 1:
        this.say(f"no sample: config.evaluate.prompt leaves no room in {this.config.data.sequence_length} tokens")
        return
    model = this.plan.program.graph, this.parameters, tokenizer
    with this.goodput("samples"):
        for written in stream(*model, [prompt], limit, Sampling(), tokens_at_once=SLICE):
            this.progress("writing a sample")
            lines = (prompt + written[0].text).split("\n")
    this.say(f"sample at step {this.data.step:,}:\n" + "\n".join(f"  | {line}" for line in lines))
    writer.text(this.data.step, "sample", "\n".join(f"    {line}" for line in lines))


def answer_now(this: Run) -> dict[str, float]:
    """Scores of the texts that the model writes for the first validation records, one of them shown."""
    if jax.process_count() > 1:
        this.say("no texts are written by several processes: python -m lm_jax.evaluate, on one, scores them")
        return {}
    from lm_jax.tasks import generate_answers, results

    kind, num = this.config.evaluate.metrics, this.config.evaluate.num_rows
    watch = lambda done, of: this.progress(f"writing: record {done} of {of}")
    model = this.plan.program.graph, this.parameters
    with this.goodput("evaluation"):
        found = generate_answers.written(*model, this.mixed, "validation", num, watch=watch)
    values = results.scores_of(kind, found)
    shown = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
    this.say(f"step {this.data.step:>6,} {len(found):,} validation texts: {shown}")
    this.say(f"the first: {found[0].prediction!r}\n      for: {found[0].truth!r}")
    return {f"final/{name}": value for name, value in values.items()}


def settle_reference(this: Run) -> None:
    """Where the loss compares with the first parameters: what they say of every pair, once before the first step."""
    if not (this.mixed.task and this.mixed.task.compares):
        return
    from lm_jax.tasks import dpo_reference

    evaluator, resumes = make_evaluator(this), this.data.step > 0
    with this.goodput("reference"):
        line = dpo_reference.attach_reference(
            this.mixed, this.config, this.workdir, this.state.parameters, evaluator, resumes
        )
    this.say(line)
