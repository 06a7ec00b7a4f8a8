"""The loop, and only the loop: restore, train, evaluate, checkpoint, resume."""

import contextlib
import dataclasses
import gzip
import lzma
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from lm_jax import answers, chat, checkpoint, command, costs, metrics, reference, terminal
from lm_jax.config import Config, UserError, parse_length
from lm_jax.data import mixture, objectives, pipeline, word_vectors
from lm_jax.data.packing import Held
from lm_jax.data.shards import check_url
from lm_jax.data.tokenizer import BESIDE
from lm_jax.data.word_vectors import WordVectors
from lm_jax.decoding import generate
from lm_jax.distributed import Stop, agree, devices, leads, workdir_lock
from lm_jax.evaluate import Evaluator, by_source, open_data
from lm_jax.goodput import Goodput, traced
from lm_jax.model import attention
from lm_jax.model.language_model import padded
from lm_jax.optimizer import averaged
from lm_jax.places import Desk, write_whole
from lm_jax.ramp import Ramp, make_ramp, with_steps
from lm_jax.sampling import Sampling
from lm_jax.sharding import batch_shards, make_mesh, mesh_shape, preflight
from lm_jax.train_state import Program, TrainState, fresh, make_program
from lm_jax.train_step import compile_step

SAMPLE_TOKENS = 96
Source = checkpoint.Located | WordVectors  # what a fresh run may start from
MOST_IN_A_ROW = 10  # gradients that are not finite, before the run stops


@dataclasses.dataclass
class Run:
    """What the loop holds on to; nothing here changes but `state`, `data` and the marks of time."""

    config: Config
    workdir: epath.Path
    say: terminal.Terminal
    desk: Desk  # where metrics and log grow
    mixed: mixture.Mixture
    stream: mixture.Mixed
    program: Program
    mesh: jax.sharding.Mesh
    ramp: Ramp
    counted: costs.Costs
    peak_flops: float
    state: TrainState
    data: checkpoint.DataState
    goodput: Goodput

    @property
    def microbatch(self) -> int:
        return int(self.config.train.microbatch_rows)

    @property
    def parameters(self) -> dict:
        """What is evaluated and sampled from."""
        return averaged(self.state.parameters, self.state.optimizer_state)

    @property
    def num_steps(self) -> int:
        return int(self.config.train.num_steps)


def run(config: Config, experiment: str, place: str, origins: dict[str, dict[str, Any]], dry_run: bool = False) -> int:
    """Trains to the end, from wherever the workdir is. Returns the exit code. Raises UserError before it writes there.

    `experiment` is what `--config` named, `place` the workdir ("": runs/<experiment>[-<variant>]).
    """
    name, given = command.run_name(experiment), command.as_given(experiment, config, origins)
    check_url("--workdir", place)
    say, goodput, workdir = terminal.Terminal(), Goodput(), epath.Path(place or f"runs/{name}")
    desk = Desk(workdir)
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir {workdir} is a file; name a folder, such as --workdir runs/{name}")
    with goodput("devices"):
        here = devices()
    say.silent = not leads()
    sizes = mesh_shape(config.mesh, len(here))
    attention.preflight(config.model, config.data.sequence_length, here[0].platform)
    if pieces := mixture.pieces_expected(config.data):
        preflight(config, padded(pieces + objectives.EXTRA[config.data.objective]), sizes)
    saved = checkpoint.read_config(workdir) if checkpoint.has_steps(workdir) else {}
    if config.evaluate.metrics:
        answers.check(config.evaluate.metrics)
    with goodput("data"):
        mixed = open_data(config, say)
        stream = mixed.stream(config.data)
    ramp = make_ramp(config)
    config = with_steps(config, ramp, stream.rows_per_epoch)
    num_pieces = objectives.specials(mixed.tokenizer, config.data.objective).num_pieces
    preflight(config, padded(num_pieces), sizes)
    with goodput("plan"):
        mesh = make_mesh(config.mesh, here)
        program = make_program(config, num_pieces)
        counted = costs.count(config, program.graph.declarations)
        config = with_microbatch(config, saved, costs.choose_microbatch(config, counted, sizes, ramp, here[0]), sizes)
        program = program._replace(config=config)
    changes = checkpoint.check_resume(workdir, saved, config, mixed.facts) if saved else []
    source = None if saved else find_init(program, mixed, say)
    with goodput("peak"):
        peak = costs.peak_flops(mesh, config.model.compute_dtype)
    say(terminal.header(config, name, counted, mixed, ramp, sizes, (here[0], peak)))
    if dry_run:
        return 0
    with workdir_lock(workdir, say), jax.set_mesh(mesh), Stop().listening() as stop:
        if leads():
            desk.fetch()
            say.log_to(desk.folder / "log.txt")
            checkpoint.clean(workdir, say)
        for line in changes:
            say(line)
        with goodput("state"):
            state, data = starting_point(program, workdir, source, say)
        if data.step >= int(config.train.num_steps):
            return already_done(desk, say)
        if leads():
            checkpoint.write_config(workdir, config, origins, mixed.facts)
            if not saved or not (workdir / BESIDE).exists():
                inherited = source.special_ids.ends if isinstance(source, checkpoint.Located) else ()
                checkpoint.write_tokenizer(workdir, mixed.tokenizer, mixed.special_ids.also(*inherited))
            if mixed.chat_template:
                for name, content in chat.files_of(mixed.chat_template).items():
                    write_whole(workdir / name, content)
        this = Run(config, workdir, say, desk, mixed, stream, program, mesh, ramp, counted, peak, state, data, goodput)
        if mixed.compares:
            with goodput("reference"):
                say(reference.settle(mixed, config, workdir, state.parameters, make_evaluator(this), data.step > 0))
        return train(this, stop, given)


