import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.interop import fp8


def weights(shape, seed=0):
    """Normal weights whose blocks differ in size by orders of magnitude."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) * 10.0 ** rng.uniform(-6, 3, size=(shape[-2], 1))).astype(np.float32)


def test_a_hand_written_case():
    # Blocks of 2: [[448, 1], [-2, 0.3]] has scale 1, its ragged neighbour [[4480], [17 * 10]] has scale 10.
    # E4M3 has 3 bits of mantissa: 0.3 lies between 0.28125 and 0.3125 (nearest), 17 between 16 and 18 (tie, to even).
    w = np.array([[448, 1, 4480], [-2, 0.3, 170]], np.float32)
    quantized, scale_inv = fp8.quantize_blocks(w, block=2)
    assert quantized.dtype == ml_dtypes.float8_e4m3fn and scale_inv.dtype == np.float32
    np.testing.assert_array_equal(scale_inv, [[1, 10]])
    # E4M3's bytes: sign, 4 bits of exponent (bias 7), 3 of mantissa.
    np.testing.assert_array_equal(
        quantized.view(np.uint8),
        [[0b0_1111_110, 0b0_0111_000, 0b0_1111_110], [0b1_1000_000, 0b0_0101_010, 0b0_1011_000]],
    )
    np.testing.assert_array_equal(
        fp8.dequantize_blocks(quantized, scale_inv, block=2), [[448, 1, 4480], [-2, 0.3125, 160]]
    )


def test_deepseek_v3_shape_of_the_scales():
    assert fp8.scale_shape((576, 7168)) == (5, 56)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(128, 128), (300, 130), (1, 1), (2, 129, 257)])
def test_error_is_half_a_step_of_e4m3(shape, dtype):
    w = weights(shape).astype(dtype)
    quantized, scale_inv = fp8.quantize_blocks(w)
    w = w.astype(np.float32)
    assert scale_inv.shape == fp8.scale_shape(shape)
    scale = np.repeat(np.repeat(scale_inv, 128, -2), 128, -1)[..., : shape[-2], : shape[-1]]
    error = np.abs(fp8.dequantize_blocks(quantized, scale_inv) - w)
    # Normal numbers: 2^-4 of the value. Subnormal ones (below 2^-6): half of their step 2^-9.
    assert (error <= np.maximum(np.abs(w) * 2**-4, scale * 2**-10) * (1 + 1e-5)).all()


def test_quantizing_what_was_dequantized_changes_nothing():
    quantized, scale_inv = fp8.quantize_blocks(weights((200, 300)))
    w = fp8.dequantize_blocks(quantized, scale_inv)
    again, scale_again = fp8.quantize_blocks(w)
    np.testing.assert_array_equal(fp8.dequantize_blocks(again, scale_again), w)


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 3e38])
def test_extreme_blocks_stay_finite(value):
    w = np.full((130, 4), value, np.float32)
    w[128:] = 1
    back = fp8.dequantize_blocks(*fp8.quantize_blocks(w))
    assert np.isfinite(back).all()
    np.testing.assert_allclose(back, w, rtol=2**-4, atol=1e-38)


def test_nan_is_refused():
    w = np.zeros((200, 4), np.float32)
    w[150, 2] = np.nan
    with pytest.raises(ValueError, match="rows 128 to 256"):
        fp8.quantize_blocks(w)


SLICES = st.builds(
    slice,
    st.none() | st.integers(-300, 300),
    st.none() | st.integers(-300, 300),
    st.none() | st.integers(-40, 40).filter(bool),
)
W_Q, W_SCALE = fp8.quantize_blocks(weights((2, 261, 140), seed=1))
W_WHOLE = fp8.dequantize_blocks(W_Q, W_SCALE)


@settings(max_examples=200, deadline=None)
@given(st.lists(SLICES, max_size=3))
def test_slices_equal_slices_of_the_whole(index):
    index = tuple(index)
    np.testing.assert_array_equal(fp8.dequantize_blocks(W_Q, W_SCALE, index), W_WHOLE[index])


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.integers(0, 99))
def test_whole_equals_the_published_formula(rows, columns, block, seed):
    quantized, scale_inv = fp8.quantize_blocks(weights((rows, columns), seed), block)
    expected = [
        [np.float32(quantized[i, j]) * scale_inv[i // block, j // block] for j in range(columns)] for i in range(rows)
    ]
    np.testing.assert_array_equal(fp8.dequantize_blocks(quantized, scale_inv, block=block), expected)
