"""The text of a compiled program, read: collectives, kernels, cycles, products in float32, buffers that should not be."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
WIDTHS = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "c64": 8, "c128": 16}  # of others the number in the name is bits
# Custom calls of the compilers themselves, which are no kernels.
INNER = re.compile(
    "AllocateBuffer|PrepareAsyncCall|ConcatBitcast|AsyncCollective|AssumeGather|Sharding|annotate|Pin|Unpin|^$"
)


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    rest: str  # attributes

    def called(self, attribute: str) -> list[str]:
        """Computations that an attribute names."""
        found = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.rest)
        return re.findall(r"[\w.\-]+", found[1]) if found else []

    @property
    def inside(self) -> list[str]:
        """Computations that it runs once; what a start has begun, its end does not begin again."""
        if self.op.endswith(("-done", "-update")):
            return []
        attributes = ("calls", "branch_computations", "true_computation", "false_computation")
        return [name for one in (*attributes, *["to_apply"] * (self.op == "call")) for name in self.called(one)]

    @property
    def channel(self) -> str:
        """What collectives that are one have in common."""
        found = re.search(r"channel_id=(\d+)", self.rest)
        return found[1] if found else self.name

    @property
    def is_product(self) -> bool:
        """Whether it is a matrix product."""
        return self.op in ("dot", "convolution") or (self.op == "custom-call" and "$gemm" in self.rest)

    @property
    def op_name(self) -> str:
        """Where it comes from in the traced function."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""


class Loop(NamedTuple):
    """A loop whose number of rounds is in the text, or is assumed."""

    op_name: str
    rounds: int
    known: bool


@dataclasses.dataclass
class Reading:
    """What one run of a program does on each device; bytes of a collective are those of its larger side."""

    collectives: dict[str, list[float]] = dataclasses.field(default_factory=dict)  # kind -> [number, bytes]
    kernels: Counter[str] = dataclasses.field(default_factory=Counter)
    cycles: Counter[str] = dataclasses.field(default_factory=Counter)  # products, elementwise, rest: the compiler's own
    float32_products: Counter[str] = dataclasses.field(default_factory=Counter)  # op_name -> number in the text
    large: dict[str, float] = dataclasses.field(default_factory=dict)  # shape -> bytes
    loops: list[Loop] = dataclasses.field(default_factory=list)
    between_slices: set[str] = dataclasses.field(default_factory=set)

    def add(self, other: "Reading", times: int) -> None:
        """Adds what `other` does `times` times."""
        for kind, (number, size) in other.collectives.items():
            mine = self.collectives.setdefault(kind, [0, 0.0])
            self.collectives[kind] = [mine[0] + times * number, mine[1] + times * size]
        self.kernels.update({name: times * number for name, number in other.kernels.items()})
        self.cycles.update({what: times * number for what, number in other.cycles.items()})
        self.float32_products.update(other.float32_products)
        self.large |= other.large
        self.loops += other.loops
        self.between_slices |= other.between_slices


