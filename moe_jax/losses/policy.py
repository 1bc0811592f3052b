"""Policy gradients from samples: GRPO (DeepSeekMath, DeepSeek-R1) and its relatives, and PPO's policy.

An objective is a choice of options, which `PolicyLossConfig` has; `rl/objectives.py` names the common choices:

    ours                       TRL 1.16 (`GRPOConfig`)             verl
    baseline group             (GRPOTrainer)                       adv_estimator grpo
    baseline leave_one_out     (RLOOTrainer)                       adv_estimator rloo
    baseline critic            -                                   adv_estimator gae
    scale_rewards              scale_rewards                       norm_adv_by_std_in_grpo
    surrogate clip, cispo      loss_type                           loss_mode vanilla, cispo
    importance_sampling_level  importance_sampling_level           loss_mode gspo
    epsilon, epsilon_high      epsilon, epsilon_high (cispo: less 1)   clip_ratio_low, clip_ratio_high
    beta                       beta                                kl_loss_coef; in rewards kl_ctrl.kl_coef
    kl_in                      (loss; RLOO: reward)                use_kl_loss, use_kl_in_reward
    kl_estimator k1, k2, k3    (k3)                                kl_loss_type kl, mse, low_var_kl
    kl_estimator k3_weighted   use_bias_correction_kl              -
    aggregation                loss_type                           loss_agg_mode
      token-mean                 dapo                                token-mean
      seq-mean-token-mean        grpo                                seq-mean-token-mean
      seq-mean-token-sum         -                                   seq-mean-token-sum
      seq-mean-token-sum-norm    dr_grpo                             seq-mean-token-sum-norm
    off_policy_mask_threshold  off_policy_mask_threshold           -
    sampler_correction, _max   vllm_importance_sampling_mode, _clip_max   rollout_correction
    RLConfig.filter_groups     -                                   filter_groups.metric

TRL's RLOOTrainer clips the product of a sequence's ratios; ours follows the paper (arXiv:2402.14740) and has no ratio.
Metrics have TRL's names. Shapes: B batch of samples, S tokens of a sample.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from moe_jax.config import PolicyLossConfig
from moe_jax.losses import SumCount, masked_sum

# Bound on log-ratios, so that exp, whose gradient is lost once it overflows, stays finite.
_MAX_LOG_RATIO = 20.0


def k3(logprobs: Array, ref_logprobs: Array) -> Array:
    """π_ref/π - log(π_ref/π) - 1 per token, an unbiased, never negative estimate of KL(π ‖ π_ref) (V3 eq. 27)."""
    log_ratio = jnp.clip(ref_logprobs - logprobs, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    return jnp.expm1(log_ratio) - log_ratio


def kl_estimate(
    logprobs: Array,
    ref_logprobs: Array,
    estimator: Literal["k1", "k2", "k3", "k3_weighted"] = "k3",
    log_ratio: Array | float = 0.0,
) -> Array:
    """KL(π ‖ π_ref) of each token that was drawn from π (Schulman, "Approximating KL divergence", 2020).

    With r = π_ref/π: k1 = -log r, unbiased, of either sign; k2 = ½ log² r, biased, with the divergence's gradient; k3 =
    r - 1 - log r, unbiased, never negative, with another gradient; k3_weighted = π/π_old · k3, where `log_ratio` is
    log π/π_old: unbiased also for tokens drawn from π_old, and with the divergence's gradient (DeepSeek-V3.2).
    """
    if estimator == "k1":
        return logprobs - ref_logprobs
    if estimator == "k2":
        return 0.5 * jnp.square(ref_logprobs - logprobs)
    kl = k3(logprobs, ref_logprobs)
    return _bounded_exp(log_ratio) * kl if estimator == "k3_weighted" else kl


class PolicyLoss(NamedTuple):
    loss: SumCount  # the gradient is that of the sum
    metrics: dict[str, SumCount]  # per token, under TRL's names


def policy_loss(
    logprobs_BS: Array,
    old_logprobs_BS: Array,
    advantages: Array,
    mask_BS: Array,
    cfg: PolicyLossConfig,
    ref_logprobs_BS: Array | None = None,
    *,
    sampler_logprobs_BS: Array | None = None,
    max_length: int | None = None,
) -> PolicyLoss:
    """The objective, its sign turned for minimising, plus β times the KL to a reference if that is in the loss.

    Per token, with ρ = π/π_old of the token, or its geometric mean over the sequence (GSPO, arXiv:2507.18071 eq. 5-7),
    clip(ρ) = clip(ρ, 1 - epsilon, 1 + epsilon_high), and sg a constant for the gradient:

    - clip: -min(ρ A, clip(ρ) A) (PPO, arXiv:1707.06347; DeepSeekMath eq. 3);
    - cispo: -sg(clip(ρ)) A log π (MiniMax-M1, arXiv:2506.13585 eq. 4-5);
    - reinforce: -A log π.

    This is multiplied by 0 for a sequence that is off policy and bad, A < 0 and mean log(π_sampler/π) above
    `off_policy_mask_threshold` (DeepSeek-V3.2, arXiv:2512.02556), and by the sampler's correction, w = π_old/π_sampler
    of the token or the product over the sequence, bounded or left out above `sampler_correction_max`. The KL term is
    neither; as k3_weighted it is ρ · k3, with ρ's gradient (V3.2), always the token's.

    The loss comes as (sum, count). To get a minibatch's loss and gradient from micro-batches or shards, add their sums
    and gradients of sums, add their counts, and divide. The count is

    - "token-mean": tokens under the mask (DAPO);
    - the others: samples with at least one token under the mask. The sum is of their tokens' means (GRPO), of their
      tokens' sums, or of these divided by `max_length` (Dr. GRPO, arXiv:2503.20783).

    Args:
        logprobs_BS: log-probabilities of the tokens under the policy, nats.
        old_logprobs_BS: those under the policy that sampled them (as the trainer finds them, if the sampler's are
            given too); no gradient.
        advantages: [B], or [B, S] of each token; no gradient.
        mask_BS: tokens that count, those that the policy wrote. The others do not matter, even if they are not finite.
        cfg: the objective.
        ref_logprobs_BS: those under the reference policy, no gradient; needed if beta > 0 and the KL is in the loss,
            and gives the metric `kl`.
        sampler_logprobs_BS: those that the sampler reported, no gradient; needed for its correction.
        max_length: most tokens that a completion may have, for "seq-mean-token-sum-norm".

    Returns:
        Loss, and as metrics over tokens `clip_ratio/low_mean` (ρ below 1 - epsilon where A < 0), `clip_ratio/high_mean`
        (ρ above 1 + epsilon_high where A > 0), `clip_ratio/region_mean` (either), `kl`, `off_policy_masked`, and
        `sampling/correction/mean` and `/bounded` (the weights' mean, and the share above the bound). At the first
        update on fresh samples ρ is 1 and the loss near 0 by construction; its gradient is not.
    """
    kl_in_loss = cfg.beta > 0 and cfg.kl_in == "loss"
    if kl_in_loss and ref_logprobs_BS is None:
        raise ValueError(f"PolicyLossConfig.beta = {cfg.beta}: needs the reference policy's log-probabilities")
    if cfg.sampler_correction != "none" and sampler_logprobs_BS is None:
        raise ValueError(
            f"PolicyLossConfig.sampler_correction = {cfg.sampler_correction!r}: needs the sampler's log-probabilities"
        )
    mask_BS = mask_BS.astype(bool)
    length_B = jnp.sum(mask_BS, axis=1)
    advantages = jax.lax.stop_gradient(advantages)
    advantages_BS = advantages[:, None] if advantages.ndim == 1 else advantages
    # Zero outside the mask before any exp: padding may hold -inf, whose differences are NaN.
    log_ratio_BS = jnp.where(mask_BS, logprobs_BS - jax.lax.stop_gradient(old_logprobs_BS), 0)
    if cfg.importance_sampling_level == "token":
        ratio_BS = _bounded_exp(log_ratio_BS)
    else:
        mean_B = jnp.sum(log_ratio_BS, axis=1) / jnp.maximum(length_B, 1)
        ratio_BS = jnp.broadcast_to(_bounded_exp(mean_B)[:, None], mask_BS.shape)
    clipped_BS = jnp.clip(ratio_BS, 1 - cfg.epsilon, 1 + cfg.epsilon_high)
    if cfg.surrogate == "clip":
        loss_BS = -jnp.minimum(ratio_BS * advantages_BS, clipped_BS * advantages_BS)
    else:
        weight_BS = jax.lax.stop_gradient(clipped_BS) if cfg.surrogate == "cispo" else 1.0
        loss_BS = -weight_BS * advantages_BS * jnp.where(mask_BS, logprobs_BS, 0)

    low_BS = (ratio_BS < 1 - cfg.epsilon) & (advantages_BS < 0)
    high_BS = (ratio_BS > 1 + cfg.epsilon_high) & (advantages_BS > 0)
    metrics = {
        "clip_ratio/low_mean": masked_sum(low_BS.astype(jnp.float32), mask_BS),
        "clip_ratio/high_mean": masked_sum(high_BS.astype(jnp.float32), mask_BS),
        "clip_ratio/region_mean": masked_sum((low_BS | high_BS).astype(jnp.float32), mask_BS),
    }
    if cfg.off_policy_mask_threshold:
        drawn_BS = old_logprobs_BS if sampler_logprobs_BS is None else sampler_logprobs_BS
        moved_BS = jnp.where(mask_BS, jax.lax.stop_gradient(drawn_BS - logprobs_BS), 0)
        far_B = jnp.sum(moved_BS, axis=1) / jnp.maximum(length_B, 1) > cfg.off_policy_mask_threshold
        out_BS = far_B[:, None] & (advantages_BS < 0)
        loss_BS = jnp.where(out_BS, 0, loss_BS)
        metrics["off_policy_masked"] = masked_sum(jnp.where(out_BS, 1.0, 0.0), mask_BS)
    if sampler_logprobs_BS is not None and cfg.sampler_correction != "none":
        weight_BS, bounded_BS = _sampler_weights(old_logprobs_BS, sampler_logprobs_BS, mask_BS, cfg)
        loss_BS *= weight_BS
        metrics["sampling/correction/mean"] = masked_sum(weight_BS, mask_BS)
        metrics["sampling/correction/bounded"] = masked_sum(bounded_BS.astype(jnp.float32), mask_BS)
    if ref_logprobs_BS is not None:
        ref_BS = jnp.where(mask_BS, jax.lax.stop_gradient(ref_logprobs_BS), 0)
        policy_BS = jnp.where(mask_BS, logprobs_BS, 0)
        kl_BS = kl_estimate(policy_BS, ref_BS, cfg.kl_estimator, log_ratio_BS)
        if cfg.kl_in == "loss":
            loss_BS += cfg.beta * kl_BS
        metrics["kl"] = masked_sum(jax.lax.stop_gradient(kl_BS), mask_BS)
    return PolicyLoss(_aggregate(loss_BS, mask_BS, cfg.aggregation, max_length), metrics)


def _bounded_exp(log_ratio: Array | float) -> Array:
    return jnp.exp(jnp.clip(log_ratio, -_MAX_LOG_RATIO, _MAX_LOG_RATIO))


def _sampler_weights(
    old_logprobs_BS: Array, sampler_logprobs_BS: Array, mask_BS: Array, cfg: PolicyLossConfig
) -> tuple[Array, Array]:
    """π_old/π_sampler, truncated or zero above the bound; and where it was above."""
    log_weight_BS = jnp.where(mask_BS, jax.lax.stop_gradient(old_logprobs_BS - sampler_logprobs_BS), 0)
    level, action = cfg.sampler_correction.split("_")
    if level == "sequence":
        log_weight_BS = jnp.broadcast_to(jnp.sum(log_weight_BS, axis=1, keepdims=True), mask_BS.shape)
    weight_BS = _bounded_exp(log_weight_BS)
    above_BS = weight_BS > cfg.sampler_correction_max
    return jnp.where(above_BS, cfg.sampler_correction_max if action == "truncate" else 0, weight_BS), above_BS


def _aggregate(loss_BS: Array, mask_BS: Array, aggregation: str, max_length: int | None) -> SumCount:
    if aggregation == "token-mean":
        return masked_sum(loss_BS, mask_BS)
    length_B = jnp.sum(mask_BS, axis=1)
    sum_B = jnp.sum(jnp.where(mask_BS, loss_BS, 0), axis=1)
    if aggregation == "seq-mean-token-mean":
        sum_B = sum_B / jnp.maximum(length_B, 1)
    elif aggregation == "seq-mean-token-sum-norm":
        if max_length is None:
            raise ValueError(f"PolicyLossConfig.aggregation = {aggregation!r}: needs max_length, the constant")
        sum_B = sum_B / max_length
    return masked_sum(sum_B, length_B > 0)
