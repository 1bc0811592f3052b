"""Advantages, KL and the clipped policy loss against loops in float64.

Shapes: P prompts, G samples per prompt, B batch of samples, S tokens of a sample.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moe_jax.config import PolicyLossConfig
from moe_jax.losses.advantages import group_advantages
from moe_jax.losses.policy import k3, policy_loss

B, S = 8, 6
CONFIGS = [
    PolicyLossConfig(aggregation=aggregation, beta=beta, epsilon=0.2, epsilon_high=0.28)
    for aggregation, beta in itertools.product(("token-mean", "seq-mean-token-mean"), (0.0, 0.3))
]


def batch(seed=0):
    """Log-probabilities, old ones, advantages, mask, reference ones; the last sample has no token that counts."""
    rng = np.random.default_rng(seed)
    logprobs_BS = -rng.exponential(size=(B, S))
    old_BS = logprobs_BS + rng.normal(size=(B, S), scale=0.4)
    ref_BS = logprobs_BS + rng.normal(size=(B, S), scale=0.4)
    lengths_B = rng.integers(1, S + 1, size=B)
    lengths_B[-1] = 0
    mask_BS = np.arange(S) < lengths_B[:, None]
    advantages_B = rng.normal(size=B)
    logprobs_BS, old_BS, advantages_B, ref_BS = (
        x.astype(np.float32) for x in (logprobs_BS, old_BS, advantages_B, ref_BS)
    )
    return logprobs_BS, old_BS, advantages_B, mask_BS, ref_BS


def reference(logprobs_BS, old_BS, advantages_B, mask_BS, ref_BS, cfg):
    """(sum, count) of the loss and of each metric, token by token."""
    sums = dict.fromkeys(("loss", "low", "high", "kl"), 0.0)
    tokens = sequences = 0
    for row in range(mask_BS.shape[0]):
        losses, advantage = [], float(advantages_B[row])
        for position in np.flatnonzero(mask_BS[row]):
            logprob = float(logprobs_BS[row, position])
            ratio = np.exp(logprob - float(old_BS[row, position]))
            clipped = min(max(ratio, 1 - cfg.epsilon), 1 + cfg.epsilon_high)
            ref_ratio = np.exp(float(ref_BS[row, position]) - logprob)
            kl = ref_ratio - np.log(ref_ratio) - 1
            losses.append(-min(ratio * advantage, clipped * advantage) + cfg.beta * kl)
            sums["kl"] += kl
            sums["low"] += ratio < 1 - cfg.epsilon and advantage < 0
            sums["high"] += ratio > 1 + cfg.epsilon_high and advantage > 0
        tokens += len(losses)
        if losses:
            sequences += 1
            sums["loss"] += sum(losses) if cfg.aggregation == "token-mean" else sum(losses) / len(losses)
    return sums, tokens if cfg.aggregation == "token-mean" else sequences, tokens


@functools.cache
def gradient(cfg):
    """Batch → its policy loss, and the sum's gradient with respect to the log-probabilities."""

    def loss(logprobs_BS, old_BS, advantages_B, mask_BS, ref_BS):
        result = policy_loss(logprobs_BS, old_BS, advantages_B, mask_BS, cfg, ref_BS)
        return result.loss.sum, result

    def run(*data):
        (_, result), grad_BS = jax.value_and_grad(loss, has_aux=True)(*data)
        return result, grad_BS

    return jax.jit(run)


@pytest.mark.parametrize("cfg", CONFIGS)
def test_values_and_metrics_match_the_loop(cfg):
    data = batch()
    (loss, metrics), _ = gradient(cfg)(*data)
    sums, count, tokens = reference(*data, cfg)
    np.testing.assert_allclose(loss.sum, sums["loss"], rtol=1e-5)
    assert loss.count == count
    assert sums["low"] > 0 and sums["high"] > 0
    assert metrics["clip_ratio/low_mean"].sum == sums["low"]
    assert metrics["clip_ratio/high_mean"].sum == sums["high"]
    assert metrics["clip_ratio/region_mean"].sum == sums["low"] + sums["high"]
    np.testing.assert_allclose(metrics["kl"].sum, sums["kl"], rtol=1e-5)
    assert {float(metric.count) for metric in metrics.values()} == {tokens}


