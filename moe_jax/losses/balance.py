"""Load balance between experts: DeepSeek-V3's sequence-wise loss, and the figures that show imbalance.

Shapes: B batch, S sequence, T tokens, E experts, K experts per token, "..." any leading axes. Padding never counts.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from moe_jax.losses import SumCount


def sequence_balance_loss(
    chosen_counts_BE: Array, affinity_BE: Array, tokens_B: Array, num_experts_per_token: int
) -> SumCount:
    """The sequence-wise balance loss, before its coefficient α (DeepSeek-V3 eq. 17-20).

    For each sequence of T valid tokens, Σ_i f_i P_i with

        f_i = E / (K T) Σ_t 1(s_it is among the K largest of token t)
        P_i = 1/T Σ_t s_it / Σ_j s_jt

    As in the paper, f counts the K largest of the *unbiased* scores over all experts: neither the balancing bias nor
    the limit on groups enters, so these may differ from the experts that were used. f is a constant for the gradient,
    which flows through P. Perfect balance gives 1.

    Args:
        chosen_counts_BE: Σ_t of f's indicator over a sequence's valid tokens (`RouterStats.unbiased_counts_BE`; for
            DeepSeek-V2's expert-level loss `counts_BE`, those that were chosen); any leading axes.
        affinity_BE: Σ_t of the normalised scores.
        tokens_B: T.
        num_experts_per_token: K.

    Returns:
        Sum over leading axes (layers) and sequences, and how many of those hold at least one token.
    """
    divisor_B = jnp.maximum(tokens_B, 1)[..., None]
    num_experts = chosen_counts_BE.shape[-1]
    f_BE = jax.lax.stop_gradient(chosen_counts_BE) * num_experts / (num_experts_per_token * divisor_B)
    p_BE = affinity_BE / divisor_B
    return SumCount(jnp.sum(f_BE * p_BE), jnp.sum(tokens_B > 0, dtype=jnp.float32))


def max_violation(counts_E: Array) -> Array:
    """MaxVio = (max load - mean load) / mean load (arXiv:2408.15664): 0 balanced, at most E/K - 1. [..., E] → [...]."""
    mean = jnp.mean(counts_E, axis=-1, dtype=jnp.float32)
    return (jnp.max(counts_E, axis=-1) - mean) / jnp.where(mean == 0, 1, mean)


def load_entropy(counts_E: Array) -> Array:
    """Entropy of the distribution of load over experts, nats: ln E if balanced; [..., E] → [...]."""
    total = jnp.sum(counts_E, axis=-1, keepdims=True, dtype=jnp.float32)
    share_E = counts_E / jnp.where(total == 0, 1, total)
    return -jnp.sum(jax.scipy.special.xlogy(share_E, share_E), axis=-1)
