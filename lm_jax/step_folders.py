"""The folders of saved steps: which of them count, which are removed or set aside, which is the newest valid one.

A step counts once it has a manifest and no mark `<step>.unfinished` stands beside it. A step that was never finished is
removed at the next start; a damaged one is renamed `<step>.broken`, and the log says so.
"""

import json
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator
from typing import Any

from etils import epath

from lm_jax import config, fault_points
from lm_jax.batch_ramp import START, DataState
from lm_jax.distributed import agree, is_main_process
from lm_jax.errors import UserError
from lm_jax.files import sealed, write_whole
from lm_jax.manifest import ITEMS, MANIFEST, invalid_reason, read_manifest
from lm_jax.regular_files import is_url, read_object
from lm_jax.remote import set_aside
from lm_jax.stop import NEVER

STEP = re.compile("0|[1-9][0-9]*")  # the name of a step's folder; folders with other names are not ours
UNFINISHED = ".unfinished"  # `<step>.unfinished` stands beside a step while it is written, and while it is removed


def steps_folder(workdir: epath.Path) -> epath.Path:
    """Where the steps of a run lie; an absolute path, as Orbax needs it."""
    return (workdir if is_url(workdir) else epath.Path(os.path.abspath(workdir))) / "checkpoints"


def mark_path(folder: epath.Path, step: int) -> epath.Path:
    """The mark of a step that is unfinished."""
    return folder / f"{step}{UNFINISHED}"


def mark_unfinished(folder: epath.Path, step: int) -> None:
    """Until the mark is removed the step does not count, whenever the process is killed."""
    words = b"this step is being written, or removed; what there is of it does not count\n"
    write_whole(mark_path(folder, step), words)


def remove_step(folder: epath.Path, step: int) -> None:
    """Removes a step, marked as unfinished until all of it is gone."""
    mark_unfinished(folder, step)
    fault_points.reach("retain")
    (folder / str(step)).rmtree()
    mark_path(folder, step).unlink()


def remove_old_steps(folder: epath.Path, settings: config.Checkpoint, keep: Collection[int] = ()) -> None:
    """Keeps the newest `keep_last` steps, every multiple of `keep_every` and those in `keep`, and removes the others."""
    for step in complete_steps(folder)[: -settings.keep_last]:
        if step not in keep and (not settings.keep_every or step % settings.keep_every):
            remove_step(folder, step)


def complete_steps(folder: epath.Path) -> list[int]:
    """Steps that have a manifest, in order."""
    return sorted(int(path.name) for path in steps_inside(folder) if (path / MANIFEST).exists())


def steps_inside(folder: epath.Path) -> list[epath.Path]:
    """The folders that are named like a step and not marked unfinished."""
    paths = list(folder.iterdir()) if folder.exists() else []
    names = {path.name for path in paths}
    return [path for path in paths if STEP.fullmatch(path.name) and f"{path.name}{UNFINISHED}" not in names]


def has_steps(workdir: epath.Path) -> bool:
    """Whether a run has a step, valid or broken, that another config must not overwrite."""
    folder = steps_folder(workdir)
    is_step = lambda path: (path / MANIFEST).exists() or is_step_without_manifest(path)
    is_broken = lambda path: ".broken" in path.name
    return any(map(is_step, steps_inside(folder))) or (folder.exists() and any(map(is_broken, folder.iterdir())))


def is_step_without_manifest(path: epath.Path) -> bool:
    """Whether a folder that is named like a step has no manifest, and is empty or holds items of a step."""
    if not path.is_dir() or (path / MANIFEST).exists():
        return False
    names = {inside.name for inside in path.iterdir()}
    return not names or bool(names & {*ITEMS, "_CHECKPOINT_METADATA"})


