"""Products with weights that stay packed in memory: they become floats a chunk at a time, where they are used.

A packed weight is a `Quantized` [F, D], outputs by inputs as Hugging Face stores it, whose blocks are one row high: any
run of its rows, and any of a stack's matrices, is again one.

Shapes: T tokens or rows sorted by group, D input width, F output width, C outputs of a chunk, E groups, Z row tiles.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array, lax

from moe_jax.ops.quantization import Quantized, dequantize, quantize
from moe_jax.ops.quantized_matmul import cut_into_tiles, quantized_matmul, take_rows

_CHUNK_NUMBERS = 2**20
"""Numbers of a weight that are floats at the same time. On two cores, beside other work, 64 rows times 16 M int8
weights took 7 to 13 ms with 2**18 or 2**20, 16 with 2**22, and 48 with all at once."""

_FEW_ROWS = 8
"""No more rows than this are taken one by one: one token's experts, when decoding."""


def packed_matmul(x_TD: Array, w: Quantized) -> Array:
    """x · wᵀ, [T, F] of x's dtype; the sums are float32.

    Where `w.inputs` says so, x is rounded too, with a scale for each row and each block of w's inputs, and the product
    is that of the quantised values (`quantized_matmul`); else it is of x as it is and w's values in x's dtype.

    Args:
        x_TD: any float type.
        w: [F, D], blocks of one row.

    Raises:
        ValueError: shapes or blocks do not fit.
    """
    if x_TD.ndim != 2 or w.ndim != 2 or x_TD.shape[1] != w.shape[1] or w.block[0] != 1:
        raise ValueError(
            f"packed_matmul: got {x_TD.shape} and {w.shape}, block {w.block}; must be [T, D], [F, D], 1 x n"
        )
    # A loop around this (of decoding) must not find w's conversion to be the same each time, and keep its result.
    w, x_TD = lax.optimization_barrier((w, x_TD))
    (T, D), F = x_TD.shape, w.shape[0]
    x = x_TD if w.inputs is None else quantize(x_TD, w.inputs, (1, w.block[1]))

    def product(w: Quantized) -> Array:
        if isinstance(x, Quantized):
            return quantized_matmul(x, w.transposed()).astype(x_TD.dtype)
        accumulator = jnp.promote_types(x.dtype, jnp.float32)
        y_TC = jnp.einsum("TD,CD->TC", x, dequantize(w, x.dtype), preferred_element_type=accumulator)
        return y_TC.astype(x.dtype)

    count = -(-F * D // _CHUNK_NUMBERS)
    chunk = -(-F // count)

    def add_chunk(index: Array, y_TF: Array) -> Array:
        start = jnp.minimum(index * chunk, F - chunk)  # the last one may overlap
        part = jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, start, chunk), w)
        return lax.dynamic_update_slice_in_dim(y_TF, product(part), start, 1)

    with jax.named_scope("packed_matmul"):
        if count == 1:
            return product(w)
        return lax.fori_loop(0, count, add_chunk, jnp.zeros((T, F), x_TD.dtype))


def packed_grouped_matmul(x_TD: Array, w: Quantized, group_sizes_E: Array) -> Array:
    """y[t] = x[t] · w[e]ᵀ for each row t of group e, [T, F] of x's dtype; rows past the sum of the sizes are zero.

    A loop over tiles of rows, of one group each, on every platform: XLA's ragged dot takes no packed weights.

    Args:
        x_TD: rows sorted by group.
        w: [E, F, D], blocks of one row.
        group_sizes_E: integer number of rows of each group.

    Raises:
        ValueError: shapes or blocks do not fit.
    """
    if x_TD.ndim != 2 or w.ndim != 3 or (x_TD.shape[1], *group_sizes_E.shape) != (w.shape[2], w.shape[0]):
        shapes = f"x {x_TD.shape}, w {w.shape}, group_sizes {group_sizes_E.shape}"
        raise ValueError(f"packed_grouped_matmul: got {shapes}; must be [T, D], [E, F, D] and [E]")
    (T, _), (E, F, _) = x_TD.shape, w.shape
    rows = 1 if T <= _FEW_ROWS else min(512, 2 ** max(3, math.ceil(math.log2(T / E))))
    tiles = cut_into_tiles(group_sizes_E, T, rows)

    def add_tile(z: Array, y_ZTF: Array) -> Array:
        y_TF = packed_matmul(take_rows(x_TD, tiles.row_ZT[z]), w[tiles.group_Z[z]])
        return lax.dynamic_update_index_in_dim(y_ZTF, y_TF, z, 0)

    y_ZTF = jnp.zeros((*tiles.row_ZT.shape, F), x_TD.dtype)
    y_ZTF = lax.fori_loop(0, tiles.num_used, add_tile, y_ZTF)
    return take_rows(y_ZTF.reshape(-1, F), tiles.place_T)


def unpacked(w: Quantized, like: Array) -> Array:
    """The weight in the dtype of `like`, made where `like` is known and not before: [..., F, D]."""
    w, like = lax.optimization_barrier((w, like))
    return dequantize(w, like.dtype)
