"""A single row's products: the same numbers as any row's, in every place that decoding takes them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.model.layers import product
from moe_jax.ops.row_product import row_product


@pytest.mark.parametrize("shape", [(6, 5), (7, 5), (1, 3)])  # even, and odd: not divided
def test_row_product_is_the_product_of_float64(shape):
    rng = np.random.default_rng(0)
    x_D, w_DF = rng.standard_normal(shape[0]), rng.standard_normal(shape)
    y_F = row_product(jnp.asarray(x_D, jnp.float32), jnp.asarray(w_DF, jnp.float32), jnp.float32)
    np.testing.assert_allclose(y_F, x_D @ w_DF, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("contracted", [1, 2])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_one_row_and_many_agree(contracted, dtype):
    inputs, outputs = ((8,), (2, 3)) if contracted == 1 else ((2, 4), (6,))
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (2, 1, *inputs)).astype(dtype)
    w = jax.random.normal(keys[1], (*inputs, *outputs))
    many = product(x, w, contracted)
    one = jnp.concatenate([product(x[b : b + 1], w, contracted) for b in range(2)])
    assert one.dtype == many.dtype == dtype
    assert one.shape == (2, 1, *outputs)
    tolerance = 1e-6 if dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(one.astype(np.float32), many.astype(np.float32), rtol=tolerance, atol=tolerance)
    assert product(x[:1], w, contracted, dtype=jnp.float32).dtype == jnp.float32


@pytest.mark.parametrize("result", [None, jnp.float32])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("inputs", "outputs"), [((4,), (2, 3)), ((12,), (5,)), ((3, 4), (5,)), ((2, 3), (2, 7)), ((6,), (6,))]
)
def test_gradients_are_those_of_the_plain_product(inputs, outputs, dtype, result):
    """Whichever factor is narrower; several axes of rows."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 5, *inputs)), dtype)
    w = jnp.asarray(rng.normal(size=(*inputs, *outputs)), dtype)
    dims = tuple(range(2, x.ndim)), tuple(range(len(inputs)))

    def plain(x, w):
        return jax.lax.dot_general(x, w, (dims, ((), ())), preferred_element_type=result or dtype)

    y, pull = jax.vjp(lambda x, w: product(x, w, len(inputs), result), x, w)
    expected, pull_plain = jax.vjp(plain, x, w)
    assert y.dtype == expected.dtype
    dy = jnp.asarray(rng.normal(size=y.shape), y.dtype)
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    for actual, wanted in zip((y, *pull(dy)), (expected, *pull_plain(dy)), strict=True):
        assert actual.dtype == wanted.dtype and actual.shape == wanted.shape
        actual, wanted = (np.asarray(a, np.float32) for a in (actual, wanted))
        np.testing.assert_allclose(actual, wanted, rtol=tolerance, atol=tolerance * np.abs(wanted).max())


def test_gradients_pass_through_a_single_row():
    x, w = jnp.arange(1.0, 5.0)[None, None], jnp.ones((4, 3))
    dx, dw = jax.grad(lambda x, w: jnp.sum(product(x, w)), argnums=(0, 1))(x, w)
    np.testing.assert_allclose(dx, jnp.full((1, 1, 4), 3.0))
    np.testing.assert_allclose(dw, jnp.broadcast_to(x[0, 0][:, None], (4, 3)))
