"""How good the model is while it is trained: validation loss, lm-eval's tasks, a sample, answers to held-out records."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath
from flax import nnx
from jax.sharding import NamedSharding

from lm_jax import fault_points, load_model, metrics, metrics_file
from lm_jax.data import mixture
from lm_jax.distributed import agree, is_main_process
from lm_jax.errors import UserError
from lm_jax.evaluator import Evaluator, by_source
from lm_jax.mesh import with_whole_rows
from lm_jax.model.build import ModelDef
from lm_jax.multihost import peers
from lm_jax.open_run import Run
from lm_jax.run_plan import Plan
from lm_jax.sharding import stored

SAMPLE_TOKENS = 96
Evaluation = tuple[Evaluator, mixture.HeldOut]  # what evaluates a run, and the validation rows of each source


def make_evaluator(run: Run) -> Evaluator:
    """The evaluator of a run: batches of as many rows as a microbatch."""
    return Evaluator(run.plan.program.graph, run.plan.mesh, run.mixed.tokenizer, run.plan.microbatch)


def make_evaluation(run: Run) -> Evaluation | None:
    """None where there is no validation text."""
    try:
        return make_evaluator(run), run.mixed.held(run.config.data, "validation")
    except UserError as error:
        run.log(f"no evaluation: {error}")
        return None


def _progress(run: Run, text: str) -> None:
    """Says after a batch how far an evaluation is. Raises Stopped."""
    run.progress(text)
    fault_points.reach("evaluation")


def evaluate_now(run: Run, evaluation: Evaluation, num_rows: int, *prefixes: str) -> dict[str, float]:
    """Metrics of the first `num_rows` validation rows (0: all) of each source, under each prefix. Raises Stopped."""
    evaluator, rows = evaluation
    watch = lambda done, of: _progress(run, f"evaluating: row {done} of {of}")
    with run.goodput("evaluation"):
        totals = {name: evaluator(run.parameters, held, num_rows, watch) for name, held in rows.items()}
    shares = run.mixed.shares(run.config.data, run.data.cursor)
    by_prefix = [by_source(totals, prefix, run.mixed.task, shares) for prefix in prefixes]
    shown = [pair for pair in by_prefix[0].items() if pair[0].count("/") == 1 and not pair[0].endswith("/perplexity")][
        :3
    ]
    run.log(f"step {run.data.step:>6,} {', '.join(f'{name} {value:.4f}' for name, value in shown)}")
    return {name: value for values in by_prefix for name, value in values.items()}


def open_benchmarks(plan: Plan, mixed: mixture.Mixture, workdir: epath.Path) -> Any:
    """The tasks of lm-eval that a run asks (`generate.benchmarks.Benchmarks`), None where it asks none.

    The one place where training looks up `generate` for tasks. Raises UserError, also where processes ask something else.
    """
    if not plan.config.evaluate.tasks:
        return None
    from lm_jax.generate.benchmarks import Benchmarks

    program = plan.program
    found = load_model.ModelRef(workdir, 0, plan.config, mixed.tokenizer, parts=program.parts)
    benchmarks = Benchmarks(plan.config.evaluate.tasks, found, program.graph, mixed.special_ids)
    peers.compare({"the questions of config.evaluate.tasks": benchmarks.fingerprint})
    return benchmarks


def ask_benchmarks(run: Run) -> dict[str, float]:
    """Numbers of the tasks that the run asks, {} where it asks none. Raises Stopped."""
    if not run.benchmarks:
        return {}
    with run.goodput("tasks"), _whole_rows(run) as model:
        found = run.benchmarks(*model, run.plan.microbatch, lambda text: _progress(run, f"tasks: {text}"))
    if shown := [f"{name} {value:.4f}" for name, value in found.items() if name.endswith("/centred_accuracy")]:
        run.log(f"step {run.data.step:>6,} {', '.join(shown[-3:])}")
    return found


def is_evaluated(run: Run) -> bool:
    """Whether the metrics have an evaluation of the step at hand: a run may have been stopped before or after it."""
    lines = metrics_file.read(run.mirror.folder) if is_main_process() else []
    return bool(agree(any("eval/loss" in line and line["step"] == run.data.step for line in lines), "is evaluated"))


@contextlib.contextmanager
def _whole_rows(run: Run) -> Iterator[tuple[ModelDef, dict]]:
    """The model and its parameters, which stay where they are, on a mesh that splits no rows: caches and prompts are not."""
    graph, mesh = run.plan.program.graph, with_whole_rows(run.plan.mesh)
    if mesh == run.plan.mesh:
        yield graph, run.parameters
        return
    layouts = {path: NamedSharding(mesh, stored(declared.axes, mesh)) for path, declared in graph.declarations.items()}
    with jax.set_mesh(mesh):
        yield graph, jax.device_put(run.parameters, nnx.traversals.unflatten_mapping(layouts))


def show_sample(run: Run, writer: metrics.Writer | metrics.NullWriter) -> None:
    """A text that the model writes after `evaluate.prompt`, where it can write one. Raises Stopped.

    The one place where training looks up `generate` for a text.
    """
    prompt, tokenizer = run.config.evaluate.prompt, run.mixed.tokenizer
    if not prompt or jax.process_count() > 1 or run.config.data.objective != "causal" or run.config.train.task:
        return
    from lm_jax.generate.decoding import SLICE, stream
    from lm_jax.generate.sampling import Sampling

    limit = min(SAMPLE_TOKENS, run.config.data.sequence_length - len(tokenizer.encode(prompt)) - 1)
    if limit < 1:
        run.log(f"no sample: config.evaluate.prompt leaves no room in {run.config.data.sequence_length} tokens")
        return
    with run.goodput("samples"), _whole_rows(run) as model:
        for written in stream(*model, tokenizer, [prompt], limit, Sampling(), tokens_at_once=SLICE):
            run.progress("writing a sample")
            lines = (prompt + written[0].text).split("\n")
    run.log(f"sample at step {run.data.step:,}:\n" + "\n".join(f"  | {line}" for line in lines))
    writer.text(run.data.step, "sample", "\n".join(f"    {line}" for line in lines))


def answer_now(run: Run) -> dict[str, float]:
    """Scores of the texts that the model writes for the first validation records, one of them shown."""
    if jax.process_count() > 1:
        run.log("no texts are written by several processes: python -m lm_jax.evaluate, on one, scores them")
        return {}
    from lm_jax.tasks import generate_answers, results

    kind, num = run.config.evaluate.metrics, run.config.evaluate.num_rows
    watch = lambda done, of: run.progress(f"writing: record {done} of {of}")
    with run.goodput("evaluation"), _whole_rows(run) as model:
        found = generate_answers.written(*model, run.mixed, "validation", num, watch=watch)
    values = results.scores_of(kind, found)
    shown = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
    run.log(f"step {run.data.step:>6,} {len(found):,} validation texts: {shown}")
    run.log(f"the first: {found[0].prediction!r}\n      for: {found[0].truth!r}")
    return {f"final/{name}": value for name, value in values.items()}


def attach_reference(run: Run) -> None:
    """Computes what the first parameters say of every pair of answers, once before the first step, for a loss that compares."""
    if not (run.mixed.task and run.mixed.task.compares):
        return
    from lm_jax.tasks import dpo_reference

    evaluator, resumes = make_evaluator(run), run.data.step > 0
    with run.goodput("reference"):
        line = dpo_reference.attach_reference(
            run.mixed, run.config, run.workdir, run.state.parameters, evaluator, resumes
        )
    run.log(line)
