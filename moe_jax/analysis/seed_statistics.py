"""Figures of runs that differ in their seed alone: means, differences, and Student's intervals."""

from __future__ import annotations

import math
from typing import TypedDict

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import stdtrit


class SeedInterval(TypedDict):
    mean: float
    low: float
    """Not-a-number with one seed, which says nothing of another."""
    high: float
    seeds: int


def mean_over_seeds(values: ArrayLike) -> SeedInterval:
    """The mean and its 95 % interval, mean ± t · s / √n, with t the 97.5 % quantile of Student's t for n - 1 degrees.

    Args:
        values: [n], one figure per seed. For a paired comparison, the differences within each seed: what the seeds
            have in common (data order, initial weights) then cancels.

    Raises:
        ValueError: no values, or another shape.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not values.size:
        raise ValueError(f"mean_over_seeds: values have shape {values.shape}, must be [seeds] with at least one")
    n, mean = len(values), float(values.mean())
    half = float(stdtrit(n - 1, 0.975)) * float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    return {"mean": mean, "low": mean - half, "high": mean + half, "seeds": n}
