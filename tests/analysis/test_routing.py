"""Measures of routing on cases whose answers are known."""

import itertools

import numpy as np
import pytest

from moe_jax.analysis.routing import (
    chance_saturation,
    coactivation,
    expert_counts,
    independent_layers,
    independent_pairs,
    kind_counts,
    mean_max_specialisation,
    mutual_information,
    pair_counts,
    saturation,
    shuffled,
    specialisation,
)

E, K = 6, 2


def random_choices(num_tokens: int, seed: int = 0, weights_E: np.ndarray | None = None) -> np.ndarray:
    """[T, K] different experts, drawn in proportion to the weights without replacement."""
    noise_TE = np.random.default_rng(seed).gumbel(size=(num_tokens, E))
    return np.argsort(-(noise_TE + np.log(np.ones(E) if weights_E is None else weights_E)), axis=1)[:, :K]


def test_pair_counts_are_the_tokens_that_use_both():
    experts_TK = np.array([[0, 1], [1, 0], [1, 2], [5, 3]])
    pairs_EE = pair_counts(experts_TK, E)
    assert np.array_equal(pairs_EE, pairs_EE.T)
    assert np.array_equal(np.diag(pairs_EE), expert_counts(experts_TK, E))
    assert (pairs_EE[0, 1], pairs_EE[1, 2], pairs_EE[3, 5], pairs_EE[0, 2]) == (2, 1, 1, 0)
    share_EE = coactivation(pairs_EE, expert_counts(experts_TK, E))
    assert share_EE[0, 1] == 1 and share_EE[1, 0] == pytest.approx(2 / 3)  # not symmetric
    assert np.all(share_EE[4] == 0)  # an expert without tokens

    others_TK = np.array([[2, 3], [2, 4], [0, 1], [0, 1]])
    assert pair_counts(experts_TK, E, others_TK)[0].tolist() == [0, 0, 2, 1, 1, 0]


def test_pair_counts_of_more_tokens_than_are_taken_at_a_time():
    experts_TK = random_choices(20_000)
    pairs_EE = pair_counts(experts_TK, E)
    for i, j in itertools.combinations(range(E), 2):
        assert pairs_EE[i, j] == np.sum(np.any(experts_TK == i, axis=1) & np.any(experts_TK == j, axis=1))


def test_random_choice_is_what_independence_expects():
    expected_EE = independent_pairs(np.full(E, 100.0), K)
    assert expected_EE[0, 1] == pytest.approx(300 * K * (K - 1) / (E * (E - 1)))  # 300 tokens
    assert expected_EE[0, 0] == 100

    # Uneven loads: the pairs of a draw from p(i, j) ∝ w_i w_j are the model itself.
    w_E = np.array([1, 1, 2, 3, 4, 0])
    pairs = list(itertools.combinations(range(E), 2))
    p_P = np.array([w_E[i] * w_E[j] for i, j in pairs], float)
    drawn_P = np.random.default_rng(0).choice(len(pairs), size=100_000, p=p_P / p_P.sum())
    experts_TK = np.array(pairs)[drawn_P]
    expected_EE = independent_pairs(expert_counts(experts_TK, E), K)
    assert pair_counts(experts_TK, E) == pytest.approx(expected_EE, rel=0.05, abs=1)

    off_diagonal = expected_EE - np.diag(np.diag(expected_EE))
    assert off_diagonal.sum(1) == pytest.approx((K - 1) * expert_counts(experts_TK, E))


def test_expected_pairs_of_extreme_loads_are_finite():
    everywhere = independent_pairs(np.array([100, 50, 50, 0]), 2)  # expert 0 works on every token
    assert everywhere[0, 1] == pytest.approx(50, rel=0.01) and everywhere[1, 2] == pytest.approx(0, abs=1)
    assert np.all(independent_pairs(np.array([5, 0, 3]), 1) == np.diag([5, 0, 3]))  # one expert a token: no pairs
    assert not independent_pairs(np.zeros(3), 2).any()


def test_layers_that_are_independent():
    first_TK, second_TK = random_choices(50_000, 1), random_choices(50_000, 2, np.arange(1.0, E + 1))
    expected_EE = independent_layers(expert_counts(first_TK, E), expert_counts(second_TK, E), 50_000)
    assert pair_counts(first_TK, E, second_TK) == pytest.approx(expected_EE, rel=0.1)


def test_routing_by_token_id_is_fully_specialised():
    kinds_T = np.repeat(np.arange(3), 40)
    experts_TK = np.array([[0, 1], [2, 3], [4, 5]])[kinds_T]
    counts_XE = kind_counts(kinds_T, experts_TK, 3, E)
    assert counts_XE[1].tolist() == [0, 0, 40, 40, 0, 0]
    assert specialisation(counts_XE)[1].tolist() == [0, 0, 0.5, 0.5, 0, 0]
    assert mean_max_specialisation(counts_XE) == 1 / K
    assert mutual_information(counts_XE) == pytest.approx(np.log(E / K))


def test_mean_max_share_weighs_by_tokens():
    assert mean_max_specialisation(np.array([[3, 0], [1, 1], [0, 0]])) == pytest.approx((3 * 1 + 2 * 0.5) / 5)


def test_shuffled_tokens_give_the_bias_of_a_small_sample():
    num_kinds = 200
    kinds_T = np.random.default_rng(3).integers(num_kinds, size=2000)
    experts_TK = random_choices(2000, 4)
    counts_XE = kind_counts(kinds_T, experts_TK, num_kinds, E)
    chance_XE = kind_counts(shuffled(kinds_T), experts_TK, num_kinds, E)
    found, chance = mutual_information(counts_XE), mutual_information(chance_XE)
    assert found > 0.1  # ten tokens of a kind look special
    assert abs(found - chance) < 0.02
    assert mean_max_specialisation(counts_XE) == pytest.approx(mean_max_specialisation(chance_XE), abs=0.01)
    assert np.array_equal(counts_XE.sum(1), chance_XE.sum(1)) and np.array_equal(counts_XE.sum(0), chance_XE.sum(0))


def test_saturation_counts_common_experts_in_any_order():
    final_LTK = np.array([[[0, 1], [2, 3]], [[0, 1], [2, 3]]], np.uint16)
    then_LTK = np.array([[[1, 0], [3, 2]], [[1, 4], [5, 0]]], np.uint16)
    assert saturation(then_LTK, final_LTK).tolist() == [1, 0.25]
    assert saturation(final_LTK, final_LTK).tolist() == [1, 1]


def test_saturation_of_strangers_is_chance():
    choices_LTK = [
        np.stack([random_choices(50_000, seed), random_choices(50_000, seed + 1, w_E)])
        for seed in (5, 7)
        for w_E in [np.arange(1.0, E + 1)]
    ]
    counts = [np.stack([expert_counts(experts_TK, E) for experts_TK in x_LTK]) for x_LTK in choices_LTK]
    chance_L = chance_saturation(*counts, K)
    assert chance_L[0] == pytest.approx(K / E, rel=0.01) and chance_L[1] > chance_L[0]
    assert saturation(*choices_LTK) == pytest.approx(chance_L, rel=0.02)


def test_nothing_gives_nothing():
    none_TK = np.zeros((0, K), int)
    counts_XE = kind_counts(np.zeros(0, int), none_TK, 2, E)
    assert mutual_information(counts_XE) == mean_max_specialisation(counts_XE) == 0
    assert not pair_counts(none_TK, E).any() and not specialisation(counts_XE).any()
