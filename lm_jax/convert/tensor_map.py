"""Our parameters <-> the tensors of a Hugging Face folder, by the rows of families.py: names, shapes, and what lies between.

All that is missing, unknown or of another shape is listed before anything is read. Arrays are read slice by slice, as devices
hold them: nothing here makes a copy of a model.
"""

import functools
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lm_jax.convert import heads, safetensors
from lm_jax.convert.description import FAMILIES, Description, graph_of
from lm_jax.convert.families import EXPERT, LAYER, Family
from lm_jax.errors import UserError
from lm_jax.model.build import ModelDef

AT_ONCE = 2**24  # bytes of a parameter that the host holds on their way to a device
# Not parameters: masks and frequencies that older versions saved as well.
IGNORED = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|attn\.(masked_)?bias|position_ids)")
# The same arrays under other names, where the tables are one.
TWICE = (
    "cls.predictions.decoder.bias",
    "lm_head.decoder.bias",
    "encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
)
HEADS = ("lm_head.", "cls.", "vocab_", "classifier.", "qa_outputs.", "score.")  # their names have no prefix
MOST_RANGES = 20  # of numbers in a message


class Slot(NamedTuple):
    """One of their tensors, or a part of it, and the parameter of ours, or the slice of one, that it fills."""

    path: tuple[str, ...]
    at: tuple[int, ...]  # of the layer, and of the expert, in what we keep stacked
    shape: tuple[int, ...]  # ours, at that index
    num_inputs: int  # dims of ours that a product maps from
    name: str
    kind: str

    @property
    def num_outputs(self) -> int:
        """How many outputs the product with this matrix has."""
        return self.matrix[1]

    @property
    def output_axis(self) -> int:
        """The axis of their tensor along which several slots may be joined."""
        return 0 if self.kind in ("linear", "undivided") else -1

    @property
    def matrix(self) -> tuple[int, int]:
        """(inputs, outputs) of the matrix that our dims are joined to."""
        return math.prod(self.shape[: self.num_inputs]), math.prod(self.shape[self.num_inputs :])

    def their_shape(self, vocab_size: int) -> tuple[int, ...]:
        """The shape of their tensor, or of the part of it that this slot takes."""
        inputs, outputs = self.matrix
        shapes: dict[str, tuple[int, ...]] = {"linear": (outputs, inputs), "conv": (inputs, outputs)}
        shapes |= {"undivided": (outputs, inputs), "table": (vocab_size, self.shape[-1]), "pieces": (vocab_size,)}
        shapes |= {"one_row": (1, self.shape[-1]), "from_third": (self.shape[0] + 2, self.shape[-1])}
        return shapes.get(self.kind, (inputs * outputs,))

    def to_ours(self, x: np.ndarray, bounds: Sequence[tuple[int, int]]) -> np.ndarray:
        """float32: the part of our parameter between `bounds`; no more of `x` is read than that."""
        if self.kind in ("linear", "undivided"):
            inputs, outputs = self.shape[: self.num_inputs], self.shape[self.num_inputs :]
            axes = (*range(len(outputs), len(self.shape)), *range(len(outputs)))
            x = x.reshape(*outputs, *inputs).transpose(axes)  # a view, as dims are split and not joined
        elif self.kind == "one_row":
            x = np.broadcast_to(x, self.shape)
        elif self.kind == "from_third":
            x = x[2:]
        elif self.kind not in ("table", "pieces"):
            x = x.reshape(self.shape)
        part = np.array(x[tuple(slice(*both) for both in bounds)], np.float32)
        if self.kind in ("table", "pieces"):  # ours is padded
            lacking = bounds[0][1] - bounds[0][0] - len(part)
            return np.pad(part, ((0, lacking), *[(0, 0)] * (part.ndim - 1))) if lacking else part
        if self.kind == "undivided":
            return part * np.float32(math.sqrt(self.shape[-1]))
        return 1 + part if self.kind == "one_more" else part

    def to_theirs(self, x: np.ndarray, vocab_size: int) -> np.ndarray:
        """Our array at this slot, in the shape and scale of their tensor."""
        if self.kind in ("table", "pieces"):
            return x[:vocab_size]
        if self.kind == "undivided":
            return x.reshape(self.matrix).T / np.float32(math.sqrt(self.shape[-1]))
        if self.kind == "one_more":
            return x - 1
        return x.reshape(self.matrix).T if self.kind == "linear" else x.reshape(self.their_shape(vocab_size))


