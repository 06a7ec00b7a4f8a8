"""Which settings a config makes anything read: of each, every condition of its declared reach holds."""

import shlex
from typing import Any

from lm_jax.config import leaves
from lm_jax.errors import UserError, shown


def is_read(flat: dict[str, Any], path: str) -> bool:
    """Whether what `flat` says makes anything read this leaf: every condition of its reach holds."""
    return all(_holds(flat, other, values) for other, values in leaves()[path].metadata["reach"].items())


def _holds(flat: dict[str, Any], path: str, values: tuple) -> bool:
    """Whether a leaf has one of these values, () = any that asks for something; what nothing reads has its default."""
    value = flat[path] if is_read(flat, path) else leaves()[path].default
    if values:
        return value in values
    return value != leaves()[path].default and (any(value) if isinstance(value, tuple) else bool(value))


def unread(flat: dict[str, Any]) -> list[str]:
    """The leaves that ask for what nothing would do."""
    asks = lambda path, field: flat[path] not in (field.default, *field.metadata["idle"])
    return [path for path, field in leaves().items() if asks(path, field) and not is_read(flat, path)]


def check_reach(flat: dict[str, Any]) -> None:
    """Raises UserError that names each leaf that nothing reads, where it would be read, and how to leave it out."""
    paths = unread(flat)
    if not paths:
        return

    def missing(path: str) -> tuple[str, tuple]:
        """The first condition of its reach that does not hold."""
        reach = leaves()[path].metadata["reach"]
        return next((other, values) for other, values in reach.items() if not _holds(flat, other, values))

    def line(path: str) -> str:
        other, values = missing(path)
        names = [str(value) or "''" for value in values] or [f"not {shown(leaves()[other].default)}"]
        return f"config.{path} = {shown(flat[path])} is read only where config.{other} is {' or '.join(names)}"

    flag = lambda path, value: f"--config.{path}={shlex.quote(str(value))}"
    mend = f"leave it out, or: {' '.join(flag(path, leaves()[path].default) for path in paths)}"
    other, values = missing(paths[0])
    if named := [value for value in values if value]:
        mend += f"\nto have it read: {flag(other, named[0])}"
    more = f" (and {len(paths) - 3} more: {', '.join(paths[3:8])})" if len(paths) > 3 else ""
    raise UserError("\n".join(map(line, paths[:3])) + f"{more}\n{mend}")
