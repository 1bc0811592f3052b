"""Losses: pure functions of arrays, reduced to (sum, count) so that micro-batches and shards add up exactly."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array


class SumCount(NamedTuple):
    """A weighted sum and its total weight; add those of micro-batches and shards, then divide."""

    sum: Array
    count: Array

    def mean(self) -> Array:
        """sum / count, and 0 where nothing was counted."""
        return self.sum / jnp.where(self.count == 0, 1, self.count)


def masked_sum(values: Array, mask: Array) -> SumCount:
    """Sum and number of the `values` under the `mask`; the others do not matter, even if they are not finite."""
    mask = mask.astype(bool)
    return SumCount(jnp.sum(jnp.where(mask, values, 0)), jnp.sum(mask, dtype=jnp.float32))
