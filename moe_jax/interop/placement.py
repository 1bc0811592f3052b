"""Tensors of a checkpoint into arrays on their devices, and out of them: one tensor at a time.

B, S and the letters of axes are those of `tensor_names`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from moe_jax.interop.low_bits import Form
from moe_jax.interop.tensor_names import Entry, dimensions
from moe_jax.interop.weight_files import WeightFiles
from moe_jax.ops.quantization import Format, Quantized
from moe_jax.sharding import partition_spec


def placed(
    entries: Sequence[Entry],
    files: WeightFiles,
    shape: tuple[int, ...],
    sharding: Sharding,
    dtype: str,
    on_host: bool | None = None,
) -> Array:
    """The array that these tensors make up; each device's part is allocated once and filled tensor by tensor.

    Pieces of the memory-mapped tensors are copied to the device, transposed there and written in place; what is held
    besides are one piece on the host and two on the device. With `on_host` (None: where devices are CPUs) parts are
    filled in the host's memory, without compiling, and are then the devices' own: nothing else is held.
    """
    boxes = {
        device: [range(size)[part] for size, part in zip(shape, index, strict=True)]
        for device, index in sharding.addressable_devices_indices_map(shape).items()
        if index is not None
    }
    if on_host is None:
        on_host = all(device.platform == "cpu" for device in boxes)
    parts = {}
    for device, box in boxes.items():
        sizes = [len(side) for side in box]
        parts[device] = _aligned(sizes, dtype) if on_host else jnp.zeros(sizes, dtype, device=device)
    for entry in entries:
        sizes, axes = entry.sizes(shape), entry.split_axes
        tensor = files.read(entry.tensor).reshape([sizes[axis] for axis in axes])
        order = tuple(axes.index(axis) for axis in entry.whole_axes)
        for device, box in boxes.items():
            sides = list(zip(box, entry.place, strict=True))
            if any(place is not None and place not in side for side, place in sides):
                continue
            local = [None if place is None else place - side.start for side, place in sides]
            wanted = {axis: slice(side.start, side.stop) for axis, side in zip(entry.ours, box, strict=True)}
            piece = tensor[tuple(wanted[axis] for axis in axes)]
            part = parts[device]
            if isinstance(part, np.ndarray):
                part[tuple(slice(None) if place is None else place for place in local)] = piece.transpose(order)
            else:
                starts = [place or 0 for place in local]
                parts[device] = _write(part, jax.device_put(piece, device), starts, order, entry.ours)
                jax.block_until_ready(parts[device])  # or pieces would queue up for their transfer
    arrays = [jax.device_put(part, device) for device, part in parts.items()]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


class _Part(NamedTuple):
    """The values or the scales of weights in low bits as if they were the tensors."""

    files: WeightFiles
    part: Literal["values", "scales"]

    def read(self, name: str) -> np.ndarray:
        return getattr(self.files.packed(name), self.part)


def packed_form(entries: Sequence[Entry], files: WeightFiles) -> Form | None:
    """The form of an array whose tensors are all in the same low bits; None for others."""
    forms = {files.form(entry.tensor) for entry in entries}
    return forms.pop() if len(forms) == 1 else None


def placed_packed(
    entries: Sequence[Entry],
    files: WeightFiles,
    variable: nnx.Variable,
    mesh: Mesh | None,
    form: Form,
    inputs: Format | None,
) -> Quantized:
    """The array [*stack, *inputs, *outputs] that these tensors make up, packed: [*stack, *outputs, D].

    On a mesh, stacks of experts are divided over them; every device has all of the rest.
    """
    format, group, columns = form
    roles = variable.get_metadata("roles")
    axes = [axis if axis == "expert" else None for axis in variable.get_metadata("axes")]
    axes = [axis for axis, role in zip(axes, roles, strict=True) if role != "i"] + [None]
    outer = len(variable.shape) - len(roles)
    kept = [size for size, role in zip(variable.shape, "b" * outer + roles, strict=True) if role != "i"]
    entries = [_with_one_input_axis(entry, roles) for entry in entries]

    def of(part: Literal["values", "scales"], dtype: str, width: int) -> Array:
        shape = (*kept, width)
        sharding = NamedSharding(mesh, partition_spec(axes, shape, mesh)) if mesh else None
        place = sharding or SingleDeviceSharding(jax.local_devices()[0])
        return placed(entries, cast(WeightFiles, _Part(files, part)), shape, place, dtype)

    width = -(-columns // 2) if format == "int4" else columns
    values = of("values", "int8" if format == "int8" else "uint8", width)
    return Quantized(values, of("scales", "float32", -(-columns // group)), format, (1, group), columns, inputs)


def _with_one_input_axis(entry: Entry, roles: str) -> Entry:
    """The entry with all inputs as one axis I, the last one of both sides."""
    roles = "b" * (len(entry.ours) - len(roles)) + roles
    inputs = {axis for axis, role in zip(entry.ours, roles, strict=True) if role == "i"}
    kept = [(axis, place) for axis, place, role in zip(entry.ours, entry.place, roles, strict=True) if role != "i"]
    outputs = [axes for axes in dimensions(entry.theirs) if axes[0] not in inputs]
    theirs = "".join(f"({axes})" if len(axes) > 1 else axes for axes in outputs)
    ours, places = "".join(axis for axis, _ in kept) + "I", (*(place for _, place in kept), None)
    return dataclasses.replace(entry, theirs=theirs + "I", ours=ours, place=places)


def _aligned(shape: list[int], dtype: str) -> np.ndarray:
    """Memory that XLA's CPU devices take over without a copy: it must start at a multiple of 64 bytes."""
    size = math.prod(shape) * jnp.dtype(dtype).itemsize
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(jnp.dtype(dtype)).reshape(shape)


@functools.partial(jax.jit, donate_argnums=0, static_argnames=("order", "ours"))
def _write(part: Array, piece: Array, starts: list[int], order: tuple[int, ...], ours: str) -> Array:
    piece = piece.transpose(order).astype(part.dtype)
    piece = jnp.expand_dims(piece, _numbered(ours))
    return jax.lax.dynamic_update_slice(part, piece, starts)


def extracted(array: Array, entry: Entry, dtype: str) -> np.ndarray:
    """The tensor of `entry`: the reverse of `placed`. From a mesh, its parts are gathered on every device."""
    numbers = [place for place in entry.place if place is not None]
    sharding = array.sharding
    whole = NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else sharding
    return np.asarray(_reader(entry.theirs, entry.ours, dtype, whole)(array, numbers))


@functools.cache
def _reader(theirs: str, ours: str, dtype: str, sharding: Sharding):
    entry = Entry("", theirs, "", ours, ())
    order = [entry.whole_axes.index(axis) for axis in entry.split_axes]

    def read(array: Array, numbers: list[Array]) -> Array:
        shape = entry.tensor_shape(array.shape)
        # One slice: axis by axis, the first would copy a share of the whole stack for each tensor.
        starts: list[Any] = [0] * array.ndim
        sizes = list(array.shape)
        for axis, number in zip(_numbered(ours), numbers, strict=True):
            starts[axis], sizes[axis] = number, 1
        array = jax.lax.dynamic_slice(array, starts, sizes).squeeze(tuple(_numbered(ours)))
        return array.astype(dtype).transpose(order).reshape(shape)

    return jax.jit(read, out_shardings=sharding)


def _numbered(ours: str) -> list[int]:
    return [i for i, axis in enumerate(ours) if not axis.isupper()]
