"""Norm, linear maps, SwiGLU and rotary embedding.

B batch, S sequence, T tokens or rows, D model, F feed-forward or outputs, R rotary pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moe_jax.config import ModelConfig, RoPEConfig
from moe_jax.ops.packed_matmul import packed_matmul, unpacked
from moe_jax.ops.quantization import Quantized, rounded
from moe_jax.ops.quantized_matmul import Recipe, low_precision_matmul
from moe_jax.ops.row_product import row_product
from moe_jax.sharding import on_weight_shards


class Rounding(NamedTuple):
    """Weights rounded to 4 bits as they are used; a scale for so many inputs of each output."""

    block: int


class Initializer:
    """Draws a model's weights: normal with the config's standard deviation, float32."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        self.std = cfg.initializer_range
        self.rngs = rngs
        self.quantization = _quantization(cfg)

    def weight(self, shape: tuple[int, ...], axes: tuple[str | None, ...], roles: str) -> nnx.Param:
        """A weight with a logical axis name per dimension (`sharding.RULES`) and a role per dimension.

        Roles: `i` the dimensions contracted with the input, `o` those of the output, `b` a stack of matrices. They
        tell the optimizer which weights are matrices, and how; an empty string is for tables, which are not. Matrices
        also know in what their products are computed (`ModelConfig.quantization`).
        """
        value = self.std * jax.random.normal(self.rngs.params(), shape, jnp.float32)
        return nnx.Param(value, axes=axes, roles=roles, quantization=self.quantization if roles else None)


def _quantization(cfg: ModelConfig) -> Recipe | Rounding | None:
    if cfg.quantization == "none":
        return None
    if cfg.quantization == "int4":
        return Rounding(cfg.quantization_block)
    return Recipe("e4m3" if cfg.quantization == "fp8" else "int8", cfg.quantization_block or None)


def constant(value: float, size: int, axis: str | None) -> nnx.Param:
    """A vector of weights that starts constant: norms' scales, biases."""
    return nnx.Param(jnp.full((size,), value, jnp.float32), axes=(axis,), roles="")


def linear(x: Array, w: nnx.Param) -> Array:
    """x · w, [..., *inputs] · [*inputs, *outputs] → [..., *outputs] of x's dtype; inputs and outputs are w's roles.

    Where w's products are quantised, each device does it with its tokens and its shard of w. A packed weight (a
    `Quantized` [*outputs, D] in w's place, `interop.packed_weights`) is one chunk after the other made floats.
    """
    array, contracted = w[...], w.get_metadata("roles").count("i")
    if isinstance(array, Quantized):
        rows, outputs = x.shape[: x.ndim - contracted], array.shape[:-1]
        w_FD = jax.tree.map(lambda a: a.reshape(math.prod(outputs), a.shape[-1]), array)
        y_TF = packed_matmul(x.reshape(math.prod(rows), -1), w_FD)
        return y_TF.reshape(*rows, *outputs)
    quantization = w.get_metadata("quantization")
    if quantization is None:
        return product(x, array, contracted)

    def quantized_product(x: Array, w: Array) -> Array:
        rows, outputs = x.shape[: x.ndim - contracted], w.shape[contracted:]
        x_TD = x.reshape(math.prod(rows), -1)
        w_DF = w.reshape(x_TD.shape[1], -1)
        if isinstance(quantization, Recipe):
            y_TF = low_precision_matmul(x_TD, w_DF, quantization)
        else:
            y_TF = product(x_TD, rounded(w_DF, "int4", (quantization.block, 1)))
        return y_TF.reshape(*rows, *outputs)

    axes = w.get_metadata("axes")[-array.ndim :]
    return on_weight_shards(quantized_product, x, array.astype(x.dtype), axes, contracted)


def in_floats(w: nnx.Param, like: Array) -> Array:
    """A weight of one input axis, [D, *outputs], in the dtype of `like`; a packed one as long as this is used."""
    value = w[...]
    return jnp.moveaxis(unpacked(value, like), -1, 0) if isinstance(value, Quantized) else value.astype(like.dtype)