def with_microbatch(config: Config, saved: dict, chosen: int, sizes: dict[str, int]) -> Config:
    """The config with its rows of a microbatch: as given, else as the run has them if this mesh can, else as chosen."""
    rows = config.train.microbatch_rows
    if rows == "auto":
        before = saved.get("config", {}).get("train.microbatch_rows", 0)
        smallest = config.data.batch_ramp[0] or config.data.global_batch_size
        kept = isinstance(before, int) and before and smallest % before == 0 and before % batch_shards(sizes) == 0
        rows = before if kept else chosen
    return dataclasses.replace(config, train=dataclasses.replace(config.train, microbatch_rows=rows))


def find_init(program: Program, mixed: mixture.Mixture, say: terminal.Terminal) -> Source | None:
    """The model, or the word vectors, that `train.init_from` names.

    Raises UserError where there is none, or that lists what differs in shape.
    """
    place = program.config.train.init_from
    if not place:
        return None
    if epath.Path(place).is_file():
        return word_vectors.read(place, mixed.tokenizer, program.config.model.model_dim)
    try:
        found = checkpoint.locate(place, say)
    except UserError as error:
        raise UserError(str(error).replace("--model", "config.train.init_from")) from None
    if found.tokenizer.fingerprint != mixed.tokenizer.fingerprint:
        mend = f"--config.data.tokenizer={found.workdir / found.tokenizer.file_name}"
        raise UserError(
            f"config.train.init_from = {place!r} has another tokenizer than this corpus; take it too: {mend}"
        )
    mine, theirs = program.graph.declarations, checkpoint.graph_of(found).declarations
    differing = [path for path in mine.keys() & theirs.keys() if not fits(path, mine[path].shape, theirs[path].shape)]
    new = {path for path in mine if path[-1] in ("lora_a", "lora_b")}
    if program.config.train.task:  # other heads
        differing += [path for path in mine.keys() - theirs.keys() - new if path[0] not in ("labels", "pooler")]
    else:
        differing += list((mine.keys() - new) ^ theirs.keys())
    if differing:
        names = ", ".join(sorted("/".join(path) for path in differing)[:3])
        raise UserError(f"config.train.init_from = {place!r}: {len(differing)} parameters differ: {names}")
    return found


def fits(path: tuple[str, ...], mine: tuple[int, ...], theirs: tuple[int, ...]) -> bool:
    """Whether a parameter can be taken; shorter rows take the first of the learned positions."""
    shorter = path == ("positions", "table") and mine[0] <= theirs[0]
    return mine[1:] == theirs[1:] if shorter else mine == theirs


