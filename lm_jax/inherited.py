"""Settings that are not given and follow from what is: a model's own from `train.init_from`, labels from the table.

What is given and is not the model's own is refused, with both values. A run that goes on keeps what its config.json
has: neither the model nor the table is asked again.
"""

from collections.abc import Collection
from typing import Any

from etils import epath

from lm_jax import load_model, run_folder
from lm_jax.config import Config, flatten, leaves
from lm_jax.config_check import each_checked
from lm_jax.errors import UserError, shown
from lm_jax.model_config import OF_TRAINING, TASKS
from lm_jax.reach import unread
from lm_jax.regular_files import check_url
from lm_jax.step_folders import has_steps

LABELS = "model.labels"
OF_TASK = ("head", "labels")
MODEL = tuple(p for p in leaves() if p.startswith("model.") and p[6:] not in OF_TRAINING.union(OF_TASK))
TEXT = ("data.objective", "data.tokenizer", "data.sequence_length")
FROM_MODEL = (*MODEL, *TEXT)
# May be given beside a model that has another: no parameter depends on it, and longer rows want it.
SCALING = ("model.rotary_scaling", "model.rotary_scaling_kind")
DERIVED = ("model.num_kv_heads", "model.head_dim", "model.mlp_dim")  # 0 says nothing of them
# Tokens of a row where a folder of Hugging Face says how many its model can read, not of how many it learnt: 131,072.
LONGEST_ROW = 2048

Settings = dict[str, Any]  # by path


def found(flat: Settings, given: Collection[str], workdir: str = "") -> dict[str, Settings]:
    """{"model" or "table": what a flat config takes from there}, without what is `given`.

    `workdir` is of a run that may go on. Raises UserError, also for what is given and is not the model's own.
    """
    flat, kept = each_checked(flat), _kept(workdir)
    given = {path for path in given if not (path in DERIVED and flat[path] == 0)}
    init_from, task = flat["train.init_from"], flat["train.task"]
    has_model = init_from != "" and not epath.Path(init_from).is_file()
    theirs = _settings_of(init_from) if has_model and not kept else Config()
    named = dict[str, Settings]()
    if has_model:
        settings = {path: kept[path] for path in FROM_MODEL} if kept else _of_model(flat, given, theirs)
        settings = {path: value for path, value in settings.items() if path not in given}
        idle = {path for path in unread(flat | settings) if path in settings}
        named["model"] = {path: value for path, value in settings.items() if path not in idle}
    head = TASKS.get(task, ("", ()))[0]
    if head in ("labels", "tags") and LABELS not in given:
        labels = kept[LABELS] if kept else _labels(flat)
        same = theirs.model.head == head and set(labels) <= set(theirs.model.labels)
        named |= {"model": named["model"] | {LABELS: theirs.model.labels}} if same else {"table": {LABELS: labels}}
    return named


def told(config: Config, origins: dict[str, dict[str, Any]]) -> str:
    """A line break and a line for each place that settings come from and nobody gave, "" where there is none."""
    lines = []
    for where, name in (("model", config.train.init_from), ("table", config.data.sources[0][0])):
        values = [
            f"{path} = {value!r}"
            for path, value in flatten(config).items()
            if origins.get(path, {}).get("from") == where and value != origins[path]["default"]
        ]
        lines += [f"\nfrom {name}: {', '.join(values)}"] if values else []
    return "".join(lines)


def _kept(workdir: str) -> Settings:
    """The flat config of a run that has steps, {} where there is none. Raises UserError."""
    check_url("--workdir", workdir)
    folder = epath.Path(workdir)
    return each_checked(run_folder.read_config(folder)["config"]) if workdir and has_steps(folder) else {}


def _settings_of(model: str) -> Config:
    """The config of the MODEL that `train.init_from` names. Raises UserError."""
    try:
        return load_model.read_settings(load_model.folder_of(model)[0])
    except UserError as error:
        raise UserError(str(error).replace("--model", "config.train.init_from")) from None


def _of_model(flat: Settings, given: Collection[str], theirs: Config) -> Settings:
    """What a MODEL brings. Raises UserError where `given` settings are not its own, or rows are longer than its table."""
    there, name, length = flatten(theirs), flat["train.init_from"], theirs.data.sequence_length
    fixed = [path for path in MODEL if path in given and path not in SCALING]
    differing = [path for path in fixed if flat[path] != there[path]]
    if (
        theirs.model.positions == "learned"
        and "data.sequence_length" in given
        and flat["data.sequence_length"] > length
    ):
        differing.append("data.sequence_length")
    if differing:
        both = [
            f"config.{path} = {shown(flat[path])} is given, {shown(there[path])} is the model's" for path in differing
        ]
        raise UserError(
            f"config.train.init_from = {name!r} is another model:\n{run_folder.few(both)}\n"
            "leave out what the model brings itself, or name a model that has it"
        )
    folder = load_model.folder_of(name)[0]
    is_table = theirs.model.positions == "learned"
    rows = length if is_table or not load_model.is_hugging_face(folder) else min(length, LONGEST_ROW)
    text = {"data.objective": theirs.data.objective, "data.tokenizer": str(folder), "data.sequence_length": rows}
    return {path: there[path] for path in MODEL} | text


def _labels(flat: Settings) -> tuple[str, ...]:
    """The labels in the records of a flat config, () where its source is not there. Raises UserError where it has no records."""
    from lm_jax.tasks import tables

    source = epath.Path(flat["data.sources"][0][0])
    return tables.labels_of(str(source), flat["train.task"], flat["data.columns"]) if source.exists() else ()
