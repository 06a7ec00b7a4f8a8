"""From an experiment's ConfigDict to a checked `Config`.

Each setting is checked by itself, derived ones are filled in, and then the table `CLASHES` is held against the whole:
the first of its rows that is true of the Config is the error that the user reads.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lm_jax.config import FIRST_LOSS_SCALE, LARGEST_LOSS_SCALE, SECTIONS, Config, flatten, leaves, unflatten
from lm_jax.errors import UserError, nearest
from lm_jax.knob import checked
from lm_jax.model_config import LARGEST_HEAD, NUM_SENTINELS, OBJECTIVES, ONE_STACK, TASKS
from lm_jax.other_words import OTHER_AXES, answer
from lm_jax.reach import check_reach, is_read, unread

WITH_LORA = "/lora_|^(labels|pooler)/"  # what is trained beside a frozen base; a pooler belongs to the head
OF_MACHINE = {path: field.default for path, field in leaves().items() if field.metadata["machine"]}


def resolve(config) -> Config:
    """A ConfigDict or nested dict -> a checked Config.

    Raises UserError for what is wrong by itself, then for what nothing reads, then for what does not go together.
    """
    flat = each_checked(flatten(config))
    check_reach(flat)
    return _derived(flat)


def resolve_found(config) -> Config:
    """`resolve` for the config of a saved run or a foreign folder, which nobody typed here.

    Settings that only concern the machine it was trained on (attention's backend, mesh, recomputation, workers) and
    settings that nothing reads get their defaults. Raises UserError.
    """
    flat = each_checked(flatten(config) | OF_MACHINE)
    return _derived(flat | {path: leaves()[path].default for path in unread(flat)})


def check_key(path: str, value: Any = None, flat: Mapping[str, Any] | None = None) -> None:
    """Raises UserError for a path that names no leaf, with the nearest one that does.

    `value` is what `--config.<path>=` gave, `flat` what is known of the config beside it.
    """
    if path in leaves():
        return
    section, _, name = path.partition(".")
    if section == "mesh" and name in OTHER_AXES:
        raise UserError(f"config.{path}: {OTHER_AXES[name]}")
    if value is not None and (words := answer(path, value, flat or {}, typed=True)):
        raise UserError(f"--config.{path[:100]}={str(value)[:100]}{words}")
    if section not in SECTIONS:
        raise UserError(f"config.{path}: no section {section!r}{nearest(path, leaves())}")
    names = ", ".join(field.name for field in dataclasses.fields(SECTIONS[section]))
    near = nearest(path, leaves()) or f"; {section} has: {names}"
    raise UserError(f"config.{path}: {section} has no {name!r}{near}" if name else f"config.{path} is a section{near}")


def each_checked(flat: dict[str, Any]) -> dict[str, Any]:
    """Every leaf by itself. Raises UserError."""
    for path in flat:
        check_key(path)
    for path in leaves():
        if path not in flat:
            raise UserError(f"config.{path} is missing")
    return {path: checked(path, flat[path], field) for path, field in leaves().items()}


def _derived(flat: dict[str, Any]) -> Config:
    """A Config of checked values, those that are derived filled in. Raises UserError for what does not go together."""
    nested = unflatten(flat)
    model = nested["model"]
    if is_read(flat, "model.num_heads"):
        model |= _sizes(model)
    model["head"] = TASKS[nested["train"]["task"]][0] if nested["train"]["task"] else model["head"]
    if model["lora_rank"]:
        nested["optimizer"]["trainable"] = nested["optimizer"]["trainable"] or WITH_LORA
    config = Config(**{name: kind(**nested[name]) for name, kind in SECTIONS.items()})
    check_together(config)
    return config


def _sizes(model: dict[str, Any]) -> dict[str, int]:
    """num_kv_heads, head_dim and mlp_dim, as given or derived. Raises UserError where no size of a head fits."""
    dim, heads, head_dim = model["model_dim"], model["num_heads"], model["head_dim"]
    if not head_dim and dim % heads:
        wider = math.ceil(dim / heads) * heads
        raise UserError(
            f"config.model.model_dim = {dim} does not divide into num_heads = {heads} heads; "
            f"the next that does is {wider} (or set config.model.head_dim)"
        )
    head_dim = head_dim or dim // heads
    if head_dim > LARGEST_HEAD:
        raise UserError(
            f"config.model.num_heads = {heads} of model_dim = {dim} are {head_dim} wide each, and attention takes up to "
            f"{LARGEST_HEAD}: at least {math.ceil(dim / LARGEST_HEAD)} heads"
        )
    derived = {"num_kv_heads": model["num_kv_heads"] or heads, "head_dim": head_dim}
    return derived | {"mlp_dim": model["mlp_dim"] or 4 * dim}


Words = dict[str, Any]  # that a message names beside the settings; empty where nothing is wrong


class Clash(NamedTuple):
    """Settings that do not go together: where `found` is true of a Config, `message` and then `mend` are the error.

    Both are format strings over the sections, such as {model.window}, and over the words that `found` gives, if it
    gives some.
    """

    found: Callable[[Config], bool | int | str | Words]
    message: str
    mend: str = ""


def check_together(config: Config) -> None:
    """Raises UserError for the first of CLASHES that holds."""
    sections = {name: getattr(config, name) for name in SECTIONS}
    for clash in CLASHES:
        if found := clash.found(config):
            words = found if isinstance(found, dict) else {}
            raise UserError((clash.message + clash.mend).format(**sections, **words))


def _nearest_divisor(small: int | str, large: int) -> Words:
    """Empty where `small` divides `large`, or is off (0) or decided later ("auto")."""
    if not small or isinstance(small, str) or large % small == 0:
        return {}
    below = (n for n in range(1, math.isqrt(large) + 1) if large % n == 0)
    return {
        "near": min((n for low in below for n in (low, large // low)), key=lambda n: abs(n - small)),
        "large": large,
    }


def _one_stack(config: Config) -> bool:
    return config.model.kind in ONE_STACK["model.kind"]


def _odd_share(config: Config) -> Words:
    """The first share of a head that is no even number of dims, and the nearest that is one."""
    model = config.model
    for share in model.rotary_share if model.positions == "rotary" and _one_stack(config) else ():
        width = int(model.head_dim * share)
        if width % 2 or (share and not width):
            return {"share": share, "near": 2 * max(1, round(model.head_dim * share / 2)) / model.head_dim}
    return {}


def _yarn_without_ends(config: Config) -> bool:
    factor, low, _, length = config.model.rotary_scaling
    yarn = config.model.rotary_scaling_kind == "yarn" and factor > 1 and _one_stack(config)
    return yarn and (not low or not length or config.model.rotary_base <= 1)


def _vanishing_multiplier(config: Config) -> bool:
    embedding, branch, attention, output = config.model.multipliers
    return min(embedding, branch, output) < 1e-6 or 0 < attention < 1e-6


def _objective_of_another_kind(config: Config) -> Words:
    objective, fitting = config.data.objective, OBJECTIVES.get(config.model.kind, ("causal",))
    if objective in fitting:
        return {}
    kind = next((kind for kind, objectives in OBJECTIVES.items() if objective in objectives), "transformer")
    return {"article": "an" if kind[0] == "e" else "a", "kind": kind, "fitting": " or ".join(fitting)}


def _head_without_task(config: Config) -> Words:
    tasks = [name for name, (head, _) in TASKS.items() if head and head == config.model.head]
    return {"task": tasks[0]} if tasks and not config.train.task else {}


def _task_of_another_kind(config: Config) -> Words:
    _, kinds = TASKS.get(config.train.task, ("", (config.model.kind,)))
    if config.model.kind in kinds:
        return {}
    return {"kinds": " or ".join(kinds), "kind": kinds[0], "objective": OBJECTIVES.get(kinds[0], ("causal",))[0]}


def _labels_not_told_apart(config: Config) -> bool:
    head, _ = TASKS.get(config.train.task, ("", ()))
    labels = config.model.labels
    return head in ("labels", "tags") and (len(set(labels)) < 2 or len(set(labels)) < len(labels))


def _no_power_of_two(config: Config) -> Words:
    scale = config.optimizer.loss_scale
    wrong = scale & (scale - 1) or scale > LARGEST_LOSS_SCALE
    return {"near": min(2 ** round(math.log2(scale)), LARGEST_LOSS_SCALE)} if wrong else {}


def _mesh_axis_without_devices(config: Config) -> Words:
    for axis, size in dataclasses.asdict(config.mesh).items():
        if size != "auto" and size < 1 and size != -1:
            what = "slices, or -1 for all that there are" if axis == "slices" else "devices, or -1 for the rest"
            return {"axis": axis, "size": size, "what": what}
    return {}


def _two_rests(config: Config) -> Words:
    axes = {axis: size for axis, size in dataclasses.asdict(config.mesh).items() if axis != "slices"}
    return {"axes": axes} if list(axes.values()).count(-1) > 1 else {}


LONGEST_CORRUPTED = round(3.0 * (NUM_SENTINELS - 1) / 0.15)  # tokens of a row: spans of three tokens, 15% of all
LARGEST_BETA = (
    0.99  # of a moment in bfloat16: from 1 - 2^-8 on, what it loses in a step is rounded away, and it never falls
)

CLASHES = (
    Clash(
        lambda c: _nearest_divisor(c.model.num_kv_heads, c.model.num_heads),
        "config.model.num_kv_heads = {model.num_kv_heads} does not divide num_heads = {large}",
        "; the nearest is {near}",
    ),
    Clash(
        lambda c: c.model.num_layers % len(c.model.window) and {"count": len(c.model.window)},
        "config.model.window = {model.window}: {count} windows do not repeat evenly over num_layers = {model.num_layers}",
    ),
    Clash(
        lambda c: c.model.num_experts and c.model.experts_per_token > c.model.num_experts,
        "config.model.experts_per_token = {model.experts_per_token}: there are num_experts = {model.num_experts}",
    ),
    Clash(
        lambda c: c.model.num_experts and (c.model.bias or not c.model.gated),
        "config.model.num_experts: experts are gated and have no biases",
        "\nadd --config.model.gated=true --config.model.bias=false",
    ),
    Clash(
        lambda c: c.model.rotary_scaling[0] < 1 or not c.model.rotary_scaling[1] < c.model.rotary_scaling[2],
        "config.model.rotary_scaling = {model.rotary_scaling}",
        ": expected a factor from 1 on, and low < high",
    ),
    Clash(
        lambda c: _one_stack(c) and len(c.model.rotary_share) not in (1, len(c.model.window)),
        "config.model.rotary_share = {model.rotary_share}",
        ": one value, or one for each of window = {model.window}",
    ),
    Clash(
        _odd_share,
        "config.model.rotary_share = {model.rotary_share}: {share} of head_dim = {model.head_dim} is no even number",
        "; the nearest that is one is {near}",
    ),
    Clash(
        _yarn_without_ends,
        "config.model.rotary_scaling = {model.rotary_scaling} of kind yarn",
        ": expected low and length above 0, such as (4.0, 1.0, 32.0, 4096.0), and rotary_base = {model.rotary_base} above 1",
    ),
    Clash(
        lambda c: any(0 < cap < 0.1 for cap in c.model.logit_softcap),
        "config.model.logit_softcap = {model.logit_softcap}",
        ": expected 0, or at least 0.1",
    ),
    Clash(
        _vanishing_multiplier,
        "config.model.multipliers = {model.multipliers}",
        ": expected at least 1e-6, or 0 for products of queries and keys",
    ),
    Clash(
        lambda c: c.model.positions in ("rotary", "sinusoidal") and c.model.head_dim % 2,
        "config.model.head_dim = {model.head_dim} must be even for {model.positions} positions",
    ),
    Clash(
        lambda c: c.model.positions == "sinusoidal" and c.model.model_dim % 2,
        "config.model.model_dim = {model.model_dim} must be even for sinusoidal positions",
    ),
    Clash(
        _objective_of_another_kind,
        "config.data.objective = {data.objective} needs {article} {kind}",
        ": add --config.model.kind={kind}; a model of kind {model.kind} takes {fitting}",
    ),
    Clash(
        lambda c: c.data.objective == "span_corruption" and c.data.sequence_length > LONGEST_CORRUPTED,
        "config.data.sequence_length = {data.sequence_length}: its spans need more than "
        + f"{NUM_SENTINELS} sentinels",
        f"; at most {LONGEST_CORRUPTED}",
    ),
    Clash(
        lambda c: c.model.positions == "relative" and c.model.kind != "encoder_decoder",
        "config.model.positions = relative is of kind encoder_decoder",
        "; a model of kind {model.kind} takes rotary",
    ),
    Clash(
        lambda c: c.model.kind == "encoder_decoder" and c.model.norm_place in ("both", "branch"),
        "config.model.norm_place = {model.norm_place} is not of an encoder_decoder",
        ", which takes pre or post",
    ),
    Clash(_head_without_task, "config.model.head = {model.head} without a task", ": add --config.train.task={task}"),
    Clash(
        _task_of_another_kind,
        "config.train.task = {train.task} needs a model of kind {kinds}, not {model.kind}",
        ": add\n--config.model.kind={kind} --config.data.objective={objective}",
    ),
    Clash(
        _labels_not_told_apart,
        "config.model.labels = {model.labels}: {train.task} tells at least two labels apart, each named once",
        ', such as ("negative", "positive");\nthose of a folder of records are read where none are given',
    ),
    Clash(
        lambda c: c.train.task and c.data.packing == "split",
        "config.data.packing = split would part records",
        ": take best_fit (too long ones are cut, and counted) or best_fit_whole (they are refused)",
    ),
    Clash(
        _no_power_of_two,
        "config.optimizer.loss_scale = {optimizer.loss_scale} is no power of two up to 2^24",
        "; the nearest is {near}",
    ),
    Clash(
        lambda c: c.model.compute_dtype == "float16" and not c.optimizer.loss_scale,
        "config.model.compute_dtype = float16 without a loss scale: most gradients are too small for float16",
        f"\nadd --config.optimizer.loss_scale={FIRST_LOSS_SCALE}, or compute in bfloat16",
    ),
    Clash(
        lambda c: c.optimizer.moment_dtype == "bfloat16" and max(c.optimizer.beta1, c.optimizer.beta2) > LARGEST_BETA,
        "config.optimizer.moment_dtype = bfloat16: beta1 = {optimizer.beta1} or beta2 = {optimizer.beta2} is too near 1",
        f" for it\ntake at most {LARGEST_BETA}, or --config.optimizer.moment_dtype=float32",
    ),
    Clash(
        lambda c: c.data.validation_fraction + c.data.test_fraction >= 0.9,
        "config.data: validation_fraction + test_fraction leave less than a tenth for training",
    ),
    Clash(
        lambda c: c.data.batch_ramp[1] and not c.data.batch_ramp[0],
        "config.data.batch_ramp = {data.batch_ramp} has no rows at the start",
        ": (0, 0) is off, (8, {data.batch_ramp[1]!r}) starts with 8",
    ),
    Clash(
        lambda c: _nearest_divisor(c.data.batch_ramp[0], c.data.global_batch_size),
        "config.data.batch_ramp[0] = {data.batch_ramp[0]} does not divide global_batch_size = {large}",
        "; the nearest is {near}",
    ),
    Clash(
        lambda c: _nearest_divisor(c.train.microbatch_rows, c.data.batch_ramp[0] or c.data.global_batch_size),
        "config.train.microbatch_rows = {train.microbatch_rows} does not divide the (smallest) batch of rows = {large}",
        "; the nearest is {near}",
    ),
    Clash(
        lambda c: (c.checkpoint.keep_best or c.evaluate.patience) and not c.evaluate.every,
        "config.checkpoint.keep_best and config.evaluate.patience compare evaluations, and evaluate.every = 0 makes none",
        ":\nadd such as --config.evaluate.every=100",
    ),
    Clash(_mesh_axis_without_devices, "config.mesh.{axis} = {size}", ": expected a number of {what}"),
    Clash(_two_rests, "config.mesh: only one axis can be -1 (the rest), got {axes}"),
)