def starting_point(
    program: Program, workdir: epath.Path, source: Source | None, say: terminal.Terminal
) -> tuple[TrainState, checkpoint.DataState]:
    """(1) The newest valid step of the workdir; (2) parameters of `train.init_from`; (3) fresh."""
    if step := agree((checkpoint.newest_valid(workdir, say, quarantine=True) or 0) if leads() else 0):
        state, data = checkpoint.restore(workdir, step, program)
        say(f"resumed at step {step:,}, row {data.cursor:,}")
        return state, data
    data = checkpoint.DataState(0, 0)
    if source is None:
        return jax.jit(lambda: fresh(program))(), data
    if isinstance(source, WordVectors):
        num, of = int(source.found.sum()), len(source.found)
        say(f"{num:,} of {of:,} pieces from the words of {source.place}; the other {of - num:,} are initialised")
        parameters = with_rows(jax.jit(lambda: fresh(program))().parameters, source)
    else:
        _, parameters = checkpoint.load_parameters(source)
        say(f"parameters from {source.workdir} step {source.step:,}")
        parameters = with_the_rest(program, parameters, say)
    optimizer_state = jax.jit(program.optimizer.init)(program.split(parameters)[0])
    return TrainState(jnp.zeros((), jnp.int32), parameters, optimizer_state), data


def with_the_rest(program: Program, given: dict, say: terminal.Terminal) -> dict:
    """The parameters of the program: the given ones, and those that are missing as they are initialised; both said."""
    flat, mine = nnx.traversals.flatten_mapping(given), program.graph.declarations
    if all(path in mine and x.shape == mine[path].shape for path, x in flat.items()) and len(flat) == len(mine):
        return given
    names = lambda paths: ", ".join("/".join(path) for path in sorted(paths)) or "nothing"
    say(f"left behind: {names(flat.keys() - mine.keys())}; initialised: {names(mine.keys() - flat.keys())}")
    start = nnx.traversals.flatten_mapping(jax.jit(lambda: fresh(program))().parameters)
    placed = {path: jax.device_put(flat.get(path, x)[: len(x)], x.sharding) for path, x in start.items()}
    return nnx.traversals.unflatten_mapping(placed)


def with_rows(parameters: dict, given: WordVectors) -> dict:
    """The parameters with the given rows of the embedding table."""
    table = parameters["embedding"]["table"]
    padding = len(table) - len(given.table)
    rows = jax.device_put(np.pad(given.table, ((0, padding), (0, 0))), table.sharding)
    is_given = np.pad(given.found, (0, padding))[:, None]
    replaced = jax.jit(lambda table, rows: jnp.where(jnp.asarray(is_given), rows, table))(table, rows)
    return parameters | {"embedding": {"table": replaced}}


def already_done(desk: Desk, say: terminal.Terminal) -> int:
    last = [line for line in metrics.read(desk.folder) if "final/loss" in line][-1:]
    result = (
        ", ".join(f"{name} {value:.4f}" for name, value in last[0].items() if name != "step") if last else "no result"
    )
    say(f"this run is finished: {result}\ntrain on with a larger --config.train.num_steps")
    return 0


