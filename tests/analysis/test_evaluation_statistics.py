"""Statistics of evaluations, against enumeration and simulation."""

import itertools

import numpy as np
import pytest

from moe_jax.analysis.evaluation_statistics import majority_answer, mean_interval, pass_at_k


def test_majority_answer():
    assert majority_answer(["3", "4", "4", None, None, None]) == "4"
    assert majority_answer(["5", "3", "4", "4", "3"]) == "3"  # of equals the one given first
    assert majority_answer(["1,000", "7", "1000.0", "7", "$1000"]) == "1,000"  # one number, three ways to write it
    assert majority_answer([" yes", "yes ", "no"]) == " yes"
    assert majority_answer([None, None]) is None
    assert majority_answer([]) is None


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 1), (5, 2, 3), (5, 2, 4), (6, 0, 3), (4, 4, 2), (4, 1, 4)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n, c, k):
    right = [True] * c + [False] * (n - c)
    subsets = [any(subset) for subset in itertools.combinations(right, k)]
    assert pass_at_k(n, c, k) == pytest.approx(sum(subsets) / len(subsets))


@pytest.mark.parametrize(("n", "c", "k"), [(4, 1, 5), (4, 1, 0), (4, 5, 1), (4, -1, 1)])
def test_pass_at_k_refuses_impossible_counts(n, c, k):
    with pytest.raises(ValueError, match="pass_at_k"):
        pass_at_k(n, c, k)


def test_mean_interval_is_the_normal_one_over_problems():
    means = np.array([0.25, 0.5, 0.75, 0.5])
    interval = mean_interval(means)
    half = 1.959964 * means.std(ddof=1) / 2
    assert interval["mean"] == 0.5 and interval["problems"] == 4
    assert interval["low"] == pytest.approx(0.5 - half, abs=1e-6)
    assert interval["high"] == pytest.approx(0.5 + half, abs=1e-6)


def test_samples_of_one_problem_are_not_independent_draws():
    samples_PG = np.repeat([[1], [0], [1], [1], [0], [1], [0], [1]], 100, axis=1)
    assert mean_interval(samples_PG) == mean_interval(samples_PG[:, 0])


def test_mean_interval_covers_the_truth():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(500):
        chances_P = rng.beta(2, 3, 200)
        interval = mean_interval(rng.random((200, 8)) < chances_P[:, None])
        hits += interval["low"] <= 0.4 <= interval["high"]
    assert 0.92 < hits / 500 < 0.98


def test_unanimous_results_have_wilsons_interval():
    right, wrong = mean_interval(np.ones(100)), mean_interval(np.zeros((100, 4)))
    assert right["mean"] == right["high"] == 1 and right["low"] == pytest.approx(1 / (1 + 1.959964**2 / 100), abs=1e-6)
    assert wrong["mean"] == wrong["low"] == 0 and wrong["high"] == pytest.approx(1 - right["low"])
    same = mean_interval(np.full(100, 0.5))
    assert same["low"] < 0.45 and same["high"] > 0.55
    assert mean_interval([1.0])["low"] < 0.3


def test_intervals_stay_between_0_and_1():
    interval = mean_interval([0.0] * 30 + [1.0])
    assert interval["low"] == 0 and 0 < interval["mean"] < interval["high"] < 1


@pytest.mark.parametrize("values", [[], [[[1.0]]], [1.5], [float("nan")], 0.5])
def test_mean_interval_refuses_what_are_no_accuracies(values):
    with pytest.raises(ValueError, match="mean_interval"):
        mean_interval(values)
