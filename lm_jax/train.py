"""The loop, and only the loop: restore, train, evaluate, checkpoint, resume."""

import contextlib
import dataclasses
import errno
import gzip
import itertools
import lzma
import shlex
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from lm_jax import checkpoint, cli, fault_points, metrics, spikes, terminal
from lm_jax.batch_ramp import Clocks, DataState, Every, Ramp, clocks, every, make_ramp, with_steps
from lm_jax.config import Config, Length, UserError, flatten, parse_length
from lm_jax.convert import word_vectors
from lm_jax.convert.word_vectors import WordVectors
from lm_jax.data import loader, mixture, objectives, special_ids
from lm_jax.data.shards import check_plain, check_url, is_url
from lm_jax.data.tokenizer import tell_losses
from lm_jax.data.tokenizer_files import BESIDE
from lm_jax.distributed import agree, devices, everyone, find_together, leads, own, workdir_lock
from lm_jax.evaluate import Evaluator, by_source, open_data
from lm_jax.generate.decoding import SLICE, stream
from lm_jax.generate.sampling import Sampling
from lm_jax.goodput import Goodput, traced
from lm_jax.model import attention
from lm_jax.model.language_model import padded
from lm_jax.multihost import peers
from lm_jax.optimizer import averaged
from lm_jax.plan import counts
from lm_jax.remote import Desk, check_room
from lm_jax.sharding import batch_shards, make_mesh, mesh_shape, preflight
from lm_jax.stop import EXIT_PREEMPTED, NEVER, Stop, Stopped
from lm_jax.train_state import Program, TrainState, fresh, make_program
from lm_jax.train_step import CompiledStep, compile_step

SAMPLE_TOKENS = 96
GENERATED = 64  # tokens, as `lm_jax.generate` writes them unasked
Source = checkpoint.Located | WordVectors  # what a fresh run may start from
MOST_IN_A_ROW = 10  # updates that are not finite, before the run stops


@dataclasses.dataclass
class Run:
    """What the loop holds on to; nothing here changes but `state`, `data` and the marks of time."""

    config: Config
    workdir: epath.Path
    say: terminal.Terminal
    desk: Desk  # where metrics and log grow
    mixed: mixture.Mixture
    stream: mixture.MixedRows
    program: Program
    mesh: jax.sharding.Mesh
    ramp: Ramp
    counted: counts.Costs
    peak_flops: float
    state: TrainState
    data: DataState
    goodput: Goodput
    facts: dict[str, Any]  # what a run must find again
    stop: Stop

    def progress(self, text: str) -> None:
        """Says where something long between two steps is. Raises Stopped where the run is asked to stop."""
        if self.is_asked_to_stop():
            raise Stopped
        self.say.progress(text)

    def is_asked_to_stop(self) -> bool:
        return bool(agree(self.stop.requested, "stop"))

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

    def every(self, length: Length) -> Every:
        return every(length, self.config, self.stream.rows_per_epoch)

    def is_due(self, length: Length) -> bool:
        """Whether what is due again after every such length is due after the step that was done."""
        return self.every(length).due(self.ramp, self.data.step)


