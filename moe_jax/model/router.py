"""Scores → experts and weights; the balancing bias; nothing else.

T tokens, D model, E experts, K experts per token, N groups of experts, L layers.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moe_jax.config import ModelConfig, MoEConfig
from moe_jax.model.layers import Initializer


class RouterBias(nnx.Variable):
    """The balancing bias: not a parameter, so no gradient, no weight decay and no optimizer state reach it."""


class RouterOutput(NamedTuple):
    """Where each token goes."""

    experts_TK: Array
    """int32, the experts chosen for each token, in no particular order."""
    weights_TK: Array
    """float32, mixing weights: unbiased scores, so gradients reach the gate."""
    scores_TE: Array
    """float32, affinity of each token to each expert."""


class RouterStats(NamedTuple):
    """What a sparse layer reports per sequence: sums over valid tokens, so that shards and micro-batches add up.

    `losses.balance` makes balance losses and load metrics of them. Stacked over layers by the model.
    """

    counts_BE: Array
    """float32, assignments of each sequence's tokens to each expert."""
    unbiased_counts_BE: Array
    """float32, assignments as they would be without the balancing bias."""
    affinity_BE: Array
    """float32, sum over tokens of the scores normalised over experts; the only part with a gradient."""
    tokens_B: Array
    """float32, valid tokens of each sequence."""


def router_stats(routed: RouterOutput, valid_BS: Array) -> RouterStats:
    """Sums a layer's routing over the valid tokens of each sequence."""
    B, S = valid_BS.shape
    _T, K = routed.experts_TK.shape
    E = routed.scores_TE.shape[1]
    valid_BS = valid_BS.astype(jnp.float32)

    def counts_BE(experts_TK: Array) -> Array:
        chosen_BSE = jnp.sum(experts_TK.reshape(B, S, K, 1) == jnp.arange(E), axis=2, dtype=jnp.float32)
        return jnp.einsum("BSE,BS->BE", chosen_BSE, valid_BS)

    scores_TE = routed.scores_TE
    affinity_BSE = _normalize(scores_TE).reshape(B, S, E)
    _, unbiased_TK = jax.lax.top_k(jax.lax.stop_gradient(scores_TE), K)
    return RouterStats(
        counts_BE(routed.experts_TK),
        counts_BE(unbiased_TK),
        jnp.einsum("BSE,BS->BE", affinity_BSE, valid_BS),
        jnp.sum(valid_BS, axis=1),
    )


def route(scores_TE: Array, bias_E: Array | None, cfg: MoEConfig) -> RouterOutput:
    """Group-limited top-k selection with a balancing bias (DeepSeek-V3 §2.1.2, eq. 12-16; DeepSeek-V2 §2.2).

    The bias decides *which* experts are chosen, never how much they weigh. Experts of groups that lost are masked with
    -inf, so that no bias can bring them back.
    """
    choice_TE = scores_TE if bias_E is None else scores_TE + bias_E
    choice_TE = jax.lax.stop_gradient(choice_TE)
    if cfg.num_groups > 1:
        choice_TE = jnp.where(_in_kept_group(choice_TE, cfg), choice_TE, -jnp.inf)
    _, experts_TK = jax.lax.top_k(choice_TE, cfg.num_experts_per_token)
    weights_TK = jnp.take_along_axis(scores_TE, experts_TK, axis=-1)
    if cfg.normalize_weights:
        weights_TK = _normalize(weights_TK)
    return RouterOutput(experts_TK, weights_TK * cfg.routed_scaling_factor, scores_TE)


def _normalize(scores: Array) -> Array:
    """Divides by the sum over the last axis, which for sigmoid scores can come close to 0."""
    # The gradient divides by the bound's square, which must be a normal float32: DeepSeek's 1e-20 would give NaN.
    return scores / jnp.maximum(jnp.sum(scores, axis=-1, keepdims=True), 1e-18)


def _in_kept_group(choice_TE: Array, cfg: MoEConfig) -> Array:
    """[T, E] bool: whether an expert's group is among the token's best."""
    T, E = choice_TE.shape
    choice_TNE = choice_TE.reshape(T, cfg.num_groups, E // cfg.num_groups)
    if cfg.group_score == "top2_sum":
        group_TN = jnp.sum(jax.lax.top_k(choice_TNE, 2)[0], axis=-1)
    else:
        group_TN = jnp.max(choice_TNE, axis=-1)
    _, kept = jax.lax.top_k(group_TN, cfg.num_groups_per_token)
    kept_TN = jnp.any(kept[:, :, None] == jnp.arange(cfg.num_groups), axis=1)
    return jnp.repeat(kept_TN, E // cfg.num_groups, axis=1)


class Router(nnx.Module):
    """The gate: affinities in float32 whatever the model's dtype (DeepSeek-V3's published checkpoints need it)."""

    def __init__(self, cfg: ModelConfig, init: Initializer):
        self.cfg = cfg.moe
        self.gate_DE = init.weight((cfg.hidden_size, cfg.moe.num_experts), ("embed", None), "")
        if cfg.moe.selection_bias:
            self.bias = RouterBias(jnp.zeros((cfg.moe.num_experts,), jnp.float32))

    def __call__(self, x_TD: Array) -> RouterOutput:
        logits_TE = jnp.einsum("TD,DE->TE", x_TD.astype(jnp.float32), self.gate_DE[...], precision="highest")
        scores_TE = jax.nn.sigmoid(logits_TE) if self.cfg.score == "sigmoid" else jax.nn.softmax(logits_TE, axis=-1)
        return route(scores_TE, self.bias[...] if self.cfg.selection_bias else None, self.cfg)


def updated_bias(bias_LE: Array, counts_LE: Array, rate: float) -> Array:
    """b ← b + γ · sign(mean load - load), per layer (DeepSeek-V3 eq. 16; arXiv:2408.15664 algorithm 1).

    `counts_LE` are assignments over the whole step: all devices, all micro-batches.
    """
    counts_LE = counts_LE.astype(jnp.float32)
    return bias_LE + rate * jnp.sign(jnp.mean(counts_LE, axis=-1, keepdims=True) - counts_LE)
