"""Named policy objectives: the choices of options that papers made, to start from.

What a paper leaves to the user (batch, learning rates, lengths) stays as it is, and so does the weight of the KL where
the paper has one and `beta` is set already.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from moe_jax.config import ConfigError, PolicyLossConfig, RLConfig


def grpo(rl: RLConfig) -> RLConfig:
    """DeepSeekMath (arXiv:2402.03300): each sample's mean over its tokens, k3 in the loss with weight 0.04."""
    return replace(rl, loss=PolicyLossConfig(aggregation="seq-mean-token-mean", beta=rl.loss.beta or 0.04))


def dr_grpo(rl: RLConfig) -> RLConfig:
    """Dr. GRPO (arXiv:2503.20783): divided neither by lengths nor by the standard deviation; no KL."""
    return replace(rl, loss=PolicyLossConfig(scale_rewards="none", aggregation="seq-mean-token-sum-norm"))


def dapo(rl: RLConfig) -> RLConfig:
    """DAPO (arXiv:2503.14476): clip-higher, dynamic sampling, token mean, soft overlong punishment; no KL.

    The punishment's buffer is a fifth of the length, as there (4,096 of 20,480 tokens).
    """
    return replace(
        rl,
        loss=PolicyLossConfig(epsilon_high=0.28),
        filter_groups="accuracy",
        overlong_buffer=rl.overlong_buffer or rl.sampling.max_new_tokens // 5,
    )


def gspo(rl: RLConfig) -> RLConfig:
    """GSPO (arXiv:2507.18071): the sequence's ratio, in a range as narrow as in its experiments; no KL."""
    loss = PolicyLossConfig(
        importance_sampling_level="sequence", epsilon=3e-4, epsilon_high=4e-4, aggregation="seq-mean-token-mean"
    )
    return replace(rl, loss=loss)


def cispo(rl: RLConfig) -> RLConfig:
    """CISPO (MiniMax-M1, arXiv:2506.13585): no bound below; the upper one, 5, is ScaleRL's (arXiv:2510.13786)."""
    return replace(rl, loss=PolicyLossConfig(surrogate="cispo", epsilon=1.0, epsilon_high=4.0))


def rloo(rl: RLConfig) -> RLConfig:
    """RLOO (arXiv:2402.14740): REINFORCE beside the mean of the group's other samples; whole sequences, KL in rewards.

    As an on-policy method: one update per batch of samples.
    """
    return replace(
        rl,
        num_iterations=1,
        num_minibatches=1,
        loss=PolicyLossConfig(
            baseline="leave_one_out",
            scale_rewards="none",
            surrogate="reinforce",
            aggregation="seq-mean-token-sum",
            kl_estimator="k1",
            kl_in="reward",
            beta=rl.loss.beta or 0.05,
        ),
    )


def reinforce(rl: RLConfig) -> RLConfig:
    """REINFORCE beside the batch's mean reward, with whole sequences; no KL; one update per batch of samples."""
    loss = PolicyLossConfig(
        baseline="batch", scale_rewards="none", surrogate="reinforce", aggregation="seq-mean-token-sum"
    )
    return replace(rl, num_iterations=1, num_minibatches=1, loss=loss)


def ppo(rl: RLConfig) -> RLConfig:
    """PPO (arXiv:1707.06347) as for language models: a critic, whitened advantages, k1 in the rewards if `beta` is set.

    `RLConfig.critic` has λ = 1, with which DeepSeek-R1's appendix finds it nearly equal to GRPO.
    """
    loss = PolicyLossConfig(baseline="critic", scale_rewards="batch")
    if rl.loss.beta:
        loss = replace(loss, beta=rl.loss.beta, kl_estimator="k1", kl_in="reward")
    return replace(rl, loss=loss)


OBJECTIVES: dict[str, Callable[[RLConfig], RLConfig]] = {
    function.__name__: function for function in (grpo, dr_grpo, dapo, gspo, cispo, rloo, reinforce, ppo)
}


def with_objective(rl: RLConfig, name: str) -> RLConfig:
    """`rl` with the named objective.

    Raises:
        ConfigError: there is none of this name.
    """
    if name not in OBJECTIVES:
        raise ConfigError(f"objective = {name!r}: must be one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name](rl)
