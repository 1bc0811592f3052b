"""Block-scaled FP8 weights as DeepSeek-V3 stores them (arXiv:2412.19437 §3.3): E4M3 values, one scale per 128 x 128.

`weight_scale_inv` is, despite its name, the multiplier: weight[r, c] = fp8[r, c] * scale_inv[r // 128, c // 128].

Shapes: R rows, C columns; P = ceil(R / block), Q = ceil(C / block) blocks; leading axes (stacked experts) are kept.
"""

import ml_dtypes
import numpy as np

BLOCK = 128
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
FP8_MAX = 448.0  # the largest E4M3 number
SCALE_SUFFIX = "_scale_inv"
QUANTIZATION_CONFIG = {  # config.json's `quantization_config` of a model with such weights
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [BLOCK, BLOCK],
}

# Looking all 256 numbers up is more than twice as fast as NumPy's cast.
_VALUES = np.arange(256, dtype=np.uint8).view(FP8).astype(np.float32)


def scale_shape(shape: tuple[int, ...], block: int = BLOCK) -> tuple[int, ...]:
    """[..., R, C] → [..., P, Q], the shape of the scales of a weight."""
    return (*shape[:-2], *(-(-size // block) for size in shape[-2:]))


def quantize_blocks(w_RC: np.ndarray, block: int = BLOCK) -> tuple[np.ndarray, np.ndarray]:
    """Weight [..., R, C] of any float type → (E4M3 values [..., R, C], float32 scale_inv [..., P, Q]).

    scale_inv = max |w| / 448 over each block. Works on `block` rows at a time, so that a weight in bfloat16 is never
    held in float32 as a whole. Raises ValueError where a weight is NaN or infinite.
    """
    quantized_RC = np.empty(w_RC.shape, FP8)
    scale_inv_PQ = np.empty(scale_shape(w_RC.shape, block), np.float32)
    starts_Q = np.arange(0, w_RC.shape[-1], block)
    column_block_C = np.arange(w_RC.shape[-1]) // block
    for p, start in enumerate(range(0, w_RC.shape[-2], block)):
        rows_RC = w_RC[..., start : start + block, :].astype(np.float32)
        amax_C = np.maximum(rows_RC.max(axis=-2), -rows_RC.min(axis=-2))
        amax_Q = np.maximum.reduceat(amax_C, starts_Q, axis=-1)
        if not np.isfinite(amax_Q).all():
            raise ValueError(f"rows {start} to {start + block}: NaN or infinite weights have no FP8 form")
        # A block of zeros has any scale; the smallest normal number avoids 0 / 0.
        scale_Q = np.maximum(amax_Q / np.float32(FP8_MAX), np.finfo(np.float32).tiny)
        scale_inv_PQ[..., p, :] = scale_Q
        rows_RC /= scale_Q[..., None, column_block_C]
        quantized_RC[..., start : start + block, :] = rows_RC
        del rows_RC  # before the next rows are made
    return quantized_RC, scale_inv_PQ


def dequantize_blocks(
    quantized_RC: np.ndarray,
    scale_inv_PQ: np.ndarray,
    index: tuple[slice, ...] = (),
    block: int = BLOCK,
) -> np.ndarray:
    """float32 weights of a slice: (fp8 * scale_inv)[index], of which only the slice is computed.

    `index` holds one slice per axis, of any start, stop and step; axes it leaves out are whole.
    """
    index += (slice(None),) * (quantized_RC.ndim - len(index))
    *stack, rows, columns = index
    row_block = (np.arange(quantized_RC.shape[-2]) // block)[rows]
    column_block = (np.arange(quantized_RC.shape[-1]) // block)[columns]
    w_RC = _VALUES[quantized_RC[index].view(np.uint8)]
    scale_inv_PQ = scale_inv_PQ[tuple(stack)].astype(np.float32)[..., column_block]
    for start in range(0, len(row_block), block):  # a few rows at a time: scales are never as large as the weight
        part = slice(start, start + block)
        w_RC[..., part, :] *= scale_inv_PQ[..., row_block[part], :]
    return w_RC
