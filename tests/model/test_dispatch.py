"""Dispatch against a plain loop over tokens and experts.

T tokens, D model, K experts per token, E experts.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.model.dispatch import dispatch

T, D, K, E = 12, 5, 2, 6
RNG = np.random.default_rng(0)
X_TD = RNG.normal(size=(T, D)).astype(np.float32)
W_EDD = RNG.normal(size=(E, D, D)).astype(np.float32)
WEIGHTS_TK = RNG.normal(size=(T, K)).astype(np.float32)
ROUTINGS = {
    "random": np.stack([RNG.permutation(E)[:K] for _ in range(T)]),
    "two experts empty": np.stack([RNG.permutation([0, 2, 3, 5])[:K] for _ in range(T)]),
    "all to the same two": np.tile([4, 1], (T, 1)),
    "all slots to one": np.full((T, K), 3),
}


def experts(w_EDD):
    """tanh(row · w of the row's expert), with the expert found from the group sizes."""

    def apply(rows_RD, group_sizes_E):
        expert_R = jnp.searchsorted(jnp.cumsum(group_sizes_E), jnp.arange(rows_RD.shape[0]), side="right")
        member_RE = jax.nn.one_hot(expert_R, E)
        return jnp.tanh(jnp.einsum("RD,EDF,RE->RF", rows_RD, w_EDD, member_RE, precision="highest"))

    return apply


@jax.jit
def output_and_gradients(x_TD, w_EDD, weights_TK, experts_TK, cotangent_TD):
    def combined(x_TD, w_EDD, weights_TK):
        y_TKD = dispatch(x_TD, experts_TK, E, experts(w_EDD))
        return jnp.einsum("TKD,TK->TD", y_TKD, weights_TK)

    y_TD, vjp = jax.vjp(combined, x_TD, w_EDD, weights_TK)
    return y_TD, vjp(cotangent_TD)


def loop(x_TD, w_EDD, weights_TK, experts_TK, cotangent_TD):
    """Output and gradients by hand in float64: y = Σ_k g tanh(x w), tanh' = 1 - tanh²."""
    x_TD, w_EDD, weights_TK = (a.astype(np.float64) for a in (x_TD, w_EDD, weights_TK))
    y, dx, dw, dg = np.zeros((T, D)), np.zeros((T, D)), np.zeros((E, D, D)), np.zeros((T, K))
    for t in range(T):
        for k, e in enumerate(experts_TK[t]):
            h = np.tanh(x_TD[t] @ w_EDD[e])
            y[t] += weights_TK[t, k] * h
            dg[t, k] = h @ cotangent_TD[t]
            dz = weights_TK[t, k] * cotangent_TD[t] * (1 - h**2)
            dx[t] += w_EDD[e] @ dz
            dw[e] += np.outer(x_TD[t], dz)
    return y, (dx, dw, dg)


@pytest.mark.parametrize("experts_TK", ROUTINGS.values(), ids=ROUTINGS.keys())
def test_equals_a_loop_over_experts_gradients_included(experts_TK):
    cotangent_TD = np.random.default_rng(1).normal(size=(T, D)).astype(np.float32)
    y, gradients = output_and_gradients(X_TD, W_EDD, WEIGHTS_TK, experts_TK, cotangent_TD)
    expected, expected_gradients = loop(X_TD, W_EDD, WEIGHTS_TK, experts_TK, cotangent_TD)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    for actual, wanted, name in zip(gradients, expected_gradients, ("x", "w", "weights"), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-5, err_msg=name)


def test_rows_are_sorted_and_complete():
    """The experts see each token's row once per choice, grouped as the sizes say."""
    seen = {}

    def apply(rows_RD, group_sizes_E):
        seen.update(rows=np.asarray(rows_RD), sizes=np.asarray(group_sizes_E))
        return rows_RD

    experts_TK = ROUTINGS["two experts empty"]
    y_TKD = dispatch(jnp.asarray(X_TD), jnp.asarray(experts_TK), E, apply)
    np.testing.assert_array_equal(seen["sizes"], np.bincount(experts_TK.ravel(), minlength=E))
    start = 0
    for e, size in enumerate(seen["sizes"]):
        tokens = np.nonzero(experts_TK == e)[0]
        np.testing.assert_array_equal(seen["rows"][start : start + size], X_TD[tokens])
        start += size
    np.testing.assert_array_equal(y_TKD, np.repeat(X_TD[:, None], K, axis=1))


def primitives(jaxpr):
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for value in equation.params.values():
            for inner in jax.tree.leaves(value, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from primitives(getattr(inner, "jaxpr", inner))


def test_gradient_gathers_and_never_scatters():
    def loss(x_TD):
        return jnp.sum(dispatch(x_TD, ROUTINGS["random"], E, lambda rows, sizes: rows * rows))

    names = set(primitives(jax.make_jaxpr(jax.grad(loss))(X_TD).jaxpr))
    assert "gather" in names and not any(name.startswith("scatter") for name in names)
    compiled = jax.jit(jax.grad(loss)).lower(X_TD).compile().as_text()
    assert "scatter(" not in compiled
