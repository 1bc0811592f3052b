"""What PPO's value function learns (arXiv:1707.06347).

Shapes: B batch of samples, S tokens of a sample.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from moe_jax.losses import SumCount, masked_sum


class ValueLoss(NamedTuple):
    loss: SumCount  # over tokens
    metrics: dict[str, SumCount]


def value_loss(
    values_BS: Array, old_values_BS: Array, returns_BS: Array, mask_BS: Array, cliprange_value: float
) -> ValueLoss:
    """½ max((V - R)², (clip(V, V_old ± cliprange_value) - R)²) per token under the mask; 0 does not clip.

    Metrics: `critic/value_loss`, `critic/values` (mean) and `critic/clip_ratio` (tokens whose clipped error is the
    larger one: they have no gradient).
    """
    mask_BS = mask_BS.astype(bool)
    old_values_BS, returns_BS = (jax.lax.stop_gradient(x) for x in (old_values_BS, returns_BS))
    error_BS = jnp.where(mask_BS, values_BS - returns_BS, 0) ** 2
    clipped_BS = error_BS
    if cliprange_value:
        bounded_BS = jnp.clip(values_BS, old_values_BS - cliprange_value, old_values_BS + cliprange_value)
        clipped_BS = jnp.where(mask_BS, bounded_BS - returns_BS, 0) ** 2
    loss = masked_sum(0.5 * jnp.maximum(error_BS, clipped_BS), mask_BS)
    metrics = {
        "critic/value_loss": loss,
        "critic/values": masked_sum(values_BS, mask_BS),
        "critic/clip_ratio": masked_sum((clipped_BS > error_BS).astype(jnp.float32), mask_BS),
    }
    return ValueLoss(loss, jax.lax.stop_gradient(metrics))


def explained_variance(values_BS: Array, returns_BS: Array, mask_BS: Array) -> Array:
    """1 - Var(R - V) / Var(R) over tokens under the mask: 1 if the values foresee the returns, 0 if they know nothing;
    0 where returns do not vary."""

    def variance(x_BS: Array) -> Array:
        return masked_sum((x_BS - masked_sum(x_BS, mask_BS).mean()) ** 2, mask_BS).mean()

    total = variance(returns_BS)
    return jnp.where(total > 0, 1 - variance(returns_BS - values_BS) / jnp.where(total > 0, total, 1), 0)
