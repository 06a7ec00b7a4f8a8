"""Who runs the tasks of a stage: this process, or datatrove's executors on this machine, on Ray or on Slurm.

A task that ended has left its mark and is not run again. A mistake of the user's is written down by the task that met it, so
that it reaches the terminal as it is from wherever the task ran.
"""

import contextlib
import dataclasses
import functools
import glob
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable

from lm_jax import stop
from lm_jax.errors import UserError
from lm_jax.meanwhile import every
from lm_jax.prepare import clean
from lm_jax.prepare.steps import task_file, working

Log = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Choice:
    """The settings of who runs the tasks."""

    executor: str = "local"  # or ray, slurm
    workers: int = 0  # tasks at once; 0 = one a core, on Ray and Slurm as many as there are
    slurm_partition: str = ""
    slurm_time: str = "24:00:00"  # limit of a task


@dataclasses.dataclass(frozen=True)
class Stage:
    """Tasks that may run in any order, each through the same steps."""

    name: str
    tasks: int
    steps: Callable[[], list]  # each called as step(documents, rank, number of tasks), as datatrove calls its blocks
    blocks: bool = False  # whether there are blocks of datatrove among them


def run_stage(stage: Stage, folder: str, choice: Choice, num_bytes: int, log: Log) -> None:
    """Runs the tasks that have no mark in `folder` yet. Raises UserError with the first mistake that a task met."""
    marks, mistakes = os.path.join(folder, "completions"), os.path.join(folder, "mistakes")
    os.makedirs(marks, exist_ok=True)
    shutil.rmtree(mistakes, ignore_errors=True)
    if len(os.listdir(marks)) == stage.tasks:
        return
    steps = [Mistakes(step, mistakes) for step in stage.steps()]
    workers = min(choice.workers or os.cpu_count() or 1, stage.tasks)
    alone = choice.executor == "local" and not stage.blocks and (workers == 1 or not has_datatrove())
    with watched(stage, folder, num_bytes, log), working():
        if alone:
            for rank in range(stage.tasks):
                mark = os.path.join(marks, f"{rank:05}")
                if not os.path.exists(mark):
                    _run_here(steps, rank, stage.tasks)
                    open(mark, "w").close()
        else:
            execute(steps, stage, folder, choice, workers, mistakes)
    missing = stage.tasks - len(os.listdir(marks))
    if missing:
        _raise_mistake(mistakes)
        raise RuntimeError(
            f"{missing} of {stage.tasks} tasks of {stage.name} did not end; their logs are in {folder}/logs"
        )


def has_datatrove() -> bool:
    """Whether datatrove is installed."""
    try:
        clean.require("")
    except UserError:
        return False
    return True


def _run_here(steps: list, rank: int, world_size: int) -> None:
    data = None
    for step in steps:
        data = step(data, rank, world_size)
    for _ in data or ():
        pass


class Mistakes:
    """A step whose UserError is written to a file, where the caller of every executor finds it."""

    def __init__(self, step, folder: str):
        self.step, self.folder = step, folder
        if hasattr(step, "stats"):
            self.stats = step.stats

    def __repr__(self) -> str:
        return repr(self.step)

    def __call__(self, data, rank: int = 0, world_size: int = 1):
        """Calls the step; a UserError of it, or of the documents that it yields, is written down."""
        with self.written(rank):
            made = self.step(data, rank, world_size)
        return made if made is None else self.guarded(made, rank)

    def guarded(self, made, rank: int):
        """The documents of the step."""
        with self.written(rank):
            yield from made

    @contextlib.contextmanager
    def written(self, rank: int):
        """Writes a UserError to the file of the task, and lets it go on."""
        try:
            yield
        except UserError as error:
            path = os.path.join(self.folder, f"{rank:05}")
            if not os.path.exists(path):
                with task_file(path) as file:
                    file.write(str(error))
            raise


def _raise_mistake(folder: str) -> None:
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "?????"))):
        with open(path) as file:
            raise UserError(file.read())


@functools.cache
def end_forks_with_us() -> None:
    """A forked child leaves within a second of this process, however that ended.

    The server that datatrove's local executor forks would stay for ever, and with it the locks that it inherited.
    """

    def watch() -> None:
        parent = os.getppid()
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    os.register_at_fork(after_in_child=lambda: threading.Thread(target=watch, daemon=True).start())


def execute(steps: list, stage: Stage, folder: str, choice: Choice, workers: int, mistakes: str) -> None:
    """Hands the tasks to datatrove's executor and waits for their marks."""
    clean.quiet()
    steps = [Quiet(), *steps]
    try:
        if choice.executor == "local":
            from datatrove.executor import LocalPipelineExecutor

            end_forks_with_us()
            with stop.children_deaf_to_ctrl_c():
                LocalPipelineExecutor(steps, stage.tasks, workers, folder).run()
        elif choice.executor == "ray":
            import ray
            from datatrove.executor import RayPipelineExecutor

            if not ray.is_initialized():
                ray.init(log_to_driver=False, logging_level="ERROR", configure_logging=False)
            RayPipelineExecutor(steps, stage.tasks, choice.workers or -1, logging_dir=folder).run()
        else:
            slurm(steps, stage, folder, choice, mistakes)
    except UserError:
        raise
    except Exception:
        _raise_mistake(mistakes)  # a pool's exception says less
        raise


def slurm(steps: list, stage: Stage, folder: str, choice: Choice, mistakes: str) -> None:
    """Submits the stage as an array of jobs, and waits until each has left its mark or one a mistake."""
    from datatrove.executor import SlurmPipelineExecutor

    job = SlurmPipelineExecutor(
        steps,
        stage.tasks,
        choice.slurm_time,
        choice.slurm_partition,
        logging_dir=folder,
        workers=choice.workers or -1,
        job_name=f"lm_jax-{stage.name}",
        env_command=f'export PATH="{os.path.dirname(sys.executable)}:$PATH"',
        mem_per_cpu_gb=4,
        qos="",
    )
    job.run()
    while job.get_incomplete_ranks() and not glob.glob(os.path.join(glob.escape(mistakes), "?????")):
        time.sleep(1)


class Quiet:
    """Keeps datatrove's log off the terminal of the process that runs a task, from the moment that the task arrives there."""

    def __reduce__(self):
        return _made_quiet, ()

    def __call__(self, data, rank: int = 0, world_size: int = 1):
        """The documents, unchanged."""
        return data


def _made_quiet() -> Quiet:
    clean.quiet()
    return Quiet()


def watched(stage: Stage, folder: str, num_bytes: int, log: Log) -> contextlib.AbstractContextManager[None]:
    """Says every few seconds how far the stage is and when it will be done."""
    marks, began = os.path.join(folder, "completions"), time.monotonic()
    first = done_share(stage, folder, num_bytes)

    def tell() -> None:
        now, passed = done_share(stage, folder, num_bytes), time.monotonic() - began
        rest = f", {passed * (1 - now) / (now - first):.0f} s left" if now > first else ""
        log(f"{stage.name}: {100 * now:.0f}% ({len(os.listdir(marks))} of {stage.tasks} tasks){rest}")

    return every(5, tell)


def done_share(stage: Stage, folder: str, num_bytes: int) -> float:
    """The share of the stage's work that is done, 0 to 1: of the bytes that are read, else of the tasks."""
    told = glob.glob(os.path.join(glob.escape(folder), "progress", "?????"))
    if told and num_bytes:
        read = 0
        for path in told:
            with open(path) as file:
                read += int(file.read() or 0)
        return min(1.0, read / num_bytes)
    return len(os.listdir(os.path.join(folder, "completions"))) / stage.tasks
