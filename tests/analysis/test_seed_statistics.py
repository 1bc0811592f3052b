"""Intervals over seeds: against a textbook's numbers, and what one seed can say."""

import math

import numpy as np
import pytest

from moe_jax.analysis.seed_statistics import mean_over_seeds


def test_three_seeds_take_students_quantile():
    interval = mean_over_seeds([1.0, 2.0, 3.0])
    assert interval["mean"] == 2 and interval["seeds"] == 3
    assert interval["high"] - 2 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)  # t(2) = 4.303, s = 1
    assert 2 - interval["low"] == pytest.approx(interval["high"] - 2)


def test_one_seed_has_no_interval():
    interval = mean_over_seeds([0.7])
    assert interval["mean"] == 0.7 and math.isnan(interval["low"]) and math.isnan(interval["high"])


def test_intervals_cover_the_truth_in_95_percent_of_repetitions():
    samples = np.random.default_rng(0).normal(5, 3, size=(4000, 3))
    covered = [interval["low"] <= 5 <= interval["high"] for interval in map(mean_over_seeds, samples)]
    assert abs(np.mean(covered) - 0.95) < 0.015


@pytest.mark.parametrize("values", [[], [[1.0, 2.0]]])
def test_other_shapes_are_refused(values):
    with pytest.raises(ValueError, match="must be"):
        mean_over_seeds(values)
