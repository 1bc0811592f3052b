"""AdamW and Muon under their schedules, on dictionaries name → array."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from moe_jax.config import OptimizerConfig
from moe_jax.model.definition import Definition


def learning_rate_schedule(cfg: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate of each step: a linear warmup, then what `cfg.schedule` says until `steps`."""
    warmup = min(cfg.warmup_steps, steps)
    final = cfg.learning_rate * cfg.final_fraction
    ramp = optax.linear_schedule(cfg.learning_rate / (warmup + 1), cfg.learning_rate, warmup)
    rest = max(steps - warmup, 1)
    if cfg.schedule == "constant":
        after = optax.constant_schedule(cfg.learning_rate)
    elif cfg.schedule == "cosine":
        after = optax.cosine_decay_schedule(cfg.learning_rate, rest, alpha=cfg.final_fraction)
    else:
        decay = min(max(round(cfg.decay_fraction * steps), 1), rest)
        after = optax.linear_schedule(cfg.learning_rate, final, decay, transition_begin=rest - decay)
    return optax.join_schedules([ramp, after], [warmup])


def make_optimizer(cfg: OptimizerConfig, steps: int, definition: Definition) -> optax.GradientTransformation:
    """Gradient clipping and AdamW or Muon, for the parameters of a `Definition`.

    Muon's update has the root mean square 0.2 whatever the matrix's shape (Moonlight, arXiv:2502.16982 eq. 4), so that
    it takes AdamW's learning rates; tables and vectors (embedding, head, gates, norms) are left to AdamW.
    """
    roles = {name: definition.variables[name].get_metadata()["roles"] for name in definition.param_names}
    is_matrix = {name: role != "" for name, role in roles.items()}
    schedule = learning_rate_schedule(cfg, steps)
    if cfg.name == "adamw":
        optimizer = optax.adamw(schedule, cfg.beta1, cfg.beta2, cfg.eps, weight_decay=cfg.weight_decay, mask=is_matrix)
    else:

        def dimensions(params: Any) -> Any:
            return {
                name: _muon_dimensions(roles[name], leaf.ndim) if is_matrix[name] else leaf
                for name, leaf in params.items()
            }

        matrices = muon(
            schedule,
            weight_decay=cfg.weight_decay,
            muon_weight_dimension_numbers=dimensions,
            consistent_rms=0.2,
        )
        tables = optax.adamw(schedule, cfg.beta1, cfg.beta2, cfg.eps, weight_decay=0.0)
        labels = {name: "matrix" if matrix else "table" for name, matrix in is_matrix.items()}
        optimizer = optax.partition({"matrix": matrices, "table": tables}, labels)
    clip = optax.clip_by_global_norm(cfg.max_grad_norm) if cfg.max_grad_norm else optax.identity()
    return optax.chain(clip, optimizer if cfg.moment_dtype == "float32" else _stored(optimizer, cfg.moment_dtype))


def _stored(optimizer: optax.GradientTransformation, dtype: str) -> optax.GradientTransformation:
    """`optimizer` with its moments in `dtype` between updates; scalars stay as they are."""

    def cast(state: Any, dtype: str) -> Any:
        def leaf(x: jax.Array) -> jax.Array:
            return x.astype(dtype) if x.ndim and jnp.issubdtype(x.dtype, jnp.floating) else x

        return jax.tree.map(leaf, state)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        changes, state = optimizer.update(updates, cast(state, "float32"), params)
        return changes, cast(state, dtype)

    return optax.GradientTransformation(lambda params: cast(optimizer.init(params), dtype), update)


def _muon_dimensions(roles: str, ndim: int) -> MuonDimensionNumbers:
    """Which dimensions of a weight are the matrix's rows and columns; the others stack matrices."""
    stacked = ndim - len(roles)
    return MuonDimensionNumbers(
        reduction_axis=tuple(stacked + i for i, role in enumerate(roles) if role == "i"),
        output_axis=tuple(stacked + i for i, role in enumerate(roles) if role == "o"),
    )
