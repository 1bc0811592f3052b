"""What a training or decoding step needs and costs on given hardware: time, memory, chip hours, dollars.

Pure arithmetic. The step's bound is a roofline: computing, reading and writing HBM, and communicating each take their
time at the chip's peak, and the step takes the longest of the three. No machine reaches it: kernels miss their peaks,
and what is communicated hides behind computing only in part.

D model, L layers, S sequence, B batch; "device" is what JAX calls so (a TPU7x chip has two).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from moe_jax.config import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """An accelerator: peaks of its data sheet, dense. Edit `CHIPS`, or use `dataclasses.replace`."""

    flops: float
    """bfloat16 FLOP/s of a chip."""
    hbm_bytes: float
    hbm_bandwidth: float
    """Bytes/s."""
    link_bandwidth: float
    """Bytes/s one way: of one of the torus's links, or, without a torus, of a chip to the others of its node."""
    dollars_per_hour: float | None
    """On demand, as of `price_source`; None where no price was found."""
    price_source: str = ""
    devices: int = 1
    """JAX devices of a chip."""
    wraps_at: int = 0
    """A dimension of the torus closes to a ring if it is a multiple of this; 0: there is no torus."""
    node_chips: int = 0
    """Without a torus: chips of a node ..."""
    network_bandwidth: float = 0.0
    """... and bytes/s one way of a chip to other nodes."""
    watts: float | None = None
    """Thermal design power of the chip alone, without host, network and cooling; None where no source was found."""
    fp8_flops: float | None = None
    """FLOP/s in FP8, dense; None where the chip has no faster units for it than for bfloat16."""
    int8_flops: float | None = None


CHIPS: dict[str, Chip] = {
    # Google Cloud's documentation. HBM bandwidth of v5p is 2,765 GB/s there, 2,460 in jax's table. A link of TPU7x is
    # taken to be v5p's, since both documents say 1,200 GB/s for all of a chip's links both ways.
    "v4": Chip(275e12, 32 * GIB, 1200e9, 45e9, 3.22, "Cloud price page, v4-64, undated copy", wraps_at=4),
    "v5e": Chip(197e12, 16e9, 819e9, 45e9, 1.20, "How to Scale Your Model, Feb 2025", wraps_at=16, int8_flops=394e12),
    "v5p": Chip(459e12, 95 * GIB, 2765e9, 90e9, 4.20, "How to Scale Your Model, Feb 2025", wraps_at=4),
    "v6e": Chip(
        918e12, 32 * GIB, 1638e9, 90e9, 2.70, "press on general availability, Dec 2024", wraps_at=16, int8_flops=1836e12
    ),
    "tpu7x": Chip(2307e12, 192 * GIB, 7380e9, 90e9, None, devices=2, wraps_at=4, fp8_flops=4614e12),
    # Data sheets; the networks' 50 GB/s are those of DeepSeek's cluster (arXiv:2505.09343), unverified for others.
    # Eight bits on GPUs are taken to be twice as fast as bfloat16, as data sheets say (A100's INT8: unverified).
    # Watts as Meta's model cards of Code Llama (A100) and Llama 3 (H100) state them; H800 is taken to be H100's,
    # unverified.
    "a100": Chip(
        312e12,
        80e9,
        2.0e12,
        300e9,
        2.0,
        "middle of $1.1-3, 2026",
        node_chips=8,
        int8_flops=624e12,
        network_bandwidth=25e9,
        watts=400,
    ),
    "h100": Chip(
        989e12,
        80e9,
        3.35e12,
        450e9,
        3.0,
        "middle of $2-5, 2026",
        node_chips=8,
        fp8_flops=1979e12,
        int8_flops=1979e12,
        network_bandwidth=50e9,
        watts=700,
    ),
    "h800": Chip(
        989e12,
        80e9,
        3.35e12,
        160e9,
        2.0,
        "DeepSeek-V3's report",
        node_chips=8,
        fp8_flops=1979e12,
        int8_flops=1979e12,
        network_bandwidth=50e9,
        watts=700,
    ),
    "h200": Chip(
        989e12,
        141e9,
        4.8e12,
        450e9,
        4.0,
        "middle of $2.5-7, 2026",
        node_chips=8,
        fp8_flops=1979e12,
        int8_flops=1979e12,
        network_bandwidth=50e9,
    ),
    "b200": Chip(
        2250e12,
        180e9,
        8e12,
        900e9,
        5.0,
        "middle of $4.5-6, 2026",
        node_chips=8,
        fp8_flops=4500e12,
        int8_flops=4500e12,
        network_bandwidth=50e9,
    ),
}
"""Peaks and prices per chip. Prices differ by a factor of several between sellers and months: give your own."""


