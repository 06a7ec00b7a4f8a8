"""The config of an experiment: what its file says, overrides, where each value came from, `:smoke`."""

import ast
import os
from typing import Any

import ml_collections

from lm_jax.cli import as_typed, check_text
from lm_jax.config import Config, flatten, leaves, unflatten
from lm_jax.config_check import check_key, resolve
from lm_jax.errors import UserError, nearest, shown
from lm_jax.experiment_file import executed, faults_told, find_experiment
from lm_jax.knob import Section
from lm_jax.reach import unread

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
        if not equals and not waiting:
            check_key(path)
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
        found += [f"{file}:{variant}" for variant in variants if variant != "smoke"] or [file]
    return found


def _config_of(module, experiment: str, variant: str) -> ml_collections.ConfigDict:
    """What `get_config` of an experiment returns; for `smoke`, the full config, checked. Raises UserError.

    A file that lists `smoke` among its variants says itself what is to be shrunk, others shrink what they are without one.
    """
    if not hasattr(module, "get_config"):
        raise UserError(f"--config {experiment}: the file has no get_config()")
    named = tuple(getattr(module, "VARIANTS", ()))
    variants = tuple(dict.fromkeys((*named, "smoke")))
    if variant and variant not in variants:
        near = nearest(variant, variants)
        raise UserError(f"--config {experiment}: no variant {variant!r}; there is {', '.join(variants)}{near}")
    config = module.get_config(variant) if variant in named else module.get_config()
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(
            f"--config {experiment}: get_config() returned {type(config).__name__}, not a ConfigDict; return config"
        )
    if variant == "smoke":
        resolve(config)  # a wrong value is answered by its name before it is shrunk
    return config


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
    experiment: str, overrides: dict[str, Any], workdir: str = "", config: ml_collections.ConfigDict | None = None
) -> tuple[Config, dict[str, dict[str, Any]]]:
    """The resolved config, and for every leaf that is not its default where it came from: {path: {from, default}}.

    `config`: what stands in for the experiment's file. Overrides that are text are read as on a command line. What a
    model or a table brings is read there, or in the `workdir` of a run that goes on (`inherited.py`); `:smoke` takes what
    a model is from the model, if one is given: that cannot be shrunk.
    """
    defaults, written = flatten(Config()), experiment_config(experiment) if config is None else config
    from_file = flatten(written)
    read = lambda path, x: parse_value(path, x) if isinstance(x, str) else x
    known = {path: read(path, x) for path, x in overrides.items() if path in leaves()}
    for path, x in overrides.items():
        check_key(path, x, from_file | known)
    given = {path: known[path] for path in overrides}
    origins = {
        path: {"from": "file", "default": defaults[path]}
        for path, value in from_file.items()
        if path in defaults and value != defaults[path]
    }
    for path in given:
        origins[path] = {"from": "command line", "default": defaults[path], "file": from_file[path]}
    flat, is_small = from_file | given, experiment.endswith(":smoke")
    if flat.get("train.init_from") or flat.get("train.task"):
        from lm_jax import inherited  # it wakes JAX up

        set_there = {f"{name}.{leaf}" for name in written for leaf in Section.said(written[name])}
        stated = (origins.keys() | set_there) - set(inherited.FROM_MODEL if is_small else ()) | given.keys()
        for where, settings in inherited.found(flat, stated, workdir).items():
            flat |= settings
            origins |= {path: {"from": where, "default": defaults[path]} for path in settings}
    return resolve(unflatten(without_unread(flat, given) if is_small else flat)), origins


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
    """The command that trains this, to paste; without its workdir, number of steps and export. "" of a config without a file."""
    if not experiment:
        return ""
    values = flatten(config)
    ends = "train.num_steps", "train.export_to"
    given = [path for path, origin in origins.items() if origin["from"] == "command line" and path not in ends]
    return as_typed("-m", "lm_jax.main", "--config", experiment, *[f"--config.{path}={values[path]}" for path in given])


def run_name(experiment: str) -> str:
    """`gpt_125m` or `gpt_125m-smoke`: the experiment and its variant; of a config without a file `notebook`."""
    path, _, variant = experiment.partition(":")
    return os.path.basename(path).removesuffix(".py") + "notebook" * (not path) + (f"-{variant}" if variant else "")
