"""What a sample, or a token of it, is worth beside what was to be expected: advantages.

Shapes: P prompts, G samples per prompt, B batch of samples, S tokens of a sample.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from moe_jax.losses import masked_sum

# Added to the standard deviation that advantages are divided by.
_STD_EPS = 1e-4


class GroupAdvantages(NamedTuple):
    advantages_PG: Array  # float32
    active_P: Array  # bool, whether the group's rewards differ
    metrics: dict[str, Array]  # reward, reward_std, frac_reward_zero_std


def group_advantages(
    rewards_PG: Array,
    scale: Literal["group", "batch", "none"] = "group",
    baseline: Literal["group", "leave_one_out", "batch", "none"] = "group",
) -> GroupAdvantages:
    """A = (r - baseline) / (std + 1e-4), the advantage of each sample.

    The baseline is the mean of the group (GRPO, DeepSeekMath §4.1.2); the mean of the others in it (RLOO,
    arXiv:2402.14740 eq. 9), which is unbiased and G/(G - 1) times the former; the mean of the batch; or 0.

    `scale` says whose standard deviation: the group's; the batch's, over all rewards; or none, no division (Dr. GRPO).
    It is the sample standard deviation (divided by n - 1) with 1e-4 added, as in TRL; the papers leave both open. With
    a baseline of the group, one whose rewards are all equal gets advantages of exactly 0: it teaches nothing.

    The groups must be whole. Metrics: `reward` (mean), `reward_std` (mean over groups of their standard deviation) and
    `frac_reward_zero_std` (share of groups whose rewards are all equal).
    """
    rewards_PG = rewards_PG.astype(jnp.promote_types(rewards_PG.dtype, jnp.float32))
    of_group = baseline in ("group", "leave_one_out")
    least = 2 if of_group or scale == "group" else 1
    if rewards_PG.ndim != 2 or rewards_PG.shape[1] < least:
        raise ValueError(f"rewards have shape {rewards_PG.shape}: must be [prompts, samples], {least} samples or more")
    # By comparison: the mean of equal rewards is not always equal to them in floating point.
    active_P = jnp.max(rewards_PG, axis=1) > jnp.min(rewards_PG, axis=1)
    std_P = jnp.where(active_P, jnp.std(rewards_PG, axis=1, ddof=min(1, rewards_PG.shape[1] - 1)), 0)
    if of_group:
        advantages_PG = rewards_PG - jnp.mean(rewards_PG, axis=1, keepdims=True)
        if baseline == "leave_one_out":
            advantages_PG *= rewards_PG.shape[1] / (rewards_PG.shape[1] - 1)
    elif baseline == "batch":
        advantages_PG = rewards_PG - jnp.mean(rewards_PG)
    elif baseline == "none":
        advantages_PG = rewards_PG
    else:
        raise ValueError(f"baseline = {baseline!r}: must be 'group', 'leave_one_out', 'batch' or 'none'")
    if scale == "group":
        advantages_PG /= std_P[:, None] + _STD_EPS
    elif scale == "batch":
        advantages_PG /= jnp.std(rewards_PG, ddof=1) + _STD_EPS
    elif scale != "none":
        raise ValueError(f"scale = {scale!r}: must be 'group', 'batch' or 'none'")
    return GroupAdvantages(
        jnp.where(active_P[:, None], advantages_PG, 0) if of_group else advantages_PG,
        active_P,
        {
            "reward": jnp.mean(rewards_PG),
            "reward_std": jnp.mean(std_P),
            "frac_reward_zero_std": jnp.mean(~active_P, dtype=jnp.float32),
        },
    )


def token_rewards(rewards_B: Array, mask_BS: Array, penalties_BS: Array | float = 0.0) -> Array:
    """[B, S]: a sample's reward at its last token under the mask, less each token's penalty (beta · KL); else 0."""
    mask_BS = mask_BS.astype(bool)
    after_BS = jnp.cumsum(mask_BS[:, ::-1], axis=1)[:, ::-1]
    last_BS = mask_BS & (after_BS == 1)
    return jnp.where(last_BS, rewards_B[:, None], 0) - jnp.where(mask_BS, penalties_BS, 0)


class TokenAdvantages(NamedTuple):
    advantages_BS: Array
    returns_BS: Array  # advantage + value: what the critic learns


def generalised_advantages(
    rewards_BS: Array, values_BS: Array, mask_BS: Array, gamma: float, lam: float
) -> TokenAdvantages:
    """Generalised advantage estimation (arXiv:1506.02438 eq. 11-16): A_t = Σ_k (γλ)^k δ_{t+k}.

    δ_t = r_t + γ V_{t+1} - V_t, where t + 1 is the sample's next token under the mask and the value after the last one
    is 0: the end is the end, also of a sample that was cut off. λ = 1 makes the return the discounted sum of rewards.
    Tokens outside the mask get 0 and do not matter, even if they are not finite.
    """
    mask_BS = mask_BS.astype(bool)
    rewards_BS, values_BS = (jnp.where(mask_BS, x, 0) for x in (rewards_BS, values_BS))

    def step(later: tuple[Array, Array], token: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], Array]:
        advantage_B, value_B = later
        reward_B, own_B, mask_B = token
        own_advantage_B = reward_B + gamma * value_B - own_B + gamma * lam * advantage_B
        later = jnp.where(mask_B, own_advantage_B, advantage_B), jnp.where(mask_B, own_B, value_B)
        return later, own_advantage_B

    nothing_B = jnp.zeros_like(values_BS[:, 0])
    tokens = (rewards_BS.T, values_BS.T, mask_BS.T)
    advantages_BS = jax.lax.scan(step, (nothing_B, nothing_B), tokens, reverse=True)[1].T
    advantages_BS = jnp.where(mask_BS, advantages_BS, 0)
    return TokenAdvantages(advantages_BS, advantages_BS + values_BS)


def whitened(values_BS: Array, mask_BS: Array) -> Array:
    """(x - mean) / (std + 1e-4) over all tokens under the mask; 0 elsewhere."""
    mean = masked_sum(values_BS, mask_BS).mean()
    variance = masked_sum((values_BS - mean) ** 2, mask_BS).mean()
    return jnp.where(mask_BS, (values_BS - mean) / (jnp.sqrt(variance) + _STD_EPS), 0)


def soft_overlong_punishment(lengths_B: Array, max_length: int, buffer: int) -> Array:
    """0 up to max_length - buffer tokens, then in a line down to -1 at max_length (DAPO, arXiv:2503.14476 eq. 13)."""
    return -jnp.clip((lengths_B - (max_length - buffer)) / buffer, 0, 1)
