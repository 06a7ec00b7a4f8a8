"""One setting of the config: how it is declared, and whether a value fits its declaration; what an experiment has set."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, get_args, get_origin

import ml_collections

from lm_jax.errors import UserError, nearest, shown

Length = (
    int | str
)  # a number of steps, or a string with its unit: "375M tokens", "2 epochs", "30 min" (a run, or between saves)
Weight = float | tuple[tuple[int, float], ...]  # of a source in the mixture; or ((first row, weight), ...), rising rows
Sources = tuple[tuple[str, Weight], ...]

SMALLEST, LARGEST = 1e-30, 1e30  # of a number that is not 0, which float32 is to hold, and its square root or square
LONGEST_TEXT, LONGEST_TUPLE = 10_000, 1_000
LONGEST = 1e18  # tokens, epochs or minutes
MOST_STEPS = 2**31 - 1  # the step is an int32
LENGTH = re.compile(r"(?P<number>[0-9]+(\.[0-9]+)?)(?P<prefix>[kKMBT]?) ?(?P<unit>tokens|epochs|steps|min)")


class Section(ml_collections.ConfigDict):
    """A section of a config that an experiment fills in; it remembers what was set, also to what it was by default.

    A copy does not: of that it is known what differs from the defaults.
    """

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        self.__dict__.get("_said", set()).add(name)

    @classmethod
    def of(cls, settings: dict[str, Any]) -> "Section":
        """A section of these defaults, of which nothing is set."""
        section = cls(settings, type_safe=False)
        section.__dict__["_said"] = set()
        return section

    @staticmethod
    def said(section: ml_collections.ConfigDict) -> set[str]:
        """The names of the settings that were set."""
        return set(vars(section).get("_said", ()))


def knob(default, meaning: str, *, choices=(), within=(None, None), fixed=True, reach=None, idle=(), machine=False):
    """A dataclass field with its default, its meaning, and the range (low, high) of its numbers.

    `fixed`: a run that resumes must keep the value.

    `reach` is {path of another setting: the values with which this one is read; () = any but the default and "off"}. The
    setting is read where all of these conditions hold; elsewhere it must have its default, or a value in `idle`, which
    describes what happens there anyway. `machine`: the setting concerns only the machine that trains; whoever reads the
    trained model ignores it.
    """
    metadata = {"meaning": meaning, "choices": choices, "low": within[0], "high": within[1], "fixed": fixed}
    metadata |= {"reach": reach or {}, "idle": idle, "machine": machine}
    return dataclasses.field(default=default, metadata=metadata)


def length(default, meaning: str, low: int = 0, **more):
    """A field that is a length of time or a number of steps; a run that resumes may change it."""
    return knob(default, meaning, within=(low, MOST_STEPS), fixed=False, **more)


def axis(default: int | str, meaning: str, choices=()):
    """A field that is the size of a mesh axis, which the machine of the training decides."""
    return knob(default, meaning, within=(-1, 2**20), choices=choices, fixed=False, machine=True)


def parse_length(length: Length) -> tuple[float, str]:
    """`"375M tokens"` -> (375e6, "tokens"); 100 -> (100, "steps")."""
    if isinstance(length, int):
        return length, "steps"
    match = LENGTH.fullmatch(length)
    assert match, length  # `checked` has seen it
    scale = {"": 1, "k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}[match["prefix"]]
    return float(match["number"]) * scale, match["unit"]


def checked(path: str, value: Any, field: dataclasses.Field) -> Any:
    """`value` as the type of the setting at `path`. Raises UserError that names path, value and what is expected."""
    if field.type == Sources:
        return checked_sources(path, value)
    kinds = get_args(field.type)
    if get_origin(field.type) is not tuple:
        return _checked_item(path, value, field.type, field.metadata)
    if not isinstance(value, (tuple, list)):
        raise _refusal(path, value, "expected a tuple, such as (1, 2) or (1,)", field.metadata)
    kinds = kinds[:1] * len(value) if kinds[-1] is Ellipsis else kinds
    if len(value) != len(kinds) or (not value and field.default):
        expected = f"expected {len(kinds) or 'at least 1'} values, got {len(value)}"
        raise _refusal(path, value, expected, field.metadata)
    if len(value) > LONGEST_TUPLE:
        expected = f"expected at most {LONGEST_TUPLE:,} values, got {len(value):,}"
        raise _refusal(path, value, expected, field.metadata)
    return tuple(_checked_item(path, item, kind, field.metadata) for item, kind in zip(value, kinds, strict=True))


def _refusal(path: str, value: Any, expected: str, metadata: Mapping) -> UserError:
    return UserError(f"config.{path} = {shown(value)}: {expected} ({metadata['meaning']})")


def _checked_item(path: str, value: Any, kind: Any, metadata: Mapping) -> Any:
    """A setting of one value, or one of a tuple. `kind` is str, bool, int, float; int | str or bool | str: a length or "auto"."""
    if kind in (int | str, bool | str):
        if isinstance(value, str) and not metadata["choices"]:
            if expected := _fault_of_length(path, value, metadata["high"]):
                raise _refusal(path, value, expected, metadata)
            return value
        kind = str if isinstance(value, str) else get_args(kind)[0]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if value.bit_length() < 1000 else math.inf
    if type(value) is not kind:
        whole = isinstance(value, float) and kind is int and value.is_integer()
        hint = f"; did you mean {int(value)}?" if whole else ""
        expected = f"expected {'an' if kind is int else 'a'} {kind.__name__}, got {type(value).__name__}{hint}"
    elif kind is str:
        expected = _fault_of_text(value) or _fault_of_choice(value, metadata["choices"])
    else:
        expected = "" if kind is bool else _fault_of_number(value, metadata["low"], metadata["high"])
    if expected:
        raise _refusal(path, value, expected, metadata)
    return value


def _fault_of_length(path: str, value: str, high: int) -> str:
    units = ("tokens", "epochs", "steps", *["min"] * (path in ("checkpoint.every", "train.num_steps")))
    match = LENGTH.fullmatch(value)
    if not match or match["unit"] not in units:
        return f'expected steps as an integer, or a string such as "375M tokens" (units: {", ".join(units)})'
    number, unit = parse_length(value)
    most = high if unit == "steps" else LONGEST
    if not 0 < number <= most:
        return "expected more than nothing" if not number else f"at most {most:.10g} {unit}"
    return "expected whole steps" if unit == "steps" and number != int(number) else ""


def _fault_of_text(value: str) -> str:
    """What is wrong with a text, whatever it is for; "" where nothing is."""
    if len(value) > LONGEST_TEXT:
        return f"expected at most {LONGEST_TEXT:,} characters, got {len(value):,}"
    if "\0" in value:
        return "expected no NUL character"
    return "" if value.encode(errors="ignore").decode() == value else "expected Unicode text"


def _fault_of_choice(value: str, choices: tuple[str, ...]) -> str:
    if not choices or value in choices:
        return ""
    known = ", ".join(choice or "''" for choice in choices)
    return f"choose one of {known}{nearest(value[:100], choices)}"


def _fault_of_number(value: float, low: float | None, high: float | None) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return "expected a finite number"
    if isinstance(value, float) and value and not SMALLEST <= abs(value) <= LARGEST:
        return f"expected 0, or a number between {SMALLEST:g} and {LARGEST:g}"
    if low is not None and value < low:
        return f"must be at least {low}"
    return f"must be at most {high}" if high is not None and value > high else ""


def checked_sources(path: str, value: Any) -> Sources:
    """Canonical ((path, weight), ...); a bare string is one source with weight 1. Raises UserError."""
    example = '(("books", 0.7), ("code", 0.3))'
    found: list[tuple[str, Weight]] = []
    for source in ((value, 1.0),) if isinstance(value, str) else value if isinstance(value, (tuple, list)) else ():
        if not isinstance(source, (tuple, list)) or len(source) != 2 or not isinstance(source[0], str):
            raise UserError(
                f"config.{path} = {shown(value)}: expected a path, or (path, weight) pairs such as {example}"
            )
        name, weight = source
        if problem := _fault_of_text(name):
            raise UserError(f"config.{path} = {shown(name)}: {problem}; expected a path, or pairs such as {example}")
        found.append((name, _checked_weight(f"config.{path}: weight {shown(weight)} of {shown(name)}", weight)))
    names = [name for name, _ in found]
    if not found or len(set(names)) < len(names):
        problem = "a path stands twice" if found else "no source"
        raise UserError(f"config.{path} = {shown(value)}: {problem}; expected a path, or pairs such as {example}")
    tables = [weight if isinstance(weight, tuple) else ((0, weight),) for _, weight in found]
    for row in sorted({0} | {first for table in tables for first, _ in table}):
        if not any(next((share for first, share in reversed(table) if first <= row), 0) for table in tables):
            raise UserError(f"config.{path} = {shown(value)}: no source has a weight from row {row:,} on")
    return tuple(found)


def _checked_weight(where: str, weight: Any) -> Weight:
    """A number, or ((first row, weight), ...) with rising rows. Raises UserError that begins with `where`."""
    number = lambda x, *kinds: type(x) in kinds and 0 <= x <= LONGEST  # NaN is not
    stages = weight if isinstance(weight, (tuple, list)) else ((0, weight),)
    for stage in stages:
        pair = isinstance(stage, (tuple, list)) and len(stage) == 2
        if not (pair and number(stage[0], int) and number(stage[1], int, float)):
            raise UserError(f"{where}: expected a number from 0 on, or ((first row, weight), ...)")
    firsts = [first for first, _ in stages]
    if not firsts or firsts != sorted(set(firsts)):
        raise UserError(f"{where}: the first rows of its stages must rise")
    table = tuple((first, float(share)) for first, share in stages)
    return table if isinstance(weight, (tuple, list)) else table[0][1]