class Stored(NamedTuple):
    """One of our parameters as it stands in their tensors, which are arrays, or `safetensors.Tensor` that are not read yet."""

    shape: tuple[int, ...]
    # By index in the stack: the slot, their tensor, and which of its outputs.
    parts: dict[tuple[int, ...], tuple[Slot, Any, slice]]

    def read(self, bounds: Sequence[tuple[int, int]]) -> np.ndarray:
        """float32: the part between (first, end) of each dim; their tensors are mapped one after the other."""
        num_stacked = len(next(iter(self.parts)))
        shape = [end - first for first, end in bounds]
        of_one = lambda at: self._read_one(tuple(i + first for i, (first, _) in zip(at, bounds, strict=False)), bounds)
        if math.prod(shape[:num_stacked]) == 1:  # no second copy of it
            return of_one((0,) * num_stacked).reshape(shape)
        ours = np.empty(shape, np.float32)
        for at in np.ndindex(ours.shape[:num_stacked]):
            ours[at] = of_one(at)
        return ours

    def _read_one(self, at: tuple[int, ...], bounds: Sequence[tuple[int, int]]) -> np.ndarray:
        """The part at one place of the stack."""
        slot, x, outputs = self.parts[at]
        x = x.read() if isinstance(x, safetensors.Tensor) else np.asarray(x)
        x = x[outputs] if slot.output_axis == 0 else x[..., outputs]
        return slot.to_ours(x, bounds[len(at) :])

    def on_mesh(self, like: jax.ShapeDtypeStruct) -> jax.Array:
        """The array, with the sharding of `like`; at most AT_ONCE bytes of it are on the host at a time."""
        assert like.shape == self.shape and isinstance(like.sharding, jax.sharding.Sharding)
        found: dict[tuple, jax.Array] = {}
        arrays = []
        for device, index in like.sharding.addressable_devices_indices_map(like.shape).items():
            bounds = tuple(part.indices(size)[:2] for part, size in zip(index or (), like.shape, strict=True))
            if bounds not in found:
                found[bounds] = self._on_device(bounds, device)
            arrays.append(jax.device_put(found[bounds], device))
        return jax.make_array_from_single_device_arrays(like.shape, like.sharding, arrays)

    def _on_device(self, bounds: Sequence[tuple[int, int]], device: jax.Device) -> jax.Array:
        shape = [end - first for first, end in bounds]
        if 4 * math.prod(shape) <= AT_ONCE:
            return jax.device_put(self.read(bounds), device)
        (first, end), rows = bounds[0], max(1, AT_ONCE // (4 * math.prod(shape[1:])))
        with jax.set_mesh(
            jax.sharding.Mesh(np.array([device]), ("alone",))
        ):  # a program of one device under no larger mesh
            whole = jnp.zeros(shape, jnp.float32, device=device)
            for start in range(first, end, rows):
                part = jax.device_put(self.read([(start, min(start + rows, end)), *bounds[1:]]), device)
                whole = _filled(whole, part, start - first)
        return whole


@functools.partial(jax.jit, donate_argnums=0)
def _filled(whole: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
    """`whole` with `part` in its rows from `start` on."""
    return jax.lax.dynamic_update_slice_in_dim(whole, part, start, 0)


def slots(family: Family, graph: ModelDef) -> list[Slot]:
    """Every tensor of a model of this family. Raises UserError where the family lacks one for a parameter of ours."""
    period, found, covered = len(graph.config.window), [], set()
    of_head = family.heads[graph.config.head].rows if graph.config.head in family.heads else ()
    for path, name, kind in {row[0]: row for row in (*family.rows, *of_head)}.values():
        for layer in range(graph.config.num_layers) if LAYER in name else (0,):
            ours = tuple(path.replace("block/", f"block_{layer % period}/").split("/"))
            declared = graph.declarations.get(ours)
            if declared is None:
                continue
            covered.add(ours)
            for expert in range(max(1, graph.config.num_experts)) if EXPERT in name else (0,):
                num_stacked = len(declared.layers)
                where = (layer // period, expert)[:num_stacked]
                theirs = name.replace(LAYER, str(layer)).replace(EXPERT, str(expert))
                prefix = "" if name.startswith(HEADS) else family.prefix
                shape, num_inputs = declared.shape[num_stacked:], len(declared.inputs)
                found.append(Slot(ours, where, shape, num_inputs, prefix + theirs, kind))
    if homeless := sorted({"/".join(path) for path in graph.declarations.keys() - covered}):
        raise UserError(f"a {family.architecture} has no place for: {', '.join(homeless)}")
    return found


def listed(names) -> str:
    """Names in one line; those that differ in numbers only are one entry with the ranges of their first number."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"\d+", "*", name), []).append(name)
    return ", ".join(
        group[0] if len(group) == 1 else f"{pattern} ({_numbers(group)})" for pattern, group in groups.items()
    )


def _numbers(names: list[str]) -> str:
    """The first number of each name as ranges, "0-3, 7"; where there are more, how many names."""
    first = sorted({int(re.search(r"\d+", name)[0]) for name in names})  # type: ignore[index]
    if len(first) < len(names):
        return f"{len(names)} of them"
    known = {*first}
    starts, ends = [n for n in first if n - 1 not in known], [n for n in first if n + 1 not in known]
    if len(starts) > MOST_RANGES:
        return f"{len(names):,} of them"
    return ", ".join(f"{a}-{b}" if b > a else str(a) for a, b in zip(starts, ends, strict=True))


def stored(described: Description, tensors: dict[str, Any], where: str) -> dict[tuple[str, ...], Stored]:
    """Our parameters as they stand in their tensors (arrays, or `safetensors.Tensor`).

    Raises UserError with all that is missing, unknown or of another shape. Nothing is left as it was initialised.
    """
    family, num_layers = FAMILIES[described.family], described.config.model.num_layers
    if num_layers > len(tensors):
        raise UserError(f"{where}: config.json says {num_layers:,} layers, the files hold {len(tensors):,} tensors")
    graph = graph_of(described)
    bare = lambda name: name.removeprefix(family.prefix)  # a base model is saved without the prefix
    found = {bare(name): x for name, x in tensors.items() if not IGNORED.fullmatch(name)}
    if described.config.model.tie_embedding:
        for name in (name for path, name, _ in family.rows if path == "unembedding/table"):
            found.pop(name, None)
    for name in TWICE:
        found.pop(name, None)
    if described.content.get("tie_word_embeddings") is True and "shared.weight" in found:
        found.setdefault("lm_head.weight", found["shared.weight"])  # T5 1.1 with one table, as transformers 5 makes it
    wanted: dict[str, list[Slot]] = {}
    for slot in slots(family, graph):
        wanted.setdefault(bare(slot.name), []).append(slot)
    found = without_heads(lacking(described), wanted, found, described.vocab_size)
    if problems := _problems(wanted, found, described.vocab_size):
        raise UserError("\n".join([f"{where}: the tensors are not those of its config.json", *problems]))
    ours = {path: Stored(declared.shape, {}) for path, declared in graph.declarations.items()}
    for name, parts in wanted.items():
        ends = np.cumsum([part.num_outputs for part in parts]).tolist()
        for slot, end in zip(parts, ends, strict=True):
            outputs = slice(end - slot.num_outputs, end) if len(parts) > 1 else slice(None)
            ours[slot.path].parts[slot.at] = slot, found[name], outputs
    return ours


def _problems(wanted: dict[str, list[Slot]], found: dict[str, Any], vocab_size: int) -> list[str]:
    """All that is missing, unknown or of another shape, a line each."""
    problems = []
    if missing := [name for name in wanted if name not in found]:
        problems.append(f"missing: {listed(missing)}")
    if unknown := [name for name in found if name not in wanted]:
        problems.append(f"unknown: {listed(unknown)}")
    whole = {name: whole_shape(parts, vocab_size) for name, parts in wanted.items()}
    wrong = [name for name in wanted if name in found and tuple(found[name].shape) != whole[name]]
    if wrong:
        first = wrong[0]
        shown = f"{list(found[first].shape)} for {list(whole[first])}"
        problems.append(f"of another shape: {listed(wrong)}, such as {shown}")
    return problems


def parameters(described: Description, tensors: dict[str, Any], where: str) -> dict:
    """Our parameters, float32 on the host, of their tensors. Raises UserError."""
    flat = {path: x.read([(0, n) for n in x.shape]) for path, x in stored(described, tensors, where).items()}
    return nnx.traversals.unflatten_mapping(flat)


def lacking(described: Description) -> tuple[str, ...]:
    """How the names start of tensors that a folder may lack, or that the class has none of."""
    family = FAMILIES[described.family]
    _, head = heads.of_class(family, described.content)
    return (*family.optional, *(head.lacks if head else ()))


def without_heads(
    starts: tuple[str, ...], wanted: dict[str, list[Slot]], found: dict[str, Any], vocab_size: int
) -> dict[str, Any]:
    """`found`, with zeros for heads of which no tensor is there: a model that was saved without them."""
    for head in starts:
        if not any(name.startswith(head) for name in found):
            empty = [name for name in wanted if name.startswith(head)]
            found |= {name: np.zeros(whole_shape(wanted[name], vocab_size), np.float32) for name in empty}
    return found


def whole_shape(parts: list[Slot], vocab_size: int) -> tuple[int, ...]:
    """The shape of a tensor that holds these parts side by side."""
    shape = list(parts[0].their_shape(vocab_size))
    if len(parts) > 1:
        shape[parts[0].output_axis] = sum(part.num_outputs for part in parts)
    return tuple(shape)


def their_tensors(described: Description, ours: dict) -> dict[str, np.ndarray]:
    """Our parameters as their tensors, float32: the vocabulary without its padding, a tied table once.

    Raises UserError where the class has no tensor for a parameter that is not nought.
    """
    parts: dict[str, list[np.ndarray]] = {}
    axes: dict[str, int] = {}
    family = FAMILIES[described.family]
    _, head = heads.of_class(family, described.content)
    for slot in slots(family, graph_of(described)):
        x: Any = ours
        for name in slot.path:
            x = x[name]
        parts.setdefault(slot.name, []).append(slot.to_theirs(np.asarray(x)[slot.at], described.vocab_size))
        axes[slot.name] = slot.output_axis
    lacked = [name for name in parts if head and head.lacks and name.removeprefix(family.prefix).startswith(head.lacks)]
    if full := [name for name in lacked if any(np.any(x) for x in parts[name])]:
        raise UserError(f"a {described.content['architectures'][0]} has no place for: {listed(full)}")
    whole = {name: several for name, several in parts.items() if name not in lacked}
    return {name: np.ascontiguousarray(np.concatenate(several, axes[name])) for name, several in whole.items()}
