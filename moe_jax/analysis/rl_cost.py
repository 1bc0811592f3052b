"""What a step of policy training costs in memory and work, computed from the configuration alone.

Estimates, to choose micro-batches by: what XLA fuses or keeps besides is not in them.

B rows, S tokens of a row, V vocabulary, L layers, D model, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from moe_jax.analysis.flops import kv_cache_bytes_per_token, parameter_counts, training_flops_per_token
from moe_jax.config import ModelConfig, RLConfig

_FLOAT32 = 4
_KEPT_BYTES_PER_WIDTH = 34
"""Bytes that a layer keeps for its backward pass in bfloat16, per token and unit of width, scores aside
(arXiv:2205.05198, §4.1)."""
_SCORE_COPIES = 3
"""Scores, probabilities and their gradient, of the one layer that is being differentiated."""


@dataclass(frozen=True)
class PolicyStepCost:
    """Of all devices together."""

    state_bytes: int
    """float32: weights, two moments, the gradient (twice where it is accumulated), the start's weights, the
    reference's, and of a critic weights, moments and gradient."""
    sampling_bytes: int
    """Cache and logits of all rows, and the scores of one layer in the prefill."""
    update_bytes: int
    """Scores of one layer and what layers keep, of a micro-batch whose samples each have a row of their own."""
    update_flops: int
    """Training of all samples at full length, as if none were packed, recomputation, the reference's and the critic's
    passes included; with `RLConfig.share_prompts` a group's prompt counts once."""
    sampling_read_bytes: int
    """What decoding reads at the least: all weights for each new token, and each row's cache, half full on average."""

    @property
    def peak_bytes(self) -> int:
        return self.state_bytes + max(self.sampling_bytes, self.update_bytes)

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """The time of a step at these rates, which are those reached, not the hardware's peaks."""
        return self.update_flops / flops_per_second + self.sampling_read_bytes / bytes_per_second


def policy_step_cost(model: ModelConfig, rl: RLConfig, prompt_length: int) -> PolicyStepCost:
    """The cost of one step of `rl` on `model`, with every row at its full length.

    A separate critic is the policy's trunk with one embedding and without multi-token prediction.
    """
    N = rl.sampling.max_new_tokens
    S, B = prompt_length + N, rl.num_prompts * rl.group_size
    micro_B = B // (rl.num_minibatches * rl.accumulation_steps)
    element = 2 if model.dtype == "bfloat16" else _FLOAT32
    counts = parameter_counts(model)
    weights = _FLOAT32 * (counts.total + counts.mtp)
    reference = weights if rl.loss.beta else 0
    gradients = 2 if rl.accumulation_steps > 1 else 1
    critic = rl.critic.kind if rl.loss.baseline == "critic" else None
    trunk = parameter_counts(replace(model, tie_word_embeddings=True)).total + model.hidden_size
    critic_state = (3 + gradients) * _FLOAT32 * trunk if critic == "separate" else 0
    cache = kv_cache_bytes_per_token(model, element)
    heads, layers, width = model.attention.num_heads, model.num_layers, model.hidden_size

    whole = _KEPT_BYTES_PER_WIDTH * width * element // 2
    kept = layers * width * element + whole if model.remat == "block" else layers * whole
    forward = training_flops_per_token(model, S) // 3
    tokens = (rl.num_prompts if rl.share_prompts else B) * prompt_length + B * N
    passes = 3 + (1 if model.remat == "block" else 0)
    per_pass = passes * rl.num_iterations
    forwards = per_pass + bool(reference) + bool(critic) + (per_pass if critic == "separate" else 0)
    return PolicyStepCost(
        state_bytes=(4 + gradients) * weights + reference + critic_state,
        sampling_bytes=B * (S * cache + model.vocab_size * _FLOAT32 * 2)
        + rl.num_prompts * heads * prompt_length**2 * _FLOAT32,
        update_bytes=micro_B * (_SCORE_COPIES * heads * S**2 * _FLOAT32 + S * kept),
        update_flops=tokens * forward * forwards,
        sampling_read_bytes=N * (_FLOAT32 * counts.total + B * (prompt_length + N // 2) * cache),
    )
