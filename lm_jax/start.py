"""How a run is opened: first it is looked at, with nothing written; then it is begun, under the workdir's lock."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import jax
from etils import epath

from lm_jax import best, decide, fault_points, load_model, run_folder, run_plan, step_folders, terminal, trackers
from lm_jax.batch_ramp import DataState
from lm_jax.closing import already_done, exporting, model_of, why_finished, why_over
from lm_jax.config import Config, flatten
from lm_jax.data import mixed_rows, mixture, special_ids
from lm_jax.data.loader import abstract_batch
from lm_jax.data.objectives import specials
from lm_jax.data.tokenizer import tell_losses
from lm_jax.distributed import agree, devices, is_main_process, own
from lm_jax.errors import UserError
from lm_jax.experiment import run_name
from lm_jax.experiment_file import faults_told
from lm_jax.files import BESIDE, check_room
from lm_jax.goodput import Goodput
from lm_jax.initial_state import Source, find_init, starting_point
from lm_jax.multihost import peers
from lm_jax.open_data import check_scores, open_data
from lm_jax.open_run import Run
from lm_jax.parts import Parts, check_parts, check_same_parts, of_experiment
from lm_jax.plan import counts
from lm_jax.regular_files import check_plain, check_url, is_url
from lm_jax.remote import LocalMirror
from lm_jax.run_plan import Plan
from lm_jax.samples import attach_reference, open_benchmarks
from lm_jax.stop import NEVER, StopSignal
from lm_jax.train_state import abstract
from lm_jax.train_step import train_step
from lm_jax.workdir_lock import find_together


@dataclasses.dataclass(frozen=True)
class Opening:
    """A run before it begins: what it will be, and what its workdir has of it."""

    workdir: epath.Path
    mirror: LocalMirror
    log: terminal.Terminal
    goodput: Goodput
    saved: dict[str, Any]  # config.json of a run that is gone on with, {} of a new one
    expected: DataState  # of the newest step, which is not verified yet
    device: jax.Device  # one of this process
    mixed: mixture.Mixture
    stream: mixed_rows.MixedRows
    plan: Plan  # from `expected`
    plan_from: Callable[[DataState], Plan]  # the same, from the data state that is restored
    changes: list[str]  # since the run was started, in words
    facts: dict[str, Any]  # by which a resumed run checks that its data and tokenizer are the same
    source: Source | None  # of the parameters of a new run
    peak_flops: float
    benchmarks: Any  # the tasks of lm-eval that the run asks, or None

    def check_room(self) -> None:
        """Raises OSError where the memory is too small, or the disk of a new run has no room for a checkpoint."""
        run_plan.check_memory(self.plan, self.device)
        if not self.saved:
            check_room(self.workdir, self.plan.checkpoint_bytes)


def find_workdir(path: str, name: str) -> epath.Path:
    """The workdir that `--workdir` names ("": runs/<name>). Raises UserError where no folder can be there."""
    check_url("--workdir", path)
    workdir = epath.Path(path or f"runs/{name}")
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir {workdir} is a file; name a folder, such as --workdir runs/{name}")
    if not is_url(workdir):
        check_plain(str(workdir))
    return workdir


def look(config: Config, experiment: str, path: str, dry_run: bool) -> Opening:
    """Opens the data, makes the plan, finds what the run starts from. Raises UserError, also where processes differ."""
    log, goodput, workdir = terminal.Terminal(), Goodput(), find_workdir(path, run_name(experiment))
    mirror = LocalMirror(workdir)
    with goodput("devices"):
        here = devices()
    device = own(here)
    fault_points.reach("start")
    log.silent = not is_main_process()
    parts = of_experiment(experiment)
    peers.compare(settings(config, experiment, dry_run) | {"the hash of its parts": parts.sha256})
    site = decide.at_hand(here, device)
    run_plan.check(config, site)
    check_parts(config, parts)
    saved = agree(
        run_folder.read_config(workdir) if is_main_process() and step_folders.has_steps(workdir) else {}, "config.json"
    )
    check_same_parts(workdir, saved, parts)
    check_scores(config)
    trackers.check(config.log.trackers)
    with goodput("data"):
        mixed = open_data(config, log)
        tell_losses(mixed.tokenizer, log)
        stream = mixed.stream(config.data)
    peers.compare(mixed.alike)
    expected = DataState.of_lists(
        agree(step_folders.expected_data_state(workdir) if is_main_process() else None, "data")
    )
    known = specials(mixed.tokenizer, config.data.objective).vocab_size, here, stream.rows_per_epoch
    with goodput("plan"), faults_of(parts):
        plan = run_plan.make_plan(config, *known, expected, site, saved.get("config", {}), parts)
        rehearse(plan)
    with goodput("data"):
        benchmarks = open_benchmarks(plan, mixed, workdir)
        best.check(config, mixed, benchmarks.measures if benchmarks else ())
    if of_run := exporting(config):
        of_run.check(model_of(mirror, mixed, plan, expected), mixed.special_ids)
    plan_from = functools.partial(run_plan.make_plan, decide.replaced(config, plan.decided), *known, parts=parts)
    changes = run_folder.check_resume(workdir, saved, plan.config, mixed.facts) if saved else []
    facts = mixed.facts | parts.record
    facts |= {"run": run_folder.run_identity(saved, plan.config, facts)}
    source = None if saved else find_init(plan.program, mixed, log)
    peers.compare({"the step of config.train.init_from": source.step if isinstance(source, load_model.ModelRef) else 0})
    with goodput("peak"):
        peak = counts.peak_flops(plan.mesh, plan.config.model.compute_dtype)
    inside = workdir, mirror, log, goodput, saved, expected
    return Opening(*inside, device, mixed, stream, plan, plan_from, changes, facts, source, peak, benchmarks)


def faults_of(parts: Parts) -> contextlib.AbstractContextManager:
    """Makes a UserError, which names the line, of what the code of a user's parts raises."""
    return faults_told(os.path.abspath(parts.path)) if parts.replaced else contextlib.nullcontext()