def product(x: Array, w: Array, contracted: int = 1, dtype: Any = None) -> Array:
    """x · w over the last `contracted` dimensions of x and the first ones of w.

    Args:
        x: [..., *inputs].
        w: [*inputs, *outputs]; taken in x's dtype.
        contracted: how many dimensions the inputs have.
        dtype: of the result [..., *outputs]; x's if not given.
    """
    w, dtype = w.astype(x.dtype), dtype or x.dtype
    rows, outputs = x.shape[: x.ndim - contracted], w.shape[contracted:]
    mesh = jax.sharding.get_abstract_mesh()

    def dot(x: Array, w: Array) -> Array:
        return _dot(contracted, dtype, x, w)

    def decoding(x: Array, w: Array) -> Array:
        accumulator = jnp.promote_types(dtype, jnp.float32)
        y = row_product(x.reshape(-1), w.reshape(-1, math.prod(outputs)), accumulator)
        return y.astype(dtype).reshape(*rows, *outputs)

    if math.prod(rows) == 1 and (mesh.empty or mesh.size == 1):
        return jax.lax.platform_dependent(x, w, cpu=decoding, default=dot)
    return dot(x, w)


def _product(contracted: int, dtype: Any, x: Array, w: Array) -> Array:
    dims = tuple(range(x.ndim - contracted, x.ndim)), tuple(range(contracted))
    return jax.lax.dot_general(x, w, (dims, ((), ())), preferred_element_type=dtype)


def _product_gradient(contracted: int, dtype: Any, residuals: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    """Of x and w. For w's the narrower of the two factors is turned, which XLA:CPU copies for that: JAX's own rule
    always turns dy, and makes two of the gradient of a SwiGLU's gate and up (not measured on accelerators)."""
    x, w = residuals
    rows, inputs = tuple(range(x.ndim - contracted)), tuple(range(contracted))
    dot = partial(jax.lax.dot_general, preferred_element_type=dtype)
    dx = dot(dy, w, ((tuple(range(len(rows), dy.ndim)), tuple(range(contracted, w.ndim))), ((), ())))
    if math.prod(w.shape[:contracted]) <= math.prod(w.shape[contracted:]):
        dw = dot(x, dy, ((rows, rows), ((), ())))
    else:
        dw = dot(dy, x, ((rows, rows), ((), ())))
        dw = jnp.moveaxis(dw, range(-contracted, 0), inputs)
    return dx.astype(x.dtype), dw.astype(w.dtype)


_dot = jax.custom_vjp(_product, nondiff_argnums=(0, 1))
_dot.defvjp(lambda contracted, dtype, x, w: (_product(contracted, dtype, x, w), (x, w)), _product_gradient)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, computed in float32, returned in x's dtype."""

    def __init__(self, size: int, eps: float):
        self.weight = constant(1.0, size, None)
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return (x32 * scale * self.weight[...]).astype(x.dtype)


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) · up(x)); gate and up are one product."""

    def __init__(self, hidden_size: int, intermediate_size: int, init: Initializer):
        # The two stand beside each other, not end to end, so that a shard of F has both.
        self.gate_up_D2F = init.weight((hidden_size, 2, intermediate_size), ("embed", None, "mlp"), "ioo")
        self.down_FD = init.weight((intermediate_size, hidden_size), ("mlp", "embed"), "io")

    def __call__(self, x_BSD: Array) -> Array:
        return linear(gated(linear(x_BSD, self.gate_up_D2F)), self.down_FD)


@jax.custom_vjp
def gated(gate_up: Array) -> Array:
    """silu(gate) · up, [..., 2, F] → [..., F]."""
    gate, up = gate_and_up(gate_up)
    return jax.nn.silu(gate) * up


def gate_and_up(gate_up: Array) -> tuple[Array, Array]:
    """Of [..., 2, F], [..., F] each. The gradient keeps them apart: of one array that a scan over layers has kept,
    XLA:CPU takes twice as long to make it."""
    return gate_up[..., 0, :], gate_up[..., 1, :]


def gated_gradient(kept: tuple[Array, Array], dy: Array) -> Array:
    """The gradient of `gated`, [..., 2, F], made in one array: JAX's own pads each half to the whole and adds them."""
    gate, up = kept
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    return jnp.stack([dy * up * (sigmoid + silu * (1 - sigmoid)), dy * silu], axis=-2)


