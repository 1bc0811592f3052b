"""Products in 8 bits against float64 products of the values that the quantised operands stand for.

Shapes: T tokens, D input width, F output width, E groups.
"""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moe_jax.ops.grouped_matmul import grouped_matmul
from moe_jax.ops.quantization import LARGEST, dequantize, quantize
from moe_jax.ops.quantized_matmul import (
    Recipe,
    low_precision_grouped_matmul,
    low_precision_matmul,
    quantized_matmul,
)

T, D, F, E, BLOCK = 19, 10, 7, 4, 4  # no size is a multiple of the block
SIZES = np.array([6, 0, 9, 1], np.int32)  # 16 of 19 rows
NARROW = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
RECIPES = [Recipe("e4m3", BLOCK), Recipe("int8", BLOCK, True), Recipe("e5m2", BLOCK)]


def example(dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = (T, D), (E, D, F), (T, F)
    return [(rng.normal(size=shape) * np.exp(rng.normal(size=shape))).astype(dtype) for shape in shapes]


def rounded(x, recipe, rows, columns):
    """What the recipe makes of x, in NumPy: float32 values and scales, multiplied in float32."""
    x, result = np.asarray(x, np.float32), np.zeros(x.shape)
    for r in range(0, x.shape[0], rows):
        for c in range(0, x.shape[1], columns):
            place = slice(r, r + rows), slice(c, c + columns)
            scale = np.abs(x[place]).max() / np.float32(LARGEST[recipe.format])
            if recipe.power_of_two:
                scale = np.float32(2.0 ** np.ceil(np.log2(np.float64(scale))))
            scaled = x[place] / scale
            narrow = NARROW.get(recipe.format)
            result[place] = (scaled.astype(narrow).astype(np.float32) if narrow else np.round(scaled)) * scale
    return result


def reference(x, w, dy, recipe):
    """y, dx and dw as the recipe defines them."""
    b = recipe.block
    x_tiles, w_blocks, dy_tiles = rounded(x, recipe, 1, b), rounded(w, recipe, b, b), rounded(dy, recipe, 1, b)
    x_columns = rounded(x_tiles, recipe, b, 1)
    return x_tiles @ w_blocks, dy_tiles @ w_blocks.T, x_columns.T @ rounded(dy, recipe, b, 1)


@functools.cache
def form(recipe, grouped=False, implementation=None):
    """(x, w, dy[, sizes]) → y, dx, dw."""

    def f(x, w, dy, *sizes):
        op = low_precision_grouped_matmul if grouped else low_precision_matmul
        y, pullback = jax.vjp(lambda x, w: op(x, w, *sizes, recipe, implementation=implementation), x, w)
        return y, *pullback(dy)

    return jax.jit(f)


@pytest.mark.parametrize(
    ("recipe", "implementation"), [(RECIPES[0], None), (RECIPES[1], None), (RECIPES[2], None), (RECIPES[1], "native")]
)
def test_a_linear_layer_is_the_recipe(recipe, implementation):
    x, w, dy = example()
    for got, want in zip(form(recipe, False, implementation)(x, w[0], dy), reference(x, w[0], dy, recipe), strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize(("recipe", "implementation"), [(RECIPES[0], "native"), (RECIPES[1], None)])
def test_a_grouped_product_is_the_recipe_for_each_group(recipe, implementation):
    x, w, dy = example()
    x[SIZES.sum() :] = np.nan  # rows of no group
    y, dx, dw = form(recipe, True, implementation)(x, w, dy, SIZES)
    start = 0
    for e, size in enumerate(SIZES):
        rows = slice(start, start + size)
        want = reference(x[rows], w[e], dy[rows], recipe) if size else (y[rows], dx[rows], np.zeros((D, F)))
        for got, value in zip((y[rows], dx[rows], dw[e]), want, strict=True):
            np.testing.assert_allclose(got, value, rtol=1e-5, atol=1e-5 * max(np.abs(value).max(initial=0), 1e-3))
        start += size
    assert not np.any(y[start:]) and not np.any(dx[start:])


def test_it_is_close_to_the_product_it_stands_for():
    x, w, dy = example()
    x[16:] = 0
    exact = jax.vjp(lambda x, w: grouped_matmul(x, w, jnp.asarray(SIZES)), x, w)
    exact = exact[0], *exact[1](dy)
    errors = []
    for recipe, implementation in ((RECIPES[1], None), (RECIPES[0], "native"), (RECIPES[2], None)):
        got = form(recipe, True, implementation)(x, w, dy, SIZES)
        errors.append([np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(got, exact, strict=True)])
    assert np.all(np.array(errors) < [[0.02], [0.06], [0.12]])
    assert np.all(np.diff(errors, axis=0) > 0)


def test_bfloat16_stays_bfloat16():
    x, w, dy = (jnp.asarray(a, jnp.bfloat16) for a in example())
    exact = form(RECIPES[0])(*(a.astype(jnp.float32) for a in (x, w[0], dy)))
    for got, want in zip(form(RECIPES[0])(x, w[0], dy), exact, strict=True):
        assert got.dtype == jnp.bfloat16
        np.testing.assert_array_equal(got, want.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("formats", "blocks"),
    [
        (("int8", "int4"), ((None, None), (None, 1))),
        (("e4m3", "int8"), ((1, 4), (4, 4))),
        (("e4m3", "e5m2"), ((1, None), (None, None))),
    ],
)
def test_formats_and_blocks_mix(formats, blocks):
    x, w, _ = example()
    a, b = (quantize(jnp.asarray(y), f, block) for y, f, block in zip((x, w[0]), formats, blocks, strict=True))
    want = np.asarray(dequantize(a), np.float64) @ np.asarray(dequantize(b), np.float64)
    for implementation in (None, "native", "emulated"):
        got = quantized_matmul(a, b, implementation=implementation)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


def test_native_products_are_of_8_bit_numbers():
    for recipe, names in ((RECIPES[0], "f8E4M3FN"), (RECIPES[1], "i8")):
        x, w, dy = example()
        text = form(recipe, False, "native").lower(x, w[0], dy).as_text()
        dots = [line for line in text.splitlines() if "dot_general" in line]
        assert len(dots) == 3 and all(line.count(f"x{names}>") == 2 for line in dots)


def test_a_broken_number_reaches_the_result():
    x, w, dy = example()
    x[3, 2] = np.inf
    y, dx, dw = form(RECIPES[0])(x, w[0], dy)
    np.testing.assert_array_equal(np.isnan(y), np.broadcast_to(np.arange(T)[:, None] == 3, (T, F)))
    assert np.all(np.isfinite(dx)) and np.any(np.isnan(dw))


def test_eight_devices_give_the_numbers_of_one():
    rng = np.random.default_rng(4)
    x, w, dy = (rng.normal(size=shape).astype(np.float32) for shape in ((16, D), (D, F), (16, F)))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows, everywhere = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in (("data",), ()))
    spread = [jax.device_put(a, s) for a, s in zip((x, w, dy), (rows, everywhere, rows), strict=True)]
    for one, many in zip(form(RECIPES[0])(x, w, dy), form(RECIPES[0])(*spread), strict=True):
        np.testing.assert_allclose(one, many, rtol=1e-6, atol=1e-6)


def test_what_does_not_fit_is_named():
    x, w, _ = (jnp.asarray(a) for a in example())
    a, b = quantize(x, "int8", (1, 4)), quantize(w[0], "int8", (5, 5))
    with pytest.raises(ValueError, match="blocks of 4 and 5"):
        quantized_matmul(a, b)
    with pytest.raises(ValueError, match=r"\(19, 10\) and \(19, 10\)"):
        quantized_matmul(a, a)
    with pytest.raises(ValueError, match="implementation = 'fast'"):
        quantized_matmul(a, quantize(w[0], "int8", (4, 4)), implementation="fast")
    with pytest.raises(ValueError, match="low_precision_matmul"):
        low_precision_matmul(x, w[0].T, RECIPES[0])
    with pytest.raises(ValueError, match="group_sizes"):
        low_precision_grouped_matmul(x, w, jnp.zeros(3, jnp.int32), RECIPES[0])