def run(config: Config, experiment: str, place: str, origins: dict[str, dict[str, Any]], dry_run: bool = False) -> int:
    """Trains to the end, from wherever the workdir is. Returns the exit code. Raises UserError before it writes there.

    `experiment` is what `--config` named, `place` the workdir ("": runs/<experiment>[-<variant>]).
    """
    name, given = cli.run_name(experiment), cli.as_given(experiment, config, origins)
    check_url("--workdir", place)
    say, goodput, workdir = terminal.Terminal(), Goodput(), epath.Path(place or f"runs/{name}")
    desk = Desk(workdir)
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir {workdir} is a file; name a folder, such as --workdir runs/{name}")
    check_plain(*[str(workdir)] * (not is_url(workdir)))
    with goodput("devices"):
        here = devices()
        mine = own(here)
    fault_points.reach("start")
    say.silent = not leads()
    peers.compare(settings(config, experiment, dry_run))
    sizes = mesh_shape(config.mesh, len(here))
    attention.preflight(config.model, config.data.sequence_length, mine.platform)
    if pieces := mixture.pieces_expected(config.data):
        preflight(config, padded(pieces + objectives.EXTRA[config.data.objective]), sizes)
    saved = agree(checkpoint.read_config(workdir) if leads() and checkpoint.has_steps(workdir) else {}, "config.json")
    if config.evaluate.metrics:
        from lm_jax.tasks import scores

        scores.check(config.evaluate.metrics)
    with goodput("data"):
        mixed = open_data(config, say)
        tell_losses(mixed.tokenizer, say)
        stream = mixed.stream(config.data)
    peers.compare(mixed.alike)
    as_written, expected = config, as_data(agree(checkpoint.expected_data_state(workdir) if leads() else None, "data"))
    config, ramp, ticking = counted_from(as_written, expected, stream.rows_per_epoch)
    num_pieces = objectives.specials(mixed.tokenizer, config.data.objective).num_pieces
    preflight(config, padded(num_pieces), sizes)
    with goodput("plan"):
        mesh = make_mesh(config.mesh, here)
        program = make_program(config, num_pieces, ticking)
        counted = counts.count(config, program.graph.declarations)
        chosen = min(everyone(counts.choose_microbatch(config, counted, sizes, ramp, mine), "microbatch"))
        config = with_microbatch(config, saved, chosen, sizes)
        program = program._replace(config=config)
    changes = checkpoint.check_resume(workdir, saved, config, mixed.facts) if saved else []
    facts = mixed.facts | {"run": checkpoint.run_identity(saved, config, mixed.facts)}
    source = None if saved else find_init(program, mixed, say)
    peers.compare({"the step of config.train.init_from": source.step if isinstance(source, checkpoint.Located) else 0})
    with goodput("peak"):
        peak = counts.peak_flops(mesh, config.model.compute_dtype)
    say(terminal.header(config, name, counted, mixed, ramp, sizes, (mine, peak)))
    if dry_run:
        return 0
    check_memory(config, counted, ramp, sizes, mine)
    if not saved:
        check_room(workdir, checkpoint_bytes(config, counted, sizes))
    with workdir_lock(workdir, say), contextlib.closing(say), jax.set_mesh(mesh), Stop() as stop:
        find_together(workdir)
        if leads():
            desk.fetch()
            say.log_to(desk.folder / "log.txt")
            peers.log_to(desk.folder / "log.txt")
            checkpoint.clean(workdir, say)
        for line in changes:
            say(line)
        with goodput("state"):
            state, data = starting_point(program, workdir, source, say, facts["run"])
        if data[:2] != expected[:2]:  # the newest step was broken
            again, ramp, ticking = counted_from(as_written, data, stream.rows_per_epoch)
            config = dataclasses.replace(config, optimizer=again.optimizer, train=again.train)
            config = with_rows_of_microbatch(config, program.config.train.microbatch_rows)
            program = make_program(config, num_pieces, ticking)
        stop.done, stop.saved = data.step, data.step if saved else NEVER
        if agree(is_over(desk, mixed, config, data.step) if leads() else None, "is over"):
            return already_done(desk, say)
        if leads():
            write_run_files(workdir, mixed, source, saved, say)
        this = Run(
            config,
            workdir,
            say,
            desk,
            mixed,
            stream,
            program,
            mesh,
            ramp,
            counted,
            peak,
            state,
            data,
            goodput,
            facts,
            stop,
        )
        if mixed.task and mixed.task.compares:
            from lm_jax.tasks import dpo_reference

            with goodput("reference"):
                say(dpo_reference.settle(mixed, config, workdir, state.parameters, make_evaluator(this), data.step > 0))
        if leads():
            checkpoint.write_config(workdir, config, origins, facts | kept_context(saved, source))
        return train(this, given)


def settings(config: Config, experiment: str, dry_run: bool) -> dict[str, Any]:
    """What all processes of a run must have alike before there is any data: {name: value}."""
    given = {f"config.{path}": value for path, value in flatten(config).items()}
    return given | {"experiment": experiment, "--dry_run": dry_run} | checkpoint.outside() | peers.own_code()


