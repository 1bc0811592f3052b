"""Tokens to the shards and rows of their experts, and back.

T tokens of a shard, D model, K experts per token, E experts, N shards of the experts, S slots, R rows.

One signature, `dispatch(x_BSD, experts_BSK, weights_BSK, arrays, axes, work, cfg)`, and three strategies:

- `local`: the shard has all experts. Sort its T·K assignments by expert, work, un-sort and add.
- `all_gather`: each shard gets the tokens of all N shards, works for the experts it holds, and the sums are
  reduce-scattered. A token travels to N shards, whatever K is.
- `all_to_all`: each assignment travels to the shard of its expert and back. A token travels K times, whatever N is.

(Where the batch is too small to be divided, every shard has all tokens, and their experts' parts are added.)

No strategy drops a token. Where a shard's share of the rows depends on the routing, buffers hold
`cfg.dispatch_buffer` times the even share; what does not fit waits for another round. What travels is of the tokens'
dtype; sums within a shard are float32. All are built of one pair of moves, `_to_slots` and `_to_tokens`, each of which
is the other's gradient, so that sorting and un-sorting are gathers in both directions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from moe_jax.config import MoEConfig
from moe_jax.sharding import partition_spec, token_axes

Work = Callable[..., Array]
"""work(x_TD, weights_TK, slots, group_sizes_E, *arrays) → y_TD float32: each token's weighted sum over its experts.

Slots are sorted by expert."""


def dispatch(
    x_BSD: Array,
    experts_BSK: Array,
    weights_BSK: Array,
    arrays: Sequence[Array],
    axes: Sequence[tuple[str | None, ...]],
    work: Work,
    cfg: MoEConfig,
    recomputed: bool = False,
) -> Array:
    """Σ_k weight · expert(x) for each token, on one device or on the mesh that `jax.set_mesh` put in place.

    Args:
        x_BSD: tokens.
        experts_BSK: int32, the experts of each token; `cfg.num_experts` for none (padding, dropped assignments).
        weights_BSK: their mixing weights.
        arrays: the experts' weights, each with the experts first.
        axes: the logical axes of each (`sharding.RULES`), the first being "expert".
        work: what the experts do. Its result may be a part of a sum over the mesh's axis `tensor`.
        cfg: number of experts, strategy, size of buffers.
        recomputed: the backward pass computes the layer anew (`ModelConfig.remat`). Experts that it gathers for that
            serve for the gradients, too.

    Returns:
        y_BSD, float32.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return _local(_flat(x_BSD), _flat(experts_BSK), _flat(weights_BSK), arrays, work, cfg).reshape(x_BSD.shape)

    tokens = partition_spec((*token_axes(x_BSD.shape), None), x_BSD.shape, mesh)
    specs = [partition_spec(names, array.shape, mesh) for names, array in zip(axes, arrays, strict=True)]
    strategy = _strategy(cfg, mesh.shape["expert"] if specs[0][0] is not None else 1, tokens[0] is not None)

    # What is kept for the backward pass: tokens that came from afar and the experts' insides, not whole experts.
    kept = ("received", "insides", "gathered") if recomputed else ("received", "insides")

    @partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(*kept))
    def shard(x_BSD: Array, experts_BSK: Array, weights_BSK: Array, *arrays: Array) -> Array:
        whole = [
            checkpoint_name(_gather_fsdp(array, spec), "gathered") for array, spec in zip(arrays, specs, strict=True)
        ]
        y_TD = strategy(_flat(x_BSD), _flat(experts_BSK), _flat(weights_BSK), whole, work, cfg)
        if any("tensor" in spec for spec in specs):
            y_TD = lax.psum(y_TD.astype(x_BSD.dtype), "tensor").astype(jnp.float32)
        return y_TD.reshape(x_BSD.shape)

    in_specs = (tokens, tokens, tokens, *specs)
    mapped = jax.shard_map(shard, in_specs=in_specs, out_specs=tokens, check_vma=False)
    return mapped(x_BSD, experts_BSK, weights_BSK, *arrays)


def _flat(x: Array) -> Array:
    """[B, S, ...] → [T, ...]."""
    return x.reshape(-1, x.shape[-1])


