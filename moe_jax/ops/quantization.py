"""Arrays in 8 and 4 bits: one float32 scale per block, values rounded to the nearest, ties to even.

qwix 0.1.8 was tried first. Its `QArray` is a plain pytree, but its tiles must divide the shape, its quantised training
shares scales between experts and knows no tiles in the grouped product, keeps full-width residuals for tiled ones, and
is switched on by intercepting JAX functions by the name of the module that calls them, not by a function of arrays.

Shapes: R rows, C columns; P, Q blocks of rows and of columns; "..." leading axes (stacked layers, experts), which never
share a scale.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array

Format = Literal["int8", "int4", "e4m3", "e5m2"]
Block = tuple[int | None, int | None]
"""Rows and columns that share a scale; None is all of them. (None, None) is a scale per matrix, (None, 1) one per
output channel of a weight [D, F], (1, 128) and (128, 128) are DeepSeek-V3's for activations and weights."""

_DTYPES: dict[str, Any] = {"int8": jnp.int8, "int4": jnp.int8, "e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2}
LARGEST = {"int8": 127.0, "int4": 7.0, "e4m3": 448.0, "e5m2": 57344.0}
"""What the largest magnitude of a block becomes. Integers are symmetric: -128 and -8 are not used."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """An array [..., R, C] as values times scales. A pytree of two arrays, which `vmap` and `scan` may stack."""

    values: Array
    """[..., R, C] of the format's type, or of "e4m3" its bits as uint8 (to slice an fp8 array, XLA:CPU turns all of it
    into halves); of "int4" [..., R, ceil(C / 2)] uint8, the even column in the low half."""
    scales: Array
    """float32 [..., P, Q]: x = value · scale. NaN where the block held an infinity or a NaN."""
    format: Format = dataclasses.field(metadata={"static": True})
    block: tuple[int, int] = dataclasses.field(metadata={"static": True})
    """Rows and columns of a block; those at the edges may be smaller."""
    columns: int = dataclasses.field(metadata={"static": True})
    """C"""
    inputs: Format | None = dataclasses.field(default=None, metadata={"static": True})
    """Of a weight in `packed_matmul`: what its other operand is rounded to; None: it stays as it is."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.values.shape[:-1], self.columns)

    @property
    def ndim(self) -> int:
        return self.values.ndim

    def __getitem__(self, index: Any) -> Quantized:
        """Some of the matrices: an index of the leading axes."""
        return jax.tree.map(lambda x: x[index], self)

    def numbers(self) -> Array:
        """The values [..., R, C] one to an element: "int4" as int8."""
        if self.format != "int4":
            return jax.lax.bitcast_convert_type(self.values, _DTYPES[self.format])
        # The conversion of a type that XLA knows: shifts of bytes are ten times slower on CPUs.
        pairs = jax.lax.bitcast_convert_type(self.values, jnp.int4).astype(jnp.int8)
        return pairs.reshape(*self.values.shape[:-1], -1)[..., : self.columns]

    def transposed(self) -> Quantized:
        """[..., C, R]; the blocks turn with it. Packed "int4" is unpacked: it becomes "int8" of the same numbers."""
        values, scales = (jnp.swapaxes(x, -1, -2) for x in (self.numbers(), self.scales))
        format = "int8" if self.format == "int4" else self.format
        return Quantized(values, scales, format, (self.block[1], self.block[0]), self.values.shape[-2])


def quantize(x: Array, format: Format, block: Block, *, power_of_two: bool = False) -> Quantized:
    """Values and scales of an array [..., R, C], the scale of a block being max |x| / the format's largest number.

    - A block of zeros gives zeros. Below the smallest normal float32 a scale does not go.
    - A block that holds an infinity or a NaN is NaN as a whole: its scale is, and so is all that is made of it. An
      error shows at once, in every format, also in those that have no NaN themselves.
    - Sizes need not be multiples of the block: those at the edge are as small as they are.

    Args:
        x: any float type; the arithmetic is float32.
        format: "int8" (-127 … 127), "int4" (-7 … 7), "e4m3" (±448) or "e5m2" (±57344).
        block: rows and columns that share a scale.
        power_of_two: round scales up to powers of two (`ue8m0` of DeepSeek-V3.1): scaling is then exact.

    Raises:
        ValueError: an unknown format, a block of less than 1, an array of less than two dimensions.
    """
    if format not in get_args(Format):
        raise ValueError(f"format = {format!r}: must be one of {', '.join(get_args(Format))}")
    if x.ndim < 2 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"quantize: got {x.dtype} {x.shape}; it must be of a float type and have two dimensions or more"
        )
    sizes = x.shape[-2:]
    rows, columns = (max(size, 1) if b is None else b for b, size in zip(block, sizes, strict=True))
    if min(rows, columns) < 1:
        raise ValueError(f"block = {block}: must be at least 1 each, or None for the whole axis")
    x = x.astype(jnp.float32)
    largest = LARGEST[format]
    max_PQ = _block_max(jnp.abs(x), (rows, columns))
    # Not a constant: XLA would make a division by one a product with its rounded inverse, at times one bit off.
    scales = max_PQ / jnp.where(max_PQ > 0, largest, 1)
    scales = jnp.maximum(scales, jnp.finfo(jnp.float32).tiny)
    if power_of_two:
        mantissa, exponent = jnp.frexp(scales)
        scales = jnp.ldexp(jnp.ones_like(scales), exponent - (mantissa == 0.5))
    broken = ~jnp.isfinite(scales)
    scaled = x / _spread(jnp.where(broken, 1, scales), (rows, columns), sizes)
    scaled = jnp.where(_spread(broken, (rows, columns), sizes), 0, jnp.clip(scaled, -largest, largest))
    values = (jnp.round(scaled) if format in ("int8", "int4") else scaled).astype(_DTYPES[format])
    if format == "int4":
        values = _pack(values)
    return Quantized(values, jnp.where(broken, jnp.nan, scales), format, (rows, columns), sizes[1])


