"""Policy gradients from groups of samples: GRPO (DeepSeekMath, DeepSeek-R1) and its token-mean form (DAPO).

Options and metrics have TRL's names. Shapes: P prompts, G samples per prompt, B batch of samples, S tokens of a sample.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from moe_jax.config import PolicyLossConfig
from moe_jax.losses import SumCount, masked_sum

# Added to the standard deviation that advantages are divided by.
_STD_EPS = 1e-4
# Bound on log-ratios, so that exp, whose gradient is lost once it overflows, stays finite.
_MAX_LOG_RATIO = 20.0


class GroupAdvantages(NamedTuple):
    advantages_PG: Array  # float32
    active_P: Array  # bool, whether the group's rewards differ
    metrics: dict[str, Array]  # reward, reward_std, frac_reward_zero_std


def group_advantages(rewards_PG: Array, scale: Literal["group", "batch", "none"] = "group") -> GroupAdvantages:
    """A = (r - mean of the group) / (std + 1e-4), the advantage of each sample over its group (DeepSeekMath §4.1.2).

    `scale` says whose standard deviation: the group's; the batch's, over all rewards; or none, no division (Dr. GRPO).
    It is the sample standard deviation (divided by n - 1) with 1e-4 added, as in TRL; the papers leave both open. A
    group whose rewards are all equal gets advantages of exactly 0: it teaches nothing.

    The groups must be whole. Metrics: `reward` (mean), `reward_std` (mean over groups of their standard deviation) and
    `frac_reward_zero_std` (share of groups whose rewards are all equal).
    """
    rewards_PG = rewards_PG.astype(jnp.promote_types(rewards_PG.dtype, jnp.float32))
    if rewards_PG.ndim != 2 or rewards_PG.shape[1] < 2:
        raise ValueError(f"rewards have shape {rewards_PG.shape}: must be [prompts, samples], 2 samples or more")
    # By comparison: the mean of equal rewards is not always equal to them in floating point.
    active_P = jnp.max(rewards_PG, axis=1) > jnp.min(rewards_PG, axis=1)
    std_P = jnp.where(active_P, jnp.std(rewards_PG, axis=1, ddof=1), 0)
    advantages_PG = rewards_PG - jnp.mean(rewards_PG, axis=1, keepdims=True)
    if scale == "group":
        advantages_PG /= std_P[:, None] + _STD_EPS
    elif scale == "batch":
        advantages_PG /= jnp.std(rewards_PG, ddof=1) + _STD_EPS
    elif scale != "none":
        raise ValueError(f"scale = {scale!r}: must be 'group', 'batch' or 'none'")
    return GroupAdvantages(
        jnp.where(active_P[:, None], advantages_PG, 0),
        active_P,
        {
            "reward": jnp.mean(rewards_PG),
            "reward_std": jnp.mean(std_P),
            "frac_reward_zero_std": jnp.mean(~active_P, dtype=jnp.float32),
        },
    )


def k3(logprobs: Array, ref_logprobs: Array) -> Array:
    """π_ref/π - log(π_ref/π) - 1 per token, an unbiased, never negative estimate of KL(π ‖ π_ref) (V3 eq. 27)."""
    log_ratio = jnp.clip(ref_logprobs - logprobs, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    return jnp.expm1(log_ratio) - log_ratio


class PolicyLoss(NamedTuple):
    loss: SumCount  # the gradient is that of the sum
    metrics: dict[str, SumCount]  # per token, under TRL's names


def policy_loss(
    logprobs_BS: Array,
    old_logprobs_BS: Array,
    advantages_B: Array,
    mask_BS: Array,
    cfg: PolicyLossConfig,
    ref_logprobs_BS: Array | None = None,
) -> PolicyLoss:
    """The clipped surrogate, its sign turned for minimising, plus β times the KL to a reference (DeepSeekMath eq. 3).

    Per token, with ρ = π/π_old: -min(ρ A, clip(ρ, 1 - epsilon, 1 + epsilon_high) A) + beta · k3.

    The loss comes as (sum, count). To get a minibatch's loss and gradient from micro-batches or shards, add their sums
    and gradients of sums, add their counts, and divide. The count is

    - "token-mean": tokens under the mask (DAPO);
    - "seq-mean-token-mean": samples with at least one token under the mask (GRPO); the sum is of their token means.

    Args:
        logprobs_BS: log-probabilities of the tokens under the policy, nats.
        old_logprobs_BS: those under the policy that sampled them; no gradient.
        advantages_B: no gradient.
        mask_BS: tokens that count, those that the policy wrote. The others do not matter, even if they are not finite.
        cfg: epsilon, epsilon_high, beta, aggregation.
        ref_logprobs_BS: those under the reference policy, no gradient; needed if beta > 0, and gives the metric `kl`.

    Returns:
        Loss, and as metrics over tokens `clip_ratio/low_mean` (ρ below 1 - epsilon where A < 0), `clip_ratio/high_mean`
        (ρ above 1 + epsilon_high where A > 0), `clip_ratio/region_mean` (either), and `kl`. At the first update on
        fresh samples ρ is 1 and the loss near 0 by construction; its gradient is not.
    """
    if cfg.beta > 0 and ref_logprobs_BS is None:
        raise ValueError(f"PolicyLossConfig.beta = {cfg.beta}: needs the reference policy's log-probabilities")
    mask_BS = mask_BS.astype(bool)
    advantages_B1 = jax.lax.stop_gradient(advantages_B)[:, None]
    # Zero outside the mask before any exp: padding may hold -inf, whose differences are NaN.
    log_ratio_BS = jnp.where(mask_BS, logprobs_BS - jax.lax.stop_gradient(old_logprobs_BS), 0)
    ratio_BS = jnp.exp(jnp.clip(log_ratio_BS, -_MAX_LOG_RATIO, _MAX_LOG_RATIO))
    clipped_BS = jnp.clip(ratio_BS, 1 - cfg.epsilon, 1 + cfg.epsilon_high)
    loss_BS = -jnp.minimum(ratio_BS * advantages_B1, clipped_BS * advantages_B1)

    low_BS = (ratio_BS < 1 - cfg.epsilon) & (advantages_B1 < 0)
    high_BS = (ratio_BS > 1 + cfg.epsilon_high) & (advantages_B1 > 0)
    metrics = {
        "clip_ratio/low_mean": masked_sum(low_BS.astype(jnp.float32), mask_BS),
        "clip_ratio/high_mean": masked_sum(high_BS.astype(jnp.float32), mask_BS),
        "clip_ratio/region_mean": masked_sum((low_BS | high_BS).astype(jnp.float32), mask_BS),
    }
    if ref_logprobs_BS is not None:
        ref_BS = jnp.where(mask_BS, jax.lax.stop_gradient(ref_logprobs_BS), 0)
        kl_BS = k3(jnp.where(mask_BS, logprobs_BS, 0), ref_BS)
        loss_BS += cfg.beta * kl_BS
        metrics["kl"] = masked_sum(jax.lax.stop_gradient(kl_BS), mask_BS)
    return PolicyLoss(_aggregate(loss_BS, mask_BS, cfg.aggregation), metrics)


def _aggregate(loss_BS: Array, mask_BS: Array, aggregation: str) -> SumCount:
    if aggregation == "token-mean":
        return masked_sum(loss_BS, mask_BS)
    length_B = jnp.sum(mask_BS, axis=1)
    mean_B = jnp.sum(jnp.where(mask_BS, loss_BS, 0), axis=1) / jnp.maximum(length_B, 1)
    return masked_sum(mean_B, length_B > 0)
