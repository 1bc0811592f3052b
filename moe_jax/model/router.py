"""Scores → experts and weights; the balancing bias; nothing else.

B batch, S sequence, T tokens (B·S, or the two axes B, S as they lie on devices), D model, E experts, K experts per
token, N groups of experts, L layers.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from moe_jax.config import ModelConfig, MoEConfig
from moe_jax.model.layers import Initializer
from moe_jax.sharding import by_rows


class RouterBias(nnx.Variable):
    """The balancing bias: not a parameter, so no gradient, no weight decay and no optimizer state reach it."""


class Choice(NamedTuple):
    """Where each token goes."""

    experts_TK: Array
    """int32, the experts chosen for each token, in no particular order."""
    weights_TK: Array
    """float32, mixing weights: unbiased scores, so gradients reach the gate."""


class RouterOutput(NamedTuple):
    """Where each token goes (`Choice`), and why."""

    experts_TK: Array
    weights_TK: Array
    scores_TE: Array
    """float32, affinity of each token to each expert."""
    logits_TE: Array
    """float32, the gate's output, of which the scores are made."""


class RouterStats(NamedTuple):
    """What a sparse layer reports per sequence: sums over valid tokens, so that shards and micro-batches add up.

    `losses.balance` makes losses and metrics of them. Stacked over layers by the model. Only `affinity_BE` and `z_B`
    have a gradient. "Normalised" scores are divided by their sum over all experts.
    """

    counts_BE: Array
    """float32, assignments of each sequence's tokens to each expert (those that capacity drops included)."""
    unbiased_counts_BE: Array
    """float32, assignments to the K largest scores, without bias and groups, as V3's sequence-wise loss counts them;
    where that loss is off or the router has no bias, `counts_BE`."""
    affinity_BE: Array
    """float32, sum of the normalised scores."""
    tokens_B: Array
    """float32, valid tokens of each sequence."""
    group_tokens_BN: Array
    """float32, tokens that have at least one of their experts in a group."""
    z_B: Array
    """float32, sum of logsumexp(logits)²."""
    entropy_B: Array
    """float32, sum of the entropies of tokens' normalised scores, nats."""
    confidence_B: Array
    """float32, sum of each token's largest normalised score: 1/E undecided, 1 sure (softmax: its top-1 probability)."""
    dropped_B: Array
    """float32, assignments dropped for lack of capacity."""
    experts_BSK: Array
    """int32, each token's experts, -1 for padding: for inspection."""


