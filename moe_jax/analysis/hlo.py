"""Which collectives and matrix products a compiled program runs, how often, over which mesh axes and of which types:
read from XLA's text.

XLA's own cost analysis counts the body of a loop once; here it counts as often as the loop runs. Branches of
conditionals are not counted: here they are rounds of dispatch that an even load skips.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "ragged-all-to-all", "all-to-all", "collective-permute")
_INSTRUCTION = re.compile(
    rf"^\s*(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<type>\(.*?\)|\S+) (?P<kind>{'|'.join(_KINDS)})(?P<start>-start)?\("
)
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$")
_WHILE = re.compile(r" while\(.*condition=%?([\w.-]+), body=%?([\w.-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|called_computation|async_execution_thread_calls)=%?([\w.-]+)")
_ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16|f8\w+|c64|c128)\[([\d,]*)\]")


_PRODUCT = re.compile(
    r"^\s*(?:ROOT )?%?[\w.-]+ = (?P<type>\w+\[[\d,]*\])\S* (?P<kind>convolution|dot|custom-call)\((?P<operands>[^)]*)\)"
)
_RESULT = re.compile(r"^\s*(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<type>\w+\[[\d,]*\])", re.MULTILINE)


@dataclass(frozen=True)
class HloProduct:
    """A product of two matrices, or of stacks of them."""

    operands: tuple[str, str]
    """Element types of the two: bf16, f8e4m3fn, s8, …"""
    flops: int
    """Of a device, once."""
    count: int
    """Times in a run of the program."""
    op_name: str

    @property
    def is_8_bit(self) -> bool:
        return all(kind in ("s8", "u8") or kind.startswith("f8") for kind in self.operands)


@dataclass(frozen=True)
class HloCollective:
    """An instruction that communicates."""

    kind: str
    """all-gather, reduce-scatter, all-reduce, all-to-all, ragged-all-to-all or collective-permute."""
    axes: tuple[str, ...]
    """Mesh axes along which the devices of a group differ; empty if a group is one device."""
    num_bytes: int
    """Of a device's whole operand (all-gather: result), once."""
    count: int
    """Times in a run of the program."""
    shape: str
    op_name: str
    """Where in the traced program it comes from."""


def collectives(hlo: str, sizes: Mapping[str, int]) -> list[HloCollective]:
    """The collectives of a compiled module's text, compiled for a mesh of these `sizes` in this order."""
    found = []
    for computation, lines, count in _executed(_computations(hlo)):
        for line in lines:
            match = _INSTRUCTION.match(line)
            if match is None:
                continue
            kind, group = match["kind"], _group(line, sizes)
            # TPUs fuse the sum and the slice that keep a device's part.
            scattered = kind == "all-reduce" and computation.startswith("all-reduce-scatter")
            num_bytes = _bytes(match["type"], largest=match["start"] is not None and kind != "all-reduce")
            if kind == "reduce-scatter":
                num_bytes *= len(group)
            name = re.search(r'op_name="([^"]*)"', line)
            shape = " ".join(re.findall(r"[a-z]+\d*\[[\d,]*\]", match["type"])[:2])
            found.append(
                HloCollective(
                    "reduce-scatter" if scattered else kind,
                    _axes(group, sizes),
                    num_bytes,
                    count,
                    shape,
                    name[1] if name else "",
                )
            )
    return found


def products(hlo: str) -> list[HloProduct]:
    """The matrix products of a compiled module's text, whose TPU form is a convolution; also those of ragged dots."""
    types = {match["name"]: match["type"] for match in _RESULT.finditer(hlo)}
    found = []
    for _, lines, count in _executed(_computations(hlo)):
        for line in lines:
            match = _PRODUCT.match(line)
            if match is None:
                continue
            name = re.search(r'op_name="([^"]*)"', line)
            op_name = name[1] if name else ""
            operands = [types.get(name, "") for name in re.findall(r"%?([\w.-]+)(?:,|$)", match["operands"])]
            if match["kind"] == "custom-call":
                # Sizes of groups and the like are integers; the two matrices come last.
                operands = [kind for kind in operands if kind and not kind.startswith(("s32", "u32", "pred"))][-2:]
                if "ragged_dot" not in op_name or len(operands) < 2:
                    continue
            sizes = [_sizes(kind) for kind in (match["type"], *operands[:2])]
            flops = 2 * math.prod(sizes[0]) * _contracted(match["kind"], line, *sizes)
            pair = operands[0].split("[")[0], operands[1].split("[")[0]
            found.append(HloProduct(pair, flops, count, op_name))
    return found