def _strategy(cfg: MoEConfig, shards: int, tokens_sharded: bool) -> Callable[..., Array]:
    """The one place that chooses. Communication of a token: N ways by all-gather, K ways by all-to-all."""
    if shards <= 1:
        return _local
    if not tokens_sharded:
        return _replicated
    auto = "all_gather" if shards <= cfg.num_experts_per_token else "all_to_all"
    return _all_gather if (auto if cfg.dispatch == "auto" else cfg.dispatch) == "all_gather" else _all_to_all


def _gather_fsdp(array: Array, spec: PartitionSpec) -> Array:
    """The shard's experts, whole along the axis `fsdp`; the gradient is reduce-scattered over it."""
    for dimension, name in enumerate(spec):
        if name == "fsdp":
            array = lax.all_gather(array, "fsdp", axis=dimension, tiled=True)
    return array


# ---------------------------------------------------------------------------------------------------------------------
# strategies: (x_TD, experts_TK, weights_TK, arrays, work, cfg) → y_TD, within one shard
# ---------------------------------------------------------------------------------------------------------------------


def _local(
    x_TD: Array, experts_TK: Array, weights_TK: Array, arrays: Sequence[Array], work: Work, cfg: MoEConfig
) -> Array:
    order = sort_by_expert(experts_TK, arrays[0].shape[0])
    return work(x_TD, weights_TK, Slots(order.assignment_R, order.row_TK), order.group_sizes_E, *arrays)


def _replicated(
    x_TD: Array, experts_TK: Array, weights_TK: Array, arrays: Sequence[Array], work: Work, cfg: MoEConfig
) -> Array:
    """Every shard has the same tokens (a batch too small to be divided): each adds what its own experts do."""
    y_TD = _own_experts(x_TD, experts_TK, weights_TK, arrays, work, cfg)
    return lax.psum(y_TD.astype(x_TD.dtype), "expert").astype(jnp.float32)


def _all_gather(
    x_TD: Array, experts_TK: Array, weights_TK: Array, arrays: Sequence[Array], work: Work, cfg: MoEConfig
) -> Array:
    gather = partial(lax.all_gather, axis_name="expert", tiled=True)
    x_TD, experts_TK, weights_TK = (checkpoint_name(gather(a), "received") for a in (x_TD, experts_TK, weights_TK))
    y_TD = _own_experts(x_TD, experts_TK, weights_TK, arrays, work, cfg)
    return lax.psum_scatter(y_TD.astype(x_TD.dtype), "expert", tiled=True).astype(jnp.float32)


def _own_experts(
    x_TD: Array, experts_TK: Array, weights_TK: Array, arrays: Sequence[Array], work: Work, cfg: MoEConfig
) -> Array:
    """The part of each token's sum that this shard's experts give."""
    R, E = experts_TK.size, arrays[0].shape[0]
    experts_TK = experts_TK - E * lax.axis_index("expert")
    order = sort_by_expert(jnp.where((experts_TK >= 0) & (experts_TK < E), experts_TK, E), E)
    room = _room(R, cfg)
    ends_E = jnp.cumsum(order.group_sizes_E)
    assignment_R = jnp.pad(order.assignment_R, (0, room), constant_values=R)

    def one_round(first: Array | int, x_TD: Array, weights_TK: Array, *arrays: Array) -> Array:
        """The work on sorted rows first … first + room."""
        slot_TK = order.row_TK - first
        in_round_TK = (slot_TK >= 0) & (slot_TK < room)
        slots = Slots(lax.dynamic_slice_in_dim(assignment_R, first, room), jnp.where(in_round_TK, slot_TK, room))
        group_sizes_E = jnp.diff(jnp.clip(ends_E - first, 0, room), prepend=0)
        return work(x_TD, weights_TK, slots, group_sizes_E, *arrays)

    return _rounds(one_round, room, ends_E[-1], R, x_TD, weights_TK, *arrays)


