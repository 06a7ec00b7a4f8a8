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
SUCH_AS = "such as v5e:4x4 (or v5e-16), 2*v5p:8x8x16, gpu:8xH100 (or h100-8), gpu:4*8xH100, rtx4090, cpu:1"
CORES = ("v4", "v5p", "tpu7x")  # whose short form counts TensorCores, two in a chip: v5p-8 is four chips


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
    together: int = MOST_IN_A_HOST  # GPUs that one switch connects


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


def _without_bfloat16(device: Device) -> Device:
    return dataclasses.replace(device, peak={name: peak for name, peak in device.peak.items() if name != "bfloat16"})


def _apple(gib: int, tera: float, bandwidth: float) -> Device:
    """A Mac's GPU, which halves no dtype's peak; JAX computes on its CPU cores, more slowly."""
    return Device("cpu", gib * GIB, {"float32": tera * 1e12, "bfloat16": tera * 1e12}, bandwidth * 1e9)


# NVIDIA's GeForce cards: GB, FP32 TFLOP/s, GB/s, watts, GB/s over PCIe in one direction.
GEFORCE = {
    "RTX3060": (12, 12.7, 360, 170, 32), "RTX3060Ti": (8, 16.2, 448, 200, 32), "RTX3070": (8, 20.3, 448, 220, 32),
    "RTX3070Ti": (8, 21.7, 608, 290, 32), "RTX3080": (10, 29.8, 760, 320, 32), "RTX3080Ti": (12, 34.1, 912, 350, 32),
    "RTX3090": (24, 35.6, 936, 350, 32), "RTX3090Ti": (24, 40.0, 1008, 450, 32), "RTX4060": (8, 15.1, 272, 115, 16),
    "RTX4060Ti": (8, 22.1, 288, 160, 16), "RTX4070": (12, 29.1, 504, 200, 32), "RTX4070SUPER": (12, 35.5, 504, 220, 32),
    "RTX4070Ti": (12, 40.1, 504, 285, 32), "RTX4070TiSUPER": (16, 44.1, 672, 285, 32), "RTX4080": (16, 48.7, 717, 320, 32),
    "RTX4080SUPER": (16, 52.2, 736, 320, 32), "RTX4090": (24, 82.6, 1008, 450, 32), "RTX5060": (8, 19.2, 448, 145, 32),
    "RTX5060Ti": (16, 23.7, 448, 180, 32), "RTX5070": (12, 30.9, 672, 250, 64), "RTX5070Ti": (16, 43.9, 896, 300, 64),
    "RTX5080": (16, 56.3, 960, 360, 64), "RTX5090": (32, 104.8, 1792, 575, 64),
}  # fmt: skip
# TPUs: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, "System architecture": peak, memory bandwidth; links are half
# of "bidirectional ICI bandwidth per chip" (v4: 6 links of 50 GB/s, arXiv:2304.01433, table 4); the network is a host's cards
# (v5e 2 x 100 Gbit/s of 8 chips, v5p 50 Gbit/s a chip, v6e 4 x 200 Gbit/s of 8 chips). Memory is what libtpu 0.0.52 gives a
# program ("available HBM") of 32, 16, 95, 32 and 96 GiB. The clock is the peak over two FLOPs of every cell of the matrix
# units: 4 of 128 x 128 (v5e), 8 (v4, v5p). Google rates no power; of v4 it is the largest measured.
# GPUs: NVIDIA's data sheets of each card, SXM where there is one, without sparsity and with sums in FP32: memory, Tensor Core
# peak in float16 and bfloat16, FP32, memory bandwidth, half of NVLink's or PCIe's two-way bandwidth, power. B200 is an eighth
# of DGX B200's sheet, GB200 a half of the GB200 superchip's (NVL72: one switch of 72) and 1,200 W without its CPU. Their
# network is a card a GPU of NVIDIA's DGX of that kind (DGX-1 50, DGX A100 200, DGX H100, H200, B200, GB200 400 Gbit/s).
# T4 and V100 (Turing, Volta) have no bfloat16. GeForce: nvidia.com, "Compare GeForce graphics cards", and the appendices of
# the white papers of Ampere GA102, Ada and RTX Blackwell: Tensor Cores with sums in FP32 make twice the FP32 peak.
# Apple: apple.com/newsroom of M1 and M2, TFLOP/s of the GPU; Apple gives none of M3 and M4: huggingface.js #1044. The memory
# is the most that is sold, shared with the CPU.
DEVICES: dict[str, Device] = {
    "v4": _tpu(30.75 * GIB, 275e12, 1200e9, 300e9, 0.0, 3, clock=275e12 / (2 * 8 * 128**2), watts=192),
    "v5e": _tpu(15.75 * GIB, 197e12, 819e9, 200e9, 3.125e9, 2, clock=197e12 / (2 * 4 * 128**2)),
    "v5p": _tpu(95.73 * GIB, 459e12, 2765e9, 600e9, 6.25e9, 3, clock=459e12 / (2 * 8 * 128**2)),
    "v6e": _tpu(31.24 * GIB, 918e12, 1638e9, 400e9, 12.5e9, 2),
    "tpu7x": _tpu(94.74 * GIB, 2307e12 / 2, 7380e9 / 2, 600e9 / 2, 0.0, 3, per_chip=2),
    "H100": _gpu(80e9, 989.4e12, 67e12, 3350e9, 450e9, 50e9, 700),
    "H200": _gpu(141e9, 989.4e12, 67e12, 4800e9, 450e9, 50e9, 700),
    "A100": _gpu(80e9, 312e12, 19.5e12, 2039e9, 300e9, 25e9, 400),
    "B200": _gpu(180e9, 2250e12, 75e12, 8000e9, 900e9, 50e9, 1000),
    "GB200": _gpu(186e9, 2500e12, 80e12, 8000e9, 900e9, 50e9, 1200, together=72),
    "L4": _gpu(24e9, 121e12, 30.3e12, 300e9, 32e9, 0.0, 72),
    "T4": _without_bfloat16(_gpu(16e9, 65e12, 8.1e12, 300e9, 16e9, 0.0, 70)),
    "V100": _without_bfloat16(_gpu(32e9, 125e12, 15.7e12, 900e9, 150e9, 6.25e9, 300)),
    **{
        name: _gpu(size * 1e9, 2e12 * single, 1e12 * single, bandwidth * 1e9, pcie * 1e9, 0.0, watts)
        for name, (size, single, bandwidth, watts, pcie) in GEFORCE.items()
    },
    "M1": _apple(16, 2.6, 68.25),
    "M2": _apple(24, 3.6, 100),
    "M3": _apple(24, 4.1, 100),
    "M4": _apple(32, 4.6, 120),
}
# What JAX calls TPUs (`device_kind`); a GPU's name stands in what JAX calls it.
KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5p": "v5p",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}