def as_data(found) -> DataState:
    """A data state as it is agreed on: lists for tuples."""
    step, cursor, skipped = found
    return DataState(step, cursor, tuple((first, last) for first, last in skipped))


def write_run_files(
    workdir: epath.Path, mixed: mixture.Mixture, source: Source | None, saved: dict[str, Any], say: terminal.Terminal
) -> None:
    """What a run consists of beside its config.json. Raises UserError where what only the run has is not as it was written."""
    checkpoint.write_run_file(workdir, mixed.tokenizer.file_name, mixed.tokenizer.model, say)
    for name, content in (mixed.task.files(mixed.tokenizer) if mixed.task else {}).items():
        checkpoint.write_run_file(workdir, name, content, say)
    checkpoint.check_run_files(workdir, saved)
    if not saved or not (workdir / BESIDE).exists():
        inherited = source.special_ids.ends if isinstance(source, checkpoint.Located) else ()
        ids = special_ids.files(mixed.tokenizer, mixed.special_ids.also(*inherited))
        checkpoint.write_run_file(workdir, BESIDE, ids[BESIDE], say)


def counted_from(config: Config, data: DataState, rows_per_epoch: float) -> tuple[Config, Ramp, Clocks]:
    """The config with its lengths in steps, the batches and the clocks of the schedule, from where the data stand."""
    ramp = make_ramp(config).through(data.step, data.cursor)
    return with_steps(config, ramp, rows_per_epoch), ramp, clocks(config, ramp)


def with_rows_of_microbatch(config: Config, rows: int | str) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, microbatch_rows=rows))


def kept_context(saved: dict[str, Any], source: Source | None) -> dict[str, int]:
    """{"context": tokens} for config.json: rows may be shorter than what the model that a run started from can read."""
    if isinstance(source, checkpoint.Located):
        return {"context": checkpoint.context_of(source)}
    return {name: saved[name] for name in ("context",) if name in saved}


def with_microbatch(config: Config, saved: dict, chosen: int, sizes: dict[str, int]) -> Config:
    """The config with its rows of a microbatch: as given, else as the run has them if this mesh can, else as chosen."""
    rows = config.train.microbatch_rows
    if rows == "auto":
        before = saved.get("config", {}).get("train.microbatch_rows", 0)
        smallest = config.data.batch_ramp[0] or config.data.global_batch_size
        kept = isinstance(before, int) and before and smallest % before == 0 and before % batch_shards(sizes) == 0
        rows = before if kept else chosen
    return with_rows_of_microbatch(config, rows)


def checkpoint_bytes(config: Config, counted: counts.Costs, sizes: dict[str, int]) -> float:
    """Of the parameters and the optimizer's state, wherever they lie."""
    whole = counts.bytes_by_class(config, counted, 1, dict.fromkeys(sizes, 1), accumulates=False)
    return whole["parameters"] + whole["optimizer"]


def check_memory(config: Config, counted: counts.Costs, ramp: Ramp, sizes: dict[str, int], device: jax.Device) -> None:
    """Raises OSError where a run needs more memory than this machine has. An accelerator's own compiler says that better, a
    CPU would wait for its disk until something is killed."""
    rows, memory = int(config.train.microbatch_rows), counts.device_memory(device)
    needed = sum(counts.bytes_by_class(config, counted, rows, sizes, ramp.stages[-1][2] > rows).values())
    if device.platform == "cpu" and needed > memory:
        raise OSError(
            errno.ENOMEM,
            f"this does not fit: {needed / 2**30:,.3g} GiB are needed, {memory / 2**30:,.3g} are here",
        )


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
    program: Program, workdir: epath.Path, source: Source | None, say: terminal.Terminal, run: str = ""
) -> tuple[TrainState, DataState]:
    """(1) The newest valid step of the workdir; (2) parameters of `train.init_from`; (3) fresh."""
    step = checkpoint.newest_valid(workdir, say, quarantine=True, run=run)
    if step is not None:
        fault_points.reach("restore")
        state, data = checkpoint.restore(workdir, step, program)
        data = as_data(agree(data, "data state"))
        say(f"resumed at step {step:,}, row {data.cursor:,}")
        return state, data
    data = DataState(0, 0)
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


