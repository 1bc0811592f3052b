"""Load balance between experts: the losses that push for it, and the figures that show how far it is.

Every loss is taken per layer and summed over layers. (Hugging Face's `load_balancing_loss_func` adds up all layers'
loads before it multiplies, so that what one layer has too much of hides what another has too little of, and is K for
perfect balance, where these are 1.) Loads are constants for the gradient, which flows through the scores.

Shapes: B batch, S sequence, T tokens, E experts, K experts per token, D devices (groups of experts), "..." any leading
axes, mostly layers L. Padding never counts.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from moe_jax.losses import SumCount
from moe_jax.model.router import RouterStats


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
        chosen_counts_BE: Σ_t of f's indicator over a sequence's valid tokens (`RouterStats.unbiased_counts_BE`); any
            leading axes.
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


def expert_balance_loss(counts_E: Array, affinity_E: Array, tokens: Array, num_experts_per_token: int) -> SumCount:
    """The expert-level balance loss of T tokens, before its coefficient α₁ (DeepSeek-V2 eq. 23-25).

    Σ_i f_i P_i with f_i = E / (K T) Σ_t 1(token t goes to expert i) and P_i = 1/T Σ_t s_it, scores normalised over all
    experts (V2's softmax scores are). Perfect balance gives 1.

    Args:
        counts_E: assignments to each expert; any leading axes.
        affinity_E: Σ_t of the normalised scores.
        tokens: T.
        num_experts_per_token: K.

    Returns:
        T Σ_i f_i P_i and T, each summed over leading axes: a loss of many micro-batches is their mean weighted by
        tokens.
    """
    f_E = _per_token(counts_E, tokens) * counts_E.shape[-1] / num_experts_per_token
    return SumCount(jnp.sum(f_E * affinity_E), jnp.sum(tokens))


def device_balance_loss(
    counts_E: Array, affinity_E: Array, tokens: Array, num_experts_per_token: int, num_devices: int
) -> SumCount:
    """The device-level balance loss of T tokens, before its coefficient α₂ (DeepSeek-V2 eq. 26-28).

    Σ_d f'_d P'_d, where f'_d is the mean of `expert_balance_loss`'s f over the experts of device d, and P'_d the sum of
    their P. Perfect balance between devices gives 1, whatever the balance within them. Arguments and result as there.
    """
    f_E = _per_token(counts_E, tokens) * counts_E.shape[-1] / num_experts_per_token
    f_D = jnp.mean(_by_device(f_E, num_devices), axis=-1)
    return SumCount(jnp.sum(f_D * jnp.sum(_by_device(affinity_E, num_devices), axis=-1)), jnp.sum(tokens))


def communication_balance_loss(
    device_tokens_D: Array, affinity_E: Array, tokens: Array, num_devices_per_token: int
) -> SumCount:
    """The communication balance loss of T tokens, before its coefficient α₃ (DeepSeek-V2 eq. 29-31).

    Σ_d f''_d P''_d with f''_d = D / (M T) Σ_t 1(token t is sent to device d), and P''_d the sum of
    `expert_balance_loss`'s P over the experts of device d. M is the most devices a token may use: perfect balance gives
    1 if every token uses that many, and less if they use fewer.

    Args:
        device_tokens_D: tokens that are sent to each device, once for all its experts; any leading axes.
        affinity_E: Σ_t of the normalised scores; device d has the d-th D-th of the experts.
        tokens: T.
        num_devices_per_token: M.

    Returns:
        As `expert_balance_loss`.
    """
    num_devices = device_tokens_D.shape[-1]
    f_D = _per_token(device_tokens_D, tokens) * num_devices / num_devices_per_token
    return SumCount(jnp.sum(f_D * jnp.sum(_by_device(affinity_E, num_devices), axis=-1)), jnp.sum(tokens))


def global_balance_loss(batch_counts_E: Array, affinity_E: Array, tokens: Array) -> SumCount:
    """The global-batch balance loss, before its coefficient (Qwen, arXiv:2501.11873).

    `expert_balance_loss` with f of the whole step's batch, and P of the T tokens at hand: micro-batches' sums add up to
    the loss of the whole batch, so that a micro-batch or sequence may specialise. Perfect balance gives 1.

    Args:
        batch_counts_E: assignments to each expert in the whole batch, every device and micro-batch.
        affinity_E: Σ_t of the normalised scores, of the tokens at hand.
        tokens: T.

    Returns:
        As `expert_balance_loss`.
    """
    return SumCount(jnp.sum(jax.lax.stop_gradient(relative_load(batch_counts_E)) * affinity_E), jnp.sum(tokens))


def router_z_loss(z: Array, tokens: Array) -> SumCount:
    """The router z-loss, before its coefficient: mean of logsumexp(logits)² over tokens (ST-MoE, arXiv:2202.08906).

    Args:
        z: Σ_t of logsumexp(logits)²; any shape (layers, sequences).
        tokens: T, of the same shape.
    """
    return SumCount(jnp.sum(z), jnp.sum(tokens))


def _per_token(counts: Array, tokens: Array) -> Array:
    """Counts per token, as constants for the gradient."""
    return jax.lax.stop_gradient(counts) / jnp.maximum(tokens, 1)[..., None]


def _by_device(values_E: Array, num_devices: int) -> Array:
    return values_E.reshape(*values_E.shape[:-1], num_devices, -1)


# ------------------------------------------------------------------------------------------------------------ figures


class RouterLoad(NamedTuple):
    """What routers did to some tokens, as sums: those of shards and micro-batches add up to the batch's."""

    counts_LE: Array
    """Assignments to each expert."""
    tokens_L: Array
    entropy_L: Array
    """Sum of the entropies of tokens' normalised scores, nats."""
    confidence_L: Array
    """Sum of tokens' largest normalised scores."""
    dropped_L: Array | None
    """Assignments dropped; None where there is no capacity."""


def router_load(stats: RouterStats, has_capacity: bool = False) -> RouterLoad:
    """Sums statistics, [L, B, ...] each, over the batch."""
    return RouterLoad(
        counts_LE=jnp.sum(stats.counts_BE, axis=1),
        tokens_L=jnp.sum(stats.tokens_B, axis=1),
        entropy_L=jnp.sum(stats.entropy_B, axis=1),
        confidence_L=jnp.sum(stats.confidence_B, axis=1),
        dropped_L=jnp.sum(stats.dropped_B, axis=1) if has_capacity else None,
    )


def load_metrics(load: RouterLoad, bias_LE: Array | None = None) -> dict[str, Array]:
    """What to watch of a step's whole batch: `<name>`, the mean over layers, and `<name>_by_layer`, [L].

    max_violation, load_entropy: as the functions of that name
    dead_experts: experts that no token chose
    score_entropy: mean over tokens of the entropy of their normalised scores, nats; ln E if undecided
    confidence: mean over tokens of their largest normalised score
    dropped_fraction: of the assignments, where experts have a capacity
    bias_norm: Euclidean norm of the balancing bias, where there is one

    And expert_load, [L, E]: each expert's share, 1 if even.
    """
    tokens_L = jnp.maximum(load.tokens_L, 1)
    layers = {
        "max_violation": max_violation(load.counts_LE),
        "load_entropy": load_entropy(load.counts_LE),
        "dead_experts": jnp.sum(load.counts_LE == 0, axis=-1, dtype=jnp.float32),
        "score_entropy": load.entropy_L / tokens_L,
        "confidence": load.confidence_L / tokens_L,
    }
    if load.dropped_L is not None:
        layers["dropped_fraction"] = load.dropped_L / jnp.maximum(jnp.sum(load.counts_LE, axis=-1), 1)
    if bias_LE is not None:
        layers["bias_norm"] = jnp.linalg.norm(bias_LE, axis=-1)
    metrics = {name: jnp.mean(value_L) for name, value_L in layers.items()}
    metrics |= {f"{name}_by_layer": value_L for name, value_L in layers.items()}
    return metrics | {"expert_load": relative_load(load.counts_LE)}


def relative_load(counts_E: Array) -> Array:
    """Each expert's load over the mean load, 1 is balanced; 0 where there is none. [..., E] → [..., E]."""
    mean = jnp.mean(counts_E, axis=-1, keepdims=True, dtype=jnp.float32)
    return counts_E / jnp.where(mean == 0, 1, mean)


def max_violation(counts_E: Array) -> Array:
    """MaxVio = (max load - mean load) / mean load (arXiv:2408.15664): 0 balanced, at most E/K - 1. [..., E] → [...]."""
    mean = jnp.mean(counts_E, axis=-1, dtype=jnp.float32)
    return (jnp.max(counts_E, axis=-1) - mean) / jnp.where(mean == 0, 1, mean)


def load_entropy(counts_E: Array) -> Array:
    """Entropy of the distribution of load over experts, nats: ln E if balanced; [..., E] → [...]."""
    total = jnp.sum(counts_E, axis=-1, keepdims=True, dtype=jnp.float32)
    share_E = counts_E / jnp.where(total == 0, 1, total)
    return -jnp.sum(jax.scipy.special.xlogy(share_E, share_E), axis=-1)
