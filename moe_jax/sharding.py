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
        ConfigError: the axes' product does not fit the number of devices.
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
    shape = tuple(sizes.values())
    return jax.make_mesh(shape, tuple(sizes), (AxisType.Auto,) * len(shape), devices=devices[:needed])


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


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Places this process's rows of a batch on the mesh; rows that do not divide over it are replicated and warned of.

    Raises:
        ConfigError: they do not divide and there are several processes, whose rows differ.
    """

    def put(x: np.ndarray) -> jax.Array:
        rows = (x.shape[0] * jax.process_count(), *x.shape[1:])
        if batch_shards(rows[0], mesh) == 1:
            _warn_of_replication(rows[0], mesh)
        sharding = NamedSharding(mesh, partition_spec(("batch",) + (None,) * (x.ndim - 1), rows, mesh))
        return jax.make_array_from_process_local_data(sharding, x)

    return {name: put(x) for name, x in batch.items()}


@functools.cache
def _warn_of_replication(rows: int, mesh: Mesh) -> None:
    wanted = _batch_devices(mesh)
    if wanted == 1:
        return
    message = f"{rows} rows of a batch do not divide over the {wanted} devices of the axes {RULES['batch']}"
    if jax.process_count() > 1:
        raise ConfigError(f"{message}: choose a batch size that is a multiple")
    logging.getLogger(__name__).warning("%s: every device works on all of them.", message)


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
