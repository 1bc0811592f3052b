"""Products in 8 bits, accumulated in float32, with DeepSeek-V3's recipe for gradients (arXiv:2412.19437 §3.3).

Every operand has scales along the contracted axis. The product of one block of it (128 in the recipe) is taken on the
quantised values, multiplied by the two operands' scales and added in float32: V3's promotion of partial sums, and where
block scales have to be applied anyway. All three products of a linear layer run in 8 bits:

    y  = x · w      x in tiles of 1 × 128 along D, w in blocks of 128 × 128
    dx = dy · wᵀ    dy in tiles of 1 × 128 along F, w as it is
    dw = xᵀ · dy    x and dy in tiles of 128 × 1, along the tokens; x from what the forward pass kept in 8 bits

All in one format (V3: E4M3). Which weights take part is said where they are made (`model.layers.Initializer`).
Where a mesh spreads the contracted axis, the loop over its blocks gathers them one by one: use these inside
`shard_map`, on what a device has.

Shapes: T tokens or rows sorted by group, D input width, F output width, E groups, M, K, N of a product, Z row tiles.
"""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import Array, lax

from moe_jax.ops.quantization import Quantized, as_float32, column_scales, dequantize, quantize, row_scales

Implementation = Literal["native", "emulated"]


class Recipe(NamedTuple):
    """How a linear layer's three products are quantised."""

    format: Literal["e4m3", "e5m2", "int8"] = "e4m3"
    block: int | None = 128
    """Numbers that share a scale along a contracted axis; None: all. A product is then one dot product, not a loop that
    reads and writes its float32 sums once a block: what pays where no kernel keeps them on the chip."""
    power_of_two: bool = False
    rows: int = 128
    """Grouped product: rows of a tile."""


# ---------------------------------------------------------------------------------------------------------------------
# One product of quantised operands, without a rule for gradients.
# ---------------------------------------------------------------------------------------------------------------------