def rehearse(plan: Plan) -> None:
    """Traces a step with parts of a user's own, which compiles nothing. Raises UserError where they do not fit."""
    program, parts = plan.program, plan.program.parts
    if not parts.replaced:
        return
    with jax.set_mesh(plan.mesh):
        state, batch = abstract(program), abstract_batch(plan.mesh, plan.microbatch, plan.config)
        after, _ = jax.eval_shape(functools.partial(train_step, program), state, batch)
    kind = lambda x: (x.shape, x.dtype)
    if jax.tree.map(kind, after) != jax.tree.map(kind, state):
        raise UserError(f"{parts.path}: a step with these parts changes the shape or the dtype of its state")


def settings(config: Config, experiment: str, dry_run: bool) -> dict[str, Any]:
    """What all processes of a run must have alike before there is any data: {name: value}."""
    given = {f"config.{path}": value for path, value in flatten(config).items()}
    return given | {"experiment": experiment, "--dry_run": dry_run} | run_folder.outside() | peers.own_code()


def begin(opening: Opening, origins: dict[str, dict[str, Any]], stop: StopSignal) -> Run | None:
    """The run with its state on the mesh, which is set; None where it is over already. The lock of its workdir is held.

    `origins` says where the values of the config come from. Raises UserError.
    """
    workdir, mirror, log = opening.workdir, opening.mirror, opening.log
    find_together(workdir)
    if is_main_process():
        mirror.fetch()
        log.log_to(mirror.folder / "log.txt")
        peers.log_to(mirror.folder / "log.txt")
        step_folders.clean(workdir, log)
    for line in opening.changes:
        log(line)
    with opening.goodput("state"):
        state, data = starting_point(opening.plan.program, workdir, opening.source, log, opening.facts["run"])
    newest_is_whole = data[:2] == opening.expected[:2]
    plan = opening.plan if newest_is_whole else opening.plan_from(data)
    stop.done, stop.saved = data.step, data.step if opening.saved else NEVER
    if why := agree(why_finished(mirror, opening.mixed, plan, data) if is_main_process() else "", "is finished"):
        already_done(mirror, log, why)
        return None
    if is_main_process():
        write_run_files(opening)
    peak = 0.0 if opening.device.platform == "cpu" else opening.peak_flops  # a CPU's is a measured one, and no bound
    given = workdir, log, mirror, opening.mixed, opening.stream, peak
    run = Run(plan, *given, state, data, opening.goodput, opening.facts, stop)
    run.trace_from, run.benchmarks = plan.config.log.profile, opening.benchmarks
    run.ended = agree(why_over(mirror, plan, data) if is_main_process() else "", "is over")
    if opening.saved and not run.ended and (of_run := exporting(plan.config)):  # another step than may be there
        of_run.check(model_of(mirror, opening.mixed, plan, data._replace(step=NEVER)), opening.mixed.special_ids)
    attach_reference(run)
    if is_main_process():
        known = opening.mixed.task.facts if opening.mixed.task else {}
        run_folder.write_config(workdir, plan.config, origins, opening.facts | known | kept_context(opening))
    return run


def write_run_files(opening: Opening) -> None:
    """Writes what a run consists of beside its config.json. Raises UserError where what only it has is not as written."""
    workdir, mixed, log = opening.workdir, opening.mixed, opening.log
    run_folder.write_run_file(workdir, mixed.tokenizer.file_name, mixed.tokenizer.model, log)
    for name, content in (mixed.task.files(mixed.tokenizer) if mixed.task else {}).items():
        run_folder.write_run_file(workdir, name, content, log)
    run_folder.check_run_files(workdir, opening.saved)
    if not opening.saved or not (workdir / BESIDE).exists():
        inherited = opening.source.special_ids.ends if isinstance(opening.source, load_model.ModelRef) else ()
        ids = special_ids.files(mixed.tokenizer, mixed.special_ids.also(*inherited))
        run_folder.write_run_file(workdir, BESIDE, ids[BESIDE], log)


def kept_context(opening: Opening) -> dict[str, int]:
    """{"context": tokens} for config.json: rows may be shorter than what the model that a run started from can read."""
    if isinstance(opening.source, load_model.ModelRef):
        return {"context": load_model.context_of(opening.source)}
    return {name: opening.saved[name] for name in ("context",) if name in opening.saved}
