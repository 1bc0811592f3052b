"""The mesh, and the one table from logical axis names to mesh axes.

Each weight names its logical axes where it is created (`layers.Weight`), activations are constrained at block
boundaries, and XLA's partitioner does the rest: the same program on 1 device and on N gives the same numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
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
            raise ConfigError(f"MeshConfig: {sizes}: {known} does not divide the {len(devices)} devices")
        sizes[free] = len(devices) // known
    needed = int(np.prod(list(sizes.values())))
    if needed > len(devices):
        raise ConfigError(f"MeshConfig: {sizes} needs {needed} devices, there are {len(devices)}")
    shape = tuple(sizes.values())
    return Mesh(np.asarray(devices[:needed]).reshape(shape), tuple(sizes), axis_types=(AxisType.Auto,) * len(shape))


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
    """Places this process's rows of a batch on the mesh; rows that do not divide over it are replicated."""

    def put(x: np.ndarray) -> jax.Array:
        rows = (x.shape[0] * jax.process_count(), *x.shape[1:])
        sharding = NamedSharding(mesh, partition_spec(("batch",) + (None,) * (x.ndim - 1), rows, mesh))
        return jax.make_array_from_process_local_data(sharding, x)

    return {name: put(x) for name, x in batch.items()}


def batch_shards(rows: int) -> int:
    """Over how many devices `rows` of a batch lie, under the mesh that `jax.set_mesh` put in place."""
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else int(np.prod([mesh.shape[name] for name in RULES["batch"] or ()]))
    return shards if rows % shards == 0 else 1


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains an activation to the logical `axes` under the mesh that `jax.set_mesh` put in place, if any."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, x.shape, mesh))