@pytest.mark.parametrize("cfg", CONFIGS)
def test_gradient_matches_central_differences(cfg):
    data = batch()
    _, grad_BS = gradient(cfg)(*data)
    logprobs64, step = data[0].astype(np.float64), 1e-6
    for index in np.ndindex(B, S):
        up, down = logprobs64.copy(), logprobs64.copy()
        up[index] += step
        down[index] -= step
        slope = (reference(up, *data[1:], cfg)[0]["loss"] - reference(down, *data[1:], cfg)[0]["loss"]) / (2 * step)
        np.testing.assert_allclose(grad_BS[index], slope, atol=2e-6)


def test_nothing_but_the_policy_gets_a_gradient():
    logprobs_BS, old_BS, advantages_B, mask_BS, ref_BS = batch()

    @jax.jit
    def loss(old_BS, advantages_B, ref_BS):
        return policy_loss(logprobs_BS, old_BS, advantages_B, mask_BS, CONFIGS[1], ref_BS).loss.sum

    assert not any(np.any(grad) for grad in jax.grad(loss, (0, 1, 2))(old_BS, advantages_B, ref_BS))


@pytest.mark.parametrize("cfg", CONFIGS)
@pytest.mark.parametrize("garbage", [-np.inf, np.nan, 100.0])
def test_what_the_mask_hides_does_not_matter(cfg, garbage):
    logprobs_BS, old_BS, advantages_B, mask_BS, ref_BS = batch()
    garbled = [np.where(mask_BS, x, np.float32(garbage)) for x in (logprobs_BS, old_BS, ref_BS)]
    one, one_grad = gradient(cfg)(logprobs_BS, old_BS, advantages_B, mask_BS, ref_BS)
    other, other_grad = gradient(cfg)(*garbled[:2], advantages_B, mask_BS, garbled[2])
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(x, y)
    np.testing.assert_array_equal(one_grad, other_grad)
    assert not np.any(np.asarray(other_grad)[~mask_BS])


@pytest.mark.parametrize("cfg", CONFIGS[1::2])
def test_padding_by_columns_and_rows_changes_nothing(cfg):
    data = batch()
    wide = [np.pad(x, [(0, 2), (0, 3)][: x.ndim]) for x in data]
    one, other = gradient(cfg)(*data)[0], gradient(cfg)(*wide)[0]
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)


@pytest.mark.parametrize("cfg", CONFIGS)
def test_micro_batches_of_unequal_length_add_up_to_the_batch(cfg):
    data = batch()
    whole, whole_grad = gradient(cfg)(*data)
    parts = [gradient(cfg)(*(x[rows : rows + 2] for x in data)) for rows in range(0, B, 2)]
    count = sum(float(result.loss.count) for result, _ in parts)
    assert count == whole.loss.count
    assert len({float(result.loss.count) for result, _ in parts}) > 1
    np.testing.assert_allclose(sum(float(r.loss.sum) for r, _ in parts) / count, whole.loss.mean(), rtol=1e-5)
    np.testing.assert_allclose(np.concatenate([grad for _, grad in parts]) / count, whole_grad / count, atol=1e-7)


@pytest.mark.parametrize("cfg", CONFIGS[1::2])
def test_eight_devices_give_the_numbers_of_one(cfg):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    data = batch()
    one, many = gradient(cfg)(*data), gradient(cfg)(*(jax.device_put(x, rows) for x in data))
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)


def test_fresh_samples_give_the_plain_policy_gradient():
    logprobs_BS, _, advantages_B, mask_BS, _ = batch()
    (loss, metrics), grad_BS = gradient(CONFIGS[0])(logprobs_BS, logprobs_BS, advantages_B, mask_BS, None)
    np.testing.assert_allclose(loss.sum, -np.sum(advantages_B[:, None] * mask_BS), rtol=1e-5)
    np.testing.assert_allclose(grad_BS, -advantages_B[:, None] * mask_BS, rtol=1e-6)
    assert "kl" not in metrics and metrics["clip_ratio/region_mean"].sum == 0


