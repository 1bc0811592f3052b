"""The mesh, and the one table from logical axis names to mesh axes.

Each weight names its logical axes where it is created (`layers.Initializer.weight`), activations are constrained at
block boundaries, and XLA's partitioner does the rest: the same program on 1 device and on N gives the same numbers.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moe_jax.config import ConfigError, MeshConfig

Tree = TypeVar("Tree")

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
    "sequence": "context",
    "rows": ("data", "fsdp", "expert", "context"),
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


def token_axes(shape: Sequence[int], mesh: Any = None) -> tuple[str, str | None]:
    """The logical axes of the first two dimensions of an array [B, S, ...] of tokens.

    The mesh's axis `context` divides sequences in twice as many chunks as it has devices (`balanced`). Where they do
    not go up, and when decoding, which has one position, it divides the rows like the other axes.
    """
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    if mesh.empty or mesh.shape["context"] == 1 or shape[1] % (2 * mesh.shape["context"]) == 0:
        return "batch", "sequence"
    return ("rows" if shape[0] % _devices("rows", mesh) == 0 else "batch"), None


def token_shards(shape: Sequence[int]) -> tuple[int, int]:
    """Over how many devices the rows and the columns of an array [B, S, ...] of tokens lie, on the mesh that
    `jax.set_mesh` put in place."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return 1, 1
    rows, columns = token_axes(shape, mesh)
    devices = _devices(rows, mesh)
    return devices if shape[0] % devices == 0 else 1, _devices(columns, mesh) if columns else 1


def row_devices(mesh: Any) -> int:
    """Over how many devices of a mesh the rows of a batch are spread, if they divide."""
    return _devices("batch", mesh)


def _devices(axis: str, mesh: Any) -> int:
    rule = RULES[axis] or ()
    return math.prod(mesh.shape[name] for name in ((rule,) if isinstance(rule, str) else rule))


def own_rows(num_rows: int, mesh: Mesh) -> list[int]:
    """Which rows of a batch lie on this process's devices; with one process, all. Axes other than the batch's repeat
    rows, so that several processes may have the same ones."""
    spec = NamedSharding(mesh, partition_spec(("batch",), (num_rows,), mesh))
    rows = spec.addressable_devices_indices_map((num_rows,)).values()
    return sorted({row for index in rows if index is not None for row in range(*index[0].indices(num_rows))})


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh, num_rows: int | None = None) -> dict[str, jax.Array]:
    """Places a batch's arrays, [B] and [B, S, ...], on the mesh; what does not divide is replicated and warned of.

    Args:
        batch: all rows, the same in every process; or, of a batch of `num_rows`, this process's `own_rows` in order.
        mesh: of all processes.
        num_rows: rows of the whole batch, if `batch` holds `own_rows` alone.
    """

    own = None if num_rows is None else own_rows(num_rows, mesh)

    def put(x: np.ndarray) -> jax.Array:
        whole = len(x) if num_rows is None else num_rows
        place_R = np.arange(whole)
        if own is not None:
            place_R[own] = np.arange(len(x))
        shape = (whole, *x.shape[1:])
        axes = token_axes(shape, mesh) if len(shape) > 1 else ("batch",)
        spec = partition_spec(axes + (None,) * (len(shape) - len(axes)), shape, mesh)
        _warn_of_replication(shape, spec, mesh)

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            return x[(place_R[index[0]], *index[1:])]

        return jax.make_array_from_callback(shape, NamedSharding(mesh, spec), part)

    return {name: put(x) for name, x in batch.items()}


def replicate(tree: Any) -> Any:
    """The arrays of a tree, whole on every device, so that every process can read them; under `jax.set_mesh` only."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.lax.with_sharding_constraint(tree, jax.tree.map(lambda _: PartitionSpec(), tree))


@functools.cache
def _warn_of_replication(shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh) -> None:
    used = set(jax.tree.leaves(tuple(spec)))
    idle = [axis for axis in RULES["rows"] or () if mesh.shape[axis] > 1 and axis not in used]
    if idle and (len(shape) > 1 or idle != ["context"]):
        message = "Rows and columns %s of a batch do not divide over the axes %s: their devices repeat the same work."
        logging.getLogger(__name__).warning(message, shape[:2], idle)


def by_rows(f: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """f(x) for an f that works on each row, or each token of [B, S, ...], alone: on each device for its own.

    For operations that XLA's partitioner does not divide (`top_k`), before which it would gather all rows.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return f(x)
    axes = token_axes(x.shape) if x.ndim > 2 else ("batch", None)
    spec = partition_spec(axes + (None,) * (x.ndim - 2), x.shape, mesh)
    if not any(spec):
        return f(x)
    return jax.shard_map(f, in_specs=spec, out_specs=spec, check_vma=False)(x)


