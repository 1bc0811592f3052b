"""Norm, SwiGLU and rotary embedding against numpy in float64."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.config import ModelConfig, RoPEConfig
from moe_jax.model.layers import (
    Initializer,
    RMSNorm,
    SwiGLU,
    apply_rope,
    gated,
    rope_frequencies,
    rotation,
    yarn_mscale,
)


def test_rmsnorm_matches_float64():
    rng = np.random.default_rng(0)
    x, weight, eps = rng.normal(size=(3, 5, 8)) * 1e-2, rng.normal(size=8), 1e-3
    norm = RMSNorm(8, eps)
    norm.weight[...] = jnp.asarray(weight, jnp.float32)
    expected = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * weight
    np.testing.assert_allclose(norm(jnp.asarray(x, jnp.float32)), expected, rtol=1e-5, atol=1e-6)


def test_rmsnorm_computes_in_float32_and_keeps_the_dtype():
    x = jnp.full((1, 4096), 300.0, jnp.bfloat16)  # the mean of squares in bfloat16 would stall long before 4096 terms
    y = RMSNorm(4096, 1e-6)(x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), 1.0)


def test_swiglu_matches_float64():
    ffn = SwiGLU(6, 10, Initializer(ModelConfig(initializer_range=0.5), nnx.Rngs(0)))
    x = np.random.default_rng(0).normal(size=(2, 3, 6))
    gate_up, down = np.asarray(ffn.gate_up_D2F[...], np.float64), np.asarray(ffn.down_FD[...], np.float64)
    gate, up = x @ gate_up[:, 0], x @ gate_up[:, 1]
    expected = (gate / (1 + np.exp(-gate)) * up) @ down
    np.testing.assert_allclose(ffn(jnp.asarray(x, jnp.float32)), expected, rtol=1e-4, atol=1e-5)


@functools.partial(jax.jit, static_argnames="cfg")
def rotate(x_SH, positions_S, cfg):
    """One head's vectors [S, d], rotated at their positions."""
    rot = rotation(positions_S[None], cfg, x_SH.shape[-1])
    return apply_rope(x_SH.astype(jnp.float32)[None, :, None], rot, cfg.layout)[0, :, 0]


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_rope_is_the_rotation_of_complex_numbers(layout):
    d, cfg = 8, RoPEConfig(theta=100.0, layout=layout)
    x, positions = np.random.default_rng(0).normal(size=(5, d)), np.array([0, 1, 2, 7, 100])
    angles = positions[:, None] * 100.0 ** (-2 * np.arange(d // 2) / d)
    pairs = (x[:, : d // 2], x[:, d // 2 :]) if layout == "half" else (x[:, ::2], x[:, 1::2])
    turned = (pairs[0] + 1j * pairs[1]) * np.exp(1j * angles)
    if layout == "half":
        expected = np.concatenate([turned.real, turned.imag], axis=-1)
    else:
        expected = np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)
    np.testing.assert_allclose(rotate(x, positions, cfg), expected, atol=2e-5)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_rope_products_depend_on_relative_position_only(layout):
    cfg = RoPEConfig(theta=100.0, layout=layout)
    q, k = np.random.default_rng(1).normal(size=(2, 8))

    def product(query_at, key_at):
        q_rotated, k_rotated = np.asarray(rotate(np.stack([q, k]), np.array([query_at, key_at]), cfg))
        return q_rotated @ k_rotated

    np.testing.assert_allclose([product(9, 4), product(105, 100)], product(5, 0), rtol=1e-4)
    assert abs(product(6, 0) - product(5, 0)) > 1e-2


def test_interleaved_is_half_after_a_permutation():
    x, positions = np.random.default_rng(2).normal(size=(5, 8)), np.array([0, 3, 5, 11, 2])
    apart = np.concatenate([x[:, ::2], x[:, 1::2]], axis=-1)
    half = rotate(apart, positions, RoPEConfig(theta=100.0, layout="half"))
    interleaved = np.asarray(rotate(x, positions, RoPEConfig(theta=100.0, layout="interleaved")))
    np.testing.assert_allclose(np.concatenate([interleaved[:, ::2], interleaved[:, 1::2]], axis=-1), half, atol=1e-6)


def test_yarn_frequencies_of_deepseek_v3():
    cfg = RoPEConfig(scaling="yarn", factor=40.0, original_max_position=4096)
    actual = np.asarray(rope_frequencies(cfg, 64), np.float64)
    expected = []
    for pair in range(32):
        plain = 10_000 ** (-pair / 32)
        # 32 turns in 4096 positions lie at pair 10.47, 1 turn at 22.51: below 10 untouched, from 23 slowed 40 times.
        slowed = 0.0 if pair <= 10 else 1.0 if pair >= 23 else (pair - 10) / 13
        expected.append(slowed * plain / 40 + (1 - slowed) * plain)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_yarn_frequencies_when_the_ramp_has_no_width():
    cfg = RoPEConfig(scaling="yarn", factor=4.0, original_max_position=4, theta=10_000.0)
    frequencies = np.asarray(rope_frequencies(cfg, 4))
    assert np.all(np.isfinite(frequencies))
    np.testing.assert_allclose(frequencies, [1.0, 0.01 / 4], rtol=1e-5)


def test_llama3_frequencies():
    """The rule as Llama 3.1 publishes it, by wavelengths."""
    factor, low, high, original = 8.0, 1.0, 4.0, 8192
    cfg = RoPEConfig(
        theta=500_000.0,
        scaling="llama3",
        factor=factor,
        original_max_position=original,
        low_freq_factor=low,
        high_freq_factor=high,
    )
    expected, branches = [], set()
    for pair in range(64):
        frequency = 500_000.0 ** (-2 * pair / 128)
        wavelength = 2 * math.pi / frequency
        if wavelength < original / high:
            branches.add("kept")
        elif wavelength > original / low:
            branches.add("slowed")
            frequency /= factor
        else:
            branches.add("between")
            smooth = (original / wavelength - low) / (high - low)
            frequency = (1 - smooth) * frequency / factor + smooth * frequency
        expected.append(frequency)
    assert branches == {"kept", "slowed", "between"}
    np.testing.assert_allclose(rope_frequencies(cfg, 128), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("mscale", "mscale_all_dim", "length"),
    [(1.0, 1.0, 1.0), (0.707, 0.707, 1.0), (1.0, 0.0, 1.368888), (1.0, 0.707, 1.368888 / 1.260804)],
)
def test_yarn_scales_the_rotation_by_the_ratio_of_mscales(mscale, mscale_all_dim, length):
    cfg = RoPEConfig(scaling="yarn", factor=40.0, mscale=mscale, mscale_all_dim=mscale_all_dim)
    rot = rotation(jnp.arange(6)[None], cfg, 16)
    np.testing.assert_allclose(np.hypot(rot.cos_BSR, rot.sin_BSR), length, rtol=1e-5)


@pytest.mark.parametrize(
    ("factor", "mscale", "m"), [(40, 1.0, 1.368888), (40, 0.707, 1.260804), (32, 1.0, 1.346574), (64, 1.0, 1.415888)]
)
def test_yarn_mscale_values(factor, mscale, m):
    assert yarn_mscale(factor, mscale) == pytest.approx(m, abs=1e-6)


def test_yarn_mscale_is_1_without_extension():
    assert yarn_mscale(1.0, 1.0) == yarn_mscale(40.0, 0.0) == 1.0


def test_initializer_has_the_configured_standard_deviation():
    weight = Initializer(ModelConfig(initializer_range=0.03), nnx.Rngs(0)).weight((64, 64), ("embed", "mlp"), "io")
    assert float(jnp.std(weight[...])) == pytest.approx(0.03, rel=0.05)
    assert weight[...].dtype == jnp.float32
    assert jax.tree.leaves(weight)[0].shape == (64, 64)


def test_the_gradient_of_the_gated_product_is_that_of_its_formula():
    gate_up, dy = (
        jax.random.normal(jax.random.key(seed), shape) for seed, shape in enumerate([(3, 5, 2, 7), (3, 5, 7)])
    )
    plain = lambda x: jax.nn.silu(x[..., 0, :]) * x[..., 1, :]  # noqa: E731
    (y, pull), (expected, expected_pull) = jax.vjp(gated, gate_up), jax.vjp(plain, gate_up)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_allclose(pull(dy)[0], expected_pull(dy)[0], rtol=1e-5, atol=1e-6)