def quantized_matmul(a: Quantized, b: Quantized, *, implementation: Implementation | None = None) -> Array:
    """a · b of [M, K] and [K, N], float32 [M, N], from the quantised values themselves.

    Args:
        a, b: of any formats, with blocks of the same length along K. "int4" is unpacked to int8 here, block by block.
        implementation: "native": the dot product of the 8-bit types, accumulated in float32 or int32; XLA uses the
            units for them where the chip has them, and converts where it has not. "emulated": the same values in
            float32, at its highest precision, anywhere. None: "emulated" on CPUs, else "native". They differ by the
            order of float32 sums (and for fp8 by the width of the chip's accumulator) within a block.

    Raises:
        ValueError: shapes, blocks or implementation do not fit.
    """
    if a.values.ndim != 2 or b.values.ndim != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(f"quantized_matmul: got {a.shape} and {b.shape}; must be [M, K] and [K, N]")
    K = a.shape[1]
    block, other = min(a.block[1], K), min(b.block[0], K)
    if block != other:
        raise ValueError(
            f"quantized_matmul: blocks of {a.block[1]} and {b.block[0]} along the contracted axis; quantise both alike"
        )
    if implementation is not None and implementation not in get_args(Implementation):
        raise ValueError(f"implementation = {implementation!r}; legal are None, {', '.join(get_args(Implementation))}")
    with jax.named_scope("quantized_matmul"):
        count = -(-K // max(block, 1))
        a_MK, b_KN = a.numbers(), b.numbers()
        scales_MP, scales_PN = row_scales(a), column_scales(b)
        if count == 1:
            return _block_product(a_MK, b_KN, scales_MP[:, 0], scales_PN[0], implementation)

        padding = count * block - K
        a_PMK = jnp.moveaxis(jnp.pad(a_MK, ((0, 0), (0, padding))).reshape(-1, count, block), 1, 0)
        b_PKN = jnp.pad(b_KN, ((0, padding), (0, 0))).reshape(count, block, -1)

        def step(sum_MN: Array, blocks: tuple[Array, Array, Array, Array]) -> tuple[Array, None]:
            return sum_MN + _block_product(*blocks, implementation), None

        zeros_MN = jnp.zeros((a.shape[0], b.shape[1]), jnp.float32)
        return lax.scan(step, zeros_MN, (a_PMK, b_PKN, scales_MP.T, scales_PN))[0]


def _block_product(a_MK: Array, b_KN: Array, scale_M: Array, scale_N: Array, implementation: str | None) -> Array:
    def emulated(a_MK: Array, b_KN: Array) -> Array:
        a_MK, b_KN = as_float32(a_MK), as_float32(b_KN)
        return jnp.einsum("MK,KN->MN", a_MK, b_KN, precision=lax.Precision.HIGHEST)

    def native(a_MK: Array, b_KN: Array) -> Array:
        integers = [jnp.issubdtype(x.dtype, jnp.integer) for x in (a_MK, b_KN)]
        if any(integers) and not all(integers):
            a_MK, b_KN = a_MK.astype(jnp.bfloat16), b_KN.astype(jnp.bfloat16)  # exact: both have at most 8 bits
        accumulator = jnp.int32 if all(integers) else jnp.float32
        return jnp.einsum("MK,KN->MN", a_MK, b_KN, preferred_element_type=accumulator).astype(jnp.float32)

    if implementation is None:
        product_MN = lax.platform_dependent(a_MK, b_KN, cpu=emulated, default=native)
    else:
        product_MN = (native if implementation == "native" else emulated)(a_MK, b_KN)
    return product_MN * scale_M[:, None] * scale_N


# ---------------------------------------------------------------------------------------------------------------------
# A linear layer.
# ---------------------------------------------------------------------------------------------------------------------


def low_precision_matmul(
    x_TD: Array, w_DF: Array, recipe: Recipe, *, implementation: Implementation | None = None
) -> Array:
    """x · w of x's dtype, forward and backward in 8 bits; x's gradient is of its dtype, w's of its.

    The gradient is that of the product at the rounded operands, passed to the unrounded ones (straight through).

    Raises:
        ValueError: shapes, recipe or implementation do not fit.
    """
    if x_TD.ndim != 2 or w_DF.ndim != 2 or x_TD.shape[1] != w_DF.shape[0]:
        raise ValueError(f"low_precision_matmul: got x {x_TD.shape} and w {w_DF.shape}; must be [T, D] and [D, F]")
    return _linear(x_TD, w_DF, recipe, implementation)


def _operands(x_TD: Array, w: Array, recipe: Recipe) -> tuple[Quantized, Quantized]:
    return _quantize(x_TD, recipe, 1, recipe.block), _quantize(w, recipe, recipe.block, recipe.block)


def _quantize(x: Array, recipe: Recipe, rows: int | None, columns: int | None) -> Quantized:
    return quantize(x, recipe.format, (rows, columns), power_of_two=recipe.power_of_two)


def _weight_gradient(x_TD: Array, dy_TF: Array, recipe: Recipe, implementation: Implementation | None) -> Array:
    """xᵀ · dy, float32 [D, F]."""
    x, dy = (_quantize(a, recipe, recipe.block, 1) for a in (x_TD, dy_TF))
    return quantized_matmul(x.transposed(), dy, implementation=implementation)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _linear(x_TD: Array, w_DF: Array, recipe: Recipe, implementation: Implementation | None) -> Array:
    return _linear_forward(x_TD, w_DF, recipe, implementation)[0]


def _linear_forward(x_TD: Array, w_DF: Array, recipe: Recipe, implementation: Implementation | None):
    x, w = _operands(x_TD, w_DF, recipe)
    y_TF = quantized_matmul(x, w, implementation=implementation).astype(x_TD.dtype)
    return y_TF, (x, w, jnp.zeros((), w_DF.dtype))


def _linear_backward(recipe: Recipe, implementation: Implementation | None, residuals: tuple, dy_TF: Array):
    x, w, like_w = residuals
    dy = _quantize(dy_TF, recipe, 1, recipe.block)
    dx_TD = quantized_matmul(dy, w.transposed(), implementation=implementation)
    dw_DF = _weight_gradient(dequantize(x), dy_TF, recipe, implementation)
    return dx_TD.astype(dy_TF.dtype), dw_DF.astype(like_w.dtype)


_linear.defvjp(_linear_forward, _linear_backward)


# ---------------------------------------------------------------------------------------------------------------------
# The grouped product: rows of each group are cut into tiles of `recipe.rows`, the last one filled up with zeros, so
# that a tile has one matrix and, in the weight's gradient, one scale per column, which no other group has a part in.
# ---------------------------------------------------------------------------------------------------------------------


def low_precision_grouped_matmul(
    x_TD: Array,
    w_EDF: Array,
    group_sizes_E: Array,
    recipe: Recipe,
    *,
    implementation: Implementation | None = None,
) -> Array:
    """y[t] = x[t] · w[e] for each row t of group e, as `ops.grouped_matmul`, forward and backward in 8 bits.

    Rows past the sum of the sizes are zero and have no part in any gradient, whatever they hold.

    Raises:
        ValueError: shapes, recipe or implementation do not fit.
    """
    shapes = f"x {x_TD.shape}, w {w_EDF.shape}, group_sizes {group_sizes_E.shape}"
    if x_TD.ndim != 2 or w_EDF.ndim != 3 or (x_TD.shape[1], *group_sizes_E.shape) != (w_EDF.shape[1], w_EDF.shape[0]):
        raise ValueError(f"low_precision_grouped_matmul: got {shapes}; must be [T, D], [E, D, F] and [E]")
    return _grouped(x_TD, w_EDF, group_sizes_E, recipe, implementation)


class Tiles(NamedTuple):
    group_Z: Array
    """The group of each tile; that of tiles without rows does not matter."""
    row_ZT: Array
    """Which row stands in each place of a tile; the number of rows where none does."""
    place_T: Array
    """Where in the tiles, one after the other, each row stands; past their end if it is in no group."""
    num_used: Array
    """Tiles that have rows: the first ones."""


def cut_into_tiles(group_sizes_E: Array, num_rows: int, block: int) -> Tiles:
    """Rows sorted by group as tiles of `block` rows, none of which has rows of two groups."""
    num_groups = group_sizes_E.shape[0]
    num_tiles = (num_rows + (block - 1) * num_groups) // block
    sizes_E = group_sizes_E.astype(jnp.int32)
    ends_E = jnp.cumsum(sizes_E)
    last_E = jnp.cumsum(-(-sizes_E // block))
    first_E = last_E - (-(-sizes_E // block))

    tile_Z = jnp.arange(num_tiles)
    group_Z = jnp.minimum(jnp.searchsorted(last_E, tile_Z, side="right"), num_groups - 1)
    start_Z = (ends_E - sizes_E)[group_Z] + (tile_Z - first_E[group_Z]) * block
    row_ZT = start_Z[:, None] + jnp.arange(block)
    row_ZT = jnp.where(row_ZT < ends_E[group_Z][:, None], row_ZT, num_rows)

    row_T = jnp.arange(num_rows)
    group_T = jnp.searchsorted(ends_E, row_T, side="right")
    own_T = jnp.minimum(group_T, num_groups - 1)
    place_T = first_E[own_T] * block + row_T - (ends_E - sizes_E)[own_T]
    return Tiles(group_Z, row_ZT, jnp.where(group_T < num_groups, place_T, num_tiles * block), last_E[-1])


def take_rows(x_TX: Array, row_T: Array) -> Array:
    """These rows; zeros for those past the end."""
    return x_TX.at[row_T].get(mode="fill", fill_value=0)


def _take_quantized(q: Quantized, row_T: Array) -> Quantized:
    """Rows of an array whose blocks are one row high."""
    # NumPy's fill does not know fp8: the bits of zero are those of the integer.
    bits = lax.bitcast_convert_type(q.values, jnp.uint8)
    values = lax.bitcast_convert_type(take_rows(bits, row_T), q.values.dtype)
    return Quantized(values, take_rows(q.scales, row_T), q.format, q.block, q.columns)


def _tile_products(x: Quantized, w: Quantized, tiles: Tiles, implementation: Implementation | None) -> Array:
    """y[t] = x[t] · w[group of t], float32."""

    def product(tile: tuple[Array, Array]) -> Array:
        group, row_T = tile
        w_DF = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, group, keepdims=False), w)
        return quantized_matmul(_take_quantized(x, row_T), w_DF, implementation=implementation)

    y_ZTF = lax.map(product, (tiles.group_Z, tiles.row_ZT))
    return take_rows(y_ZTF.reshape(-1, y_ZTF.shape[-1]), tiles.place_T)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _grouped(
    x_TD: Array, w_EDF: Array, group_sizes_E: Array, recipe: Recipe, implementation: Implementation | None
) -> Array:
    return _grouped_forward(x_TD, w_EDF, group_sizes_E, recipe, implementation)[0]


def _grouped_forward(x_TD, w_EDF, group_sizes_E, recipe, implementation):
    x, w = _operands(x_TD, w_EDF, recipe)
    tiles = cut_into_tiles(group_sizes_E, x_TD.shape[0], recipe.rows)
    y_TF = _tile_products(x, w, tiles, implementation).astype(x_TD.dtype)
    return y_TF, (x, w, tiles, jnp.zeros((), w_EDF.dtype))


def _grouped_backward(recipe, implementation, residuals, dy_TF):
    x, w, tiles, like_w = residuals
    dy = _quantize(dy_TF, recipe, 1, recipe.block)
    dx_TD = _tile_products(dy, w.transposed(), tiles, implementation)

    def add_tile(dw_EDF: Array, tile: tuple[Array, Array]) -> tuple[Array, None]:
        group, row_T = tile
        x_TD = dequantize(_take_quantized(x, row_T))
        dw_DF = _weight_gradient(x_TD, take_rows(dy_TF, row_T), recipe, implementation)
        return dw_EDF.at[group].add(dw_DF), None

    dw_EDF, _ = lax.scan(add_tile, jnp.zeros(w.shape, jnp.float32), (tiles.group_Z, tiles.row_ZT))
    return dx_TD.astype(dy_TF.dtype), dw_EDF.astype(like_w.dtype), None


_grouped.defvjp(_grouped_forward, _grouped_backward)