def device_name(device: jax.Device | jax.sharding.AbstractDevice) -> str:
    """The name of the device in `DEVICES`, or what its maker calls it."""
    kind = device.device_kind
    if device.platform == "tpu":
        return KINDS.get(kind, kind)
    geforce = re.fullmatch(r"NVIDIA GeForce (RTX \d{4}( Ti)?( SUPER)?)", kind)  # no laptop's: these are other chips
    name = geforce[1].replace(" ", "") if geforce else ""
    return name if name in DEVICES else next((n for n in gpus() if re.search(rf"\b{n}\b", kind)), kind)


def gpus() -> list[str]:
    """The GPUs that the table has."""
    return [name for name, device in DEVICES.items() if device.platform == "gpu"]


def has_bfloat16(device: jax.Device | jax.sharding.AbstractDevice) -> bool:
    """Whether a device multiplies in bfloat16: of GPUs those from Ampere on, of compute capability 8.0.

    A GPU that the table lacks is asked itself; one that is not here either is taken for a new one.
    """
    if known := DEVICES.get(device_name(device)):
        return "bfloat16" in known.peak
    here = next((one for one in jax.local_devices() if one.device_kind == device.device_kind), None)
    return not re.fullmatch(r"[1-7]\.\d+", str(getattr(here, "compute_capability", "")))


def closed_sides(topology: "Topology") -> tuple[bool, bool, bool]:
    """Which sides of a slice are rings: all of one that is made of cubes of 4 x 4 x 4, of v5e and v6e those of 16 chips."""
    if DEVICES[topology.kind].torus == 2:
        first, second = (side == 16 for side in topology.shape)
        return first, second, False
    cubes = all(side % 4 == 0 for side in topology.shape)
    return cubes, cubes, cubes


