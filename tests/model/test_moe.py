"""The sparse layer against a loop over tokens and experts.

B batch, S sequence, D model, E experts.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.config import MeshConfig, ModelConfig, MoEConfig
from moe_jax.losses.balance import sequence_balance_loss
from moe_jax.model.layers import Initializer
from moe_jax.model.moe import MoE
from moe_jax.sharding import make_mesh

B, S, D, F, E, K = 3, 6, 8, 5, 6, 2
CONFIG = MoEConfig(
    num_experts=E, num_experts_per_token=K, expert_size=F, num_shared_experts=2, routed_scaling_factor=1.5
)
X_BSD = np.random.default_rng(0).normal(size=(B, S, D)).astype(np.float32)
VALID_BS = np.arange(S) < np.array([[6], [4], [0]])
KEYS_BS = np.zeros((B, S), np.int32)


@jax.jit
def call(layer, x_BSD):
    return layer(x_BSD, VALID_BS, KEYS_BS, 0, False)


@functools.cache
def build(moe=CONFIG):
    cfg = ModelConfig(hidden_size=D, moe=moe)
    abstract = jax.eval_shape(lambda: MoE(cfg, Initializer(cfg, nnx.Rngs(0))))
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda x: jnp.asarray((0.2 if x.ndim == 1 else 0.5) * rng.normal(size=x.shape), x.dtype), abstract
    )


def swiglu(x, gate_up, down):
    gate, up = x @ gate_up[:, 0], x @ gate_up[:, 1]
    return (gate / (1 + np.exp(-gate)) * up) @ down


def loop(layer):
    """Output and counts, token by token in float64."""
    f64 = lambda v: np.asarray(v[...], np.float64)  # noqa: E731
    y_BSD, counts_BE = np.zeros((B, S, D)), np.zeros((B, E))
    for b, s in np.ndindex(B, S):
        x = X_BSD[b, s].astype(np.float64)
        scores = 1 / (1 + np.exp(-x @ f64(layer.router.gate_DE)))
        chosen = np.argsort(scores + f64(layer.router.bias))[-K:]
        for e in chosen if VALID_BS[b, s] else []:  # no expert works on padding
            weight = 1.5 * scores[e] / scores[chosen].sum()
            y_BSD[b, s] += weight * swiglu(x, f64(layer.experts.gate_up_ED2F)[e], f64(layer.experts.down_EFD)[e])
            counts_BE[b, e] += 1
        if layer.shared is not None:
            y_BSD[b, s] += swiglu(x, f64(layer.shared.gate_up_D2F), f64(layer.shared.down_FD))
    return y_BSD, counts_BE


@pytest.mark.parametrize("shared", [0, 2])
def test_equals_a_loop(shared):
    layer = build(dataclasses.replace(CONFIG, num_shared_experts=shared))
    y_BSD, stats = call(layer, X_BSD)
    expected_BSD, counts_BE = loop(layer)
    np.testing.assert_allclose(y_BSD, expected_BSD, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(stats.counts_BE, counts_BE)
    assert counts_BE.sum() == K * VALID_BS.sum()


def test_shared_experts_are_one_wide_feed_forward():
    assert build().shared.gate_up_D2F.shape == (D, 2, 2 * F)
    assert build(dataclasses.replace(CONFIG, num_shared_experts=0)).shared is None


def test_capacity_applies_where_it_is_asked_for():
    layer = build(dataclasses.replace(CONFIG, num_shared_experts=0, capacity_factor=0.5))
    run = jax.jit(lambda layer, drop: layer(X_BSD, VALID_BS, KEYS_BS, 0, drop), static_argnums=1)
    whole, free = run(layer, False)
    y_BSD, stats = run(layer, True)
    assert np.sum(free.dropped_B) == 0
    # Six experts keep two of 20 assignments each: ⌈0.5 · 20 / 6⌉.
    assert 20 - 6 * 2 <= np.sum(stats.dropped_B) < 20 and stats.dropped_B[2] == 0
    np.testing.assert_array_equal(stats.counts_BE, free.counts_BE)  # the router's own load is not changed
    same_BS = np.all(np.isclose(y_BSD, whole, atol=1e-6), axis=-1)
    assert not np.all(same_BS[VALID_BS]) and np.any(np.abs(y_BSD) > 0)


@pytest.fixture(scope="module")
def gradients():
    """Gradients of Σ y² and of the balance loss for each parameter, by name."""
    graph, params, rest = nnx.split(build(), nnx.Param, ...)

    @jax.jit
    def both(params):
        def losses(params):
            y_BSD, stats = nnx.merge(graph, params, rest)(X_BSD, VALID_BS, KEYS_BS, 0, False)
            balance = sequence_balance_loss(stats.unbiased_counts_BE, stats.affinity_BE, stats.tokens_B, K)
            return jnp.sum(y_BSD**2), balance.sum / balance.count

        _, vjp = jax.vjp(losses, params)
        return vjp((1.0, 0.0))[0], vjp((0.0, 1.0))[0]

    of_output, of_balance = (nnx.to_flat_state(state) for state in both(params))
    return {
        ".".join(path): (np.asarray(a[...]), np.asarray(b[...]))
        for (path, a), (_, b) in zip(of_output, of_balance, strict=True)
    }


def test_output_gradient_reaches_every_parameter(gradients):
    for name, (gradient, _) in gradients.items():
        assert np.all(np.isfinite(gradient)) and np.any(gradient), name


def test_balance_gradient_reaches_the_gate_alone(gradients):
    found = {name: gradient for name, (_, gradient) in gradients.items()}
    assert np.abs(found["router.gate_DE"]).max() > 1e-4
    assert {name for name, gradient in found.items() if np.any(gradient)} == {"router.gate_DE"}


def test_balance_loss_is_that_of_the_valid_tokens():
    layer = build()
    _, stats = call(layer, X_BSD)
    balance = sequence_balance_loss(stats.unbiased_counts_BE, stats.affinity_BE, stats.tokens_B, K)
    gate = np.asarray(layer.router.gate_DE[...], np.float64)
    total = 0.0
    for b in range(2):
        scores = 1 / (1 + np.exp(-X_BSD[b, VALID_BS[b]].astype(np.float64) @ gate))
        f, p = np.zeros(E), (scores / scores.sum(axis=1, keepdims=True)).mean(axis=0)
        for row in scores:
            f[np.argsort(row)[-K:]] += E / (K * len(scores))
        total += f @ p
    assert balance.count == 2
    np.testing.assert_allclose(balance.sum, total, rtol=1e-5)


def test_bfloat16_is_near_float32():
    layer = build()
    exact, _ = call(layer, X_BSD)
    y_BSD, _ = call(layer, jnp.asarray(X_BSD, jnp.bfloat16))
    assert y_BSD.dtype == jnp.bfloat16
    error = np.abs(np.asarray(y_BSD, np.float32) - exact)
    # A rounded input may route a token elsewhere; most stay.
    assert np.median(error) < 0.02 * np.std(exact)


def test_every_device_routes_its_own_tokens():
    """XLA would gather all tokens' scores for `top_k`."""
    cfg = ModelConfig(hidden_size=D, moe=dataclasses.replace(CONFIG, num_groups=3, num_groups_per_token=2))
    mesh = make_mesh(MeshConfig(data=8))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    x_BSD = jax.ShapeDtypeStruct((8, S, D), jnp.float32, sharding=rows)
    layer = build(cfg.moe)

    def loss(x_BSD):
        y_BSD, stats = layer(x_BSD, np.ones((8, S), bool), np.zeros((8, S), np.int32), 0, False)
        return jnp.sum(y_BSD**2) + jnp.sum(stats.unbiased_counts_BE @ stats.affinity_BE.T)

    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(loss)).lower(x_BSD).compile().as_text()
    assert f"f32[{S},{E}]" in text and f"[{8 * S},{E}]" not in text
