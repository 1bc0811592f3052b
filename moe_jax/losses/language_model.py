"""Language modelling: next-token targets, cross-entropy, and multi-token prediction (DeepSeek-V3 §2.2).

Shapes: B batch, S sequence, D model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from moe_jax.losses import SumCount
from moe_jax.ops.token_logprobs import token_logprobs


def next_token_targets(
    tokens_BS: Array, segment_ids_BS: Array, loss_mask_BS: Array | None = None, offset: int = 1
) -> tuple[Array, Array]:
    """What each position predicts, and with which weight.

    Position i predicts token i + offset if that lies in the same document; no target crosses a document's boundary. The
    MTP module of depth k, whose position i has seen the tokens up to i + k, takes `offset=k + 1` (V3 eq. 23-24).

    Args:
        tokens_BS: integers.
        segment_ids_BS: which document of its row each token belongs to, from 1; 0 is padding. A document is contiguous.
        loss_mask_BS: weight of each token as a *target* (0: may be read, is not predicted); None weighs all tokens 1.
        offset: how far ahead the target lies, at least 1.

    Returns:
        targets_BS, integers, and weights_BS, float32; where the weight is 0 the target has no meaning.
    """
    if offset < 1:
        raise ValueError(f"offset = {offset}: must be at least 1")
    targets_BS = _shift(tokens_BS, offset)
    same_BS = (segment_ids_BS == _shift(segment_ids_BS, offset)) & (segment_ids_BS != 0)
    weights_BS = same_BS.astype(jnp.float32)
    if loss_mask_BS is not None:
        weights_BS *= _shift(loss_mask_BS.astype(jnp.float32), offset)
    return targets_BS, weights_BS


def _shift(x_BS: Array, offset: int) -> Array:
    """x[i + offset] at i, zeros at the end."""
    return jnp.pad(x_BS[:, offset:], ((0, 0), (0, min(offset, x_BS.shape[1]))))


def cross_entropy(hidden_BSD: Array, head_DV: Array, targets_BS: Array, weights_BS: Array, **options: Any) -> SumCount:
    """Weighted negative log-likelihood of the targets, nats.

    Returns the sum over positions and the sum of the weights. Micro-batches and shards combine by adding both.
    `options` are those of `token_logprobs`: banned ids, chunks, shards, implementation.
    """
    logprobs_BS = token_logprobs(hidden_BSD, head_DV, targets_BS, **options).logprobs
    # Selected, not multiplied away: a position without weight may have a banned target, whose logprob is -inf.
    nll_BS = jnp.where(weights_BS > 0, -logprobs_BS, 0)
    return SumCount(jnp.sum(weights_BS * nll_BS), jnp.sum(weights_BS))


def mtp_loss(depths: Sequence[SumCount], loss_coef: float | Array) -> Array:
    """λ/D · Σ_k L_k (V3 eq. 25): the mean over the D modules of their mean cross-entropies, times λ.

    The paper divides each L_k by the sequence length; here it is a mean over the targets that exist, which padding and
    packing leave alone. Give the whole batch's counts with a micro-batch's sums, and the micro-batches' losses add up.
    """
    if not depths:
        raise ValueError("mtp_loss needs the cross-entropy of at least one module")
    return loss_coef * jnp.mean(jnp.stack([depth.mean() for depth in depths]))
