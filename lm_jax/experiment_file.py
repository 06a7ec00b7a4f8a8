"""The file of an experiment: found, executed as a module, and where it failed. It is code of the user's, and runs as such."""

import contextlib
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Iterator
from types import ModuleType

from lm_jax.errors import UserError, nearest, shown
from lm_jax.other_words import answer

LARGEST_EXPERIMENT = 2**20  # bytes


def find_experiment(experiment: str) -> tuple[str, str]:
    """(file, variant) of `x.py:variant`; a relative path that is not here may stand in the clone. Raises UserError."""
    path, _, variant = experiment.partition(":")
    clone = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    for candidate in (path, os.path.join(clone, path)):
        if os.path.isfile(candidate):
            return os.path.abspath(candidate), variant
    shipped, folder = os.path.join(clone, "experiments"), os.path.dirname(path) or "."
    folder = folder if os.path.isdir(folder) else shipped
    names = [name for name in sorted(os.listdir(folder)) if name.endswith(".py")] if os.path.isdir(folder) else []
    near = nearest(path, [os.path.join(os.path.relpath(folder), name) for name in names])
    missing = "" if os.path.isdir(shipped) else "; experiments come with a clone of the repository"
    raise UserError(f"--config {experiment}: no such file{near}{missing}")


def executed(path: str, named: str) -> ModuleType:
    """A file of a user's code as a module; `named` is the flag that names it, for messages. Raises UserError."""
    folder = os.path.dirname(path)
    if folder not in sys.path:
        sys.path.insert(0, folder)  # an experiment may import another
    spec = importlib.util.spec_from_file_location(f"experiment_{os.path.basename(path)[:-3]}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{named}: not a Python file")
    if os.path.getsize(path) > LARGEST_EXPERIMENT:
        raise UserError(f"{named}: a file of {os.path.getsize(path):,} bytes is no experiment")
    module = importlib.util.module_from_spec(spec)
    with faults_told(path):
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def faults_told(path: str) -> Iterator[None]:
    """Makes a UserError of whatever the code of a user's file may raise."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(_where_it_failed(error, path)) from error


def _where_it_failed(error: BaseException, path: str) -> str:
    """The line of the experiment file, the type and the first words of what it raised."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if frame.filename == path]
    number = inside[-1].lineno if inside else getattr(error, "lineno", frames[-1].lineno)
    near = os.path.relpath(path)
    where = f"{path if near.startswith('..') else near} line {number}"
    if words := _other_word(error):
        return f"{where}: {words}"
    while error.args and isinstance(error.args[0], Exception):  # ml_collections wraps a KeyError
        error = error.args[0]
    message = re.sub(
        r'Other fields present: "\{.*\}"', "", str(error.args[0] if error.args else error), flags=re.DOTALL
    )
    message = re.sub(r"\s+", " ", message)[:200]
    return f"{where}: {type(error).__name__}: {message}"


def _other_word(error: BaseException) -> str:
    """What a name that no section has means here, where `ml_collections` refused to set or read it; "" elsewhere."""
    frame = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][-1]
    word = frame.f_locals.get("attribute", frame.f_locals.get("key"))
    if not isinstance(word, str) or "ml_collections" not in frame.f_code.co_filename:
        return ""
    value = frame.f_locals.get("value")
    words = answer(word, value, {}, typed=False)
    return (word if value is None else f"{word} = {shown(value)}") + words if words else ""
