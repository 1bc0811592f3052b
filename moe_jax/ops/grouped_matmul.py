"""Products of row groups with one matrix each: the work of sparse experts.

Shapes: T rows (token-expert pairs, sorted by group), D input width, F output width, E experts (groups),
B rows of a block.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array, lax

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


# ---------------------------------------------------------------------------------------------------------------------
# The choice, and the rule for gradients. An implementation is two functions:
#   product(x_TD, w_EDF, group_sizes_E, transpose_w) -> y_TF        (transpose_w: x_TF, w_EDF -> y_TD)
#   weight_gradient(x_TD, dy_TF, group_sizes_E)      -> dw_EDF
# ---------------------------------------------------------------------------------------------------------------------


def _choose(implementation: str | None, blocked: Callable, ragged: Callable, *args: Array) -> Array:
    """The one place that chooses. By the platform the program is lowered for, not by the machine that lowers it."""
    if implementation == "blocked":
        return blocked(*args)
    if implementation == "ragged":
        return ragged(*args)
    return lax.platform_dependent(*args, cpu=blocked, default=ragged)


def _product(x_TD: Array, w_EDF: Array, group_sizes_E: Array, transpose_w: bool, implementation: str | None) -> Array:
    blocked = partial(_blocked_product, transpose_w=transpose_w)
    ragged = partial(_ragged_product, transpose_w=transpose_w)
    with jax.named_scope("grouped_matmul"):
        return _choose(implementation, blocked, ragged, x_TD, w_EDF, group_sizes_E)


def _weight_gradient(x_TD: Array, dy_TF: Array, group_sizes_E: Array, implementation: str | None) -> Array:
    with jax.named_scope("grouped_matmul_dw"):
        return _choose(implementation, _blocked_weight_gradient, _ragged_weight_gradient, x_TD, dy_TF, group_sizes_E)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped_matmul(x_TD: Array, w_EDF: Array, group_sizes_E: Array, implementation: str | None) -> Array:
    return _product(x_TD, w_EDF, group_sizes_E, False, implementation)


def _grouped_matmul_forward(x_TD: Array, w_EDF: Array, group_sizes_E: Array, implementation: str | None):
    return _grouped_matmul(x_TD, w_EDF, group_sizes_E, implementation), (x_TD, w_EDF, group_sizes_E)


def _grouped_matmul_backward(implementation: str | None, residuals: tuple[Array, Array, Array], dy_TF: Array):
    x_TD, w_EDF, group_sizes_E = residuals
    dx_TD = _product(dy_TF, w_EDF, group_sizes_E, True, implementation)
    dw_EDF = _weight_gradient(x_TD, dy_TF, group_sizes_E, implementation)
    return dx_TD, dw_EDF, None


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
# ragged: XLA's ragged dot, a native kernel on TPU. (XLA:CPU multiplies every row with every matrix.)
# ---------------------------------------------------------------------------------------------------------------------

_RAGGED_CONTRACTION = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)


def _ragged_product(x_TD: Array, w_EDF: Array, group_sizes_E: Array, transpose_w: bool) -> Array:
    w_EDF = w_EDF.swapaxes(1, 2) if transpose_w else w_EDF
    y_TF = lax.ragged_dot(x_TD, w_EDF, group_sizes_E, preferred_element_type=_accumulator(x_TD.dtype))
    # What a kernel leaves in rows that belong to no group is not specified.
    grouped_T = jnp.arange(x_TD.shape[0]) < jnp.sum(group_sizes_E)
    return jnp.where(grouped_T[:, None], y_TF, 0).astype(x_TD.dtype)


def _ragged_weight_gradient(x_TD: Array, dy_TF: Array, group_sizes_E: Array) -> Array:
    dw_EDF = lax.ragged_dot_general(
        x_TD, dy_TF, group_sizes_E, _RAGGED_CONTRACTION, preferred_element_type=_accumulator(x_TD.dtype)
    )
    return dw_EDF.astype(x_TD.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# blocked
#
# Sorted rows make every group one contiguous slice, which is cut here into blocks: long ones, and a short one for the
# rest where it fits. Blocks are written in order and in place. A block that reaches past its group's end, or would
# reach past the array's and is moved back, keeps by a mask what stands in the rows that are not its own. The
# loops visit only groups that have rows and slice a group's matrix out once, not once per block.
# ---------------------------------------------------------------------------------------------------------------------


def _block_lengths(num_rows: int, num_groups: int) -> tuple[int, int]:
    """Rows of a long and of a short block.

    Longer blocks reach a better rate; a group's last block wastes on average half its length. 128 and 32 rows were
    measured best on CPUs from about 100 rows per group on; below (decoding) a long block holds an average group.
    """
    average = -(-num_rows // num_groups)
    long = min(128, max(8, 1 << (average - 1).bit_length()), num_rows)
    return long, min(long, max(8, long // 4))


def _for_each_group(group_sizes_E: Array, visit: Callable[[Array, Array, Array, Any], Any], carry: Any) -> Any:
    """Folds `carry = visit(group, start, end, carry)` over the groups that have rows, in order."""
    group_sizes_E = group_sizes_E.astype(jnp.int32)
    ends_E = jnp.cumsum(group_sizes_E)
    present_E = jnp.nonzero(group_sizes_E, size=group_sizes_E.shape[0], fill_value=0)[0]

    def body(index: Array, carry: Any) -> Any:
        group = present_E[index]
        return visit(group, ends_E[group] - group_sizes_E[group], ends_E[group], carry)

    return lax.fori_loop(0, jnp.count_nonzero(group_sizes_E), body, carry)


def _for_each_block(
    start: Array, end: Array, lengths: tuple[int, int], visit: Callable[[Array, int, Any], Any], carry: Any
) -> Any:
    """Folds `carry = visit(begin, B, carry)` over blocks of B rows that cover [start, end), in order.

    All are long, save that a remainder that fits a short block gets one.
    """
    long, short = lengths
    num_long = jnp.maximum(0, end - start + long - 1 - short) // long
    rest = start + num_long * long
    num_short = (end - rest + short - 1) // short
    carry = lax.fori_loop(0, num_long, lambda i, carry: visit(start + i * long, long, carry), carry)
    return lax.fori_loop(0, num_short, lambda i, carry: visit(rest + i * short, short, carry), carry)


def _block_mask(begin: Array, end: Array, B: int, num_rows: int) -> tuple[Array, Array]:
    """Where a block's slice starts so that it fits the array, and which of the slice's rows [B, 1] are the block's."""
    slot = jnp.minimum(begin, num_rows - B)
    rows_B1 = slot + jnp.arange(B)[:, None]
    return slot, (rows_B1 >= begin) & (rows_B1 < end)


