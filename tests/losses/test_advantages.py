"""Baselines, token rewards, generalised advantages and DAPO's punishment against loops in float64.

Shapes: P prompts, G samples per prompt, B batch of samples, S tokens of a sample.
"""

import jax
import numpy as np
import pytest

from moe_jax.losses.advantages import (
    generalised_advantages,
    group_advantages,
    soft_overlong_punishment,
    token_rewards,
    whitened,
)

B, S = 5, 6
LENGTHS = [6, 3, 1, 4, 0]
MASK_BS = np.arange(S) < np.array(LENGTHS)[:, None]


@pytest.mark.parametrize("baseline", ["leave_one_out", "batch", "none"])
@pytest.mark.parametrize("scale", ["batch", "none"])
def test_baselines_match_the_loop(baseline, scale):
    rewards_PG = np.array([[0.0, 1.0, 0.25], [1.0, 1.0, 1.0], [0.5, 0.0, 0.0]])
    result = jax.jit(group_advantages, static_argnums=(1, 2))(rewards_PG.astype(np.float32), scale, baseline)
    divisor = np.std(rewards_PG, ddof=1) + 1e-4 if scale == "batch" else 1.0
    for p, rewards in enumerate(rewards_PG):
        for g, reward in enumerate(rewards):
            others = [r for i, r in enumerate(rewards) if i != g]
            expected = {"leave_one_out": sum(others) / 2, "batch": rewards_PG.mean(), "none": 0.0}[baseline]
            np.testing.assert_allclose(result.advantages_PG[p, g], (reward - expected) / divisor, atol=1e-6)
    np.testing.assert_array_equal(result.active_P, [True, False, True])


def test_one_sample_per_prompt_is_enough_without_a_baseline_of_the_group():
    result = group_advantages(np.array([[1.0], [0.0]], np.float32), "none", "batch")
    np.testing.assert_allclose(result.advantages_PG, [[0.5], [-0.5]])
    assert result.metrics["reward_std"] == 0
    with pytest.raises(ValueError, match="2 samples or more"):
        group_advantages(np.ones((2, 1), np.float32), "none", "leave_one_out")
    with pytest.raises(ValueError, match="baseline = 'mean'"):
        group_advantages(np.ones((2, 2), np.float32), "none", "mean")  # pyright: ignore[reportArgumentType]


def test_the_reward_comes_at_the_last_token_and_penalties_at_each():
    rewards_B = np.arange(1.0, B + 1).astype(np.float32)
    penalties_BS = np.full((B, S), 0.25, np.float32)
    penalties_BS[~MASK_BS] = np.nan
    expected = np.where(MASK_BS, -0.25, 0.0)
    for b, length in enumerate(LENGTHS):
        if length:
            expected[b, length - 1] += rewards_B[b]
    np.testing.assert_allclose(token_rewards(rewards_B, MASK_BS, penalties_BS), expected)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.95), (0.9, 0.8), (0.9, 0.0)])
def test_generalised_advantages_match_the_sum_over_deltas(gamma, lam):
    rng = np.random.default_rng(0)
    rewards_BS, values_BS = rng.normal(size=(2, B, S))
    hidden = [np.where(MASK_BS, x, np.nan).astype(np.float32) for x in (rewards_BS, values_BS)]
    result = jax.jit(generalised_advantages, static_argnums=(3, 4))(*hidden, MASK_BS, gamma, lam)
    for b, length in enumerate(LENGTHS):
        values = [*values_BS[b, :length], 0.0]
        deltas = [rewards_BS[b, t] + gamma * values[t + 1] - values[t] for t in range(length)]
        for t in range(S):
            expected = sum((gamma * lam) ** k * deltas[t + k] for k in range(length - t)) if t < length else 0.0
            np.testing.assert_allclose(result.advantages_BS[b, t], expected, atol=1e-5)
            returned = expected + values[t] if t < length else 0.0
            np.testing.assert_allclose(result.returns_BS[b, t], returned, atol=1e-5)


def test_lambda_one_returns_the_reward_whatever_the_critic_says():
    values_BS = np.random.default_rng(0).normal(size=(B, S)).astype(np.float32)
    rewards_BS = token_rewards(np.ones(B, np.float32), MASK_BS)
    returns_BS = generalised_advantages(rewards_BS, values_BS, MASK_BS, 1.0, 1.0).returns_BS
    np.testing.assert_allclose(returns_BS, MASK_BS.astype(float), atol=1e-6)


def test_tokens_between_that_the_policy_did_not_write_are_stepped_over():
    mask_BS = np.array([[1, 0, 1, 1]], bool)
    rewards_BS, values_BS = np.random.default_rng(0).normal(size=(2, 1, 4)).astype(np.float32)
    gapless = generalised_advantages(rewards_BS[:, [0, 2, 3]], values_BS[:, [0, 2, 3]], np.ones((1, 3)), 0.9, 0.8)
    result = generalised_advantages(rewards_BS, values_BS, mask_BS, 0.9, 0.8)
    np.testing.assert_allclose(result.advantages_BS[:, [0, 2, 3]], gapless.advantages_BS, rtol=1e-6)
    assert result.advantages_BS[0, 1] == 0


def test_whitened_tokens_have_mean_zero_and_deviation_one():
    values_BS = np.random.default_rng(0).normal(3.0, 2.0, size=(B, S)).astype(np.float32)
    result = np.asarray(whitened(values_BS, MASK_BS))
    np.testing.assert_allclose(result[MASK_BS].mean(), 0, atol=1e-5)
    np.testing.assert_allclose(result[MASK_BS].std(), 1, rtol=1e-3)
    assert not result[~MASK_BS].any()


def test_overlong_completions_are_punished_softly():
    lengths_B = np.array([1, 16, 17, 18, 20])
    np.testing.assert_allclose(soft_overlong_punishment(lengths_B, 20, 4), [0, 0, -0.25, -0.5, -1])