def dequantize(q: Quantized, dtype: Any = jnp.float32) -> Array:
    """value · scale, [..., R, C], multiplied in float32 and rounded once."""
    numbers = as_float32(q.numbers())
    return (numbers * _spread(q.scales, q.block, numbers.shape[-2:])).astype(dtype)


def as_float32(numbers: Array) -> Array:
    """Values of any format as float32."""
    if numbers.dtype != jnp.float8_e4m3fn:
        return numbers.astype(jnp.float32)

    def by_bits(numbers: Array) -> Array:
        # 4 bits of exponent and 3 of mantissa are the same in the middle of a half, whose exponent counts from 8 less.
        # XLA's own conversion takes 16 times as long on CPUs.
        bits = jax.lax.bitcast_convert_type(numbers, jnp.uint8).astype(jnp.uint16)
        half = jax.lax.bitcast_convert_type((bits & 0x80) << 8 | (bits & 0x7F) << 7, jnp.float16)
        return jnp.where(bits & 0x7F == 0x7F, jnp.nan, half.astype(jnp.float32) * 256)

    return jax.lax.platform_dependent(numbers, cpu=by_bits, default=lambda numbers: numbers.astype(jnp.float32))


def rounded(x: Array, format: Format, block: Block) -> Array:
    """`x` as `quantize` would keep it, of x's dtype; the gradient passes as if nothing were rounded (straight through).

    For quantisation-aware training (arXiv:1712.05877).
    """
    return _rounded(x, format, block)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _rounded(x: Array, format: Format, block: Block) -> Array:
    return dequantize(quantize(x, format, block), x.dtype)


_rounded.defvjp(lambda x, format, block: (_rounded(x, format, block), None), lambda format, block, _, dy: (dy,))


def row_scales(q: Quantized) -> Array:
    """The scale of each row, [..., R, Q]."""
    return _spread(q.scales, (q.block[0], 1), (q.shape[-2], q.scales.shape[-1]))


def column_scales(q: Quantized) -> Array:
    """The scale of each column, [..., P, C]."""
    return _spread(q.scales, (1, q.block[1]), (q.scales.shape[-2], q.columns))


def _block_max(x: Array, block: tuple[int, int]) -> Array:
    """[..., R, C], not negative → [..., P, Q], the largest number of each block."""
    for axis, size in ((-2, block[0]), (-1, block[1])):
        length = x.shape[axis]
        axis += x.ndim
        padding = [(0, 0)] * x.ndim
        padding[axis] = (0, -length % size)
        x = jnp.pad(x, padding)
        x = jnp.max(x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :]), axis=axis + 1)
    return x


def _spread(scales: Array, block: tuple[int, int], sizes: tuple[int, ...]) -> Array:
    """[..., P, Q] → [..., R, C], each block's number in all its places."""
    for axis, width, size in ((-2, block[0], sizes[0]), (-1, block[1], sizes[1])):
        if scales.shape[axis] == size:
            continue
        axis += scales.ndim
        repeated = (*scales.shape[: axis + 1], width, *scales.shape[axis + 1 :])
        scales = jnp.broadcast_to(jnp.expand_dims(scales, axis + 1), repeated)  # jnp.repeat would look each one up
        scales = scales.reshape(*repeated[:axis], -1, *repeated[axis + 2 :])
        scales = jax.lax.slice_in_dim(scales, 0, size, axis=axis)
    return scales


def _pack(values: Array) -> Array:
    """int8 in -8 … 7 [..., C] → uint8 [..., ceil(C / 2)]."""
    values = jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, values.shape[-1] % 2)])
    low, high = (jax.lax.bitcast_convert_type(values[..., i::2], jnp.uint8) for i in (0, 1))
    return (low & 0x0F) | (high << 4)