def _all_to_all(
    x_TD: Array, experts_TK: Array, weights_TK: Array, arrays: Sequence[Array], work: Work, cfg: MoEConfig
) -> Array:
    R, E, N = experts_TK.size, arrays[0].shape[0], lax.axis_size("expert")
    order = sort_by_expert(experts_TK, N * E)
    counts_N = jnp.sum(order.group_sizes_E.reshape(N, E), axis=1)
    starts_N = jnp.cumsum(counts_N) - counts_N
    shard_TK = experts_TK // E  # N for none
    room = _room(R, cfg)  # for each pair of shards

    def one_round(first: Array | int, x_TD: Array, weights_TK: Array, *arrays: Array) -> Array:
        """Of the rows for each shard, sends number first … first + room."""
        place_TK = order.row_TK - jnp.append(starts_N, 0)[shard_TK] - first
        sent_TK = (shard_TK < N) & (place_TK >= 0) & (place_TK < room)
        send_N = jnp.clip(counts_N - first, 0, room)
        row_NC = (starts_N + first)[:, None] + jnp.arange(room)
        assignment_NC = order.assignment_R.at[row_NC].get(mode="fill", fill_value=R)
        slots = Slots(
            jnp.where(_filled(send_N, room), assignment_NC.reshape(N * room), R),
            jnp.where(sent_TK, shard_TK * room + place_TK, N * room),
        )
        receive_N = lax.all_to_all(send_N, "expert", 0, 0, tiled=True)
        experts_S = _exchange(slots.assignments(experts_TK, fill=N * E), send_N, receive_N)
        experts_S = jnp.where(_filled(receive_N, room), experts_S % E, E)
        rows_SD = _exchange(slots.tokens(x_TD), send_N, receive_N)
        weights_S = _exchange(slots.assignments(weights_TK), send_N, receive_N)
        rows_SD, weights_S, experts_S = (checkpoint_name(a, "received") for a in (rows_SD, weights_S, experts_S))
        y_SD = _local(rows_SD, experts_S[:, None], weights_S[:, None], arrays, work, cfg).astype(x_TD.dtype)
        return slots.sums(_exchange(y_SD, receive_N, send_N))

    most = lax.pmax(jnp.max(counts_N), "expert")  # all shards take the same rounds
    return _rounds(one_round, room, most, R, x_TD, weights_TK, *arrays)


def _room(rows: int, cfg: MoEConfig) -> int:
    """Slots for a shard's experts' rows in one round."""
    return min(rows, 8 * math.ceil(cfg.dispatch_buffer * rows / lax.axis_size("expert") / 8))


def _rounds(one_round: Callable[..., Array], room: int, present: Array, most: int, *operands: Array) -> Array:
    """Σ one_round(first, *operands) over first = 0, room, 2 room, … below `present`, which is at most `most`.

    The first round, which an even load does not exceed, keeps what its gradient needs; later ones compute it anew.
    """
    y_TD = one_round(0, *operands)
    if room >= most:
        return y_TD
    nothing = jnp.zeros_like(y_TD)

    @jax.checkpoint
    def later_rounds(*operands: Array) -> Array:
        @jax.checkpoint
        def later(first: Array, *operands: Array) -> Array:
            return lax.cond(first < present, one_round, lambda *_: nothing, first, *operands)

        def step(y_TD: Array, first: Array) -> tuple[Array, None]:
            return y_TD + later(first, *operands), None

        return lax.scan(step, nothing, jnp.arange(room, most, room))[0]

    # One choice for all of them: a skipped round inside the scan would still add zeros to every gradient.
    return y_TD + lax.cond(present > room, later_rounds, lambda *_: nothing, *operands)


# ---------------------------------------------------------------------------------------------------------------------
# sorting, and the moves
# ---------------------------------------------------------------------------------------------------------------------


class Order(NamedTuple):
    """Assignments sorted by expert; those of no expert come last and are not counted."""

    assignment_R: Array
    """The assignment, t·K + k, of each row."""
    row_TK: Array
    """The row of each assignment."""
    group_sizes_E: Array


_FEW_ASSIGNMENTS = 32
"""One token's K experts, or those of a few: 6 were measured."""