def is_over(desk: Desk, mixed: mixture.Mixture, config: Config, step: int) -> bool:
    """Whether all steps are done, and the last evaluation as well, which comes after the last step is saved."""
    if step < int(config.train.num_steps):
        return False
    evaluated = any("final/loss" in line and line["step"] == step for line in metrics.read(desk.folder))
    return evaluated or step > int(config.train.num_steps) or not is_there(mixed, config, "validation")


def is_there(mixed: mixture.Mixture, config: Config, split: str) -> bool:
    """Whether a held-out split has a document."""
    try:
        return bool(mixed.held(config.data, split))
    except UserError:
        return False


def already_done(desk: Desk, say: terminal.Terminal) -> int:
    last = [line for line in metrics.read(desk.folder, say) if "final/loss" in line][-1:]
    shown = lambda value: "not finite" if value is None else f"{value:.4f}"
    values = [f"{name} {shown(value)}" for line in last for name, value in line.items() if name != "step"]
    result = ", ".join(values) or "no result"
    say(f"this run is finished: {result}\ntrain on with a larger --config.train.num_steps")
    return 0


def train(this: Run, given: str) -> int:
    """Trains from where `this` is; `given` is the command that does it. Returns the exit code.

    What is trained is saved before it is evaluated; what a run that is gone on with had not evaluated, it does first.
    """
    config, say, stop = this.config, this.say, this.stop
    with this.goodput("compile"):
        one_step = compiled(this) if this.data.step < this.num_steps else None
    say(this.goodput.start_up())
    with checkpoint.Saver(this.workdir, config, this.facts, stop) as saver:
        evaluation = make_evaluation(this)
        writer, log, trouble = stretch(this, one_step, evaluation, saver)
        while log.spike and not trouble:
            trouble = go_back(this, log, saver)
            if trouble or this.is_asked_to_stop():
                break
            writer.close()
            writer, log, trouble = stretch(this, one_step, evaluation, saver, log.watch)
        saver.close()
    finished = this.data.step == this.num_steps and not trouble and not this.is_asked_to_stop()
    if finished:
        finish(this, evaluation, writer)
    writer.close()
    if not trouble:
        say(this.goodput.table())
    if finished:
        say(next_commands(this, given))
    elif not trouble:
        say(f"saved at step {this.data.step:,} of {this.num_steps:,}; the same command goes on from there")
    else:
        give_up(this, trouble)
    this.desk.send()
    return cli.EXIT_FAULT if trouble else 0 if finished else EXIT_PREEMPTED


def stretch(this: Run, one_step: CompiledStep | None, evaluation, saver: checkpoint.Saver, watch=None):
    """From where `this` is to the end, to a signal, or to where it is no good to go on -> (writer, log, what the trouble is).

    "" is none. What was trained is saved, unless there is trouble or a spike (`log.spike`).
    """
    writer = metrics.Writer(this.desk.folder, this.data.step, this.say) if leads() else metrics.Nowhere()
    kept = checkpoint.saved_beside(this.workdir, this.data.step) if leads() else {}  # whose spikes count
    log = StepLog(this, writer, watch or spikes.Watch(kept))
    trouble = ""
    try:
        try:
            if this.data.step == 0:
                writer.hyper_parameters(flatten(this.config))
                show_sample(this, writer)
            elif one_step:
                look(this, None if is_evaluated(this) else evaluation, writer)
            if one_step:
                steps(this, one_step, log, evaluation, writer, saver)
        except Stopped:
            pass  # after a whole step
        log.flush()
        log.agree_on_spike()
        if agree(log.hopeless, "hopeless"):
            trouble = f"{MOST_IN_A_ROW} updates in a row were not finite (inf or NaN); none of them was applied"
        elif not log.spike:
            writer.flush()
            save(this, saver, log)
            saver.wait()
    except checkpoint.NotFinite as error:
        trouble = str(error)
    return writer, log, trouble


