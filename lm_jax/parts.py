"""Parts of training that a user's own code replaces: the block of a Transformer, the loss of a token, the update rule.

An experiment file that defines `get_parts()` returns them as `Parts`. config.json keeps the path of that file, its hash
and what it replaces. No code runs because the folder of a run names it: a run with parts is resumed by an experiment
whose file has the recorded hash, and read with `--parts FILE`, which is executed once its hash is right.
"""

import dataclasses
import inspect
import os
from collections.abc import Callable
from typing import Any

import jax
import optax

from lm_jax import experiment_file
from lm_jax.config import Config, Optimizer
from lm_jax.errors import UserError
from lm_jax.files import file_hash
from lm_jax.loss import token_losses
from lm_jax.model.transformer import Block
from lm_jax.update_rules import update_rule

MEND = "leave get_parts() out, or what of it does not fit this config"


@dataclasses.dataclass(frozen=True)
class Parts:
    """What can be replaced, and the file that does it. Each part is a class or a function of the file of `get_parts`."""

    block: type[Block] = Block
    # (float32 logits [B, T, V], int32 targets [B, T]) -> float32 [B, T], what training minimises. What is reported and
    # evaluated stays the cross entropy.
    loss: Callable[[jax.Array, jax.Array], jax.Array] = token_losses
    # (config.optimizer, declarations) -> the rule between clipping and weight decay; the schedule multiplies its updates.
    optimizer: Callable[[Optimizer, dict], optax.GradientTransformation] = update_rule
    path: str = ""  # of the file, as it was found; set when it is read
    sha256: str = ""

    @property
    def replaced(self) -> list[str]:
        """The names of the parts that are not the ordinary ones."""
        return [name for name in ("block", "loss", "optimizer") if getattr(self, name) is not getattr(ORDINARY, name)]

    @property
    def record(self) -> dict[str, Any]:
        """What config.json keeps: {"parts": {"path", "sha256", "replaced"}}, or nothing where all are ordinary."""
        said = {"path": self.path, "sha256": self.sha256, "replaced": self.replaced}
        return {"parts": said} if self.replaced else {}


ORDINARY = Parts()


def of_experiment(named: str) -> Parts:
    """The parts of an experiment, `file.py:variant`, "" = of no file. The file is executed. Raises UserError."""
    return (
        ORDINARY
        if not named
        else _of_module(experiment_file.executed(experiment_file.find_experiment(named)[0], f"--config {named}"))
    )


def _of_module(module: Any) -> Parts:
    """What `get_parts()` of an executed file returns, with the file that defines it. Raises UserError."""
    if not hasattr(module, "get_parts"):
        return ORDINARY
    with experiment_file.faults_told(module.__file__ or ""):
        path = os.path.abspath(inspect.getfile(module.get_parts))  # an experiment may import it from another
        found = module.get_parts()
    near = os.path.relpath(path)
    near = path if near.startswith("..") else near
    if not isinstance(found, Parts):
        raise UserError(f"{near}: get_parts() returned {type(found).__name__}; return lm_jax.parts.Parts(block=...)")
    for name in found.replaced:
        part = getattr(found, name)
        if not (inspect.isclass(part) and issubclass(part, Block) if name == "block" else inspect.isfunction(part)):
            expected = "a class over lm_jax.model.transformer.Block" if name == "block" else "a function"
            raise UserError(f"{near}: {name} of get_parts() is {type(part).__name__}; expected {expected}")
        if part.__module__ != module.get_parts.__module__:
            raise UserError(
                f"{near}: {name} of get_parts() is defined in {part.__module__}; define it in the file itself:\n"
                "a run keeps the hash of this file, which says nothing of another"
            )
    return dataclasses.replace(found, path=near, sha256=str(file_hash(path)["sha256"])) if found.replaced else ORDINARY


def of_run(recorded: dict[str, Any], given: str, model: str) -> Parts:
    """The parts of a run: `recorded` in its config.json, {} where it has none; `given` is the value of --parts.

    The file is executed once its hash is known to be the recorded one. Raises UserError.
    """
    if not recorded:
        return ORDINARY
    needed = f"--parts {recorded['path']} (sha256 {recorded['sha256']})"
    replaced = " and ".join(recorded["replaced"])
    if not given:
        raise UserError(
            f"{model} was trained with its own {replaced}, and code is executed only where you name it\n"
            f"read the file, then say {needed}"
        )
    if not os.path.isfile(given):
        raise UserError(f"--parts {given}: no such file; {model} needs {needed}")
    if (found := file_hash(given)["sha256"]) != recorded["sha256"]:
        raise UserError(
            f"--parts {given} is another file than {model} was trained with, and is not executed:\n"
            f"its sha256 is {found}\nput back {needed.removeprefix('--parts ')}"
        )
    return _of_module(experiment_file.executed(os.path.abspath(given), f"--parts {given}"))


def of_source(recorded: dict[str, Any], mine: Parts, model: str) -> Parts:
    """The parts of a run that another one starts from: ordinary where its model is, else `mine`. Raises UserError."""
    if recorded.get("sha256") == mine.sha256:
        return mine
    if "block" not in recorded.get("replaced", ()):
        return ORDINARY
    raise UserError(
        f"{model} has the block of {recorded['path']} (sha256 {recorded['sha256']}), and this experiment has not\n"
        f"put into it: from {os.path.basename(recorded['path']).removesuffix('.py')} import get_parts"
    )


def check_same_parts(workdir: Any, saved: dict[str, Any], mine: Parts) -> None:
    """Raises UserError where a run, whose config.json is `saved`, was started with other parts."""
    there = saved.get("parts", {})
    if not saved or there.get("sha256", "") == mine.sha256:
        return
    said = lambda path, digest: f"those of {path} (sha256 {digest})" if path else "the ordinary ones"
    raise UserError(
        f"{workdir} holds a run with other parts than get_parts() gives:\n"
        f"there {said(there.get('path'), there.get('sha256'))}\nhere {said(mine.path, mine.sha256)}\n"
        f"{'put that file back' if there else 'leave get_parts() out'}, or use another --workdir"
    )


def check_parts(config: Config, parts: Parts) -> None:
    """Raises UserError where a replaced part would not be read, or would leave a setting unread."""
    said = f"{parts.path}: get_parts() replaces the"
    if parts.block is not Block and config.model.kind not in ("transformer", "encoder"):
        raise UserError(f"{said} block, and config.model.kind = {config.model.kind} has none\n{MEND}")
    task = config.train.task
    if parts.loss is not token_losses and (config.model.head or task == "preference"):
        raise UserError(f"{said} loss of a token, and config.train.task = {task} has its own\n{MEND}")
    for name in ("name", "moment_dtype") if parts.optimizer is not update_rule else ():
        if (value := getattr(config.optimizer, name)) != getattr(Optimizer(), name):
            raise UserError(f"{said} optimizer, so config.optimizer.{name} = {value} is not read: leave it out")
