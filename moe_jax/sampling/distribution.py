"""What a token is drawn from: temperature, truncation, and the draw itself.

B rows, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from moe_jax.config import SamplingConfig


def sample_token(key: Array, logits_BV: Array, cfg: SamplingConfig) -> tuple[Array, Array]:
    """One token per row and its log-probability under the truncated, tempered distribution; [B] int32, [B] float32."""
    return token_at(jax.random.uniform(key, (len(logits_BV), 1)), logits_BV, cfg)


def token_at(uniform_B1: Array, logits_BV: Array, cfg: SamplingConfig) -> tuple[Array, Array]:
    """`sample_token` with each row's random number given."""
    if cfg.temperature == 0:
        token_B = jnp.argmax(logits_BV, axis=-1)
        return token_B, jnp.zeros(token_B.shape)
    logprob_BV = log_probabilities(logits_BV, cfg)
    token_B = invert(uniform_B1, jnp.exp(logprob_BV))
    return token_B, jnp.take_along_axis(logprob_BV, token_B[:, None], axis=-1)[:, 0]


def log_probabilities(logits_BV: Array, cfg: SamplingConfig) -> Array:
    """log p of every token, float32; temperature 0 puts all on the best token."""
    if cfg.temperature == 0:
        best_B1 = jnp.argmax(logits_BV, axis=-1, keepdims=True)
        return jnp.where(jnp.arange(logits_BV.shape[-1]) == best_B1, 0.0, -jnp.inf)
    return jax.nn.log_softmax(truncate(logits_BV / cfg.temperature, cfg), axis=-1)


def draw(key: Array, probability_BV: Array) -> Array:
    """One token per row, [B] int32, from probabilities that need not sum to 1."""
    return invert(jax.random.uniform(key, (len(probability_BV), 1)), probability_BV)


def invert(uniform_B1: Array, probability_BV: Array) -> Array:
    """The tokens at which the cumulative distributions reach random numbers in [0, 1), [B] int32.

    One random number per row, and a token of probability 0 is never drawn.
    """
    cumulative_BV = jnp.cumsum(probability_BV, axis=-1)
    # XLA sums in a tree, whose rounding can give a token of probability 0 a slot, or lower the sum by an ulp.
    reached_BV = (cumulative_BV > uniform_B1 * cumulative_BV[:, -1:]) & (probability_BV > 0)
    best_B = jnp.argmax(probability_BV, axis=-1)
    return jnp.where(jnp.any(reached_BV, axis=-1), jnp.argmax(reached_BV, axis=-1), best_B)


def truncate(logits_BV: Array, cfg: SamplingConfig) -> Array:
    """Sets the logits to -inf that top_k, top_p and min_p leave out, in this order; the best token always stays."""
    if cfg.top_k and cfg.top_k < logits_BV.shape[-1]:
        worst_B1 = jax.lax.top_k(logits_BV, cfg.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV >= worst_B1, logits_BV, -jnp.inf)
    if cfg.top_p < 1:
        order_BV = jnp.argsort(-logits_BV, axis=-1)
        probability_BV = jax.nn.softmax(jnp.take_along_axis(logits_BV, order_BV, axis=-1), axis=-1)
        before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
        rank_BV = jnp.argsort(order_BV, axis=-1)
        keep_BV = jnp.take_along_axis(before_BV < cfg.top_p, rank_BV, axis=-1)
        logits_BV = jnp.where(keep_BV, logits_BV, -jnp.inf)
    if cfg.min_p:
        floor_B1 = jnp.max(logits_BV, axis=-1, keepdims=True) + jnp.log(cfg.min_p)
        logits_BV = jnp.where(logits_BV >= floor_B1, logits_BV, -jnp.inf)
    return logits_BV
