"""Devices as their makers' sheets describe them, and the topologies that are made of them: one table for every command.

Bytes, bytes/s, FLOP/s, watts, Hz. What a maker does not publish is 0, and what follows from it is left out, never guessed.
"""

import dataclasses
import difflib
import itertools
import math
import re

import jax

from lm_jax.errors import UserError

GIB = 2**30
MOST_SLICES, MOST_IN_A_HOST, MOST_CPUS = 999, 8, 64
SUCH_AS = "such as v5e:4x4, v5p:8x8x16, 2*v5p:8x8x16, gpu:8xH100, gpu:4*8xH100, cpu:1"


@dataclasses.dataclass(frozen=True)
class Device:
    """One device: what JAX calls a device, half a chip of a TPU7x, a chip of the other TPUs, a GPU."""

    platform: str
    memory: float  # bytes that a program may take
    peak: dict[str, float]  # dense matrix products in a dtype
    bandwidth: float = 0.0  # of its memory
    links: float = 0.0  # what it sends to its neighbours, over all links together
    network: float = 0.0  # what it sends to other slices or hosts: its share of the host's cards
    watts: float = 0.0  # rated power of the device alone
    clock: float = 0.0  # of a TPU's matrix units
    per_chip: int = 1
    torus: int = 1  # dims of the torus that the links make; of a switch 1
    capability: float = 0.0  # of an NVIDIA GPU


def _tpu(memory: float, peak: float, bandwidth: float, links: float, network: float, torus: int, **more) -> Device:
    """Float32 products of ours are at precision HIGHEST, which a TPU makes of six in bfloat16 (XLA, DotPrecision)."""
    return Device("tpu", memory, _tpu_peak(peak), bandwidth, links, network, torus=torus, **more)


def _tpu_peak(bfloat16: float) -> dict[str, float]:
    return {"bfloat16": bfloat16, "float32": bfloat16 / 6}


def _gpu(
    memory: float, half: float, float32: float, bandwidth: float, links: float, network: float, watts: float, **more
):
    """JAX takes three quarters of a GPU's memory (docs.jax.dev, "GPU memory allocation")."""
    peak = {"float16": half, "bfloat16": half, "float32": float32}
    return Device("gpu", 0.75 * memory, peak, bandwidth, links, network, watts, **more)


# TPUs: docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x}, "System architecture": peak, memory bandwidth; links are half of
# "bidirectional ICI bandwidth per chip"; the network is a host's cards (v5e 2 x 100 Gbit/s of 8 chips, v5p 50 Gbit/s a chip,
# v6e 4 x 200 Gbit/s of 8 chips). Memory is what libtpu 0.0.52 gives a program ("available HBM") of 16, 95, 32 and 96 GiB. The
# clock is the peak over two FLOPs of every cell of the matrix units: 4 of 128 x 128 (v5e), 8 (v5p). Google rates no power.
# GPUs: NVIDIA's data sheets of each card, SXM where there is one, without sparsity: memory, Tensor Core peak in float16 and
# bfloat16, FP32, memory bandwidth, half of NVLink's or PCIe's two-way bandwidth, power. B200 is an eighth of DGX B200's sheet.
# Their network is a card a GPU of NVIDIA's DGX of that kind (DGX A100 200, DGX H100, H200, B200 400 Gbit/s).
# A T4 (Turing) has no bfloat16.
DEVICES: dict[str, Device] = {
    "v5e": _tpu(15.75 * GIB, 197e12, 819e9, 200e9, 3.125e9, 2, clock=197e12 / (2 * 4 * 128**2)),
    "v5p": _tpu(95.73 * GIB, 459e12, 2765e9, 600e9, 6.25e9, 3, clock=459e12 / (2 * 8 * 128**2)),
    "v6e": _tpu(31.24 * GIB, 918e12, 1638e9, 400e9, 12.5e9, 2),
    "tpu7x": _tpu(94.74 * GIB, 2307e12 / 2, 7380e9 / 2, 600e9 / 2, 0.0, 3, per_chip=2),
    "H100": _gpu(80e9, 989.4e12, 67e12, 3350e9, 450e9, 50e9, 700, capability=9.0),
    "H200": _gpu(141e9, 989.4e12, 67e12, 4800e9, 450e9, 50e9, 700, capability=9.0),
    "A100": _gpu(80e9, 312e12, 19.5e12, 2039e9, 300e9, 25e9, 400, capability=8.0),
    "B200": _gpu(180e9, 2250e12, 75e12, 8000e9, 900e9, 50e9, 1000, capability=10.0),
    "L4": _gpu(24e9, 121e12, 30.3e12, 300e9, 32e9, 0.0, 72, capability=8.9),
    "T4": dataclasses.replace(
        _gpu(16e9, 65e12, 8.1e12, 300e9, 16e9, 0.0, 70, capability=7.5), peak={"float16": 65e12, "float32": 8.1e12}
    ),
}
# What JAX calls TPUs (`device_kind`); a GPU's name stands in what JAX calls it.
KINDS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5p": "v5p",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}


def device_name(device: jax.Device) -> str:
    """The name of the device in `DEVICES`, or what its maker calls it."""
    kind = device.device_kind
    if device.platform == "tpu":
        return KINDS.get(kind, kind)
    return next((name for name in DEVICES if re.search(rf"\b{name}\b", kind)), kind)