def test_extreme_ratios_stay_finite():
    logprobs_BS = np.full((B, S), -0.5, np.float32)
    old_BS = logprobs_BS.copy()
    logprobs_BS[:, 0] = old_BS[:, 1] = -500.0
    old_BS[:, 0] = logprobs_BS[:, 1] = -1e-3
    advantages_B = np.where(np.arange(B) % 2, 1.0, -1.0).astype(np.float32)
    (loss, _), grad_BS = gradient(CONFIGS[1])(logprobs_BS, old_BS, advantages_B, np.ones((B, S), bool), old_BS)
    assert np.isfinite(loss.sum) and np.all(np.isfinite(grad_BS))


@pytest.mark.parametrize("cfg", CONFIGS)
def test_no_token_at_all_gives_zero(cfg):
    logprobs_BS, old_BS, advantages_B, _, ref_BS = batch()
    (loss, metrics), grad_BS = gradient(cfg)(logprobs_BS, old_BS, advantages_B, np.zeros((B, S), bool), ref_BS)
    assert loss.mean() == 0 and not np.any(grad_BS)
    assert all(metric.mean() == 0 for metric in metrics.values())


def test_beta_without_a_reference_is_refused():
    logprobs_BS, old_BS, advantages_B, mask_BS, _ = batch()
    with pytest.raises(ValueError, match=r"beta = 0\.3"):
        policy_loss(logprobs_BS, old_BS, advantages_B, mask_BS, CONFIGS[1])


def test_k3_is_never_negative_and_estimates_the_kl():
    rng = np.random.default_rng(0)
    p_V, q_V = rng.dirichlet(np.ones(6)), rng.dirichlet(np.ones(6))
    estimates_V = k3(jnp.log(p_V), jnp.log(q_V))
    assert np.all(estimates_V >= 0)
    np.testing.assert_allclose(np.sum(p_V * estimates_V), np.sum(p_V * np.log(p_V / q_V)), rtol=1e-5)
    assert k3(jnp.array(-1.3), jnp.array(-1.3)) == 0


advantages_of = jax.jit(group_advantages, static_argnums=1)
REWARDS_PG = np.array([[0.0, 1.0, 1.0, 0.3], [1.1, 1.1, 1.1, 1.1], [0.1, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_match_the_loop(scale):
    result = advantages_of(REWARDS_PG.astype(np.float32), scale)
    everything = [float(r) for r in REWARDS_PG.ravel()]

    def std(values):
        mean = sum(values) / len(values)
        return (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5

    for p, rewards in enumerate(REWARDS_PG):
        divisor = {"group": std(list(rewards)) + 1e-4, "batch": std(everything) + 1e-4, "none": 1.0}[scale]
        for g, reward in enumerate(rewards):
            expected = (reward - sum(rewards) / len(rewards)) / divisor
            np.testing.assert_allclose(result.advantages_PG[p, g], expected, atol=1e-5)
    np.testing.assert_array_equal(result.active_P, [True, False, True, False])
    np.testing.assert_allclose(result.metrics["reward"], sum(everything) / len(everything), rtol=1e-6)
    np.testing.assert_allclose(result.metrics["reward_std"], np.mean([std(list(r)) for r in REWARDS_PG]), rtol=1e-5)
    assert result.metrics["frac_reward_zero_std"] == 0.5


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1.1, 1e6 / 7])
def test_equal_rewards_give_exactly_no_advantage(scale, value):
    rewards_PG = np.full((3, 7), value, np.float32)
    result = advantages_of(rewards_PG, scale)
    assert not np.any(result.advantages_PG)
    assert result.metrics["reward_std"] == 0 and result.metrics["frac_reward_zero_std"] == 1


def test_binary_rewards_as_integers_or_booleans():
    result = advantages_of(np.array([[True, False, True, True]]), "none")
    np.testing.assert_allclose(result.advantages_PG, [[0.25, -0.75, 0.25, 0.25]])


def test_illegal_groups_are_named():
    with pytest.raises(ValueError, match=r"\(3, 1\)"):
        group_advantages(jnp.zeros((3, 1)))
    with pytest.raises(ValueError, match="scale = 'std'"):
        group_advantages(jnp.zeros((3, 2)), "std")