@dataclass(frozen=True)
class Hardware:
    """So many chips of a kind; TPUs as a torus."""

    name: str
    chip: Chip
    chips: int
    torus: tuple[int, ...] = ()

    @property
    def devices(self) -> int:
        return self.chips * self.chip.devices

    @property
    def grid(self) -> tuple[int, ...]:
        """Dimensions that mesh axes lie along: the torus's, and a chip's devices where it has several."""
        return (*self.torus, self.chip.devices) if self.chip.devices > 1 else self.torus

    @property
    def device(self) -> Chip:
        """A device's share of its chip."""
        n = self.chip.devices
        rates = ("flops", "fp8_flops", "int8_flops", "hbm_bytes", "hbm_bandwidth", "link_bandwidth")
        values = {name: getattr(self.chip, name) for name in rates}
        return replace(self.chip, **{name: value and value / n for name, value in values.items()})


def parse_hardware(topology: str = "", chip: str = "", chips: int = 0) -> Hardware:
    """The hardware of `topology` ("v5p:8x16x16", a torus of chips), or of a kind of chip and how many.

    Raises:
        ConfigError: neither or both are given, or a name is unknown; legal ones are listed.
    """
    if bool(topology) == bool(chip):
        raise ConfigError("give either --topology, e.g. v5p:8x16x16, or --chip and --chips, e.g. --chip h800 --chips 8")
    name, _, shape = topology.partition(":") if topology else (chip, "", "")
    if name not in CHIPS:
        raise ConfigError(f"no chip is named {name!r}: there are {', '.join(CHIPS)}")
    if not topology:
        if chips < 1:
            raise ConfigError(f"--chips {chips}: must be at least 1")
        return Hardware(chip, CHIPS[name], chips)
    sizes = shape.split("x")
    if not CHIPS[name].wraps_at or not all(size.isdigit() and int(size) > 0 for size in sizes):
        raise ConfigError(f"--topology {topology!r}: must be a TPU and its torus, e.g. v5p:8x16x16 or v5e:16x16")
    torus = tuple(map(int, sizes))
    return Hardware(topology, CHIPS[name], math.prod(torus), torus)


# ---------------------------------------------------------------------------------------------------------------------
# communication
# ---------------------------------------------------------------------------------------------------------------------

Kind = Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute"]


@dataclass(frozen=True)
class Collective:
    """One operation, `count` times a step."""

    kind: Kind
    axes: tuple[str, ...]
    """The mesh axes it goes over."""
    num_bytes: float
    """Of a device's whole operand (all-gather: result), once."""
    count: float = 1.0
    what: str = ""

    def sent_bytes(self, size: int) -> float:
        """Bytes that each of `size` devices sends in a step, going by rings."""
        passes = {"all-reduce": 2.0}.get(self.kind, 1.0)
        share = 1.0 if self.kind == "collective-permute" else (size - 1) / size
        return self.count * passes * share * self.num_bytes