def by_queries(f: Callable[..., jax.Array], queries: Any, keys: Any, weights: Any) -> jax.Array:
    """f(queries, keys, weights), [B, S, ...], where each query needs all keys: on each device of the axis `context` for
    its own queries, with the keys of all; queries and keys are trees of arrays [B, S, ...].

    The keys are gathered, in the backward pass once more, and their gradients reduce-scattered.
    """
    if not divides_sequences(jax.tree.leaves(queries)[0].shape[1]):
        return f(queries, keys, weights)

    @jax.checkpoint
    def shard(queries: Any, keys: Any, weights: Any) -> jax.Array:
        return f(queries, jax.tree.map(lambda x: lax.all_gather(x, "context", axis=1, tiled=True), keys), weights)

    mesh = jax.sharding.get_abstract_mesh()
    queries_specs, keys_specs = (jax.tree.map(functools.partial(_columns, mesh=mesh), x) for x in (queries, keys))
    in_specs, out_specs = (queries_specs, keys_specs, PartitionSpec()), jax.tree.leaves(queries_specs)[0]
    # Heads stay XLA's to divide, over `tensor`. Left to it, rows would be gathered.
    names = set(RULES["rows"] or ())
    mapped = jax.shard_map(shard, in_specs=in_specs, out_specs=out_specs, axis_names=names, check_vma=False)
    return mapped(queries, keys, weights)


def on_weight_shards(
    f: Callable[[jax.Array, jax.Array], jax.Array],
    x: jax.Array,
    w: jax.Array,
    axes: Sequence[str | None],
    contracted: int,
) -> jax.Array:
    """f(x, w), a product over the last `contracted` dimensions of x [B, S, ...] and the first ones of w: on each device
    for its tokens and its shard of w, whole along `fsdp`.

    For products whose insides XLA's partitioner would divide badly. `axes` are w's logical axes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        return f(x, w)
    w_spec = partition_spec(axes, w.shape, mesh)
    inputs, outputs = ([name if name == "tensor" else None for name in part] for part in _split(w_spec, contracted))
    tokens = partition_spec(token_axes(x.shape), x.shape[:2], mesh)
    between = [None] * (x.ndim - 2 - contracted)

    def shard(x: jax.Array, w: jax.Array) -> jax.Array:
        for dimension, name in enumerate(w_spec):
            if name == "fsdp":
                w = lax.all_gather(w, "fsdp", axis=dimension, tiled=True)
        y = f(x, w)
        return lax.psum(y, "tensor") if "tensor" in inputs else y

    specs = PartitionSpec(*tokens, *between, *inputs), w_spec
    out = PartitionSpec(*tokens, *between, *outputs)
    return jax.shard_map(shard, in_specs=specs, out_specs=out, check_vma=False)(x, w)


def table_rows(table_VD: jax.Array, tokens_BS: jax.Array, dtype: Any) -> jax.Array:
    """table_VD[tokens_BS] in `dtype`, [B, S, D], of a table with the logical axes ("vocab", "embed").

    Where `fsdp` divides its columns, each device looks up its own ones for the tokens of all devices of the axis, and
    they exchange what they found: no device holds the table, or its gradient, in whole. The gradient is added up in the
    table's dtype.
    """
    mesh = jax.sharding.get_abstract_mesh()
    spec = PartitionSpec() if mesh.empty else partition_spec(("vocab", "embed"), table_VD.shape, mesh)
    tokens = PartitionSpec() if mesh.empty else partition_spec(token_axes(tokens_BS.shape), tokens_BS.shape, mesh)
    if "fsdp" not in spec or tokens[0] is None or mesh.manual_axes:
        return table_VD[tokens_BS].astype(dtype)

    def shard(table_VD: jax.Array, tokens_BS: jax.Array) -> jax.Array:
        tokens_BS = lax.all_gather(tokens_BS, "fsdp", axis=0, tiled=True)
        if spec[0] is None:
            x_BSD = table_VD[tokens_BS].astype(dtype)
        else:
            place_BS = tokens_BS - len(table_VD) * lax.axis_index(spec[0])
            found_BS = (place_BS >= 0) & (place_BS < len(table_VD))
            x_BSD = jnp.where(found_BS[..., None], table_VD[jnp.where(found_BS, place_BS, 0)].astype(dtype), 0)
        x_BSD = lax.all_to_all(x_BSD, "fsdp", split_axis=0, concat_axis=2, tiled=True)
        return x_BSD if spec[0] is None else lax.psum(x_BSD, spec[0])

    return jax.shard_map(shard, in_specs=(spec, tokens), out_specs=PartitionSpec(*tokens, None), check_vma=False)(
        table_VD, tokens_BS
    )


def sum_of_shards(x_RDV: jax.Array, *axes: str | None) -> jax.Array:
    """Σ_R x, a weight's gradient from its parts on all devices that share the rows of a batch; `axes` are the weight's.

    Each device gets its shard at once. Left to XLA, the whole sum lives on every device until the optimizer takes its
    part of it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes or len(x_RDV) == 1 or len(x_RDV) != _devices("rows", mesh):
        return jnp.sum(x_RDV, axis=0)
    spec, rows = partition_spec(axes, x_RDV.shape[1:], mesh), RULES["rows"]
    kept = [axis if axis == "tensor" else None for axis in spec]

    def shard(x_1DV: jax.Array) -> jax.Array:
        x_DV, left = x_1DV[0], list(rows or ())
        if "fsdp" in spec:
            x_DV = lax.psum_scatter(x_DV, "fsdp", scatter_dimension=list(spec).index("fsdp"), tiled=True)
            left.remove("fsdp")
        return lax.psum(x_DV, tuple(left))

    return jax.shard_map(shard, in_specs=PartitionSpec(rows, *kept), out_specs=spec, check_vma=False)(x_RDV)


