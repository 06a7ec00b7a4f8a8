"""The folder of a run: config.json and the small files beside it, and whether a run may go on in it.

    <workdir>/config.json  tokenizer.{model,json,bytes}  special_ids.json  chat_template.jinja  reference.npz ...

config.json is written last: it is sealed, and has the hashes of the files beside it. It keeps the config, where each
value came from, what the run was trained on (`facts`), and the settings outside of the config that decide results.
"""

import json
import os
from collections.abc import Callable
from typing import Any

import jax
import jaxlib.version
from etils import epath

from lm_jax.config import Config, difference, flatten, leaves
from lm_jax.errors import UserError
from lm_jax.files import RUN_FILES, file_hash, invalid_reason, seal, sealed, unsealed, write_whole
from lm_jax.manifest import FORMAT
from lm_jax.reach import is_read
from lm_jax.regular_files import read_bytes

CONFIG = "config.json"
# What decides results from outside of a config: {name: whether a run must keep it}.
OUTSIDE = {
    "jax_enable_x64": True,
    "jax_default_prng_impl": True,
    "jax_threefry_partitionable": True,
    "jax_default_matmul_precision": True,
    "XLA_FLAGS": False,
    "jax": False,
    "jaxlib": False,
}


def write_config(workdir: epath.Path, config: Config, origins: dict[str, dict], facts: dict[str, Any]) -> None:
    """Writes config.json, after the files beside it: `origins` says where each value that is no default came from."""
    files = {name: file_hash(workdir / name) for name in RUN_FILES if (workdir / name).exists()}
    content = {"format": FORMAT, "config": flatten(config), "origins": origins, **facts, "outside": outside()}
    write_whole(workdir / CONFIG, sealed(content | {"files": files}))


def run_identity(saved: dict[str, Any], config: Config, facts: dict[str, Any]) -> str:
    """The id that config.json and every step of a run have: made at its start from what a run must keep, and kept."""
    kept = {path: value for path, value in flatten(config).items() if leaves()[path].metadata["fixed"]}
    return saved.get("run") or seal([kept, facts])[:16]


def outside() -> dict[str, Any]:
    """{name: value} of the settings in `OUTSIDE`, as they are in this process."""
    versions = {"jax": jax.__version__, "jaxlib": jaxlib.version.__version__}
    flags = os.environ.get("XLA_FLAGS", "").split()
    given = {"XLA_FLAGS": " ".join(sorted(flag for flag in flags if "host_platform_device_count" not in flag))}
    return {name: (versions | given).get(name, getattr(jax.config, name, None)) for name in OUTSIDE}


def write_run_file(workdir: epath.Path, name: str, content: bytes, log: Callable[[str], None]) -> None:
    """Writes a file beside config.json, and says so where another content stood there."""
    assert name in RUN_FILES, name
    path = workdir / name
    there = path.read_bytes() if path.exists() else None
    if there is not None and there != content:
        log(f"{name} was not as it was written: it is written again")
    if there != content:
        write_whole(path, content)


def read_config(workdir: epath.Path) -> dict[str, Any]:
    """The content of config.json; a key newer than the run has its default. Raises UserError where it is damaged."""
    path = workdir / CONFIG
    try:
        content = unsealed(read_bytes(path), FORMAT)
        content["config"] = flatten(Config()) | content["config"]
    except (FileNotFoundError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is no config of a run; use another --workdir") from None
    except ValueError as error:
        raise UserError(
            f"{path} is no config of a run: it {error}\nput it back from a copy, or use another --workdir"
        ) from None
    return content


def check_run_files(workdir: epath.Path, content: dict[str, Any]) -> None:
    """Raises UserError where a file beside config.json is not the one whose hash config.json (`content`) has."""
    files = content.get("files", {})
    for name, expected in files.items():
        if problem := invalid_reason(workdir / name, expected):
            raise UserError(f"{workdir / name} {problem}; put it back from a copy")
    if found := [name for name in RUN_FILES if files and name not in files and (workdir / name).exists()]:
        raise UserError(f"{workdir / found[0]} is not of this run, which was written without it; take it away")


def check_resume(workdir: epath.Path, saved: dict[str, Any], config: Config, facts: dict[str, Any]) -> list[str]:
    """Lines that say what changed since the run was started. Raises UserError where something changed that must not."""
    here = flatten(config)
    changed = difference(saved["config"], here)
    changed = {path: both for path, both in changed.items() if path not in leaves() or is_read(here, path)}
    fixed = {
        path: values for path, values in changed.items() if path not in leaves() or leaves()[path].metadata["fixed"]
    }
    if fixed:
        shown = [line for path, (old, new) in fixed.items() for line in describe(path, old, new)]
        raise UserError(
            f"{workdir} holds a run with another config:\n{few(shown)}\nuse another --workdir, or its config"
        )
    if different := other_data(saved, facts):
        raise UserError(
            f"{workdir} holds a run on other data, or of other settings:\n{few(different)}\n"
            "use another --workdir, or what the run had"
        )
    now = {f"config.{path}": values for path, values in changed.items()}
    before, here = saved.get("outside", {}), outside()
    now |= {name: (old, here.get(name)) for name, old in before.items() if old != here.get(name)}
    return [f"changed on resume: {name}: {old!r} -> {new!r}" for name, (old, new) in now.items()]


def few(lines: list[str]) -> str:
    """The first three lines, and how many more there are."""
    return "\n".join(lines[:3]) + f" (+{len(lines) - 3} more)" * (len(lines) > 3)


def describe(path: str, old: Any, new: Any) -> list[str]:
    """Lines that say how a config value differs; of `data.sources`, which source and which weight."""
    if path != "data.sources" or not old:
        return [f"config.{path}: {old!r} there, {new!r} here"]
    there, here = ({source: weight for source, weight in sources} for sources in (old, new))
    weights = {source: (there.get(source, "none"), here.get(source, "none")) for source in {**there, **here}}
    lines = [
        f"config.{path}: weight of {source!r}: {a} there, {b} here"
        for source, (a, b) in weights.items()
        if json.dumps(a) != json.dumps(b)
    ]
    return lines or [f"config.{path}: the order of the sources"]


def other_data(saved: dict[str, Any], facts: dict[str, Any]) -> list[str]:
    """Lines that say which settings of `OUTSIDE`, tokenizer or shards are not those that the run was started on."""
    there, here = saved.get("outside", {}), outside()
    lines = [
        f"{name} {there[name]!r} there, {here[name]!r} here"
        for name, kept in OUTSIDE.items()
        if kept and there.get(name, here[name]) != here[name]
    ]
    lines += [
        f"{name} {saved.get(name)!r} there, {facts[name]!r} here"
        for name in ("pipeline", "tokenizer")
        if saved.get(name) != facts[name]
    ]
    for source, here in facts["shards"].items():
        there = saved.get("shards", {}).get(source, {})
        lines += [
            f"{source}: {name} {there.get(name, 'none')} there, {here.get(name, 'none')} here"
            for name in sorted({*there, *here})
            if there.get(name) != here.get(name)
        ]
    return lines
