"""The state of a training run, and one update of it.

B batch, M micro-batches, L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_jax.config import MoEConfig
from moe_jax.losses import SumCount
from moe_jax.losses.balance import RouterLoad, load_metrics
from moe_jax.model.definition import Arrays, Definition
from moe_jax.model.router import updated_bias
from moe_jax.sharding import replicate

Batch = dict[str, Array]


class TrainState(NamedTuple):
    """All that an update reads and writes."""

    step: Array
    """int32, updates so far."""
    params: Arrays
    rest: Arrays
    """Router biases."""
    opt_state: optax.OptState


Update = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]
"""One optimizer step: (state, batch) → (new state, metrics). The old state's arrays are donated."""


class LossOutput(NamedTuple):
    """A micro-batch's part of the loss. Micro-batches' parts add up to the batch's loss and metrics."""

    loss: Array
    metrics: dict[str, SumCount]
    routers: dict[str, RouterLoad]
    """Load of the sparse layers, by the name of their stack of blocks ("moe_blocks", "mtp.blocks")."""
    maxima: dict[str, Array]
    """Metrics of which the batch's is the largest of the micro-batches'."""


def _combine(a: LossOutput, b: LossOutput) -> LossOutput:
    added = jax.tree.map(jnp.add, a, b)
    return added._replace(maxima=jax.tree.map(jnp.maximum, a.maxima, b.maxima))


class Loss(Protocol):
    def __call__(self, params: Arrays, rest: Arrays, batch: Batch, totals: Any) -> LossOutput:
        """This micro-batch's part of the loss of a batch whose counts are `totals`."""
        ...


class CountTotals(Protocol):
    def __call__(self, params: Arrays, rest: Arrays, batch: Batch, accumulation_steps: int) -> Any:
        """What the parts of a loss need to know of the whole batch, e.g. what its sums are divided by."""
        ...


def init_state(definition: Definition, optimizer: optax.GradientTransformation, key: Array, mesh: Mesh) -> TrainState:
    """New weights and optimizer state, created in their shards."""
    params, rest = definition.init(key, mesh)
    return start_state(definition, optimizer, params, rest, mesh)


def start_state(
    definition: Definition, optimizer: optax.GradientTransformation, params: Arrays, rest: Arrays, mesh: Mesh
) -> TrainState:
    """A fresh optimizer on given weights. The weights are copied: updates donate their state."""
    moments = moment_shardings(jax.eval_shape(optimizer.init, params), definition, mesh)
    shardings = (*definition.shardings(mesh), moments)
    init = jax.jit(
        lambda params, rest: (jnp.zeros((), jnp.int32), params, rest, optimizer.init(params)),
        out_shardings=(NamedSharding(mesh, PartitionSpec()), *shardings),
    )
    return TrainState(*init(jax.tree.map(jnp.copy, params), jax.tree.map(jnp.copy, rest)))


def moment_shardings(opt_state: Any, definition: Definition, mesh: Mesh) -> Any:
    """Optimizer moments lie as their parameters do, everything else is replicated."""
    params, _ = definition.shardings(mesh)

    def sharding(path: tuple, leaf: Any) -> NamedSharding:
        name = getattr(path[-1], "key", None) if path else None
        if name in params and leaf.shape == definition.variables[name].shape:
            return params[name]
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(sharding, opt_state)


def micro_batches(batch: Batch, count: int) -> Batch:
    """The batch's rows in `count` micro-batches, [M, B/M, ...]; interleaved, so that each has rows of every shard."""
    return jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, count, *x.shape[1:]), 0, 1), batch)


def make_update(
    loss: Loss,
    totals: CountTotals,
    optimizer: optax.GradientTransformation,
    *,
    accumulation_steps: int = 1,
    balance: MoEConfig | None = None,
) -> Update:
    """One optimizer step on one batch: gradients (accumulated over micro-batches), update, balancing bias.

    Router biases move by the counts of the whole batch: every device, every micro-batch (DeepSeek-V3 eq. 16), as
    `balance` says; without it they stand still. The function is jitted; the batch's arrays have B first, divisible by
    `accumulation_steps`. Totals and losses find in it also `step_B`, the number of updates before this one.

    Metrics are means over what each counts, with `grad_norm` (before clipping) and the figures of
    `losses.balance.load_metrics` as `moe/…`, for the modules of multi-token prediction `mtp/…`.
    """

    def gradients(params: Arrays, rest: Arrays, batch: Batch) -> tuple[Arrays, LossOutput]:
        total = totals(params, rest, batch, accumulation_steps)

        def scalar(params: Arrays, micro: Batch) -> tuple[Array, LossOutput]:
            output = loss(params, rest, micro, total)
            return output.loss, output

        if accumulation_steps == 1:
            gradient, output = jax.grad(scalar, has_aux=True)(params, batch)
            return gradient, output
        micros = micro_batches(batch, accumulation_steps)
        grad = jax.grad(scalar, has_aux=True)

        def step(sums: tuple[Arrays, LossOutput], micro: Batch) -> tuple[tuple[Arrays, LossOutput], None]:
            gradient, output = grad(params, micro)
            return (jax.tree.map(jnp.add, sums[0], gradient), _combine(sums[1], output)), None

        first = grad(params, jax.tree.map(lambda x: x[0], micros))
        return jax.lax.scan(step, first, jax.tree.map(lambda x: x[1:], micros))[0]

    def update(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        rows = len(next(iter(batch.values())))
        batch = batch | {"step_B": jnp.full(rows, state.step)}  # by row, as micro-batches are made
        gradient, output = gradients(state.params, state.rest, batch)
        with jax.named_scope("optimizer"):
            changes, opt_state = optimizer.update(gradient, state.opt_state, state.params)
            params: Any = optax.apply_updates(state.params, changes)
        rest = dict(state.rest)
        metrics = {name: value.mean() for name, value in output.metrics.items()}
        metrics |= output.maxima | {"loss": output.loss, "grad_norm": optax.tree.norm(gradient)}
        for name, load in output.routers.items():
            room, bias = "mtp" if name.startswith("mtp") else "moe", f"{name}.ffn.router.bias"
            if bias in rest and balance is not None and balance.bias_update_rate:
                counts_LE, rate = load.counts_LE, balance.bias_update_rate
                rest[bias] = updated_bias(rest[bias], counts_LE, rate, balance.bias_zero_mean)
            metrics |= {f"{room}/{key}": value for key, value in load_metrics(load, rest.get(bias)).items()}
        return TrainState(state.step + 1, params, rest, opt_state), replicate(metrics)

    return jax.jit(update, donate_argnums=0)