def _sizes(type_text: str) -> list[int]:
    return [int(n) for n in type_text.partition("[")[2].rstrip("]").split(",") if n]


def _contracted(kind: str, line: str, result: list[int], a: list[int], b: list[int]) -> int:
    """How many numbers each one of the result is the sum of."""
    if kind == "dot":
        axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line)
        return math.prod(a[int(axis)] for axis in axes[1].split(",") if axis) if axes else 1
    if kind == "custom-call":
        return a[-1] if len(result) == 2 else a[0]
    labels = re.search(r"dim_labels=\w+_(\w+)->(\w+)", line)
    assert labels is not None
    kernel, output = dict(zip(labels[1], b, strict=True)), dict(zip(labels[2], result, strict=True))
    # A spatial dimension of the kernel is a second contracted one, unless the result has it too: then it is a batch.
    windows = (size for label, size in kernel.items() if label.isdigit() and output.get(label, 1) == 1)
    return kernel.get("i", 1) * math.prod(windows)


def _computations(hlo: str) -> dict[str, list[str]]:
    """Lines of each computation; the entry's is named ""."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in hlo.splitlines():
        match = _COMPUTATION.match(line)
        if match:
            lines = found.setdefault("" if match["entry"] else match["name"], [])
        else:
            lines.append(line)
    return found


def _executed(computations: dict[str, list[str]]) -> Iterator[tuple[str, list[str], int]]:
    """Each computation that runs, with how often: once for each place that calls it."""
    stack = [("", 1)]
    while stack:
        name, count = stack.pop()
        lines = computations.get(name, [])
        yield name, lines, count
        for line in lines:
            loop = _WHILE.search(line)
            if loop:
                stack.append((loop[2], count * _trip_count(line, computations.get(loop[1], []))))
            else:
                stack += [(called, count) for called in _CALLED.findall(line)]


def _trip_count(line: str, condition: Sequence[str]) -> int:
    """Iterations of a loop that counts from 0; 1 where its end is not a constant."""
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
    if known:
        return int(known[1])
    text = "\n".join(condition)
    ends = re.findall(r"s32\[\][^ ]* constant\((\d+)\)", text)
    return max(int(ends[0]), 1) if len(ends) == 1 and "direction=LT" in text else 1


def _bytes(type_text: str, largest: bool) -> int:
    sizes = []
    for kind, dimensions in _ARRAY.findall(type_text):
        bits = 8 if kind == "pred" or kind.startswith("f8") else int(re.sub(r"\D", "", kind))
        sizes.append(math.prod(int(n) for n in dimensions.split(",") if n) * bits // 8)
    return max(sizes, default=0) if largest else sum(sizes)


def _iota(text: str) -> np.ndarray:
    """[2,4]T(1,0): numbers from 0, in this shape, transposed."""
    shape, permutation = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()  # pyright: ignore
    dimensions = [int(n) for n in shape.split(",")]
    ids = np.arange(math.prod(dimensions)).reshape(dimensions)
    return ids.transpose([int(n) for n in permutation.split(",")]) if permutation else ids


def _group(line: str, sizes: Mapping[str, int]) -> list[int]:
    """The first group of devices that communicate, as numbers in the mesh's order."""
    everyone = list(range(math.prod(sizes.values())))
    pairs = re.search(r"source_target_pairs=\{\{(.*?)\}\}", line)
    if pairs:
        for pair in pairs[1].split("},{"):
            source, target = map(int, pair.split(","))
            if source != target:
                return [source, target]
        return [0]
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    if listed:
        return [int(n) for n in listed[1].split(",")]
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", line)
    if iota:
        return _iota(iota[3]).reshape(int(iota[1]), int(iota[2]))[0].tolist()
    mesh = re.search(r"replica_groups=(?:mesh|@\w+)\[(.*?)\](?:, device_ids=\((.*?\))\))? ?\{(.*?)\}", line)
    if mesh:
        axes = re.findall(r"'(\w+)'=(\d+)", mesh[1])
        shape = [int(size) for _, size in axes]
        ids = (_iota(mesh[2]) if mesh[2] else np.arange(math.prod(shape))).reshape(shape)
        used = re.findall(r"'(\w+)'", mesh[3])
        return ids[tuple(slice(None) if name in used else 0 for name, _ in axes)].reshape(-1).tolist()
    return everyone


def _axes(group: Sequence[int], sizes: Mapping[str, int]) -> tuple[str, ...]:
    places = np.unravel_index(list(group), tuple(sizes.values()))
    return tuple(name for name, place in zip(sizes, places, strict=True) if len(set(place.tolist())) > 1)
