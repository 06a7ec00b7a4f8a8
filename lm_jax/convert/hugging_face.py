"""A Hugging Face folder, config.json and safetensors: read onto the mesh, and written whole or not at all.

What its config.json says is in description.py, what its tensors are in tensor_map.py.
"""

import json
import os
import shutil
from collections.abc import Callable

import numpy as np
from flax import nnx

from lm_jax import regular_files
from lm_jax.convert import safetensors
from lm_jax.convert.description import Description, describe, what_it_is
from lm_jax.convert.tensor_map import listed, parameters, stored, their_tensors
from lm_jax.errors import UserError
from lm_jax.files import MODEL_FILES, draft_folder


def read_description(folder: str) -> Description:
    """What the config.json of a folder says. Raises UserError."""
    path = os.path.join(folder, "config.json")
    try:
        content = regular_files.read_json(path)
    except (OSError, ValueError, RecursionError):
        raise UserError(f"{path} cannot be read as JSON") from None
    return describe(content, path, folder)


def read_parameters(folder: str, described: Description) -> dict:
    """The parameters of a folder, float32, on the host."""
    return parameters(described, safetensors.folder_tensors(folder), folder)


def read_on_mesh(folder: str, described: Description, like: dict) -> dict:
    """The parameters of a folder, laid out like `like`: no process reads more of a file than its devices hold."""
    found, flat = stored(described, safetensors.folder_tensors(folder), folder), nnx.traversals.flatten_mapping(like)
    return nnx.traversals.unflatten_mapping({path: x.on_mesh(flat[path]) for path, x in found.items()})


Proof = Callable[[str, dict[str, np.ndarray]], None]


def write(
    folder: str,
    described: Description,
    ours: dict,
    files: dict[str, bytes],
    prove: Proof = lambda folder, tensors: None,
    shard_bytes: int = safetensors.SHARD_BYTES,
) -> None:
    """Writes a new folder, whole or not at all: small files, then arrays.

    `prove` raises where it must not be written: it gets a folder with the small files, and the arrays before they are
    on disk. All that is written is read again here.
    """
    if os.path.exists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        raise UserError(f"{folder} is there and not empty; name another folder")
    parent = os.path.dirname(os.path.abspath(folder))
    tensors = their_tensors(described, ours)
    check_room(parent, folder, sum(x.nbytes for x in tensors.values()) + sum(map(len, files.values())))
    os.makedirs(parent, exist_ok=True)
    with draft_folder(os.path.abspath(folder), alone=False) as unfinished:
        os.mkdir(unfinished)
        for name, content in ({"config.json": json.dumps(described.content, indent=1).encode()} | files).items():
            with open(os.path.join(unfinished, name), "wb") as file:
                file.write(content)
        check_read(unfinished, described, tensors)
        prove(unfinished, tensors)
        safetensors.write_folder(unfinished, tensors, shard_bytes)
        found = safetensors.folder_tensors(unfinished)
        if wrong := [name for name, x in tensors.items() if not np.array_equal(found[name].read(), x, equal_nan=True)]:
            raise UserError(f"{folder}: not written: the disk gave {listed(wrong)} back in another way")


def check_room(parent: str, folder: str, num_bytes: int) -> None:
    """Raises UserError where the disk has no room for a folder of so many bytes."""
    while not os.path.isdir(parent):
        parent = os.path.dirname(parent)
    free = shutil.disk_usage(parent).free
    if free < num_bytes:
        raise UserError(
            f"{folder}: {num_bytes / 1e9:,.2f} GB are to be written, {free / 1e9:,.2f} GB are free there; name another disk"
        )


def check_read(folder: str, described: Description, tensors: dict[str, np.ndarray]) -> None:
    """Raises UserError where config.json and these arrays, read again here, are another model."""
    found = read_description(folder)
    here, there = what_it_is(described.config.model), what_it_is(found.config.model)
    wrong = [key for key in here if here[key] != there.get(key)]
    if not wrong and described.vocab_size == found.vocab_size:
        again = their_tensors(found, parameters(found, tensors, folder))
        # A scale that is kept as 1 + w, or divided by a root, may change its last bit on the way.
        wrong = [name for name, x in tensors.items() if not np.allclose(again[name], x, 1e-6, 1e-30, equal_nan=True)]
    if wrong:
        raise UserError(f"not written: read here again it has another {listed(wrong)}")


def carried_files(folder: str) -> dict[str, bytes]:
    """{name: content} of the text files in a folder that go along with its model."""
    found = {}
    for name in MODEL_FILES:
        if os.path.isfile(path := os.path.join(folder, name)):
            with open(path, "rb") as file:
                found[name] = file.read()
    return found