def torus_dimensions(torus: Sequence[int], sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Along which dimensions of the torus each mesh axis lies.

    As `jax.make_mesh` chooses: from the last axis on, each takes whole dimensions whose product is its size, as many as
    it can. An axis for which there are none is taken to lie along a part of one dimension, without a ring.
    """
    free, placed = list(torus), {}
    for name, size in reversed(list(sizes.items())):
        placed[name] = _whole_dimensions(free, size)
        for dimension in placed[name]:
            free.remove(dimension)
    return {name: placed[name] for name in sizes}


def _whole_dimensions(free: Sequence[int], size: int) -> tuple[int, ...]:
    for count in range(len(free), 0, -1):
        for dimensions in itertools.combinations(free, count):
            if math.prod(dimensions) == size and 1 not in dimensions:
                return dimensions
    return ()


def collective_seconds(collective: Collective, hardware: Hardware, sizes: Mapping[str, int]) -> float:
    """Time of a collective at full speed of the links it can use.

    On a torus: two links for each dimension that its axes lie along, one where the dimension is no ring; between the
    devices of a chip is taken to be one link, too. What goes to one device each (all-to-all) passes a quarter of each
    ring on its way. Without a torus: the node's bandwidth if the
    group, with all axes inside it, fits a node, else the network's.
    """
    size = math.prod(sizes[axis] for axis in collective.axes)
    if size == 1:
        return 0.0
    chip = hardware.device
    sent = collective.sent_bytes(size)
    if not hardware.torus:
        names = list(sizes)
        first = min(names.index(axis) for axis in collective.axes)
        within = math.prod(sizes[name] for name in names[first:])
        return sent / (chip.link_bandwidth if within <= chip.node_chips else chip.network_bandwidth)
    placed = torus_dimensions(hardware.grid, sizes)
    dimensions = [dimension for axis in collective.axes for dimension in placed[axis]]
    rings = [dimension % chip.wraps_at == 0 for dimension in dimensions]
    bandwidth = chip.link_bandwidth * max(sum(2 if ring else 1 for ring in rings), 1)
    if collective.kind == "all-to-all":
        hops = sum(n / 4 if ring else n / 2 for n, ring in zip(dimensions, rings, strict=True)) or size / 2
        sent *= max(hops, 1.0)
    return sent / bandwidth


# ---------------------------------------------------------------------------------------------------------------------
# the bill
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """What one device does in a step."""

    flops: float
    """Executed, what remat computes anew included."""
    hbm_bytes: float
    """Read and written, at least."""
    collectives: tuple[Collective, ...] = ()
    quantization: Literal["none", "fp8", "int8", "int4"] = "none"
    quantized_flops: float = 0.0
    """Those of `flops` whose operands have 8 bits."""


@dataclass(frozen=True)
class Roofline:
    compute_seconds: float
    hbm_seconds: float
    interconnect_seconds: float

    @property
    def step_seconds(self) -> float:
        return max(self.compute_seconds, self.hbm_seconds, self.interconnect_seconds)

    @property
    def bound_by(self) -> str:
        """The largest of the three."""
        seconds = {
            "compute": self.compute_seconds,
            "hbm": self.hbm_seconds,
            "interconnect": self.interconnect_seconds,
        }
        return max(seconds, key=lambda name: seconds[name])


def roofline(step: Step, hardware: Hardware, sizes: Mapping[str, int]) -> Roofline:
    """The step's three times; collectives are added up, as if none overlapped with another."""
    chip = hardware.device
    fast = {"fp8": chip.fp8_flops, "int8": chip.int8_flops}.get(step.quantization) or chip.flops
    return Roofline(
        (step.flops - step.quantized_flops) / chip.flops + step.quantized_flops / fast,
        step.hbm_bytes / chip.hbm_bandwidth,
        sum(collective_seconds(collective, hardware, sizes) for collective in step.collectives),
    )


@dataclass(frozen=True)
class Bill:
    days: float
    chip_hours: float
    dollars: float | None
    """None without a price."""
    kilowatt_hours: float | None = None
    """Of the chips alone, at their thermal design power; None where that is unknown."""


def bill(
    tokens: float,
    tokens_per_second: float,
    chips: int,
    dollars_per_hour: float | None,
    *,
    extra_chip_hours: float = 0.0,
    watts: float | None = None,
) -> Bill:
    """Time, money and energy for `tokens` at a speed of all chips together, plus some more chip hours."""
    hours = tokens / tokens_per_second / 3600
    chip_hours = hours * chips + extra_chip_hours
    dollars = None if dollars_per_hour is None else chip_hours * dollars_per_hour
    return Bill(hours / 24, chip_hours, dollars, None if watts is None else chip_hours * watts / 1000)
