"""Softmax attention with any number of key-value heads.

B batch, S queries, T keys, H query heads, K key-value heads, G query heads per key-value head, D key width,
E value width, R rows of queries that share a key-value head (G·S).
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array


@partial(jax.checkpoint, static_argnums=(4,))
def attention(q_BSHD: Array, k_BTKD: Array, v_BTKE: Array, mask_BST: Array, scale: float) -> Array:
    """softmax(q·k · scale) v with the softmax in float32; returns [B, S, H, E] in q's dtype.

    Serves multi-head attention (K = H), grouped-query attention (K divides H) and absorbed MLA (K = 1). `mask_BST` is
    True where a query may see a key; a query that may see none gets the mean of all values, a finite number that the
    caller masks out.

    Heads lie outside and the sum of the weights is divided out last: on a CPU, two to three times faster with
    gradients than the plain order at a few dozen tokens. The backward pass computes the scores anew: kept for all
    layers they are most of a model's memory, and writing them takes longer than computing them.
    """
    B, S, H, D = q_BSHD.shape
    K = k_BTKD.shape[2]
    q_BKRD = q_BSHD.reshape(B, S, K, H // K, D).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, D)
    k_BKTD, v_BKTE = k_BTKD.transpose(0, 2, 1, 3), v_BTKE.transpose(0, 2, 1, 3)
    score_BKRT = jnp.einsum("BKRD,BKTD->BKRT", q_BKRD, k_BKTD, preferred_element_type=jnp.float32) * scale
    penalty_BST = jnp.where(mask_BST, 0.0, -1e30)
    score_BKRT += jnp.tile(penalty_BST, (1, H // K, 1))[:, None]
    largest_BKR1 = jax.lax.stop_gradient(jnp.max(score_BKRT, axis=-1, keepdims=True))
    weight_BKRT = jnp.exp(score_BKRT - largest_BKR1)
    total_BKR1 = jnp.sum(weight_BKRT, axis=-1, keepdims=True)
    mixed_BKRE = jnp.einsum("BKRT,BKTE->BKRE", weight_BKRT.astype(v_BTKE.dtype), v_BKTE)
    mixed_BKRE = (mixed_BKRE / total_BKR1).astype(q_BSHD.dtype)
    return mixed_BKRE.reshape(B, H, S, -1).transpose(0, 2, 1, 3)