def go_back(this: Run, log: "StepLog", saver: checkpoint.Saver) -> str:
    """From a spike to a saved step before it, without the rows around it. Returns why not, where that was done often enough.

    Nothing but the workdir says that it was done, and `checkpoint.go_back` says it before anything goes on: a run that is killed
    goes back once more, or has gone back.
    """
    saver.wait()
    good, say = good_step(this, log.spike), this.say
    if good == NEVER:
        say(f"no saved step is {spikes.MARGIN} steps before it, with the same batches since: the run goes on")
        return ""
    found = as_data(agree(checkpoint.read_data_state(this.workdir, good) if leads() else None, "data state"))
    row_at = mixture.SkippingRows(this.stream, found.skipped).row_at
    if spikes.times_gone_back(found, row_at) >= spikes.MOST:
        return f"the loss jumps again, after rows were left out {spikes.MOST} times from step {good:,} on"
    data = spikes.without_rows_around(log.spike, found, this.ramp, row_at)
    (first, last), *_ = set(data.skipped) - set(found.skipped)
    if leads():
        checkpoint.go_back(this.workdir, data)
    agree(good, "went back")  # all wait until that is done
    jax.tree.map(lambda x: x.delete(), this.state)  # there may be no room for two
    this.state, this.data = checkpoint.restore(this.workdir, good, this.program)[0], data
    this.stop.done = this.stop.saved = good
    log.watch = None
    say(f"went back to step {good:,}: from there on rows {first:,} to {last - 1:,} are left out")
    return ""


def good_step(this: Run, spike: int) -> int:
    """The newest saved step that is whole and MARGIN steps before a spike, NEVER where there is none.

    One from which other batches were taken than now would need another schedule, so another program.
    """
    folder = checkpoint.steps_folder(this.workdir)
    is_good = lambda step: (
        step <= spike - spikes.MARGIN
        and not checkpoint.fault(folder / str(step))
        and checkpoint.read_data_state(this.workdir, step).cursor == this.ramp.cursor(step)
    )
    return next(filter(is_good, checkpoint.newest_first(folder)), NEVER)


def compiled(this: Run) -> CompiledStep:
    this.say.progress("compiling the step")
    fault_points.reach("compile")
    one_microbatch = all(rows == this.microbatch for _, _, rows in this.ramp.stages)
    return compile_step(this.program, this.mesh, one_microbatch)