def dims(shape: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(dtype, sizes) of every array in a shape."""
    for dtype, sizes in re.findall(r"\b([a-z]+[0-9a-z]*)\[([\d,]*)\]", shape):
        yield dtype, tuple(int(size) for size in sizes.split(",") if size)


def bytes_of(shape: str) -> float:
    """Bytes of all arrays in a shape, without padding."""
    width = lambda dtype: WIDTHS.get(dtype) or int((re.findall(r"\d+", dtype) or ["0"])[0]) / 8
    return sum(math.prod(sizes) * width(dtype) for dtype, sizes in dims(shape))


def computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """({name: its instructions}, the name of the entry)."""
    found: dict[str, list[Instruction]] = {}
    entry, current = "", []
    for line in text.split("\n"):
        if line.endswith("{") and (head := re.match(r"(ENTRY )?%?([\w.\-]+) \(", line)):
            current = found.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif part := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)", line):
            name, rest = part[1], part[2]
            if op := re.search(r" ([a-z][a-z0-9\-]*)\(", rest):
                inside, _, after = rest[op.end() :].partition(")")
                operands = tuple(re.findall(r"%([\w.\-]+)", inside))
                whole = inside + after if op[1] == "constant" else after
                current.append(Instruction(name, rest[: op.start()], op[1], operands, whole))
    return found, entry


def read(text: str, rounds: Callable[[str], int], length: int, tokens: int, vocab: int, widths: set[int]) -> Reading:
    """Reads a program for one run of it.

    `rounds(op_name)` is assumed of a loop whose number of rounds is not in the text. Buffers are looked for with `length`
    in two dims, unless it is one of the `widths` of the model, and with `tokens` by `vocab` (of a device both).
    """
    named, entry = computations(text)
    channels: set[tuple[str, str]] = set()
    reading = Reading()
    reading.between_slices = {
        kind.lower().replace("_", "-") for kind in re.findall(r'_xla_megascale_transfer_type="(\w+)"', text)
    }

    def walk(name: str, times: int, fused: bool) -> None:
        lines = named.get(name, [])
        shapes = {line.name: line.shape for line in lines}
        for line in lines:
            kind = _collective(line)
            if kind and not (fused and (kind, line.channel) in channels):  # several fusions may carry on with one
                channels.add((kind, line.channel))
                number, size = reading.collectives.get(kind, [0, 0.0])
                reading.collectives[kind] = [number + times, size + times * max(_sides(line, shapes))]
            factors = line.operands[:2] if line.is_product else ()
            if factors and all(shapes.get(one, "").startswith("f32") for one in factors):
                reading.float32_products[line.op_name or line.name] += 1
            if not fused:
                _own_work(reading, line, times)
                reading.large |= {shape: bytes_of(shape) for shape in _large(line.shape, length, tokens, vocab, widths)}
            if line.op == "while":
                reading.loops.append(_loop(named, line, rounds))
                walk(line.called("body")[0], times * reading.loops[-1].rounds, fused)
            for called in line.inside:
                walk(called, times, fused or line.op == "fusion")

    walk(entry, 1, False)
    return reading


def _collective(line: Instruction) -> str:
    """The kind of collective that begins here, "" where none does."""
    op = line.op.removesuffix("-start")
    return op if op in KINDS else ""


def _sides(line: Instruction, shapes: dict[str, str]) -> tuple[float, float]:
    """Bytes of what goes in, and of what comes out; the result of a start may hold both."""
    before = sum(bytes_of(shapes.get(name, "")) for name in line.operands)
    after = bytes_of(line.shape)
    both = line.op in ("all-gather-start", "reduce-scatter-start", "collective-permute-start") and line.shape[:1] == "("
    return before, after - before if both else after


def _own_work(reading: Reading, line: Instruction, times: int) -> None:
    if found := re.search(r'"estimated_cycles":"(\d+)"', line.rest):
        what = {"kOutput": "products", "kLoop": "elementwise"}.get((line.called("kind") or [""])[0], "rest")
        reading.cycles[what] += times * int(found[1])
    target = re.search(r'custom_call_target="([^"]*)"', line.rest)
    if line.op == "custom-call" and target and not INNER.search(target[1]):
        name = target[1]
        if name == "tpu_custom_call":  # a Pallas kernel: the instruction has its name
            name = re.sub(r"(\.clone|\.remat\d*|\.\d+)+$", "", line.name)
        elif name == "__gpu$xla.gpu.triton" and (own := re.search(r'\bname = "(\w+)"', line.rest)):
            name = own[1]
        reading.kernels[name] += times


def _large(shape: str, length: int, tokens: int, vocab: int, widths: set[int]) -> Iterator[str]:
    for dtype, sizes in dims(shape):
        squares = sizes.count(length) >= 2 and length not in widths
        others = [size for size in sizes if size != 1]
        logits = vocab in others and math.prod(others) == tokens * vocab and not (len(others) == 2 and tokens in widths)
        if squares or logits:
            yield f"{dtype}[{','.join(map(str, sizes))}]"


def _loop(named: dict[str, list[Instruction]], line: Instruction, rounds: Callable[[str], int]) -> Loop:
    """Its rounds: stated, or from the one constant that its condition compares with, or assumed."""
    if stated := re.search(r"known_trip_count\W+n\W+(\d+)", line.rest):
        return Loop(line.op_name, int(stated[1]), True)
    condition, body = (named.get((line.called(part) or [""])[0], []) for part in ("condition", "body"))
    inner = [named.get(called, []) for one in condition for called in one.called("calls")]
    constants = [one.rest.split(",")[0] for part in (condition, *inner) for one in part if one.op == "constant"]
    if len(constants) == 1 and constants[0].isdigit():
        return Loop(line.op_name, math.ceil(int(constants[0]) / _counts_by(condition, body)), True)
    return Loop(line.op_name, rounds(line.op_name), False)


def _counts_by(condition: list[Instruction], body: list[Instruction]) -> int:
    """By how much a loop's body raises the counter that its condition reads: 1, of windowed products 2."""
    counter = next((one for one in condition if one.op == "get-tuple-element"), None)
    if not counter or not body or body[-1].op != "tuple":
        return 1
    defined = {one.name: one for one in body}
    raised = defined.get(body[-1].operands[int(re.findall(r"index=(\d+)", counter.rest)[0])])
    added = [defined[name] for name in raised.operands if name in defined] if raised and raised.op == "add" else []
    steps = [one.rest.split(",")[0] for one in added if one.op == "constant"]
    return int(steps[0]) if steps and steps[0].isdigit() else 1