def sort_by_expert(experts_TK: Array, num_experts: int) -> Order:
    """Stable: within an expert, rows are in the order of tokens."""
    R = experts_TK.size
    if R <= _FEW_ASSIGNMENTS:
        return _order_by_pairs(experts_TK, num_experts)
    expert_R, index_R = experts_TK.reshape(-1).astype(jnp.uint32), jnp.arange(R, dtype=jnp.uint32)
    if (num_experts + 1) * R < 2**32:
        # Sorting one number made of both is several times faster than sorting pairs.
        key_R = lax.sort(expert_R * R + index_R)
        expert_R, order_R = key_R // R, key_R % R
    else:
        expert_R, order_R = lax.sort((expert_R, index_R), num_keys=1)
    ends_E = jnp.searchsorted(expert_R, jnp.arange(1, num_experts + 1, dtype=jnp.uint32)).astype(jnp.int32)
    row_R = jnp.zeros(R, jnp.int32).at[order_R].set(index_R.astype(jnp.int32), unique_indices=True)
    return Order(order_R.astype(jnp.int32), row_R.reshape(experts_TK.shape), jnp.diff(ends_E, prepend=0))


def _order_by_pairs(experts_TK: Array, num_experts: int) -> Order:
    """`sort_by_expert` by comparing all with all: when decoding, sorting takes as long as half a product."""
    expert_R, index_R = experts_TK.reshape(-1), jnp.arange(experts_TK.size)
    equal_RR, less_RR = (compare(expert_R, expert_R[:, None]) for compare in (jnp.equal, jnp.less))
    row_R = jnp.sum(less_RR | (equal_RR & (index_R < index_R[:, None])), axis=1, dtype=jnp.int32)
    order_R = jnp.sum(jnp.where(row_R == index_R[:, None], index_R, 0), axis=1, dtype=jnp.int32)
    sizes_E = jnp.sum(expert_R == jnp.arange(num_experts)[:, None], axis=1, dtype=jnp.int32)
    return Order(order_R, row_R.reshape(experts_TK.shape), sizes_E)


class Slots(NamedTuple):
    """Which assignment is in which slot, both ways round."""

    assignment_S: Array
    """The assignment, t·K + k, in each slot; T·K in an empty one."""
    slot_TK: Array
    """The slot of each assignment; S for none."""

    @property
    def token_S(self) -> Array:
        """The token in each slot; T in an empty one."""
        return self.assignment_S // self.slot_TK.shape[1]

    def tokens(self, x_TD: Array) -> Array:
        """Each slot's token, [S, D]; zeros in empty slots."""
        return _to_slots(x_TD, self.token_S, self.slot_TK)

    def assignments(self, x_TK: Array, fill: int = 0) -> Array:
        """Each slot's own number, [S], of one number per assignment."""
        if jnp.issubdtype(x_TK.dtype, jnp.integer):
            return x_TK.reshape(-1).at[self.assignment_S].get(mode="fill", fill_value=fill)
        return _to_slots(x_TK.reshape(-1, 1), self.assignment_S, self.slot_TK.reshape(-1, 1))[:, 0]

    def per_assignment(self, x_S: Array) -> Array:
        """The number in each assignment's slot, [T, K]; 0 where it has none."""
        return x_S.at[self.slot_TK].get(mode="fill", fill_value=0)

    def sums(self, y_SD: Array) -> Array:
        """Each token's sum over its K slots, [T, D] float32."""
        return _to_tokens(y_SD, self.token_S, self.slot_TK)


@jax.custom_vjp
def _to_slots(x_TD: Array, token_S: Array, slot_TK: Array) -> Array:
    return x_TD.at[token_S].get(mode="fill", fill_value=0)


@jax.custom_vjp
def _to_tokens(y_SD: Array, token_S: Array, slot_TK: Array) -> Array:
    # K gathers fuse with the sum; one gather of [T, K, D] would be written out first.
    rows = (y_SD.at[slot_TK[:, k]].get(mode="fill", fill_value=0) for k in range(slot_TK.shape[1]))
    dtype = jnp.promote_types(y_SD.dtype, jnp.float32)
    return sum((row_TD.astype(dtype) for row_TD in rows), start=jnp.zeros((), dtype))