def _blocked_product(x_TD: Array, w_EDF: Array, group_sizes_E: Array, transpose_w: bool) -> Array:
    num_rows, (num_groups, D, F) = x_TD.shape[0], w_EDF.shape
    lengths = _block_lengths(num_rows, num_groups)
    einsum = "BF,DF->BD" if transpose_w else "BD,DF->BF"

    def visit_group(group: Array, start: Array, end: Array, y_TF: Array) -> Array:
        w_DF = lax.dynamic_index_in_dim(w_EDF, group, keepdims=False)

        def visit_block(begin: Array, B: int, y_TF: Array) -> Array:
            slot, mask_B1 = _block_mask(begin, end, B, num_rows)
            x_BD = lax.dynamic_slice_in_dim(x_TD, slot, B)
            y_BF = jnp.einsum(einsum, x_BD, w_DF, preferred_element_type=_accumulator(x_TD.dtype))
            y_BF = jnp.where(mask_B1, y_BF.astype(y_TF.dtype), lax.dynamic_slice_in_dim(y_TF, slot, B))
            return lax.dynamic_update_slice_in_dim(y_TF, y_BF, slot, 0)

        return _for_each_block(start, end, lengths, visit_block, y_TF)

    return _for_each_group(group_sizes_E, visit_group, jnp.zeros((num_rows, D if transpose_w else F), x_TD.dtype))


def _blocked_weight_gradient(x_TD: Array, dy_TF: Array, group_sizes_E: Array) -> Array:
    (num_rows, D), F, num_groups = x_TD.shape, dy_TF.shape[1], group_sizes_E.shape[0]
    long, short = lengths = _block_lengths(num_rows, num_groups)

    def visit_group(group: Array, start: Array, end: Array, dw_EDF: Array) -> Array:
        def block_gradient(begin: Array, B: int) -> Array:
            slot, mask_B1 = _block_mask(begin, end, B, num_rows)
            x_BD = jnp.where(mask_B1, lax.dynamic_slice_in_dim(x_TD, slot, B), 0)
            dy_BF = lax.dynamic_slice_in_dim(dy_TF, slot, B)
            return jnp.einsum("BD,BF->DF", x_BD, dy_BF, preferred_element_type=_accumulator(x_TD.dtype))

        # The first block starts the sum: adding it to zeros costs two more passes over [D, F], as much as a small
        # group's product.
        first_is_short = end - start <= short
        dw_DF = lax.cond(first_is_short, lambda: block_gradient(start, short), lambda: block_gradient(start, long))
        dw_DF = _for_each_block(
            jnp.minimum(start + long, end),
            end,
            lengths,
            lambda begin, B, dw_DF: dw_DF + block_gradient(begin, B),
            dw_DF,
        )
        return lax.dynamic_update_index_in_dim(dw_EDF, dw_DF.astype(dw_EDF.dtype), group, 0)

    return _for_each_group(group_sizes_E, visit_group, jnp.zeros((num_groups, D, F), x_TD.dtype))
