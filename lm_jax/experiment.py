"""An experiment: the file that `--config` names, executed; overrides; where each value came from; `:smoke`."""

import ast
import contextlib
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import ml_collections

from lm_jax.cli import as_typed, check_text
from lm_jax.config import Config, flatten, leaves, unflatten
from lm_jax.config_check import check_key, resolve
from lm_jax.errors import UserError, nearest, shown
from lm_jax.reach import unread

LARGEST_EXPERIMENT = 2**20  # bytes
SHRUNK = ("model.num_heads", "model.num_kv_heads", "model.head_dim", "model.mlp_dim")  # of those that `shrink` sets


def split_overrides(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """({x.y: v} of `--config.x.y=v` or `--config.x.y v`, the other arguments). Raises UserError for a repeated one."""
    check_text(arguments)
    overrides: dict[str, str] = {}
    rest, waiting = [], list(arguments)
    while waiting:
        argument = waiting.pop(0)
        if not argument.startswith("--config."):
            rest.append(argument)
            continue
        path, equals, value = argument.removeprefix("--config.").partition("=")
        check_key(path)
        if not equals and not waiting:
            raise UserError(f"--config.{path} needs a value, such as --config.{path}=1")
        if path in overrides:
            values = shown(overrides[path]), shown(value or waiting[0])
            raise UserError(f"--config.{path} stands twice: {' and '.join(values)}")
        overrides[path] = value if equals else waiting.pop(0)
    return overrides, rest


def parse_value(path: str, text: str) -> Any:
    """The value that `--config.path=text` means, by the type of the leaf. Raises UserError."""
    kind = leaves()[path].type
    if kind is str:
        return text
    if kind in (bool, bool | str) and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return text  # `resolve` says what was expected


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


def experiment_config(experiment: str) -> ml_collections.ConfigDict:
    """What an experiment file says, `:smoke` shrunk. The file is code and is executed. Raises UserError."""
    path, variant = find_experiment(experiment)
    module = executed(path, f"--config {experiment}")
    with faults_told(path):
        config = _config_of(module, experiment, variant)
    return shrink(config) if variant == "smoke" else config


def shipped() -> list[str]:
    """`experiments/x.py`, or `experiments/x.py:variant` of each, of the clone; [] where there is none. They are executed."""
    folder = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "experiments")
    files = [name for name in sorted(os.listdir(folder)) if name.endswith(".py")] if os.path.isdir(folder) else []
    found = []
    for file in (f"experiments/{name}" for name in files):
        variants = getattr(executed(find_experiment(file)[0], f"--config {file}"), "VARIANTS", ())
        found += [f"{file}:{variant}" for variant in variants] or [file]
    return found


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


def _config_of(module, experiment: str, variant: str) -> ml_collections.ConfigDict:
    """What `get_config` of an experiment returns; for `smoke`, the full config, checked. Raises UserError."""
    if not hasattr(module, "get_config"):
        raise UserError(f"--config {experiment}: the file has no get_config()")
    variants = (*getattr(module, "VARIANTS", ()), "smoke")
    if variant and variant not in variants:
        near = nearest(variant, variants)
        raise UserError(f"--config {experiment}: no variant {variant!r}; there is {', '.join(variants)}{near}")
    takes_variant = inspect.signature(module.get_config).parameters
    config = module.get_config(variant) if takes_variant and variant != "smoke" else module.get_config()
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(
            f"--config {experiment}: get_config() returned {type(config).__name__}, not a ConfigDict; return config"
        )
    if variant == "smoke":
        resolve(config)  # a wrong value is answered by its name before it is shrunk
    return config


