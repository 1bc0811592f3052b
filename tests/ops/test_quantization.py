"""Quantised arrays: rounding against ml_dtypes and PyTorch, scales, edges, broken numbers, packing."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moe_jax.interop import fp8
from moe_jax.ops.quantization import LARGEST, dequantize, quantize

FORMATS = ["int8", "int4", "e4m3", "e5m2"]
NARROW = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
BLOCKS = [(None, None), (None, 1), (1, 4), (4, 4)]
SHAPE = (2, 6, 10)  # not multiples of 4
FLOATS = hnp.arrays(np.float32, SHAPE, elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=False))


@functools.cache
def rounds(format, block, power_of_two=False):
    """x → its quantised form and what that stands for, compiled."""

    def f(x):
        q = quantize(x, format, block, power_of_two=power_of_two)
        return q, dequantize(q)

    return jax.jit(f)


def reference(x, format, block, power_of_two=False):
    """Values and scales, block by block in NumPy."""
    values, stands_for = np.zeros(x.shape, np.float32), np.zeros(x.shape, np.float32)
    rows, columns = (size if b is None else b for b, size in zip(block, x.shape[1:], strict=True))
    for e in range(x.shape[0]):
        for r in range(0, x.shape[1], rows):
            for c in range(0, x.shape[2], columns):
                place = e, slice(r, r + rows), slice(c, c + columns)
                scale = np.maximum(np.abs(x[place]).max() / np.float32(LARGEST[format]), np.finfo(np.float32).tiny)
                if power_of_two:
                    scale = np.float32(2.0 ** np.ceil(np.log2(np.float64(scale))))
                scaled = x[place] / scale
                rounded = scaled.astype(NARROW[format]) if format in NARROW else np.round(scaled)
                values[place] = rounded.astype(np.float32)
                stands_for[place] = values[place] * scale
    return values, stands_for


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=12, deadline=None)
@given(x=FLOATS, block=st.sampled_from(BLOCKS), power_of_two=st.booleans())
def test_values_and_scales_are_those_of_the_loop(format, x, block, power_of_two):
    q, stands_for = rounds(format, block, power_of_two)(x)
    values, expected = reference(x, format, block, power_of_two)
    np.testing.assert_array_equal(np.asarray(q.numbers(), np.float32), values)
    np.testing.assert_array_equal(stands_for, expected)


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=12, deadline=None)
@given(x=FLOATS)
def test_the_error_is_half_a_step_and_quantising_again_changes_nothing(format, x):
    form = rounds(format, (1, None))
    _, once = form(x)
    relative, step = {
        "int8": (0, 1 / 127),
        "int4": (0, 1 / 7),
        "e4m3": (2**-3, 2**-9 / 448),
        "e5m2": (2**-2, 2**-16 / 57344),
    }[format]  # of a normal number; of the smallest ones, in parts of the row's largest
    largest = np.abs(x).max(-1, keepdims=True)
    bound = 0.5 * (relative * np.abs(x) + step * largest) * (1 + 1e-5) + 1e-35
    assert np.all(np.abs(once - x) <= bound)
    _, twice = form(once)
    np.testing.assert_allclose(twice, once, rtol=3e-7)


def test_fp8_rounds_as_pytorch_does():
    """Bits of torch.float8_e4m3fn and torch.float8_e5m2 (PyTorch 2.13), ties and subnormal numbers among them."""
    inputs = [0.0, -0.0, 1.0, 1.0625, 1.125, 1.1875, 1.3125, -1.0625, -1.1875, 2**-9, 2**-10, 1.5 * 2**-9, 2.5 * 2**-9]
    inputs += [2**-6, 0.9375 * 2**-6, 0.96875 * 2**-6, 17.0, 19.0, 21.0, 23.0, 440.0, 432.0, 448.0, 447.0, -448.0]
    inputs += [300.5, 0.1, 0.3, 1 / 3, -2 / 3, 3.14159274]
    e4m3 = [0, 128, 56, 56, 57, 58, 58, 184, 186, 1, 0, 2, 2, 8, 8, 8, 88, 90, 90, 92, 126, 126, 126, 126, 254, 121]
    e4m3 += [29, 42, 43, 179, 69]
    bits = np.asarray(quantize(jnp.array([inputs]), "e4m3", (1, None)).values).view(np.uint8)[0]  # their scale is 1
    np.testing.assert_array_equal(bits, e4m3)
    inputs = [57344.0, 50000.0, 53248.0, 40960.0, 2**-16, 2**-17, 1.5 * 2**-16, 2.5 * 2**-16, 1.125, 1.375]
    e5m2 = [123, 122, 122, 121, 1, 0, 2, 2, 60, 62]
    bits = np.asarray(quantize(jnp.array([inputs]), "e5m2", (1, None)).values).view(np.uint8)[0]
    np.testing.assert_array_equal(bits, e5m2)


def test_blocks_are_those_of_deepseek_checkpoints():
    w = np.random.default_rng(0).normal(size=(2, 6, 10)).astype(np.float32)
    values, scale_inv = fp8.quantize_blocks(w, block=4)
    q, stands_for = rounds("e4m3", (4, 4))(w)
    np.testing.assert_array_equal(np.asarray(q.values).view(np.uint8), values.view(np.uint8))
    np.testing.assert_array_equal(q.scales, scale_inv)
    np.testing.assert_array_equal(stands_for, fp8.dequantize_blocks(values, scale_inv, block=4))


def test_powers_of_two():
    x = np.array([[448.0, 449.0, 1.0, 1e-30, 3e-38]], np.float32).T
    q, _ = rounds("e4m3", (1, 1), True)(x)
    np.testing.assert_array_equal(q.scales[:, 0], [1, 2, 2**-8, np.ldexp(1.0, -108), np.ldexp(1.0, -126)])


@pytest.mark.parametrize("format", FORMATS)
def test_zeros_stay_zeros(format):
    x = np.zeros((3, 8), np.float32)
    x[1] = 1
    for power_of_two in (False, True):
        q, stands_for = rounds(format, (1, 4), power_of_two)(x)
        np.testing.assert_allclose(stands_for, x, rtol=1e-6)
        assert np.all(np.isfinite(q.scales)) and np.all(np.asarray(q.scales) > 0)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_broken_number_breaks_its_block_and_no_other(format, bad):
    x = np.ones((2, 8), np.float32)
    x[1, 5] = bad
    q, stands_for = rounds(format, (1, 4))(x)
    broken = np.zeros((2, 8), bool)
    broken[1, 4:] = True
    np.testing.assert_array_equal(np.isnan(stands_for), broken)
    np.testing.assert_allclose(np.asarray(stands_for)[~broken], 1, rtol=1e-6)
    assert not np.any(np.asarray(q.numbers(), np.float32)[broken])


def test_largest_and_smallest_numbers():
    x = np.array([[3.4e38, -3.4e38, 1.0], [1.2e-38, 0.0, -1.2e-38]], np.float32)
    for format in FORMATS:
        _, stands_for = rounds(format, (1, None))(x)
        assert np.all(np.isfinite(stands_for))
        np.testing.assert_allclose(np.asarray(stands_for)[0, :2], x[0, :2], rtol=1e-6)


@pytest.mark.parametrize("columns", [1, 4, 5])
def test_int4_takes_half_a_byte(columns):
    x = np.random.default_rng(1).integers(-7, 8, size=(3, columns)).astype(np.float32)
    x[:, 0] = 7
    q, stands_for = rounds("int4", (1, None))(x)
    assert q.values.dtype == jnp.uint8 and q.values.shape == (3, -(-columns // 2)) and q.shape == x.shape
    np.testing.assert_array_equal(q.numbers(), x)
    np.testing.assert_array_equal(stands_for, x)
    turned = q.transposed()
    assert turned.format == "int8" and turned.shape == (columns, 3)
    np.testing.assert_array_equal(dequantize(turned), x.T)


def test_a_stack_is_a_pytree_whose_parts_are_quantised_alone():
    w = jnp.asarray(np.random.default_rng(2).normal(size=SHAPE), jnp.float32)
    stacked = quantize(w, "int8", (4, 4))
    _, parts = jax.lax.scan(lambda _, part: (None, dequantize(part)), None, stacked)
    np.testing.assert_array_equal(parts, dequantize(stacked))
    np.testing.assert_array_equal(dequantize(jax.tree.map(lambda a: a[1], stacked)), dequantize(stacked)[1])
    np.testing.assert_array_equal(dequantize(stacked.transposed()), jnp.swapaxes(dequantize(stacked), 1, 2))
    assert dequantize(stacked, jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("x", "format", "block", "message"),
    [
        (np.ones((2, 2), np.float32), "fp8", (1, 1), "format = 'fp8'.*e4m3"),
        (np.ones((2, 2), np.float32), "int8", (0, 1), r"block = \(0, 1\)"),
        (np.ones(2, np.float32), "int8", (1, 1), r"float32 \(2,\)"),
        (np.ones((2, 2), np.int32), "int8", (1, 1), "int32"),
    ],
)
def test_illegal_arguments_are_named(x, format, block, message):
    with pytest.raises(ValueError, match=message):
        quantize(jnp.asarray(x), format, block)