def steps(this: Run, one_step: CompiledStep, log: "StepLog", evaluation, writer, saver) -> None:
    """From where `this` is to the last step, or to a signal. Raises Stopped where that came between two steps.

    The order: dispatch step n, then write the metrics of step n - 1, so that the device never waits for the host. What
    follows a step (checkpoint, evaluation) sees the state after it, and the lines before it are written.
    """
    config, stop = this.config, this.stop
    num = (this.ramp.cursor(this.num_steps) - this.ramp.cursor(this.data.step)) // this.microbatch
    rows_left = mixture.SkippingRows(this.stream, this.data.skipped)
    batches = loader.batches(rows_left, this.mesh, this.data.cursor, num, this.microbatch, config.data.num_workers)
    batches = this.goodput.waiting(batches, "data wait")
    numbers = range(this.data.step, this.num_steps)
    for step in traced(numbers, config.log.profile, this.desk.folder / "profile", this.say):
        rows = this.ramp.rows(step)
        fault_points.reach("step")

        def watch(done: int, step: int = step, rows: int = rows) -> bool:
            log.inside(step, done * this.microbatch, rows)
            fault_points.reach("microbatch")
            return this.is_asked_to_stop()

        with peers.pace(rows):
            with jax.transfer_guard("disallow"):  # the host neither feeds nor reads the device unasked while it works
                outcome = one_step(this.state, rows // this.microbatch, batches, watch)
            if outcome is None:
                return
            this.state = outcome[0]
            this.data = DataState(step + 1, this.data.cursor + rows, this.data.skipped)
            assert this.data.cursor == this.ramp.cursor(this.data.step), this.data
            stop.done = step + 1
            log.done(step + 1, rows, outcome[1])
        saver.poll()
        peers.stepped(step + 1)
        if this.is_asked_to_stop() or log.spike:
            return
        if step + 1 < this.num_steps:
            with log.paused():
                between_steps(this, log, evaluation, writer, saver)
        if log.spike or agree(log.hopeless, "hopeless"):
            return


def between_steps(this: Run, log: "StepLog", evaluation, writer: metrics.Writer | metrics.Nowhere, saver) -> None:
    """What is due after a step that is not the last: a checkpoint, then what looks at the model."""
    length = this.config.checkpoint.every
    number, unit = parse_length(length)
    in_time = lambda: agree(time.monotonic() - saver.saved_at >= 60 * number, "time to save")
    due = in_time() if unit == "min" else this.is_due(length)
    if due or is_looked_at(this):
        log.flush()
        log.agree_on_spike()
    if log.spike:
        return
    if due:
        writer.flush()
        save(this, saver, log)
    look(this, evaluation, writer)


def save(this: Run, saver: checkpoint.Saver, log: "StepLog") -> None:
    """Every step is read by now. While updates are skipped no older step is removed: it may be the last good one."""
    with this.goodput("checkpoint"):
        this.desk.send()
        watched = log.watch.kept() if log.watch and this.config.train.on_spike != "off" else {}
        saver.save(this.state, this.data, watched, retain=not log.skipping)


def is_looked_at(this: Run) -> bool:
    return this.is_due(this.config.evaluate.every) or this.data.step == this.num_steps // 2


def look(this: Run, evaluation, writer: metrics.Writer | metrics.Nowhere) -> None:
    """The evaluation that is due after a step, and half-way a sample."""
    if evaluation and this.is_due(this.config.evaluate.every):
        writer.scalars(this.data.step, evaluate_now(this, evaluation, this.config.evaluate.num_rows, "eval"))
    if this.data.step == this.num_steps // 2:
        show_sample(this, writer)


def is_evaluated(this: Run) -> bool:
    """Whether the metrics have the evaluation of the step that a run is gone on with from: it was stopped after it, or before."""
    lines = metrics.read(this.desk.folder) if leads() else []
    return bool(agree(any("eval/loss" in line and line["step"] == this.data.step for line in lines), "is evaluated"))


def give_up(this: Run, trouble: str) -> None:
    """Says it, and leaves the checkpoints as they are: those before are finite, but near what breaks them."""
    newest = max(checkpoint.complete_steps(checkpoint.steps_folder(this.workdir)), default=0)
    this.say(
        f"stopped: {trouble}\n"
        f"the same command goes on from step {newest:,} and comes here again, unless something changes: a lower\n"
        "config.optimizer.learning_rate, a smaller config.optimizer.clip_norm, or the text of the rows named above"
    )


class StepLog:
    """Metrics of a step written one step later, speeds over the time since the last line, progress with what remains.

    The device counts the steps whose gradient was not finite; the counts of all steps are read with the metrics of the next
    line, which waits for them anyway.
    """

    def __init__(self, this: Run, writer: metrics.Writer | metrics.Nowhere, watch: spikes.Watch):
        self.this, self.writer = this, writer
        self.watch: spikes.Watch | None = watch
        self.spike = 0  # the step from behind which all processes are to go back, once they know of it
        self._spike = 0  # the same, as soon as this process has read it
        self.waiting: tuple[int, dict] | None = None
        self.unread: list[tuple[int, dict]] = []  # the steps since the last line
        self.skipped = float(this.state.optimizer_state.skipped)  # read once, before the loop
        self.skipping, self.hopeless = False, False
        self.every = this.every(this.config.log.every)
        self.row_at = mixture.SkippingRows(this.stream, this.data.skipped).row_at
        self.wrong, self.wrong_from, self.wrong_to = "", 0, 0  # what of which steps is not finite
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
            f"step done in {counts.duration(left_step)}, all in {counts.duration(left)}"
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
        if self.every.due(self.this.ramp, step - 1):
            self.agree_on_spike()
        self.unread.append((step, device_metrics))
        self.tokens += rows * self.this.config.data.sequence_length
        if self.every.due(self.this.ramp, step) or step in (1, self.this.num_steps):
            self.waiting = (step, device_metrics)
            if all(value.is_ready() for value in device_metrics.values()):  # on a CPU: nothing would wait
                self.flush()
        else:
            self.inside(step, 0, rows)

    def agree_on_spike(self) -> None:
        """At a step at which all processes have read the same metrics; the leading one's history counts."""
        if self.this.config.train.on_spike == "rewind":
            self.spike = agree(self._spike, "spike")

    def read_steps(self) -> None:
        """Says what was wrong with the steps since the last line: which rows were skipped, where the loss jumped."""
        for step, device_metrics in self.unread:
            names = ("train/skipped", "train/skipped_in_a_row", "train/loss", "train/grad_norm")
            skipped, in_a_row, loss, norm = metrics.to_host({name: device_metrics[name] for name in names}).values()
            what = "" if skipped == self.skipped else "update" if np.isfinite(norm) else "gradient"
            if what != self.wrong:
                self.tell_skipped()
                self.wrong, self.wrong_from = what, step
            self.wrong_to, self.skipped, self.skipping = step, skipped, bool(what)
            self.hopeless |= in_a_row >= MOST_IN_A_ROW
            if not what:
                self.judge(step, loss, norm)
        self.tell_skipped()
        self.wrong, self.unread = "", []

    def tell_skipped(self) -> None:
        if not self.wrong:
            return
        first, last, ramp = self.wrong_from, self.wrong_to, self.this.ramp
        rows = f"{self.row_at(ramp.cursor(first - 1)):,} to {self.row_at(ramp.cursor(last) - 1):,}"
        steps = f"step {first:,}" if first == last else f"steps {first:,} to {last:,}"
        self.this.say(f"{steps} skipped: the {self.wrong} of rows {rows} is not finite")

    def judge(self, step: int, loss: float, norm: float) -> None:
        """Holds a step against those before it, and says a spike."""
        on_spike = self.this.config.train.on_spike
        if on_spike == "off" or self.watch is None:
            return
        if jump := self.watch(loss, norm):
            ramp = self.this.ramp
            rows = f"{self.row_at(ramp.cursor(step - 1)):,} to {self.row_at(ramp.cursor(step) - 1):,}"
            self.this.say(f"step {step:,}, rows {rows}: {jump}")
            self._spike = self._spike or step

    def flush(self) -> None:
        self.read_steps()
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
        left = counts.duration(self._left(step, self.tokens) / rate)
        this.say(
            f"step {step:>6,} of {this.num_steps:,}  loss {values['train/loss']:.4f}  grad norm {values['train/grad_norm']:.2f}"
            f"  {rate:,.0f} tokens/s  {left} left"
        )


def make_evaluation(this: Run) -> tuple[Evaluator, mixture.HeldOut] | None:
    """What evaluates this run and the rows of each source, None where it has no validation text."""
    try:
        rows = this.mixed.held(this.config.data, "validation")
    except UserError as error:
        this.say(f"no evaluation: {error}")
        return None
    return make_evaluator(this), rows


def make_evaluator(this: Run) -> Evaluator:
    return Evaluator(this.program.graph, this.mesh, this.mixed.tokenizer, this.microbatch)


def evaluate_now(this: Run, evaluation, num_rows: int, *prefixes: str) -> dict[str, float]:
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


def show_sample(this: Run, writer: metrics.Writer | metrics.Nowhere) -> None:
    """A text that the model writes after `evaluate.prompt`, where it can write one. Raises Stopped."""
    prompt = this.config.evaluate.prompt
    if not prompt or jax.process_count() > 1 or this.config.data.objective != "causal" or this.config.train.task:
        return
    room = this.config.data.sequence_length - len(this.mixed.tokenizer.encode(prompt)) - 1
    limit = min(SAMPLE_TOKENS, room)
    if limit < 1:
        this.say(f"no sample: config.evaluate.prompt leaves no room in {this.config.data.sequence_length} tokens")
        return
    model = this.program.graph, this.parameters, this.mixed.tokenizer
    with this.goodput("samples"):
        for written in stream(*model, [prompt], limit, Sampling(), tokens_at_once=SLICE):
            this.progress("writing a sample")
            lines = (prompt + written[0].text).split("\n")
    this.say(f"sample at step {this.data.step:,}:\n" + "\n".join(f"  | {line}" for line in lines))
    writer.text(this.data.step, "sample", "\n".join(f"    {line}" for line in lines))


def finish(this: Run, evaluation, writer: metrics.Writer | metrics.Nowhere) -> None:
    """The last sample, the curve, the last evaluation (`eval` as those before, `final` on all rows), the compressors.

    The line that has `final/loss` is the last that a run writes: without it the run is not over.
    """
    fault_points.reach("end")
    show_sample(this, writer)
    lines = metrics.read(this.desk.folder)
    this.say(terminal.curve(metrics.series(lines, "train/loss"), "training loss, nats per token"))
    if evaluation is None:
        return
    num_rows = this.config.evaluate.num_rows
    limited = 0 < num_rows < max(held.num_rows for held in evaluation[1].values())
    if limited and not is_evaluated(this):
        writer.scalars(this.data.step, evaluate_now(this, evaluation, num_rows, "eval"))
    values = evaluate_now(this, evaluation, 0, *["eval"] * (not limited), "final")
    if this.config.evaluate.metrics:
        values |= answer_now(this)
    writer.scalars(this.data.step, values)
    if "final/bits_per_byte" in values and not this.config.train.task:
        this.say(compare_with_compressors(this.mixed, values["final/bits_per_byte"]))


def answer_now(this: Run) -> dict[str, float]:
    """Scores of the texts that the model writes for the first validation records, one of them shown."""
    if jax.process_count() > 1:
        this.say("no texts are written by several processes: python -m lm_jax.evaluate, on one, scores them")
        return {}
    kind, num = this.config.evaluate.metrics, this.config.evaluate.num_rows
    watch = lambda done, of: this.progress(f"writing: record {done} of {of}")
    from lm_jax.tasks import generate_answers, results

    with this.goodput("evaluation"):
        found = generate_answers.written(
            this.program.graph, this.parameters, this.mixed, "validation", num, watch=watch
        )
    values = results.scores_of(kind, found)
    shown = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
    this.say(f"step {this.data.step:>6,} {len(found):,} validation texts: {shown}")
    this.say(f"the first: {found[0].prediction!r}\n      for: {found[0].truth!r}")
    return {f"final/{name}": value for name, value in values.items()}


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


def next_commands(this: Run, given: str) -> str:
    """What can be done with a finished run, as commands to paste; `given` is the one that trained it."""
    mixed, model = this.mixed, ["--model", str(this.workdir)]
    splits = [split for split in ("test", "validation") if is_there(mixed, this.config, split)]
    chats = bool(mixed.task and mixed.task.chat_template)
    asked = ["--chat"] if chats else ["--prompt", this.config.evaluate.prompt]
    room = this.config.data.sequence_length - len(mixed.tokenizer.encode("" if chats else asked[1])) - 1
    asked += [f"--max_new_tokens={max(1, room // 2)}"] * (room < 2 * GENERATED)
    writes = this.config.data.objective == "causal" and (not this.config.train.task or chats)
    longer = [f"--config.train.num_steps={4 * this.num_steps}", "--workdir", free_place(f"{this.workdir}-longer")]
    logs = str(checkpoint.steps_folder(this.workdir).parent.parent)
    lines = [
        f"done in {counts.duration(time.monotonic() - this.goodput.start)}; next:",
        f"  longer     {given} {shlex.join(longer)}",
        *[f"  generate   {cli.as_typed('-m', 'lm_jax.generate', *model, *asked)}"] * writes,
        *[f"  evaluate   {cli.as_typed('-m', 'lm_jax.evaluate', *model, '--split', split)}" for split in splits[:1]],
        f"  look       {cli.as_typed('-m', 'tensorboard.main', '--logdir', logs)}",
    ]
    return "\n".join(lines)


def free_place(place: str) -> str:
    """`place`, or where that is taken the first of place-2, place-3, ... that is not."""
    places = itertools.chain([place], (f"{place}-{number}" for number in itertools.count(2)))
    return next(place for place in places if not epath.Path(place).exists())