def clean(workdir: epath.Path, log: Callable[[str], None]) -> None:
    """Removes what a killed run left half-written, sets a step without manifest aside; other files stay."""
    folder = steps_folder(workdir)
    names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    for name in names:
        step, _, rest = name.partition(".")
        if not STEP.fullmatch(step):
            continue
        if rest.startswith("orbax-checkpoint-tmp"):
            (folder / name).rmtree()
            log(f"removed {name}: a checkpoint that was never finished")
        elif f".{rest}" == UNFINISHED:
            if step in names:
                (folder / step).rmtree()
                log(f"removed {step}: a checkpoint that was never finished")
            (folder / name).unlink()
        elif not rest and f"{name}{UNFINISHED}" not in names and is_step_without_manifest(folder / name):
            to = set_step_aside(folder, int(step))
            log(f"checkpoint {step} is broken: {MANIFEST} is missing; set aside as {to.name}")


def set_step_aside(folder: epath.Path, step: int) -> epath.Path:
    """Renames the folder of a step to `<step>.broken`, or `<step>.broken-1` ... Returns its new path."""
    number = len(list(folder.glob(f"{step}.broken*")))
    to = folder / (f"{step}.broken" + f"-{number}" * bool(number))
    set_aside(folder / str(step), to)
    return to


def newest_first(folder: epath.Path) -> Iterator[int]:
    """Steps that have a manifest, as the main process finds them; all processes ask for the next one together."""
    step = sys.maxsize
    while True:
        earlier = [found for found in complete_steps(folder) if found < step] if is_main_process() else []
        if (step := agree(max(earlier, default=NEVER), "a step")) == NEVER:
            return
        yield step


def newest_valid(
    workdir: epath.Path, log: Callable[[str], None], quarantine: bool, run: str = "", items: Collection[str] = ITEMS
) -> int | None:
    """The newest step whose `items` are as they were written, None where the run has no step; `run` is its identity.

    With `quarantine` broken steps are set aside. All processes call it together. Raises UserError if all are broken.
    """
    folder = steps_folder(workdir)
    for step in newest_first(folder):
        problem = invalid_reason(folder / str(step), run, items)
        if not problem:
            return step
        log(f"checkpoint {step} is broken: {problem}" + ("; set aside, trying the one before" if quarantine else ""))
        if quarantine and is_main_process():
            fault_points.reach("quarantine")
            set_step_aside(folder, step)
    if has_steps(workdir):
        mend = "remove the folder to start over, or restore it from a copy"
        raise UserError(f"no checkpoint in {folder} is whole; {mend}")
    return None


def go_back(workdir: epath.Path, data: DataState) -> None:
    """Makes the step of `data`, a valid one, the newest; from there on the rows `data.skipped` are left out.

    Later steps are removed first, the newest first: a run that is killed in between comes here again. Then the manifest
    is replaced by one with the skipped rows, which count in place of those in the step's data state.
    """
    folder = steps_folder(workdir)
    for step in reversed(complete_steps(folder)):
        if step > data.step:
            remove_step(folder, step)
    manifest = read_manifest(folder / str(data.step))
    write_whole(folder / str(data.step) / MANIFEST, sealed(manifest | {"skipped": data.skipped}))


def read_data_state(workdir: epath.Path, step: int) -> DataState:
    """The data state of a verified step, with the rows that were left out since; of converted parameters, row 0."""
    folder = steps_folder(workdir) / str(step)
    if not (folder / "data").exists():
        return DataState(step, 0)
    saved = json.loads((folder / "data" / "metadata").read_text())
    skipped = read_object(folder / MANIFEST).get("skipped", saved["skipped"])
    return DataState.of_lists((saved["step"], saved["cursor"], skipped, saved.get("seconds", 0.0)))


def expected_data_state(workdir: epath.Path) -> DataState:
    """The data state of the newest step, which is not verified yet; of the start of a run where none can be read."""
    try:
        return read_data_state(workdir, complete_steps(steps_folder(workdir))[-1])
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return START


def saved_beside(workdir: epath.Path, step: int) -> dict[str, Any]:
    """The manifest of a step, not verified; {} where there is none."""
    return read_object(steps_folder(workdir) / str(step) / MANIFEST)
