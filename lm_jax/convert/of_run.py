"""A finished run as a Hugging Face folder (`config.train.export_to`): refused early, written by a process of its own.

That process has one CPU device and reads the saved step, as tools/convert_checkpoint.py does: of a run of many processes one
writes, and the devices of the training hold nothing more. `lm_jax.json` in the folder says which step it is.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Callable

import jax
from etils import epath

from lm_jax import cli, distributed, load_model, step_folders
from lm_jax.config import Mesh
from lm_jax.convert import export as leaving
from lm_jax.convert import transformers_peer
from lm_jax.data.special_ids import SpecialIds
from lm_jax.data.worker import end_with_parent
from lm_jax.errors import UserError
from lm_jax.mesh import make_mesh
from lm_jax.regular_files import is_url, read_object
from lm_jax.terminal import Terminal

KEY = "config.train.export_to"
IN_CHILD = "from lm_jax import cli; from lm_jax.convert import of_run; cli.run_command(of_run.write)"
ALONE = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "JAX_NUM_PROCESSES": "1", "LM_JAX_FAULT": ""}


def check(found: load_model.ModelRef, ids: SpecialIds) -> None:
    """Raises UserError where no family, or no file of a tokenizer, can say what the run is, or the folder has something else.

    `found` is the step that may be there already, `ids` are those of its texts.
    """
    folder = found.config.train.export_to
    if is_url(epath.Path(folder)):
        raise UserError(f"{KEY} = {folder!r}: a folder of this machine is expected; copy it to a bucket after the run")
    try:
        leaving.check(found, ids)
    except UserError as error:
        raise UserError(f"{KEY} = {folder!r}: {error}") from None
    is_empty = not os.path.lexists(folder) or (os.path.isdir(folder) and not os.listdir(folder))
    if distributed.is_main_process() and not is_empty and not is_there(found):
        raise UserError(
            f"{KEY} = {folder!r} is there, and not what this run will be: name a folder that is not there yet"
        )


def is_there(found: load_model.ModelRef) -> bool:
    """Whether the folder is this step of this run, which is saved."""
    record = os.path.join(found.config.train.export_to, leaving.RECORD)
    steps = step_folders.complete_steps(step_folders.steps_folder(found.workdir)) if os.path.isfile(record) else []
    return found.step in steps and read_object(record).get("model") == load_model.fingerprint(found)


def export(found: load_model.ModelRef, log: Callable[[str], None]) -> str:
    """Writes and proves the folder where it is not there yet. Returns "", or what was wrong."""
    if is_there(found):
        return ""
    folder, model = found.config.train.export_to, f"{found.workdir}@{found.step}"
    log(f"exporting step {found.step:,} to {folder}")
    line = [sys.executable, "-c", IN_CHILD, model, folder, found.parts.path]
    package = os.path.dirname(os.path.dirname(os.path.abspath(cli.__file__)))
    environment = os.environ | ALONE | {"PYTHONPATH": os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    if done.stdout.strip():
        log(done.stdout.strip())
    if not done.returncode:
        return ""
    said = done.stderr.strip().removeprefix("lm_jax: ") or f"the process that exports ended with {done.returncode}"
    return f"{KEY} = {folder!r}: " + "\n".join(said.split("\n")[-4:])


def write(arguments: list[str]) -> int:
    """In that process: the folder of a MODEL, proven where `transformers` is installed."""
    end_with_parent(0, 0)
    model, folder, parts = arguments
    log = Terminal()
    again = shlex.join(["python", "tools/convert_checkpoint.py", model, folder, "--unproven"])
    with jax.set_mesh(make_mesh(Mesh(data=1), [distributed.own(distributed.devices())])):
        one = leaving.of_model(load_model.locate_with(model, parts, log))
        leaving.write_folder(folder, one, transformers_peer.prover(False, again, log), log)
    log(f"wrote {folder}, a {one.described.content['architectures'][0]}")
    return 0