def shapes(kind: str) -> list[tuple[int, ...]]:
    """The slices of a TPU that Google makes, smallest first."""
    if DEVICES[kind].torus == 2:  # the table of v5e and v6e
        return [(1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)]
    cubes, most = itertools.combinations_with_replacement(range(4, 25, 4), 3), 4096 if kind == "v4" else 6144
    small: list[tuple[int, ...]] = [(2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4)]
    return small + sorted(  # blocks of 4 x 4 x 4 chips
        (shape for shape in cubes if math.prod(shape) <= most), key=lambda shape: (math.prod(shape), shape)
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
    """The topology of `v5e:4x4`, `2*v5p:8x8x16`, `gpu:8xH100`, `gpu:4*8xH100`, `cpu:1`, or of what `written_out` knows.

    Raises UserError with the nearest.
    """
    text = written_out(text)
    num, star, one = text.rpartition("*") if not text.startswith("gpu:") else ("", "", text)
    islands = _islands(text, num, star)
    kind, colon, shape = one.partition(":")
    if kind == "cpu":
        return _cpus(text, shape, islands)
    if kind == "gpu":
        return _gpus(text, shape)
    if kind in DEVICES and DEVICES[kind].platform == "cpu":
        if colon or star:
            raise UserError(f"--topology {text}: a Mac is one device; say --topology {kind}")
        return Topology(text, kind, (1,))
    tpus = [name for name, device in DEVICES.items() if device.platform == "tpu"]
    if kind not in tpus:
        near = difflib.get_close_matches(kind.upper(), [name.upper() for name in DEVICES], n=1, cutoff=0.3)
        mend = f"; did you mean {_named(near[0])}?" if near else ""
        raise UserError(
            f"--topology {text}: no device {kind!r}{mend}\nTPUs {', '.join(tpus)}; GPUs {_gpus_told()}; Macs M1 to M4; cpu\n"
            f"{SUCH_AS}"
        )
    sides = tuple(int(side) for side in shape.split("x")) if re.fullmatch(r"\d{1,4}(x\d{1,4})*", shape) else ()
    if sides not in shapes(kind):
        raise UserError(f"--topology {text}: {shape or 'nothing'} is no slice of {kind}{_nearest_shapes(kind, sides)}")
    return Topology(text, kind, sides, islands)


def written_out(text: str) -> str:
    """A topology as people type it in our words; what is not understood, as it is.

    h100, h100-8, 8xh100, h100-16: gpu:1xH100, gpu:8xH100, gpu:8xH100, gpu:2*8xH100. v5e-8, v5litepod-8, v5p-8: v5e:2x4 twice,
    v5p:2x2x1 (Google's accelerator types; the slice most like a cube). m1: M1. Raises UserError where no slice has so many chips.
    """
    if tpu := re.fullmatch(r"(?i)((?:\d+\*)?)(v4|v5e|v5litepod|v5p|v6e|tpu7x)-(\d{1,6})", text):
        kind = tpu[2].lower().replace("litepod", "e")
        each = 2 if kind in CORES else 1
        chips = int(tpu[3]) / each
        unlike = lambda shape: (abs(math.log(math.prod(shape) / max(chips, 0.5))), sum(shape))
        near = min(shapes(kind), key=unlike)
        named = f"{tpu[1]}{kind}:{'x'.join(map(str, near))}"
        if math.prod(near) != chips:
            short = f"{kind.replace('v5e', 'v5litepod')}-{math.prod(near) * each}"
            raise UserError(
                f"--topology {text}: no slice of {kind} has so many chips; the nearest is {named} ({short})"
            )
        return named
    if gpu := re.fullmatch(r"(?i)(?:gpu:)?((?:\d+\*)?)(?:(\d+)x)?([a-z]+\d+\w*)(?:-(\d{1,6}))?", text):
        name, num = _named(gpu[3]), int(gpu[2] or gpu[4] or 1)
        if name in gpus() and not (gpu[2] and gpu[4]):
            most = DEVICES[name].together
            hosts = f"{num // most}*" if not gpu[1] and num > most and num % most == 0 and gpu[4] else gpu[1]
            return f"gpu:{hosts}{most if hosts != gpu[1] else num}x{name}"
    return _named(text) if text.lower() in map(str.lower, DEVICES) else text


def _named(text: str) -> str:
    """A name of the table in its own letters."""
    return next((name for name in DEVICES if name.lower() == text.lower()), text)


def _gpus_told() -> str:
    """The GPUs in a message: what NVIDIA sells by name alone as a range."""
    return f"{', '.join(name for name in gpus() if name not in GEFORCE)}, {min(GEFORCE)} to {max(GEFORCE)}"


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
    if kind not in gpus():
        near = difflib.get_close_matches(kind.upper(), gpus(), n=1, cutoff=0.3)
        mend = f"; did you mean gpu:{each}x{near[0]}?" if near else ""
        raise UserError(f"--topology {text}: no GPU {kind!r}{mend}\nthere is {_gpus_told()}; such as gpu:8xH100")
    most = DEVICES[kind].together
    if not re.fullmatch("[1-9][0-9]?", each) or int(each) > most:
        raise UserError(
            f"--topology {text}: a host has 1 to {most} GPUs\n"
            f"such as gpu:{most}x{kind}; of several hosts gpu:4*{most}x{kind}"
        )
    return Topology(text, kind, (int(each),), islands)


def _cpus(text: str, shape: str, islands: int) -> Topology:
    if islands > 1 or not shape.isdigit() or not 1 <= int(shape) <= MOST_CPUS:
        raise UserError(f"--topology {text}: expected cpu:1 to cpu:{MOST_CPUS}, devices that share this machine")
    return Topology(text, "cpu", (int(shape),))