def shapes(kind: str) -> list[tuple[int, ...]]:
    """The slices of a TPU that Google makes, smallest first."""
    if DEVICES[kind].torus == 2:  # the table of v5e and v6e
        return [(1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)]
    cubes = itertools.combinations_with_replacement(range(4, 25, 4), 3)  # of 4 x 4 x 4 chips, up to 6,144 in a slice
    small: list[tuple[int, ...]] = [(2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4)]
    return small + sorted(
        (shape for shape in cubes if math.prod(shape) <= 6144), key=lambda shape: (math.prod(shape), shape)
    )


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices that are connected: `islands` slices or hosts of equal shape."""

    text: str
    kind: str  # a name in DEVICES, or "cpu"
    shape: tuple[int, ...]  # chips of a slice, GPUs of a host, devices of a CPU
    islands: int = 1

    @property
    def island(self) -> int:
        """Devices that links connect."""
        return math.prod(self.shape) * (DEVICES[self.kind].per_chip if self.kind in DEVICES else 1)

    @property
    def size(self) -> int:
        """Devices of all islands."""
        return self.island * self.islands

    @property
    def platform(self) -> str:
        """Which compiler makes its programs: tpu, gpu or cpu."""
        return DEVICES[self.kind].platform if self.kind in DEVICES else "cpu"


def parse(text: str) -> Topology:
    """The topology of `v5e:4x4`, `2*v5p:8x8x16`, `gpu:8xH100`, `gpu:4*8xH100`, `cpu:1`. Raises UserError with the nearest."""
    num, star, one = text.rpartition("*") if not text.startswith("gpu:") else ("", "", text)
    islands = _islands(text, num, star)
    kind, colon, shape = one.partition(":")
    if kind == "cpu":
        return _cpus(text, shape, islands)
    if kind == "gpu":
        return _gpus(text, shape)
    tpus = [name for name, device in DEVICES.items() if device.platform == "tpu"]
    if kind not in tpus:
        gpus = [name for name in DEVICES if name not in tpus]
        near = difflib.get_close_matches(kind, tpus, n=1, cutoff=0.3)
        here = next((f"gpu:8x{name}" for name in gpus if name.lower() == kind.lower()), "")
        mend = f"; did you mean {here or near[0]}?" if here or near else ""
        raise UserError(
            f"--topology {text}: no device {kind!r}{mend}\nTPUs {', '.join(tpus)}; GPUs {', '.join(gpus)}; cpu\n{SUCH_AS}"
        )
    sides = tuple(int(side) for side in shape.split("x")) if re.fullmatch(r"\d{1,4}(x\d{1,4})*", shape) else ()
    if sides not in shapes(kind):
        raise UserError(f"--topology {text}: {shape or 'nothing'} is no slice of {kind}{_nearest_shapes(kind, sides)}")
    return Topology(text, kind, sides, islands)


def _islands(text: str, num: str, star: str, what: str = "slices", example: str = "2*v5e:2x4") -> int:
    if star and not (re.fullmatch("[1-9][0-9]{0,2}", num)):
        raise UserError(f"--topology {text}: {num!r} is no number of {what} (1 to {MOST_SLICES}); such as {example}")
    return int(num) if star else 1


def _nearest_shapes(kind: str, sides: tuple[int, ...]) -> str:
    """The rest of a message: all shapes where they are few, else those whose sides are most like these."""
    legal, asked = shapes(kind), (1, 1, 1, *sorted(map(lambda side: max(1, side), sides)))
    unlike = lambda shape: sum(abs(math.log(a / b)) for a, b in zip(sorted(shape)[::-1], asked[::-1], strict=False))
    near = sorted(legal, key=lambda shape: (unlike(shape), shape))
    listed = legal if len(legal) <= 10 else sorted(near[:6], key=math.prod)
    named = lambda shape: f"{kind}:{'x'.join(map(str, shape))}"
    more = f" ({len(legal)} in all)" if len(legal) > len(listed) else ""
    return f"; the nearest is {named(near[0])}\nthere is {', '.join(map(named, listed))}{more}"


def _gpus(text: str, shape: str) -> Topology:
    num, star, host = shape.rpartition("*")
    islands = _islands(text, num, star, "hosts", "gpu:4*8xH100")
    each, times, kind = host.partition("x") if host[:1].isdigit() else ("1", "x", host)
    gpus = [name for name, device in DEVICES.items() if device.platform == "gpu"]
    if kind not in gpus:
        near = difflib.get_close_matches(kind.upper(), gpus, n=1, cutoff=0.3)
        mend = f"; did you mean gpu:{each}x{near[0]}?" if near else ""
        raise UserError(f"--topology {text}: no GPU {kind!r}{mend}\nthere is {', '.join(gpus)}; such as gpu:8xH100")
    if not re.fullmatch(f"[1-{MOST_IN_A_HOST}]", each):
        raise UserError(
            f"--topology {text}: a host has 1 to {MOST_IN_A_HOST} GPUs\n"
            f"such as gpu:{MOST_IN_A_HOST}x{kind}; of several hosts gpu:4*{MOST_IN_A_HOST}x{kind}"
        )
    return Topology(text, kind, (int(each),), islands)


def _cpus(text: str, shape: str, islands: int) -> Topology:
    if islands > 1 or not shape.isdigit() or not 1 <= int(shape) <= MOST_CPUS:
        raise UserError(f"--topology {text}: expected cpu:1 to cpu:{MOST_CPUS}, devices that share this machine")
    return Topology(text, "cpu", (int(shape),))
