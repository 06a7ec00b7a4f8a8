"""Safetensors: eight bytes, a JSON header of that length, arrays. Read without trust: every number is checked first.

A file holds arrays and nothing that runs (github.com/huggingface/safetensors describes the format). Arrays are memory-mapped.
"""

import json
import math
import os
import re
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from lm_jax.errors import UserError
from lm_jax.regular_files import opened, read_bytes

DTYPES: dict[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
NAMES = {np.dtype(kind): name for name, kind in DTYPES.items()}
LARGEST_HEADER = 100_000_000  # bytes, as the format says
INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
SHARD_BYTES = 5_000_000_000


class Tensor(NamedTuple):
    """An array of a file: where it begins, and its range in the file checked."""

    path: str
    dtype: str
    shape: tuple[int, ...]
    start: int

    def read(self) -> np.ndarray:
        """The array, memory-mapped."""
        kind, count = np.dtype(DTYPES[self.dtype]), math.prod(self.shape)
        if not count:
            return np.zeros(self.shape, kind)
        return np.memmap(self.path, kind, "r", self.start, (count,)).reshape(self.shape)


def file_tensors(path: str) -> dict[str, Tensor]:
    """{name: tensor} of one file, unread. Raises UserError for a file that is not whole, or no safetensors file."""

    def refuse(problem: str) -> UserError:
        return UserError(f"{path} is no whole safetensors file: {problem}; copy or download it again")

    try:
        file, total = opened(path), os.path.getsize(path)
    except OSError as error:
        raise refuse(str(error.strerror)) from None
    with file:
        size = int.from_bytes(file.read(8), "little")
        if total < 8 or size > min(LARGEST_HEADER, total - 8):
            raise refuse(f"a header of {size:,} bytes in a file of {total:,}")
        try:
            header = json.loads(file.read(size), object_pairs_hook=_without_repetition)
            header.pop("__metadata__", None)
        except (ValueError, RecursionError, AttributeError, TypeError):
            raise refuse("its header cannot be read") from None
    found, ranges = {}, []
    for name, entry in header.items():
        match entry:
            case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(start), int(stop)]}:
                fits = all(type(n) is int and n >= 0 for n in shape) and 0 <= start <= stop <= total - 8 - size
                if dtype not in DTYPES:
                    raise UserError(f"{path}: {name} is {dtype}, which is not read; known are {', '.join(DTYPES)}")
                if not fits or math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize != stop - start:
                    raise refuse(f"{name} {dtype} {shape} does not stand at bytes {start} to {stop}")
            case _:
                raise refuse(f"{name} has no dtype, shape and place")
        ranges.append((start, stop))
        found[name] = Tensor(path, dtype, tuple(shape), 8 + size + start)
    ends = [0, *(stop for _, stop in sorted(ranges))]
    if [start for start, _ in sorted(ranges)] != ends[:-1] or ends[-1] != total - 8 - size:
        raise refuse("its arrays do not fill it without a gap")
    return found


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice")
    return found


def weight_files(folder: str) -> list[str]:
    """The files that hold a model's arrays: `model.safetensors`, else those that the index names, and nothing beside them.

    Raises UserError; a pickle is refused with the way out.
    """
    names = sorted(os.listdir(folder))
    if WHOLE in names:  # it wins over an index, as in `transformers`
        return [WHOLE]
    if INDEX in names:
        return sorted(set(_weight_map(folder, names).values()))
    others = [name for name in names if name.endswith(".safetensors")]
    if others:
        raise UserError(
            f"{folder} has neither {WHOLE} nor {INDEX}; {others[0]} is not read\n"
            f"where it holds the whole model, name it {WHOLE}; where it is a part, copy the others and the index too"
        )
    raise UserError(f"{folder} has no {WHOLE} and no {INDEX}{_way_out(folder, names)}")


def folder_tensors(folder: str) -> dict[str, Tensor]:
    """{name: tensor} of a model's folder, unread, each in the file that the index names for it. Raises UserError."""
    found = {file: file_tensors(os.path.join(folder, file)) for file in weight_files(folder)}
    if list(found) == [WHOLE]:
        return found[WHOLE]
    named = _weight_map(folder, os.listdir(folder))
    if lacking := [name for name, file in named.items() if name not in found[file]]:
        raise UserError(
            f"{folder}: {named[lacking[0]]} does not hold {lacking[0]}, which {INDEX} says (+{len(lacking) - 1} more); "
            "copy or download it again"
        )
    return {name: found[file][name] for name, file in named.items()}


def _way_out(folder: str, names: list[str]) -> str:
    """What to do with a pickle, "" where there is none."""
    pickles = [name for name in names if re.search(r"\.(bin|pt|pth|ckpt|pkl)$", name)]
    if not pickles:
        return ""
    save = f"AutoModelForCausalLM.from_pretrained({folder!r}).save_pretrained({folder + '-safe'!r})"
    return (
        f"; {pickles[0]} is a pickle, which can run any code and is never read\n"
        f'where you trust it: python -c "import transformers; transformers.{save}"'
    )


def _weight_map(folder: str, present: list[str]) -> dict[str, str]:
    """{name of a tensor: its file}, as the index says: files of its own folder, never paths. Raises UserError."""
    path = os.path.join(folder, INDEX)
    try:
        named = json.loads(read_bytes(path), object_pairs_hook=_without_repetition)["weight_map"]
        assert named and all(isinstance(name, str) for name in named.values())
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError, AssertionError):
        raise UserError(f"{path} is no index of safetensors files; copy or download it again") from None
    files = set(named.values())
    for name in sorted(files):
        if name != os.path.basename(name) or not name.endswith(".safetensors"):
            raise UserError(f"{path} names {name!r}: only safetensors files beside it are read")
    if lacking := sorted(files - set(present)):
        raise UserError(f"{path} names {len(lacking)} files that are not there: {', '.join(lacking[:3])}")
    return named


def write_file(path: str, tensors: dict[str, np.ndarray]) -> None:
    """Writes {name: array} as one file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, x in tensors.items():
        header[name] = {"dtype": NAMES[x.dtype], "shape": list(x.shape), "data_offsets": [offset, offset + x.nbytes]}
        offset += x.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for x in tensors.values():
            file.write(np.ascontiguousarray(x).data)


def write_folder(folder: str, tensors: dict[str, np.ndarray], shard_bytes: int = SHARD_BYTES) -> None:
    """One file, or where that is too large several with an index."""
    shards: list[dict[str, np.ndarray]] = [{}]
    for name, x in tensors.items():
        if shards[-1] and sum(y.nbytes for y in shards[-1].values()) + x.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = x
    if len(shards) == 1:
        return write_file(os.path.join(folder, WHOLE), tensors)
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file_name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        write_file(os.path.join(folder, file_name), shard)
        weight_map |= dict.fromkeys(shard, file_name)
    total = sum(x.nbytes for x in tensors.values())
    with open(os.path.join(folder, INDEX), "w") as file:
        json.dump({"metadata": {"total_size": total}, "weight_map": weight_map}, file, indent=1)