gated.defvjp(lambda gate_up: (gated(gate_up), gate_and_up(gate_up)), lambda kept, dy: (gated_gradient(kept, dy),))


def rematerialised(body: Callable, remat: str) -> Callable:
    """`body` with its backward pass computing anew what `ModelConfig.remat` says."""
    if remat == "none":
        return body
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
    return jax.checkpoint(body, policy=policy)


class Rotation(NamedTuple):
    """Cosines and sines of each position's rotation angles, float32."""

    cos_BSR: Array
    sin_BSR: Array


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature m = 0.1 · mscale · ln(factor) + 1 (arXiv:2309.00071; DeepSeek-V3's code)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 and mscale else 1.0


def rope_frequencies(cfg: RoPEConfig, head_dim: int) -> Array:
    """Angle per position of each rotary pair, [head_dim / 2] float32, with YaRN's or Llama 3's scaling."""
    pair_R = jnp.arange(head_dim // 2, dtype=jnp.float32)
    frequency_R = cfg.theta ** (-2.0 * pair_R / head_dim)
    if cfg.scaling == "yarn":

        def pair_that_turns(times: float) -> float:
            return head_dim * math.log(cfg.original_max_position / (times * 2 * math.pi)) / (2 * math.log(cfg.theta))

        low = max(math.floor(pair_that_turns(cfg.beta_fast)), 0)
        high: float = min(math.ceil(pair_that_turns(cfg.beta_slow)), head_dim - 1)
        high = high + 0.001 if low == high else high
        keep_R = 1.0 - jnp.clip((pair_R - low) / (high - low), 0.0, 1.0)
        return frequency_R / cfg.factor * (1 - keep_R) + frequency_R * keep_R
    if cfg.scaling == "llama3":
        turns_R = cfg.original_max_position * frequency_R / (2 * math.pi)
        keep_R = (turns_R - cfg.low_freq_factor) / (cfg.high_freq_factor - cfg.low_freq_factor)
        keep_R = jnp.clip(keep_R, 0.0, 1.0)
        return frequency_R / cfg.factor * (1 - keep_R) + frequency_R * keep_R
    return frequency_R


def rotation(positions_BS: Array, cfg: RoPEConfig, head_dim: int) -> Rotation:
    """The rotation of each position; with YaRN its length is m(mscale) / m(mscale_all_dim)."""
    angle_BSR = positions_BS[..., None].astype(jnp.float32) * rope_frequencies(cfg, head_dim)
    scale = 1.0
    if cfg.scaling == "yarn":
        scale = yarn_mscale(cfg.factor, cfg.mscale) / yarn_mscale(cfg.factor, cfg.mscale_all_dim)
    return Rotation(jnp.cos(angle_BSR) * scale, jnp.sin(angle_BSR) * scale)


def apply_rope(x_BSHR: Array, rot: Rotation, layout: str) -> Array:
    """Rotates the pairs of x [B, S, H, 2R]: (i, i + R) in layout "half", (2i, 2i + 1) in "interleaved".

    The result keeps the layout of its input, so that caches are exchangeable only within one layout.
    """
    x = x_BSHR.astype(jnp.float32)
    cos, sin = rot.cos_BSR[:, :, None, :], rot.sin_BSR[:, :, None, :]
    if layout == "half":
        a, b = jnp.split(x, 2, axis=-1)
        rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    else:
        a, b = x[..., 0::2], x[..., 1::2]
        rotated = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape)
    return rotated.astype(x_BSHR.dtype)
