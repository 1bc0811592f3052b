"""Tensors of a checkpoint into arrays on their devices, and out of them: one tensor at a time.

B, S and the letters of axes are those of `tensor_names`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from moe_jax.interop.tensor_names import Entry
from moe_jax.interop.weight_files import WeightFiles


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
