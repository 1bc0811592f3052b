"""Tokens to the rows of their experts and back.

T tokens, D model, K experts per token, E experts, R = T·K rows, one per assignment, sorted by expert.

One signature: `dispatch(x_TD, experts_TK, num_experts, apply) → y_TKD`, where `apply(rows_RD, group_sizes_E)` is the
experts' work on rows sorted by expert. The strategy here is local: sort, work, un-sort, no token dropped.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array


def dispatch(x_TD: Array, experts_TK: Array, num_experts: int, apply: Callable[[Array, Array], Array]) -> Array:
    """Runs each token through its experts; returns [T, K, D], the K experts' outputs for each token."""
    T, K = experts_TK.shape
    flat_R = experts_TK.reshape(-1)
    order_R = jnp.argsort(flat_R, stable=True)
    inverse_R = jnp.argsort(order_R)
    group_sizes_E = jnp.sum(flat_R[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
    rows_RD = _gather_tokens(x_TD, order_R, inverse_R, K)
    return _permute(apply(rows_RD, group_sizes_E), inverse_R, order_R).reshape(T, K, -1)


@jax.custom_vjp
def _permute(rows_RD: Array, order_R: Array, inverse_R: Array) -> Array:
    """rows[order]; its gradient is the inverse gather, where autodiff would scatter."""
    return rows_RD[order_R]


def _permute_forward(rows_RD: Array, order_R: Array, inverse_R: Array) -> tuple[Array, Array]:
    return rows_RD[order_R], inverse_R


def _permute_backward(inverse_R: Array, gradient_RD: Array) -> tuple[Array, None, None]:
    return gradient_RD[inverse_R], None, None


_permute.defvjp(_permute_forward, _permute_backward)


def _gather_tokens(x_TD: Array, order_R: Array, inverse_R: Array, K: int) -> Array:
    """The token of each sorted row; its gradient gathers each token's K rows and adds them."""

    @jax.custom_vjp
    def gather(x_TD: Array, order_R: Array, inverse_R: Array) -> Array:
        return x_TD[order_R // K]

    def forward(x_TD: Array, order_R: Array, inverse_R: Array) -> tuple[Array, Array]:
        return x_TD[order_R // K], inverse_R

    def backward(inverse_R: Array, gradient_RD: Array) -> tuple[Array, None, None]:
        return jnp.sum(gradient_RD[inverse_R].reshape(-1, K, gradient_RD.shape[-1]), axis=1), None, None

    gather.defvjp(forward, backward)
    return gather(x_TD, order_R, inverse_R)