def _split(spec: PartitionSpec, at: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    return tuple(spec)[:at], tuple(spec)[at:]


def _columns(x: jax.Array, mesh: Any, axis: int = 1) -> PartitionSpec:
    """That of an array of tokens whose rows are on the dimension before `axis`, where the columns are divided."""
    axes = (None,) * (axis - 1) + ("batch", "sequence")
    return partition_spec(axes + (None,) * (x.ndim - len(axes)), x.shape, mesh)


def balanced(tree: Tree, axis: int = 1) -> Tree:
    """The tree's arrays with the columns of `axis` in the order in which attention shares its work evenly.

    Where the axis `context` has C devices, device i gets chunks i and 2C-1-i of the 2C that a sequence is cut into
    (Llama 3, arXiv:2407.21783 §3.3.2): under a causal mask a chunk's work grows with its place. Otherwise the arrays
    themselves.
    """
    return jax.tree.map(functools.partial(_exchange_chunks, axis=axis, forth=True), tree)


def in_order(tree: Tree, axis: int = 1) -> Tree:
    """Undoes `balanced`."""
    return jax.tree.map(functools.partial(_exchange_chunks, axis=axis, forth=False), tree)


def _exchange_chunks(x: jax.Array, axis: int, forth: bool) -> jax.Array:
    if not divides_sequences(x.shape[axis]):
        return x
    mesh = jax.sharding.get_abstract_mesh()
    C = mesh.shape["context"]
    routes = [[(chunk // 2, min(chunk, 2 * C - 1 - chunk)) for chunk in range(parity, 2 * C, 2)] for parity in (0, 1)]
    if not forth:
        routes = [[(target, source) for source, target in route] for route in routes]

    def swapped(keep: jax.Array, a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.where(keep, a, b), jnp.where(keep, b, a)

    def move(x: jax.Array) -> jax.Array:
        # A device has an even chunk and an odd one in both orders; in the balanced one an odd device has the odd first.
        is_even = lax.axis_index("context") % 2 == 0
        pair = tuple(jnp.split(x, 2, axis=axis))
        pair = pair if forth else swapped(is_even, *pair)
        pair = tuple(lax.ppermute(x, "context", route) for x, route in zip(pair, routes, strict=True))
        pair = swapped(is_even, *pair) if forth else pair
        return jnp.concatenate(pair, axis=axis)

    spec, names = _columns(x, mesh, axis), set(RULES["rows"] or ())
    return jax.shard_map(move, in_specs=spec, out_specs=spec, axis_names=names, check_vma=False)(x)


def divides_sequences(length: int) -> bool:
    """Whether a sequence of this length lies on several devices."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.shape["context"] > 1 and length % (2 * mesh.shape["context"]) == 0


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains an activation to the logical `axes` under the mesh that `jax.set_mesh` put in place, if any."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, x.shape, mesh))