def train(this: Run, stop: Stop, given: str) -> int:
    """Trains from where `this` is; `given` is the command that does it. Returns the exit code."""
    config, say, goodput = this.config, this.say, this.goodput
    with goodput("compile"):
        say.progress("compiling the step")
        one_microbatch = all(rows == this.microbatch for _, _, rows in this.ramp.stages)
        one_step = compile_step(this.program, this.mesh, one_microbatch)
    say(goodput.start_up())
    writer = metrics.Writer(this.desk.folder, this.data.step) if leads() else metrics.Nowhere()
    saver = checkpoint.Saver(this.workdir, config, this.mixed.facts)
    if not this.data.step:
        writer.hyper_parameters(checkpoint.flatten(config))
    evaluation = make_evaluation(this)
    num = (this.ramp.cursor(this.num_steps) - this.ramp.cursor(this.data.step)) // this.microbatch
    rows_left = mixture.Kept(this.stream, this.data.skipped)
    batches = pipeline.batches(rows_left, this.mesh, this.data.cursor, num, this.microbatch, config.data.num_workers)
    batches = goodput.waiting(batches, "data wait")
    log = StepLog(this, writer)
    if this.data.step == 0:
        show_sample(this, writer)
    # The order in the loop: dispatch step n, then write the metrics of step n - 1, so that the device never waits for
    # the host. What follows a step (evaluation, checkpoint) sees the state after it, and the lines before it are written.
    for step in traced(range(this.data.step, this.num_steps), config.log.profile, this.desk.folder / "profile", say):
        rows = this.ramp.rows(step)

        def watch(done: int, step: int = step, rows: int = rows) -> bool:
            log.inside(step, done * this.microbatch, rows)
            return stop.requested

        with jax.transfer_guard("disallow"):  # the host neither feeds nor reads the device unasked while it works
            outcome = one_step(this.state, rows // this.microbatch, batches, watch)
        if outcome is None:
            break
        this.state = outcome[0]
        this.data = checkpoint.DataState(step + 1, this.data.cursor + rows, this.data.skipped)
        log.done(step + 1, rows, outcome[1])
        saver.poll()
        if step + 1 < this.num_steps:
            with log.paused():
                between_steps(this, log, evaluation, writer, saver)
        if stop.requested or log.hopeless:
            break
    log.flush()
    if log.hopeless:
        return give_up(this, saver, writer)
    finished = this.data.step == this.num_steps
    if finished:
        finish(this, evaluation, writer)
    writer.flush()
    with goodput("checkpoint"):
        this.desk.send()
        saver.save(this.state, this.data)
        saver.close()
    writer.close()
    say(goodput.table())
    if finished:
        say(next_commands(this, given))
    else:
        say(f"saved at step {this.data.step:,} of {this.num_steps:,}; the same command goes on from there")
    this.desk.send()
    return 0 if finished else command.EXIT_PREEMPTED


def between_steps(this: Run, log: "StepLog", evaluation, writer: metrics.Writer | metrics.Nowhere, saver) -> None:
    """What is due after a step that is not the last: an evaluation, a sample half-way, a checkpoint."""
    step, every = this.data.step, int(this.config.evaluate.every)
    if evaluation and every and step % every == 0:
        log.flush()
        evaluate_now(this, evaluation, writer, this.config.evaluate.num_rows, "eval")
    if step == this.num_steps // 2:
        log.flush()
        show_sample(this, writer)
    number, unit = parse_length(this.config.checkpoint.every)
    if time.monotonic() - saver.saved_at >= 60 * number if unit == "min" else step % int(number) == 0:
        log.flush()
        writer.flush()
        with this.goodput("checkpoint"):
            this.desk.send()
            saver.save(this.state, this.data)


def give_up(this: Run, saver: checkpoint.Saver, writer: metrics.Writer | metrics.Nowhere) -> int:
    """Leaves the checkpoints as they are: the parameters before these steps are finite, but near what breaks them."""
    saver.close()
    writer.close()
    newest = max(checkpoint.complete_steps(saver.folder), default=0)
    this.say(
        f"stopped: {MOST_IN_A_ROW} gradients in a row were not finite (inf or NaN); none of them was applied\n"
        f"the same command goes on from step {newest:,} and comes here again, unless something changes: a lower\n"
        "config.optimizer.learning_rate, a smaller config.optimizer.clip_norm, or the text of the rows named above"
    )
    return command.EXIT_FAULT


class StepLog:
    """Metrics of a step written one step later, speeds over the time since the last line, progress with what remains.

    The device counts the steps whose gradient was not finite; the counts of all steps are read with the metrics of the next
    line, which waits for them anyway.
    """

    def __init__(self, this: Run, writer: metrics.Writer | metrics.Nowhere):
        self.this, self.writer = this, writer
        self.waiting: tuple[int, dict] | None = None
        self.unread: list[tuple[int, dict]] = []  # the steps since the last line
        self.skipped = float(this.state.optimizer_state.skipped)  # read once, before the loop
        self.hopeless = False
        self.every = int(this.config.log.every)
        self.first = this.data.step
        self.mark, self.mark_tokens, self.mark_step = time.monotonic(), 0.0, this.data.step
        self.tokens = 0.0  # since this process started
        self.since = time.monotonic()

    @contextlib.contextmanager
    def paused(self):
        """Evaluations and saves do not count as time of steps."""
        start = time.monotonic()
        yield
        end = time.monotonic()
        self.mark += end - max(start, self.mark)
        self.since += end - start

    def inside(self, step: int, done: int, rows: int) -> None:
        this = self.this
        tokens = self.tokens + done * this.config.data.sequence_length
        rate = tokens / (time.monotonic() - self.since)
        left_step = (rows - done) * this.config.data.sequence_length / rate
        left = self._left(step, tokens) / rate
        this.say.progress(
            f"step {step + 1:,} of {this.num_steps:,}: row {done} of {rows}, {rate:,.0f} tokens/s, "
            f"step done in {costs.duration(left_step)}, all in {costs.duration(left)}"
        )

    def _left(self, step: int, tokens: float) -> float:
        total = (
            self.this.ramp.cursor(self.this.num_steps) - self.this.ramp.cursor(self.first)
        ) * self.this.config.data.sequence_length
        return max(0.0, total - tokens)

    def done(self, step: int, rows: int, device_metrics: dict) -> None:
        """`step` updates are done (dispatched, on an accelerator)."""
        if self.waiting:
            self.flush()
        self.unread.append((step, device_metrics))
        self.tokens += rows * self.this.config.data.sequence_length
        if step % self.every == 0 or step in (1, self.this.num_steps):
            self.waiting = (step, device_metrics)
            if all(value.is_ready() for value in device_metrics.values()):  # on a CPU: nothing would wait
                self.flush()
        else:
            self.inside(step, 0, rows)

    def read_guard(self) -> None:
        """Says which rows were skipped since the last line, and whether there is hope."""
        names, first, last = ("train/skipped", "train/skipped_in_a_row"), 0, 0

        def tell() -> None:
            rows = f"{self.this.ramp.cursor(first - 1):,} to {self.this.ramp.cursor(last) - 1:,}"
            steps = f"step {first:,}" if first == last else f"steps {first:,} to {last:,}"
            self.this.say(f"{steps} skipped: the gradient of rows {rows} is not finite")

        for step, device_metrics in self.unread:
            skipped, in_a_row = metrics.to_host({name: device_metrics[name] for name in names}).values()
            if skipped > self.skipped:
                first, last = first or step, step
            elif first:
                tell()
                first = 0
            self.skipped = skipped
            self.hopeless |= in_a_row >= MOST_IN_A_ROW
        if first:
            tell()
        self.unread = []

    def flush(self) -> None:
        self.read_guard()
        if self.waiting is None:
            return
        (step, device_metrics), self.waiting = self.waiting, None
        this = self.this
        values = metrics.to_host(device_metrics)  # waits for the step, on an accelerator
        now = time.monotonic()
        values["train/tokens"] = float(this.ramp.cursor(step) * this.config.data.sequence_length)
        seconds = max(now - self.mark, 1e-9)
        rate = (self.tokens - self.mark_tokens) / seconds
        values |= {"perf/tokens_per_second": rate, "perf/step_seconds": seconds / max(1, step - self.mark_step)}
        if this.peak_flops:
            values["perf/mfu"] = rate * this.counted.flops_per_token / this.peak_flops
        self.mark, self.mark_tokens, self.mark_step = now, self.tokens, step
        self.writer.scalars(step, values)
        left = costs.duration(self._left(step, self.tokens) / rate)
        this.say(
            f"step {step:>6,} of {this.num_steps:,}  loss {values['train/loss']:.4f}  grad norm {values['train/grad_norm']:.2f}"
            f"  {rate:,.0f} tokens/s  {left} left"
        )


def make_evaluation(this: Run) -> tuple[Evaluator, dict[str, Held]] | None:
    """What evaluates this run and the rows of each source, None where it has no validation text."""
    try:
        rows = this.mixed.held(this.config.data, "validation")
    except UserError as error:
        this.say(f"no evaluation: {error}")
        return None
    return make_evaluator(this), rows


def make_evaluator(this: Run) -> Evaluator:
    return Evaluator(this.program.graph, this.mesh, this.mixed.tokenizer.bytes_per_piece, this.microbatch)


def evaluate_now(
    this: Run, evaluation, writer: metrics.Writer | metrics.Nowhere, num_rows: int, *prefixes: str
) -> float:
    """Bits per byte of the first `num_rows` validation rows (0: all) of each source, written under each prefix.

    0 where the model does not predict every byte, as an encoder.
    """
    evaluator, rows = evaluation
    watch = lambda done, of: this.say.progress(f"evaluating: row {done} of {of}")
    with this.goodput("evaluation"):
        totals = {name: evaluator(this.parameters, held, num_rows, watch) for name, held in rows.items()}
    values = {
        name: value for prefix in prefixes for name, value in by_source(totals, prefix, this.mixed.scores).items()
    }
    writer.scalars(this.data.step, values)
    shown = {name.split("/", 1)[1]: value for name, value in values.items() if name.startswith(f"{prefixes[0]}/")}
    loss, bits_per_byte = shown.pop("loss"), shown.get("bits_per_byte", 0.0)
    of_text = f", {bits_per_byte:.3f} bits/byte" if bits_per_byte else ""
    if this.config.train.task:
        of_text = "".join(f", {name} {value:.4f}" for name, value in list(shown.items())[:2])
    this.say(f"step {this.data.step:>6,} validation loss {loss:.4f}{of_text}")
    return bits_per_byte


def show_sample(this: Run, writer: metrics.Writer | metrics.Nowhere) -> None:
    prompt = this.config.evaluate.prompt
    if not prompt or jax.process_count() > 1 or this.config.data.objective != "causal" or this.config.train.task:
        return
    room = this.config.data.sequence_length - len(this.mixed.tokenizer.encode(prompt)) - 1
    limit = min(SAMPLE_TOKENS, room)
    if limit < 1:
        this.say(f"no sample: config.evaluate.prompt leaves no room in {this.config.data.sequence_length} tokens")
        return
    with this.goodput("samples"):
        text = generate(this.program.graph, this.parameters, this.mixed.tokenizer, [prompt], limit, Sampling())[0]
    this.say(f"sample at step {this.data.step:,}:\n" + "\n".join(f"  | {line}" for line in (prompt + text).split("\n")))
    writer.text(this.data.step, "sample", "\n".join(f"    {line}" for line in (prompt + text).split("\n")))


def finish(this: Run, evaluation, writer: metrics.Writer | metrics.Nowhere) -> None:
    """The last sample, the curve, the last evaluation (`eval` as those before, `final` on all rows), the compressors."""
    show_sample(this, writer)
    writer.flush()
    lines = metrics.read(this.desk.folder)
    this.say(terminal.curve(metrics.series(lines, "train/loss"), "training loss, nats per token"))
    if evaluation is None:
        return
    num_rows = this.config.evaluate.num_rows
    if 0 < num_rows < max(held.num_rows for held in evaluation[1].values()):
        evaluate_now(this, evaluation, writer, num_rows, "eval")
        bits_per_byte = evaluate_now(this, evaluation, writer, 0, "final")
    else:
        bits_per_byte = evaluate_now(this, evaluation, writer, 0, "eval", "final")
    if this.config.evaluate.metrics:
        answer_now(this, writer)
    if bits_per_byte and not this.config.train.task:
        this.say(compare_with_compressors(this.mixed, bits_per_byte))


def answer_now(this: Run, writer: metrics.Writer | metrics.Nowhere) -> None:
    """The texts that the model writes for the first validation records, one of them shown, and their scores."""
    if jax.process_count() > 1:
        this.say("no texts are written by several processes: python -m lm_jax.evaluate, on one, scores them")
        return
    kind, num = this.config.evaluate.metrics, this.config.evaluate.num_rows
    watch = lambda done, of: this.say.progress(f"writing: record {done} of {of}")
    with this.goodput("evaluation"):
        results = answers.written(this.program.graph, this.parameters, this.mixed, "validation", num, watch=watch)
    values = answers.scores(kind, results)
    writer.scalars(this.data.step, {f"final/{name}": value for name, value in values.items()})
    shown = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
    this.say(f"step {this.data.step:>6,} {len(results):,} validation texts: {shown}")
    this.say(f"the first: {results[0].prediction!r}\n      for: {results[0].truth!r}")


def compare_with_compressors(mixed: mixture.Mixture, bits_per_byte: float) -> str:
    """Bits per byte of the model beside gzip's and xz's on the same validation text, up to 16 MB of it."""
    splits = [corpus.splits["validation"] for corpus in mixed.corpora.values()]
    line = f"validation text: yours {bits_per_byte:.2f} bits/byte"
    if sum(split.num_bytes for split in splits) > 16e6:
        return line
    text = "".join(mixed.tokenizer.decode(split.tokens) for split in splits).encode()
    of = lambda compressed: 8 * len(compressed) / max(1, len(text))
    return f"{line} · gzip -9 {of(gzip.compress(text, 9)):.2f} · xz -9 {of(lzma.compress(text, preset=9)):.2f}"


def next_commands(this: Run, given: str) -> str:
    longer = f"--config.train.num_steps={4 * this.num_steps} --workdir {this.workdir}-longer"
    sample = f'  generate   python -m lm_jax.generate --model {this.workdir} --prompt "{this.config.evaluate.prompt}"'
    return "\n".join(
        [
            f"done in {costs.duration(time.monotonic() - this.goodput.start)}; next:",
            f"  longer     {given} {longer}",
            *[sample] * (this.config.data.objective == "causal" and not this.config.train.task),
            f"  evaluate   python -m lm_jax.evaluate --model {this.workdir} --split test",
            f"  look       tensorboard --logdir {checkpoint.steps_folder(this.workdir).parent.parent}",
        ]
    )