def _where_it_failed(error: BaseException, path: str) -> str:
    """The line of the experiment file, the type and the first words of what it raised."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if frame.filename == path]
    number = inside[-1].lineno if inside else getattr(error, "lineno", frames[-1].lineno)
    while error.args and isinstance(error.args[0], Exception):  # ml_collections wraps a KeyError
        error = error.args[0]
    message = re.sub(
        r'Other fields present: "\{.*\}"', "", str(error.args[0] if error.args else error), flags=re.DOTALL
    )
    message = re.sub(r"\s+", " ", message)[:200]
    near = os.path.relpath(path)
    return f"{path if near.startswith('..') else near} line {number}: {type(error).__name__}: {message}"


def shrink(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """`:smoke` of every experiment: the same program in miniature, two steps on anything that computes."""
    model, data = config.model, config.data
    group = max(1, model.num_heads // (model.num_kv_heads or model.num_heads))
    shares = tuple(model.rotary_share) * (len(model.window) // len(model.rotary_share))
    kinds = tuple(dict.fromkeys(zip(model.window, shares, strict=True)))  # each kind of layer once
    model.window, shares = zip(*kinds, strict=True)
    model.rotary_share = shares if len(set(shares)) > 1 else shares[:1]
    model.num_layers = 2 * len(model.window) if len(model.window) > 1 else 2
    model.model_dim, model.mlp_dim, model.head_dim = 64, 128, 16
    model.num_heads, model.num_kv_heads = 4, 4 // min(group, 4)
    model.num_experts, model.experts_per_token = min(model.num_experts, 4), min(model.experts_per_token, 2)
    model.window = tuple(min(window, 16) for window in model.window)
    data.tokenizer = "sentencepiece:512" if data.tokenizer.startswith("sentencepiece:") else data.tokenizer
    data.sequence_length, data.global_batch_size, data.batch_ramp = 64, 8, (0, 0)
    config.optimizer.warmup, config.optimizer.decay_over = 1, 0
    config.train.num_steps, config.train.microbatch_rows, config.train.init_from = 2, 8, ""
    config.checkpoint.every, config.evaluate.every, config.evaluate.num_rows, config.log.every = 2, 2, 8, 1
    for path, value in without_unread(flatten(config)).items():
        if path in SHRUNK:
            section, name = path.split(".")
            config[section][name] = value
    return config


def without_unread(flat: dict[str, Any], given=()) -> dict[str, Any]:
    """A shrunk config in which sizes that a model of this kind has not are as by default, but those `given` by name."""
    return flat | {path: leaves()[path].default for path in unread(flat) if path in SHRUNK and path not in given}


def load_config(
    experiment: str, overrides: dict[str, Any], config: ml_collections.ConfigDict | None = None
) -> tuple[Config, dict[str, dict[str, Any]]]:
    """The resolved config, and for every leaf that is not its default where it came from: {path: {from, default}}.

    `config`: what stands in for the experiment's file. Overrides that are text are read as on a command line.
    """
    defaults, from_file = flatten(Config()), flatten(experiment_config(experiment) if config is None else config)
    given = {path: parse_value(path, x) if isinstance(x, str) else x for path, x in overrides.items()}
    origins = {
        path: {"from": "file", "default": defaults[path]}
        for path, value in from_file.items()
        if path in defaults and value != defaults[path]
    }
    for path in given:
        origins[path] = {"from": "command line", "default": defaults[path], "file": from_file[path]}
    flat = from_file | given
    return resolve(unflatten(without_unread(flat, given) if experiment.endswith(":smoke") else flat)), origins


def table(config: Config, origins: dict[str, dict]) -> str:
    """One line a setting: path, value, where the value came from, meaning."""
    rows = []
    for path, field in leaves().items():
        section, name = path.split(".")
        value = getattr(getattr(config, section), name)
        rows.append((path, repr(value), origins.get(path, {}).get("from", "default"), field.metadata["meaning"]))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(f"{a:<{widths[0]}} = {b:<{widths[1]}}  {c:<{widths[2]}}  {d}" for a, b, c, d in rows)


def as_given(experiment: str, config: Config, origins: dict[str, dict[str, Any]]) -> str:
    """The command that trains this, to paste; without its workdir and number of steps. "" of a config without a file."""
    if not experiment:
        return ""
    values = flatten(config)
    given = [path for path, origin in origins.items() if origin["from"] == "command line" and path != "train.num_steps"]
    return as_typed("-m", "lm_jax.main", "--config", experiment, *[f"--config.{path}={values[path]}" for path in given])


def run_name(experiment: str) -> str:
    """`gpt_125m` or `gpt_125m-smoke`: the experiment and its variant; of a config without a file `notebook`."""
    path, _, variant = experiment.partition(":")
    return os.path.basename(path).removesuffix(".py") + "notebook" * (not path) + (f"-{variant}" if variant else "")
