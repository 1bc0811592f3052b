"""Products of row groups with one matrix each: the work of sparse experts.

Shapes: T rows (token-expert pairs, sorted by group), D input width, F output width, E experts (groups),
B rows of a block.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import Array, lax

from moe_jax.ops.row_product import row_product

Implementation = Literal["ragged", "blocked", "reference"]


def grouped_matmul(
    x_TD: Array, w_EDF: Array, group_sizes_E: Array, *, implementation: Implementation | None = None
) -> Array:
    """y[t] = x[t] @ w[e] for each row t of group e, with gradients for x and w.

    Args:
        x_TD: rows sorted by group: the first group_sizes_E[0] rows belong to group 0, the next to group 1, and so on.
        w_EDF: one matrix per group, of x's dtype.
        group_sizes_E: integer number of rows of each group. Zeros are fine; the sum may be below T, not above.
        implementation: "ragged" (XLA's ragged dot), "blocked" (loops over row blocks, for the CPU), "reference"
            (every row times every matrix, masked: tests and tiny shapes), or None: the best for the platform.

    Returns:
        y_TF of x's dtype, accumulated in float32 or wider. Rows past the sum of the sizes are zero.

    Raises:
        ValueError: shapes or dtypes do not fit each other, or the implementation is unknown.
    """
    _check(x_TD, w_EDF, group_sizes_E, implementation)
    if implementation == "reference":
        return _reference(x_TD, w_EDF, group_sizes_E)
    return _grouped_matmul(x_TD, w_EDF, group_sizes_E, implementation)


def _check(x_TD: Array, w_EDF: Array, group_sizes_E: Array, implementation: str | None) -> None:
    shapes = f"x {x_TD.shape}, w {w_EDF.shape}, group_sizes {group_sizes_E.shape}"
    if x_TD.ndim != 2 or w_EDF.ndim != 3 or group_sizes_E.ndim != 1:
        raise ValueError(f"grouped_matmul: got {shapes}; the shapes must be [T, D], [E, D, F] and [E]")
    if x_TD.shape[1] != w_EDF.shape[1] or group_sizes_E.shape[0] != w_EDF.shape[0]:
        raise ValueError(f"grouped_matmul: got {shapes}; D must agree in x and w, E in w and group_sizes")
    if not jnp.issubdtype(group_sizes_E.dtype, jnp.integer):
        raise ValueError(f"grouped_matmul: group_sizes is {group_sizes_E.dtype}; it must be of an integer dtype")
    if x_TD.dtype != w_EDF.dtype:
        raise ValueError(
            f"grouped_matmul: x is {x_TD.dtype} and w is {w_EDF.dtype}; cast one to the dtype of the other"
        )
    if implementation is not None and implementation not in get_args(Implementation):
        raise ValueError(
            f"grouped_matmul: implementation={implementation!r}; legal are None, {', '.join(get_args(Implementation))}"
        )


def _accumulator(dtype) -> jnp.dtype:
    return jnp.promote_types(dtype, jnp.float32)


class Gathered(NamedTuple):
    """Rows that are taken from an array where they are needed: values[index]."""

    values_ND: Array
    index_T: Array
    """int32. An index outside `values_ND` is for rows that belong to no group."""

    def array(self) -> Array:
        return self.values_ND.at[self.index_T].get(mode="clip")


Rows = Array | Gathered


# ---------------------------------------------------------------------------------------------------------------------
# The two operations, the choice between their implementations, and the rule for gradients.
# ---------------------------------------------------------------------------------------------------------------------


def product(
    x_TD: Rows, w_EDF: Array, group_sizes_E: Array, transpose_w: bool = False, implementation: str | None = None
) -> Array:
    """y[t] = x[t] @ w[e], or x[t] @ w[e]ᵀ: [T, F] or [T, D], of x's dtype. Without a rule for gradients."""
    with jax.named_scope("grouped_matmul"):
        blocked, ragged = (partial(f, transpose_w=transpose_w) for f in (_blocked_product, _ragged_product))
        return _choose(implementation, blocked, ragged, ragged, x_TD, w_EDF, group_sizes_E)


def weight_gradient(x_TD: Rows, dy_TF: Rows, group_sizes_E: Array, implementation: str | None = None) -> Array:
    """dw[e] = Σ x[t]ᵀ dy[t] over the rows t of group e: [E, D, F]. Without a rule for gradients."""
    with jax.named_scope("grouped_matmul_dw"):
        forms = _blocked_weight_gradient, _tiled_weight_gradient, _ragged_weight_gradient
        return _choose(implementation, *forms, x_TD, dy_TF, group_sizes_E)


def _choose(implementation: str | None, blocked: Callable, tpu: Callable, ragged: Callable, *args: Rows) -> Array:
    """The one place that chooses. By the platform the program is lowered for, not by the machine that lowers it."""
    if implementation == "blocked":
        return blocked(*args)
    if implementation == "ragged":
        return ragged(*args)
    return lax.platform_dependent(*args, cpu=blocked, tpu=tpu, default=ragged)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped_matmul(x_TD: Array, w_EDF: Array, group_sizes_E: Array, implementation: str | None) -> Array:
    return product(x_TD, w_EDF, group_sizes_E, False, implementation)


def _grouped_matmul_forward(x_TD: Array, w_EDF: Array, group_sizes_E: Array, implementation: str | None):
    return _grouped_matmul(x_TD, w_EDF, group_sizes_E, implementation), (x_TD, w_EDF, group_sizes_E)


def _grouped_matmul_backward(implementation: str | None, residuals: tuple[Array, Array, Array], dy_TF: Array):
    x_TD, w_EDF, group_sizes_E = residuals
    dx_TD = product(dy_TF, w_EDF, group_sizes_E, True, implementation)
    return dx_TD, weight_gradient(x_TD, dy_TF, group_sizes_E, implementation), None


_grouped_matmul.defvjp(_grouped_matmul_forward, _grouped_matmul_backward)


# ---------------------------------------------------------------------------------------------------------------------
# reference: every row times every matrix, with JAX's own gradients.
# ---------------------------------------------------------------------------------------------------------------------


def _reference(x_TD: Array, w_EDF: Array, group_sizes_E: Array) -> Array:
    ends_E = jnp.cumsum(group_sizes_E)
    rows_T1 = jnp.arange(x_TD.shape[0])[:, None]
    member_TE = (rows_T1 < ends_E) & (rows_T1 >= ends_E - group_sizes_E)
    x_TED = jnp.where(member_TE[:, :, None], x_TD[:, None, :], 0)
    y_TF = jnp.einsum("TED,EDF->TF", x_TED, w_EDF, preferred_element_type=_accumulator(x_TD.dtype))
    return y_TF.astype(x_TD.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# ragged: XLA's ragged dot, on TPU a native kernel, but not for weights' gradients. (XLA:CPU multiplies every row with
# every matrix.)
# ---------------------------------------------------------------------------------------------------------------------

_RAGGED_CONTRACTION = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)


def _ragged_product(x_TD: Rows, w_EDF: Array, group_sizes_E: Array, transpose_w: bool) -> Array:
    x_TD = _array(x_TD)
    w_EDF = w_EDF.swapaxes(1, 2) if transpose_w else w_EDF
    y_TF = lax.ragged_dot(x_TD, w_EDF, group_sizes_E, preferred_element_type=_accumulator(x_TD.dtype))
    # What a kernel leaves in rows that belong to no group is not specified.
    grouped_T = jnp.arange(x_TD.shape[0]) < jnp.sum(group_sizes_E)
    return jnp.where(grouped_T[:, None], y_TF, 0).astype(x_TD.dtype)


def _ragged_weight_gradient(x_TD: Rows, dy_TF: Rows, group_sizes_E: Array) -> Array:
    x_TD, dy_TF = _array(x_TD), _array(dy_TF)
    dw_EDF = lax.ragged_dot_general(
        x_TD, dy_TF, group_sizes_E, _RAGGED_CONTRACTION, preferred_element_type=_accumulator(x_TD.dtype)
    )
    return dw_EDF.astype(x_TD.dtype)


def _tiled_weight_gradient(x_TD: Rows, dy_TF: Rows, group_sizes_E: Array, interpret: bool = False) -> Array:
    """Of TPUs: JAX's own kernel (megablox), which visits each group's tiles of rows.

    XLA for TPUs (libtpu 0.0.42) makes a dense product with every group of a ragged contraction: with 16 groups, 16
    times the FLOPs (seen in a program compiled for v5p).
    """
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm  # Pallas takes a second to import

    x_TD, dy_TF = _array(x_TD), _array(dy_TF)
    (T, D), F = x_TD.shape, dy_TF.shape[1]
    tile = min(_TILE, -(-T // 128) * 128)
    x_TD, dy_TF = (jnp.pad(a, ((0, -T % tile), (0, 0))) for a in (x_TD, dy_TF))
    tiling = tile, min(_TILE, D), min(_TILE, F)
    # Sums are float32, in the fast memory; what is written is rounded.
    return tgmm(x_TD.T, dy_TF, group_sizes_E.astype(jnp.int32), x_TD.dtype, tiling, interpret=interpret)


_TILE = 512
"""Rows, inputs and outputs that the TPU's kernel has in its fast memory at a time: 2.5 MB in bfloat16."""


def _array(rows: Rows) -> Array:
    return rows.array() if isinstance(rows, Gathered) else rows


# ---------------------------------------------------------------------------------------------------------------------
# blocked
#
# Sorted rows make every group one contiguous slice. It is cut into whole blocks of the longest length, if it has so
# many rows, and a last block of the shortest length that holds the rest. What was measured on CPUs shaped this:
# - A product's rate grows with its rows, so a group of about average size is one product, not several.
# - XLA:CPU runs the body of a loop in one thread only if it has few operations (eight), and hands each operation to
#   another thread if it has more, which costs more than the product. So there is a flat loop per block length over
#   the groups whose last block has it, and no choice inside a loop.
# A block that reaches past its group's end, or would reach past the array's and is moved back, keeps by a mask what
# stands in the rows that are not its own. Groups without rows are not visited; a visit slices its group's matrix once.
# ---------------------------------------------------------------------------------------------------------------------

_FEW_ROWS = 8
"""No more rows than this are taken one by one."""
_LONGEST_BLOCK = 1024
_BLOCK_FRACTIONS = (1 / 8, 1 / 4, 3 / 8, 7 / 16, 1 / 2, 9 / 16, 5 / 8, 3 / 4, 1)
"""Lengths, as shares of the longest; they are densest at the average group's size, one half."""


def _block_lengths(num_rows: int, num_groups: int) -> list[int]:
    """The lengths of blocks, ascending; the longest is twice the average group's size, within bounds."""
    longest = min(_LONGEST_BLOCK, 2 * -(-num_rows // num_groups))
    return sorted({min(num_rows, max(8, 8 * round(longest * share / 8))) for share in _BLOCK_FRACTIONS})


class _Blocks(NamedTuple):
    """How each group's rows are cut."""

    starts_E: Array
    rests_E: Array
    """Where the last block starts."""
    ends_E: Array
    whole_E: Array
    """Number of whole blocks of the longest length, before the last block."""
    by_length_E: Array
    """Groups that have rows, ordered by the length of their last block ..."""
    first: Array
    """... and where in that order each length begins, and the last one ends."""
    long_E: Array
    """Groups that have whole blocks ..."""
    num_long: Array
    """... and how many those are."""


def _cut(group_sizes_E: Array, lengths: list[int]) -> _Blocks:
    sizes_E = group_sizes_E.astype(jnp.int32)
    ends_E = jnp.cumsum(sizes_E)
    starts_E = ends_E - sizes_E
    whole_E = jnp.maximum(sizes_E - 1, 0) // lengths[-1]
    rests_E = starts_E + whole_E * lengths[-1]
    length_E = jnp.searchsorted(jnp.asarray(lengths), ends_E - rests_E)
    length_E = jnp.where(sizes_E == 0, len(lengths), length_E)
    by_length_E = jnp.argsort(length_E)
    first = jnp.searchsorted(length_E[by_length_E], jnp.arange(len(lengths) + 1))
    long_E = jnp.argsort(whole_E == 0)
    return _Blocks(starts_E, rests_E, ends_E, whole_E, by_length_E, first, long_E, jnp.count_nonzero(whole_E))


def _for_each_last_block(blocks: _Blocks, lengths: list[int], visit: Callable[[Array, int, Array], Array], out: Array):
    """Folds `out = visit(group, B, out)` over the groups that have rows, whose last block is B rows long."""
    for i, B in enumerate(lengths):

        def body(index: Array, out: Array, B: int = B) -> Array:
            return visit(blocks.by_length_E[index], B, out)

        out = lax.fori_loop(blocks.first[i], blocks.first[i + 1], body, out)
    return out


def _for_each_long_group(blocks: _Blocks, visit: Callable[[Array, Array], Array], out: Array) -> Array:
    """Folds `out = visit(group, out)` over the groups that have whole blocks."""
    return lax.fori_loop(0, blocks.num_long, lambda index, out: visit(blocks.long_E[index], out), out)


def _last_block(blocks: _Blocks, group: Array, B: int, num_rows: int) -> tuple[Array, Array]:
    """Where the group's last block's slice starts so that it fits the array, and which of its rows [B, 1] are its."""
    slot = jnp.minimum(blocks.rests_E[group], num_rows - B)
    rows_B1 = slot + jnp.arange(B)[:, None]
    return slot, (rows_B1 >= blocks.rests_E[group]) & (rows_B1 < blocks.ends_E[group])


def _size(rows: Rows) -> tuple[int, int, jnp.dtype]:
    """Number and width of the rows, and their dtype."""
    if isinstance(rows, Gathered):
        return rows.index_T.shape[0], rows.values_ND.shape[1], rows.values_ND.dtype
    return rows.shape[0], rows.shape[1], rows.dtype


def _take(rows: Rows, start: Array, B: int) -> Array:
    """B rows. Gathered ones are gathered here, block by block, so that all of them are never written out."""
    if isinstance(rows, Gathered):
        return rows.values_ND.at[lax.dynamic_slice_in_dim(rows.index_T, start, B)].get(mode="clip")
    return lax.dynamic_slice_in_dim(rows, start, B)


def _blocked_product(x_TD: Rows, w_EDF: Array, group_sizes_E: Array, transpose_w: bool) -> Array:
    (num_rows, _, dtype), (num_groups, D, F) = _size(x_TD), w_EDF.shape
    if num_rows <= _FEW_ROWS:
        return _row_by_row(x_TD, w_EDF, group_sizes_E, transpose_w)
    lengths = _block_lengths(num_rows, num_groups)
    blocks = _cut(group_sizes_E, lengths)
    einsum = "BF,DF->BD" if transpose_w else "BD,DF->BF"

    def product(start: Array, B: int, w_DF: Array) -> Array:
        x_BD = _take(x_TD, start, B)
        return jnp.einsum(einsum, x_BD, w_DF, preferred_element_type=_accumulator(dtype)).astype(dtype)

    def last_block(group: Array, B: int, y_TF: Array) -> Array:
        slot, mask_B1 = _last_block(blocks, group, B, num_rows)
        y_BF = product(slot, B, lax.dynamic_index_in_dim(w_EDF, group, keepdims=False))
        y_BF = jnp.where(mask_B1, y_BF, lax.dynamic_slice_in_dim(y_TF, slot, B))
        return lax.dynamic_update_slice_in_dim(y_TF, y_BF, slot, 0)

    def whole_blocks(group: Array, y_TF: Array) -> Array:
        w_DF, B = lax.dynamic_index_in_dim(w_EDF, group, keepdims=False), lengths[-1]

        def block(index: Array, y_TF: Array) -> Array:
            start = blocks.starts_E[group] + index * B
            return lax.dynamic_update_slice_in_dim(y_TF, product(start, B, w_DF), start, 0)

        return lax.fori_loop(0, blocks.whole_E[group], block, y_TF)

    y_TF = jnp.zeros((num_rows, D if transpose_w else F), dtype)
    y_TF = _for_each_last_block(blocks, lengths, last_block, y_TF)
    return _for_each_long_group(blocks, whole_blocks, y_TF)


def _row_by_row(x_TD: Rows, w_EDF: Array, group_sizes_E: Array, transpose_w: bool) -> Array:
    """One token's experts, when decoding: a product with a single row goes as fast as its matrix is read."""
    (num_rows, _, dtype), (_, D, F) = _size(x_TD), w_EDF.shape
    ends_E = jnp.cumsum(group_sizes_E).astype(jnp.uint32)  # unsigned: an index that may be negative takes one more step
    row_T = jnp.arange(num_rows, dtype=jnp.uint32)
    group_T = jnp.searchsorted(ends_E, row_T, side="right", method="compare_all").astype(jnp.uint32)

    def row(t: Array, y_TF: Array) -> Array:
        w_DF = lax.dynamic_index_in_dim(w_EDF, lax.dynamic_index_in_dim(group_T, t, keepdims=False), keepdims=False)
        y_F = row_product(_take(x_TD, t, 1)[0], w_DF.T if transpose_w else w_DF, _accumulator(dtype))
        return lax.dynamic_update_index_in_dim(y_TF, y_F.astype(dtype), t, 0)

    return lax.fori_loop(jnp.uint32(0), ends_E[-1], row, jnp.zeros((num_rows, D if transpose_w else F), dtype))


def _blocked_weight_gradient(x_TD: Rows, dy_TF: Rows, group_sizes_E: Array) -> Array:
    (num_rows, D, dtype), F, num_groups = _size(x_TD), _size(dy_TF)[1], group_sizes_E.shape[0]
    lengths = _block_lengths(num_rows, num_groups)
    blocks = _cut(group_sizes_E, lengths)
    accumulator = _accumulator(dtype)

    def product(x_BD: Array, dy_BF: Array) -> Array:
        return jnp.einsum("BD,BF->DF", x_BD, dy_BF, preferred_element_type=accumulator)

    def last_block(group: Array, B: int, dw_EDF: Array) -> Array:
        slot, mask_B1 = _last_block(blocks, group, B, num_rows)
        # Both: an infinity in another group's row times 0 would be a NaN in this one's gradient.
        x_BD, dy_BF = (jnp.where(mask_B1, _take(rows, slot, B), 0) for rows in (x_TD, dy_TF))
        return lax.dynamic_update_index_in_dim(dw_EDF, product(x_BD, dy_BF), group, 0)

    def whole_blocks(group: Array, dw_EDF: Array) -> Array:
        def block(index: Array, dw_DF: Array) -> Array:
            start = blocks.starts_E[group] + index * lengths[-1]
            return dw_DF + product(*(_take(rows, start, lengths[-1]) for rows in (x_TD, dy_TF)))

        dw_DF = lax.dynamic_index_in_dim(dw_EDF, group, keepdims=False)
        dw_DF = lax.fori_loop(0, blocks.whole_E[group], block, dw_DF)
        return lax.dynamic_update_index_in_dim(dw_EDF, dw_DF, group, 0)

    dw_EDF = _for_each_last_block(blocks, lengths, last_block, jnp.zeros((num_groups, D, F), accumulator))
    return _for_each_long_group(blocks, whole_blocks, dw_EDF).astype(dtype)
