"""The mesh, and the one table from logical axis names to mesh axes.

Each weight names its logical axes where it is created (`layers.Initializer.weight`), activations are constrained at
block boundaries, and XLA's partitioner does the rest: the same program on 1 device and on N gives the same numbers.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moe_jax.config import ConfigError, MeshConfig

RULES: dict[str, str | tuple[str, ...] | None] = {
    # weights
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "head": None,
    "latent": None,
    "mlp": "tensor",
    "expert": "expert",
    # activations
    "batch": ("data", "fsdp", "expert"),
    "sequence": None,
    "activation": None,
}
"""Logical axis → mesh axis, or axes, or None for replicated."""


def make_mesh(cfg: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the axes of `MeshConfig`; its first devices are taken if it needs fewer than there are.

    Raises:
        ConfigError: the axes' product does not fit the number of devices, or leaves a process without one; an axis is
            no product of dimensions of a TPU's torus.
    """
    devices = jax.devices() if devices is None else devices
    sizes = dataclasses.asdict(cfg)
    known = int(np.prod([size for size in sizes.values() if size != -1]))
    if -1 in sizes.values():
        free = next(name for name, size in sizes.items() if size == -1)
        if len(devices) % known:
            raise ConfigError(
                f"MeshConfig.{free} = -1: the other axes, {sizes}, take {known} devices each, which does not divide the"
                f" {len(devices)} there are; choose sizes whose product does"
            )
        sizes[free] = len(devices) // known
    needed = int(np.prod(list(sizes.values())))
    if needed > len(devices):
        raise ConfigError(
            f"MeshConfig: {sizes} needs {needed} devices, there are {len(devices)}; lower an axis, or set one to -1"
        )
    processes = {device.process_index for device in devices}
    if len({device.process_index for device in devices[:needed]}) < len(processes):
        raise ConfigError(
            f"MeshConfig: {sizes} needs {needed} of the {len(devices)} devices and leaves some of the {len(processes)}"
            " processes without one; raise an axis, set one to -1, or start fewer processes"
        )
    shape = tuple(sizes.values())
    try:
        return jax.make_mesh(shape, tuple(sizes), (AxisType.Auto,) * len(shape), devices=devices[:needed])
    except NotImplementedError as error:
        raise ConfigError(
            f"MeshConfig: {sizes}: the size of each axis must be a product of dimensions of the TPUs' torus, each"
            " used once; `python -m launch.compile --search` lists meshes that fit"
        ) from error


def partition_spec(axes: Sequence[str | None], shape: Sequence[int], mesh: Any) -> PartitionSpec:
    """The partitioning of an array whose trailing dimensions are the logical `axes`; leading ones are replicated.

    A dimension that its mesh axes do not divide is replicated.
    """
    spec: list[Any] = [None] * (len(shape) - len(axes))
    for axis, size in zip(axes, shape[len(shape) - len(axes) :], strict=True):
        rule = RULES[axis] if axis is not None else None
        names = (rule,) if isinstance(rule, str) else rule or ()
        shards = int(np.prod([mesh.shape[name] for name in names]))
        spec.append(rule if shards > 1 and size % shards == 0 else None)
    return PartitionSpec(*spec)


def own_rows(num_rows: int, mesh: Mesh) -> list[int]:
    """Which rows of a batch lie on this process's devices; with one process, all. Axes other than the batch's repeat
    rows, so that several processes may have the same ones."""
    rows = _batch_sharding((num_rows,), mesh).addressable_devices_indices_map((num_rows,)).values()
    return sorted({row for index in rows if index is not None for row in range(*index[0].indices(num_rows))})


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh, num_rows: int | None = None) -> dict[str, jax.Array]:
    """Places a batch on the mesh; rows that do not divide over it are replicated and warned of.

    Args:
        batch: all rows, the same in every process; or, of a batch of `num_rows`, this process's `own_rows` in order.
        mesh: of all processes.
        num_rows: rows of the whole batch, if `batch` holds `own_rows` alone.
    """

    own = None if num_rows is None else own_rows(num_rows, mesh)

    def put(x: np.ndarray) -> jax.Array:
        whole = len(x) if num_rows is None else num_rows
        if batch_shards(whole, mesh) == 1:
            _warn_of_replication(whole, mesh)
        place_R = np.arange(whole)
        if own is not None:
            place_R[own] = np.arange(len(x))
        shape = (whole, *x.shape[1:])
        return jax.make_array_from_callback(shape, _batch_sharding(shape, mesh), lambda index: x[place_R[index[0]]])  # pyright: ignore[reportOptionalSubscript]

    return {name: put(x) for name, x in batch.items()}


def _batch_sharding(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, partition_spec(("batch",) + (None,) * (len(shape) - 1), shape, mesh))


def replicate(tree: Any) -> Any:
    """The arrays of a tree, whole on every device, so that every process can read them; under `jax.set_mesh` only."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.lax.with_sharding_constraint(tree, jax.tree.map(lambda _: PartitionSpec(), tree))


@functools.cache
def _warn_of_replication(rows: int, mesh: Mesh) -> None:
    wanted = _batch_devices(mesh)
    if wanted == 1:
        return
    message = "%d rows of a batch do not divide over the %d devices of the axes %s: every device works on all of them."
    logging.getLogger(__name__).warning(message, rows, wanted, RULES["batch"])


def _batch_devices(mesh: Any) -> int:
    return int(np.prod([mesh.shape[name] for name in RULES["batch"] or ()]))


def batch_shards(rows: int, mesh: Any = None) -> int:
    """Over how many devices `rows` of a batch lie, on `mesh` or on the one that `jax.set_mesh` put in place."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    shards = 1 if mesh.empty else _batch_devices(mesh)
    return shards if rows % shards == 0 else 1


def by_rows(f: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """f(x) for an f that works on each row of the batch alone: on each device for its own rows.

    For operations that XLA's partitioner does not divide (`top_k`), before which it would gather all rows.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or batch_shards(x.shape[0], mesh) == 1:
        return f(x)
    rows = PartitionSpec(RULES["batch"])
    return jax.shard_map(f, in_specs=rows, out_specs=rows, check_vma=False)(x)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains an activation to the logical `axes` under the mesh that `jax.set_mesh` put in place, if any."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, x.shape, mesh))