def _to_slots_backward(indices: tuple[Array, Array], dy_SD: Array) -> tuple[Array, None, None]:
    return _to_tokens(dy_SD, *indices).astype(dy_SD.dtype), None, None


def _to_tokens_backward(residuals: tuple[Array, Array, Array], dy_TD: Array) -> tuple[Array, None, None]:
    *indices, like = residuals
    return _to_slots(dy_TD.astype(like.dtype), *indices), None, None


_to_slots.defvjp(lambda x, token_S, slot_TK: (_to_slots(x, token_S, slot_TK), (token_S, slot_TK)), _to_slots_backward)
_to_tokens.defvjp(
    lambda y, token_S, slot_TK: (_to_tokens(y, token_S, slot_TK), (token_S, slot_TK, jnp.zeros(0, y.dtype))),
    _to_tokens_backward,
)


def _filled(sizes_N: Array, room: int) -> Array:
    """[N · room] bool: slots that hold a row."""
    return (jnp.arange(room) < sizes_N[:, None]).reshape(-1)


@jax.custom_vjp
def _exchange(x_SD: Array, send_N: Array, receive_N: Array) -> Array:
    """Sends the first send_N[j] of the jth block of slots to shard j; receives as many blocks.

    What stands past a block's rows is not specified. The gradient goes the same way back. TPUs and GPUs send rows that
    exist (`ragged_all_to_all`), other platforms whole blocks.
    """

    def ragged(x_SD: Array, send_N: Array, receive_N: Array) -> Array:
        N = send_N.shape[0]
        room = x_SD.shape[0] // N
        here = jnp.full(N, lax.axis_index("expert") * room, jnp.int32)
        there = jnp.arange(N, dtype=jnp.int32) * room
        out = jnp.zeros_like(x_SD)
        return lax.ragged_all_to_all(x_SD, out, there, send_N, here, receive_N, axis_name="expert")

    def whole(x_SD: Array, send_N: Array, receive_N: Array) -> Array:
        return lax.all_to_all(x_SD, "expert", 0, 0, tiled=True)

    return lax.platform_dependent(x_SD, send_N, receive_N, tpu=ragged, cuda=ragged, rocm=ragged, default=whole)


def _exchange_backward(sizes: tuple[Array, Array], dy_SD: Array) -> tuple[Array, None, None]:
    send_N, receive_N = sizes
    return _exchange(dy_SD, receive_N, send_N), None, None


_exchange.defvjp(
    lambda x, send_N, receive_N: (_exchange(x, send_N, receive_N), (send_N, receive_N)), _exchange_backward
)


# ---------------------------------------------------------------------------------------------------------------------
# capacity
# ---------------------------------------------------------------------------------------------------------------------


def within_capacity(experts_TK: Array, affinity_TK: Array, cfg: MoEConfig) -> Array:
    """`experts_TK` with `cfg.num_experts`, none, in place of assignments beyond the capacity (DeepSeek-V2 §2.2.4).

    A group of experts (V2's device), or an expert where there is one group, keeps the assignments of highest affinity
    up to `cfg.capacity_factor` times the mean. Assignments of no expert do not count. Whatever the mesh, this is over
    the whole batch, all of which every device sorts: fit for comparison, not for a pod.
    """
    units = cfg.num_groups if cfg.num_groups > 1 else cfg.num_experts
    flat_R, R = experts_TK.reshape(-1), experts_TK.size
    unit_R = flat_R // (cfg.num_experts // units)  # `units` for none
    index_R = jnp.arange(R)
    affinity_R = jax.lax.stop_gradient(affinity_TK).reshape(-1)
    sorted_R, _, order_R = lax.sort((unit_R, -affinity_R, index_R), num_keys=2)
    ends = jnp.searchsorted(sorted_R, jnp.arange(units), side="right")
    starts = jnp.append(0, ends)
    capacity = jnp.ceil(cfg.capacity_factor * ends[-1] / units)
    kept_R = index_R - starts[sorted_R] < capacity
    kept_R = jnp.zeros(R, bool).at[order_R].set(kept_R, unique_indices=True)
    return jnp.where(kept_R, flat_R, cfg.num_experts).reshape(experts_TK.shape)
