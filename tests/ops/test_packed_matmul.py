"""Products with packed weights against products with what the weights stand for.

T rows, D input width, F output width, E groups.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops import packed_matmul as ops
from moe_jax.ops.packed_matmul import packed_grouped_matmul, packed_matmul, unpacked
from moe_jax.ops.quantization import Quantized, dequantize, quantize

T, D, F, E, BLOCK = 19, 12, 30, 4, 8  # no size is a multiple of the block
SIZES = np.array([6, 0, 9, 1], np.int32)  # 16 of 19 rows
FORMATS = ["int8", "int4", "e4m3"]


def packed(shape, format, inputs=None):
    w = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    q = quantize(jnp.asarray(w), format, (1, BLOCK))
    values = jax.lax.bitcast_convert_type(q.values, jnp.uint8) if format == "e4m3" else q.values  # as files are loaded
    return Quantized(values, q.scales, q.format, q.block, q.columns, inputs)


def rows(count=T, dtype=np.float32):
    return np.random.default_rng(0).normal(size=(count, D)).astype(dtype)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(ops, "_CHUNK_NUMBERS", 7 * D)  # five chunks of F, the last one overlapping


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("count", [1, T])
def test_it_is_the_product_with_what_the_weight_stands_for(format, count):
    x, w = rows(count), packed((F, D), format)
    want = x.astype(np.float64) @ np.asarray(dequantize(w), np.float64).T
    np.testing.assert_allclose(jax.jit(packed_matmul)(x, w), want, rtol=1e-5, atol=1e-5)
    half = jax.jit(packed_matmul)(x.astype(jnp.bfloat16), w)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(np.float32), want, rtol=0.05, atol=0.1)


@pytest.mark.parametrize(("format", "inputs"), [("int8", "int8"), ("int4", "int8"), ("e4m3", "e4m3")])
def test_inputs_are_rounded_where_the_weight_says_so(format, inputs):
    x, w = rows(), packed((F, D), format, inputs)
    x_stands_for = np.asarray(dequantize(quantize(jnp.asarray(x), inputs, (1, BLOCK))), np.float64)
    want = x_stands_for @ np.asarray(dequantize(w), np.float64).T
    np.testing.assert_allclose(jax.jit(packed_matmul)(x, w), want, rtol=1e-5, atol=1e-5)
    assert np.abs(x_stands_for - x).max() > 1e-3


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("sizes", [SIZES, np.array([0, 3, 0, 2], np.int32)])  # tiles of several rows, or of one
def test_a_grouped_product_takes_each_group_s_matrix(format, sizes):
    x, w = rows(T if sizes is SIZES else 5), packed((E, F, D), format)
    x[sizes.sum() :] = np.nan  # rows of no group
    y = np.asarray(jax.jit(packed_grouped_matmul)(x, w, sizes))
    start = 0
    for e, size in enumerate(sizes):
        part = slice(start, start + size)
        want = x[part].astype(np.float64) @ np.asarray(dequantize(w)[e], np.float64).T
        np.testing.assert_allclose(y[part], want, rtol=1e-5, atol=1e-5)
        start += size
    assert not y[start:].any()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("count", [1, T])
def test_a_loop_around_it_keeps_no_floats_of_the_weight(format, count):
    """XLA moves out of loops what is the same each time: this must not be."""
    w, x = packed((40 * D, D), format), rows(count)

    def decode(x, w):
        def step(state):
            n, x = state
            return n + 1, packed_matmul(x, w)[:, :D] + unpacked(w, x)[:D, :D].sum() * 0 + x

        return jax.lax.while_loop(lambda state: (state[0] < 3) & (state[1][0, 0] < 1e9), step, (0, x))[1]

    text = jax.jit(decode).lower(x, w).compile().as_text()
    loops = [line for line in text.splitlines() if " while(" in line]
    assert loops and not any(f"[{40 * D},{D}]" in line and f"f32[{40 * D},{D}]" in line for line in loops)


def test_what_does_not_fit_is_named():
    w = packed((F, D), "int8")
    with pytest.raises(ValueError, match=r"\(19, 11\) and \(30, 12\)"):
        packed_matmul(rows()[:, :11], w)
    with pytest.raises(ValueError, match=r"block \(8, 8\)"):
        packed_matmul(rows(), quantize(jnp.ones((F, D)), "int8", (8, 8)))
    with pytest.raises(ValueError, match="group_sizes"):
        packed_grouped_matmul(rows(), packed((E, F, D), "int8"), SIZES[:2])