def router_stats(routed: RouterOutput, counted_BS: Array, dropped_T: Array, cfg: MoEConfig) -> RouterStats:
    """Sums a layer's routing over those tokens of each sequence that count; `dropped_T` of a token's assignments were
    dropped.

    At a few thousand tokens and hundreds of experts every pass over [T, E] shows in the step's time. So there are few,
    and what nobody reads is left for the compiler to remove.
    """
    B, S = counted_BS.shape
    E, N = cfg.num_experts, cfg.num_groups
    experts_BSK = jnp.where(counted_BS[..., None], routed.experts_TK.reshape(B, S, -1), -1)
    counted_BS = counted_BS.astype(jnp.float32)

    def total_B(value_T: Array) -> Array:
        return jnp.sum(value_T.reshape(B, S) * counted_BS, axis=1)

    chosen_BE = unbiased_BE = _counts(experts_BSK, E)
    if cfg.selection_bias and cfg.sequence_balance_coef:
        unbiased_TK = _best(jax.lax.stop_gradient(routed.scores_TE), cfg.num_experts_per_token)
        unbiased_BE = _counts(jnp.where(counted_BS[..., None] > 0, unbiased_TK.reshape(B, S, -1), -1), E)
    tokens_B = jnp.sum(counted_BS, axis=1)
    present_BSN = jnp.any((experts_BSK // (E // N))[..., None] == jnp.arange(N), axis=2)
    share_TE = _normalize(routed.scores_TE)
    constant_TE = jax.lax.stop_gradient(share_TE)
    entropy_T = -jnp.sum(constant_TE * jnp.log(jnp.maximum(constant_TE, 1e-30)), axis=-1)
    return RouterStats(
        counts_BE=chosen_BE,
        unbiased_counts_BE=unbiased_BE,
        affinity_BE=jnp.einsum("BSE,BS->BE", share_TE.reshape(B, S, E), counted_BS),
        tokens_B=tokens_B,
        group_tokens_BN=jnp.sum(present_BSN, axis=1, dtype=jnp.float32),
        z_B=total_B(jax.nn.logsumexp(routed.logits_TE, axis=-1) ** 2),
        entropy_B=total_B(entropy_T),
        confidence_B=total_B(jnp.max(constant_TE, axis=-1)),
        dropped_B=total_B(jax.lax.stop_gradient(dropped_T)),
        experts_BSK=experts_BSK,
    )


def _counts(experts_BSK: Array, num_experts: int) -> Array:
    """float32 [B, E], the tokens that have an expert among theirs, which are distinct; -1 is none."""
    # Adding up a comparison of all K at once takes 30 times as long on CPUs: a bool is what vectorises.
    chosen = (experts_BSK[..., k, None] == jnp.arange(num_experts) for k in range(experts_BSK.shape[-1]))
    return jnp.sum(functools.reduce(jnp.logical_or, chosen), axis=1, dtype=jnp.float32)


def route(scores_TE: Array, bias_E: Array | None, cfg: MoEConfig, fixed_TK: Array | None = None) -> Choice:
    """Group-limited top-k selection with a balancing bias (DeepSeek-V3 §2.1.2, eq. 12-16; DeepSeek-V2 §2.2).

    The bias decides *which* experts are chosen, never how much they weigh. Experts of groups that lost are masked with
    -inf, so that no bias can bring them back. With `fixed_TK` those are the experts, and only their weights are found.
    """
    experts_TK = _best_experts(scores_TE, bias_E, cfg) if fixed_TK is None else fixed_TK
    weights_TK = jnp.take_along_axis(scores_TE, experts_TK, axis=-1)
    if cfg.normalize_weights:
        weights_TK = _normalize(weights_TK)
    return Choice(experts_TK, weights_TK * cfg.routed_scaling_factor)


def _best_experts(scores_TE: Array, bias_E: Array | None, cfg: MoEConfig) -> Array:
    choice_TE = scores_TE if bias_E is None else scores_TE + bias_E
    choice_TE = jax.lax.stop_gradient(choice_TE)
    if cfg.num_groups > 1:
        choice_TE = jnp.where(_in_kept_group(choice_TE, cfg), choice_TE, -jnp.inf)
    return _best(choice_TE, cfg.num_experts_per_token)


def fixed_experts(keys_T: Array, layer: Array | int, cfg: MoEConfig) -> Array:
    """Experts [T, K] that do not depend on what the model computes: controls for learned routing.

    hash: K distinct experts drawn evenly for each token id and layer (Hash layers, arXiv:2106.04426; DeepSeek-V4's
    first sparse layers do so by a table). uniform: K experts in turn along positions, so that E/K successive tokens use
    each expert once, in every layer.

    Args:
        keys_T: int32; hash: token ids; uniform: positions.
        layer: the sparse layer's number; layers hash differently.
        cfg: `routing` says which.
    """
    E, K = cfg.num_experts, cfg.num_experts_per_token
    if cfg.routing == "uniform":
        return (keys_T[..., None] * K + jnp.arange(K)) % E
    hashed_T = _mixed(_mixed(keys_T.astype(jnp.uint32)) + jnp.asarray(layer, jnp.uint32))
    hashed_TE = _mixed(hashed_T[..., None] + jnp.arange(E, dtype=jnp.uint32))
    return _best(hashed_TE, K)


def _mixed(x: Array) -> Array:
    """Scatters uint32 numbers so that near ones become independent: MurmurHash3's finalizer, after an odd multiple."""
    x = (x + jnp.uint32(1)) * jnp.uint32(0x9E3779B1)
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _normalize(scores: Array) -> Array:
    """Divides by the sum over the last axis, which for sigmoid scores can come close to 0."""
    # The gradient divides by the bound's square, which must be a normal float32: DeepSeek's 1e-20 would give NaN.
    return scores / jnp.maximum(jnp.sum(scores, axis=-1, keepdims=True), 1e-18)


def _in_kept_group(choice_TE: Array, cfg: MoEConfig) -> Array:
    """[T, E] bool: whether an expert's group is among the token's best."""
    size = choice_TE.shape[-1] // cfg.num_groups
    choice_TNE = choice_TE.reshape(*choice_TE.shape[:-1], cfg.num_groups, size)
    group_TN = _sum_of_two_best(choice_TNE) if cfg.group_score == "top2_sum" else jnp.max(choice_TNE, axis=-1)
    kept = _best(group_TN, cfg.num_groups_per_token)
    kept_TN = jnp.any(kept[..., None] == jnp.arange(cfg.num_groups), axis=-2)
    return jnp.repeat(kept_TN, size, axis=-1)


def _best(x_TE: Array, k: int) -> Array:
    """[T, k] int32: where the k largest of each token's values are."""
    return by_rows(lambda x_TE: jax.lax.top_k(x_TE, k)[1], x_TE)


def _sum_of_two_best(x: Array) -> Array:
    """Of the last axis, a value that occurs twice counting twice; by maxima, which CPUs find faster than `top_k`."""
    best = jnp.max(x, axis=-1)
    is_best = x == best[..., None]
    next_best = jnp.max(jnp.where(is_best, -jnp.inf, x), axis=-1)
    return best + jnp.where(jnp.sum(is_best, axis=-1) > 1, best, next_best)


class Router(nnx.Module):
    """The gate: affinities in float32 whatever the model's dtype (DeepSeek-V3's published checkpoints need it)."""

    def __init__(self, cfg: ModelConfig, init: Initializer):
        self.cfg = cfg.moe
        self.gate_DE = init.weight((cfg.hidden_size, cfg.moe.num_experts), ("embed", None), "")
        if cfg.moe.selection_bias:
            self.bias = RouterBias(jnp.zeros((cfg.moe.num_experts,), jnp.float32))

    def __call__(self, x_TD: Array, keys_T: Array, layer: Array | int) -> RouterOutput:
        """Routes tokens; `keys_T` and `layer` are `fixed_experts`' and count only with `routing` hash or uniform."""
        cfg = self.cfg
        logits_TE = jnp.einsum("...D,DE->...E", x_TD.astype(jnp.float32), self.gate_DE[...], precision="highest")
        scores_TE = _scores(logits_TE, cfg)
        fixed_TK = None if cfg.routing == "learned" else fixed_experts(keys_T, layer, cfg)
        choice = route(scores_TE, self.bias[...] if cfg.selection_bias else None, cfg, fixed_TK)
        return RouterOutput(*choice, scores_TE, logits_TE)


def _scores(logits_TE: Array, cfg: MoEConfig) -> Array:
    return jax.nn.sigmoid(logits_TE) if cfg.score == "sigmoid" else jax.nn.softmax(logits_TE, axis=-1)


def estimated_scaling_factor(cfg: MoEConfig, samples: int = 16_384) -> float:
    """The `routed_scaling_factor` that gives the sum of the routed experts the size of one expert's output.

    Moonlight's rule (arXiv:2502.16982, its appendix): the mean of 1 / ‖weights‖ of a token over Gaussian logits, where
    experts' outputs are taken as independent and of equal size. 2.446 for the best 6 of 64 sigmoid scores, 2.83 for 8
    of 384. By simulation with a fixed seed, to 3 digits; `cfg.routed_scaling_factor` itself does not enter.
    """
    logits_TE = np.random.default_rng(0).normal(size=(samples, cfg.num_experts)).astype(np.float32)
    fixed_TK = None if cfg.routing == "learned" else fixed_experts(jnp.arange(samples), 0, cfg)
    plain = dataclasses.replace(cfg, routed_scaling_factor=1.0)
    choice = route(_scores(jnp.asarray(logits_TE), cfg), None, plain, fixed_TK)
    return float(jnp.mean(1 / jnp.linalg.norm(choice.weights_TK, axis=-1)))


def updated_bias(bias_LE: Array, counts_LE: Array, rate: float, zero_mean: bool = False) -> Array:
    """b ← b + γ · sign(mean load - load), per layer (DeepSeek-V3 eq. 16; arXiv:2408.15664 algorithm 1).

    `counts_LE` are assignments over the whole step: all devices, all micro-batches. With `zero_mean` the change's mean
    over experts is subtracted, so that the bias keeps its own (Moonlight, arXiv:2502.16982).
    """
    counts_LE = counts_LE.astype(jnp.float32)
    sign_LE = jnp.sign(jnp.mean(counts_LE, axis=-1, keepdims=True) - counts_LE)
    if zero_mean:
        sign_LE -= jnp.mean(sign_LE, axis=-1, keepdims=True)
    return bias_LE + rate * sign_LE
