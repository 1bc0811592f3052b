"""Multi-head latent attention and grouped-query attention, each in its training and its cached form.

B batch, S sequence, T cached positions, D model, H heads, K key-value heads, C latent, N part of a head without
positions, R part with, V value width, Q query latent.

Both classes have the same three methods. `entries` are the two arrays that a position leaves in the cache;
`attend` is the form for training and prefill, over the entries of the sequence itself; `attend_cached` is the form
for decoding, over the entries of a cache.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moe_jax.config import AttentionConfig, ModelConfig
from moe_jax.model.layers import (
    Initializer,
    RMSNorm,
    Rotation,
    apply_rope,
    constant,
    in_floats,
    linear,
    product,
    yarn_mscale,
)
from moe_jax.ops.attention import Branches, Tokens, attention, cached_attention, seen_by
from moe_jax.ops.quantization import Quantized
from moe_jax.sharding import by_queries


class Entries(NamedTuple):
    """What attention keeps of each position: MLA (latent, rotary key), GQA (keys, values); [B, S, ...] each.

    In a cache positions come last but one, [B, T, C] and [B, K, T, W]: heads outside, as the products want them, which
    would otherwise copy the cache for each token. A cache of one layer alone is [B·K, T, ·], or [T, ·] where that is
    one (`block.own_cache`).
    """

    first: Array
    second: Array


class MLA(nnx.Module):
    """Multi-head latent attention (DeepSeek-V2 §2.1, DeepSeek-V3 eq. 1-11).

    The cache holds the normalised latent and the rotated shared key, kv_lora_rank + qk_rope_head_dim numbers a
    position. Training expands them into keys and values per head; decoding absorbs the expansion into the query and
    the output, so that all heads read the latent itself.
    """

    def __init__(self, cfg: ModelConfig, init: Initializer):
        a, D = cfg.attention, cfg.hidden_size
        self.cfg = a
        N, R, V, H, C, Q = (
            a.qk_nope_head_dim,
            a.qk_rope_head_dim,
            a.v_head_dim,
            a.num_heads,
            a.kv_lora_rank,
            a.q_lora_rank,
        )
        if Q:
            self.query_a_DQ = init.weight((D, Q), ("embed", "latent"), "io")
            self.query_norm = RMSNorm(Q, a.latent_norm_eps)
        self.query_b = init.weight((Q or D, H, N + R), ("embed", "heads", "head"), "ioo")
        self.key_value_a_DC = init.weight((D, C + R), ("embed", "latent"), "io")
        self.key_value_norm = RMSNorm(C, a.latent_norm_eps)
        self.key_value_b_CHN = init.weight((C, H, N + V), ("embed", "heads", "head"), "ioo")
        self.output_HVD = init.weight((H, V, D), ("heads", "head", "embed"), "iio")
        self.absorbed: tuple[Array, Array] | None = None
        m = yarn_mscale(a.rope.factor, a.rope.mscale_all_dim) if a.rope.scaling == "yarn" else 1.0
        self.scale = (N + R) ** -0.5 * m * m

    def absorb(self) -> None:
        """Keeps the expansion's two halves as decoding reads them: cutting and turning them at each step costs more.
        A packed one stays packed."""
        expand_CHN = self.key_value_b_CHN[...]
        if not isinstance(expand_CHN, Quantized):
            self.absorbed = nnx.data(_absorbed(expand_CHN, self.cfg))

    def entries(self, x_BSD: Array, rot: Rotation) -> Entries:
        compressed = linear(x_BSD, self.key_value_a_DC)
        latent_BSC, key_BSR = jnp.split(compressed, [self.cfg.kv_lora_rank], axis=-1)
        key_BSR = apply_rope(key_BSR[:, :, None], rot, self.cfg.rope.layout)[:, :, 0]
        return Entries(self.key_value_norm(latent_BSC), key_BSR)

    def attend(self, x_BSD: Array, rot: Rotation, entries: Entries, tokens: Tokens | Branches) -> Array:
        query_BSHN, query_BSHR = self._queries(x_BSD, rot)

        # Between devices that share a sequence the latent travels, not the keys and values that are made of it.
        def mix(queries: tuple[Array, Any], keys: tuple[Entries, Any], expand_CHN: nnx.Param) -> Array:
            query, (latent_BTC, key_BTR) = queries[0], keys[0]
            expanded = linear(latent_BTC, expand_CHN)
            key_BTHN, value_BTHV = jnp.split(expanded, [self.cfg.qk_nope_head_dim], axis=-1)
            key_BTHR = jnp.broadcast_to(key_BTR[:, :, None], (*key_BTHN.shape[:3], key_BTR.shape[-1]))
            key = jnp.concatenate([key_BTHN, key_BTHR], axis=-1)
            return attention(query, key, value_BTHV, seen_by(queries[1], keys[1]), self.scale)

        query = jnp.concatenate([query_BSHN, query_BSHR], axis=-1)
        return self._output(by_queries(mix, (query, tokens), (entries, tokens), self.key_value_b_CHN))

    def attend_cached(self, x_BSD: Array, rot: Rotation, entries: Entries, mask_BST: Array) -> Array:
        query_BSHN, query_BSHR = self._queries(x_BSD, rot)
        parts = self.absorbed or _absorbed(in_floats(self.key_value_b_CHN, x_BSD), self.cfg)
        key_HNC, value_HCV = (part.astype(x_BSD.dtype) for part in parts)
        queries = jnp.einsum("BSHN,HNC->BSHC", query_BSHN, key_HNC), query_BSHR
        mixed_BSHC = cached_attention(queries, entries, entries.first, mask_BST, self.scale)
        return self._output(jnp.einsum("BSHC,HCV->BSHV", mixed_BSHC, value_HCV))

    def _queries(self, x_BSD: Array, rot: Rotation) -> tuple[Array, Array]:
        if self.cfg.q_lora_rank:
            x_BSD = self.query_norm(linear(x_BSD, self.query_a_DQ))
        query = linear(x_BSD, self.query_b)
        query_BSHN, query_BSHR = jnp.split(query, [self.cfg.qk_nope_head_dim], axis=-1)
        return query_BSHN, apply_rope(query_BSHR, rot, self.cfg.rope.layout)

    def _output(self, mixed_BSHV: Array) -> Array:
        return linear(mixed_BSHV, self.output_HVD)


def _absorbed(expand_CHN: Array, cfg: AttentionConfig) -> tuple[Array, Array]:
    """What the query absorbs of the expansion, [H, N, C], and what the output does, [H, C, V]."""
    key_HCN, value_HCV = jnp.split(jnp.moveaxis(expand_CHN, 1, 0), [cfg.qk_nope_head_dim], axis=-1)
    return key_HCN.swapaxes(1, 2), value_HCV


class GQA(nnx.Module):
    """Grouped-query attention (arXiv:2305.13245) with the optional biases and norms of Qwen and OLMoE."""

    def __init__(self, cfg: ModelConfig, init: Initializer):
        a, D = cfg.attention, cfg.hidden_size
        self.cfg = a
        H, K, W = a.num_heads, a.num_kv_heads, a.head_dim
        self.query_DHW = init.weight((D, H, W), ("embed", "heads", "head"), "ioo")
        self.key_DKW = init.weight((D, K, W), ("embed", "heads", "head"), "ioo")
        self.value_DKW = init.weight((D, K, W), ("embed", "heads", "head"), "ioo")
        self.output_HWD = init.weight((H, W, D), ("heads", "head", "embed"), "iio")
        if a.qkv_bias:
            self.query_bias = constant(0.0, H * W, None)
            self.key_bias = constant(0.0, K * W, None)
            self.value_bias = constant(0.0, K * W, None)
        if a.qk_norm != "none":
            self.query_norm = RMSNorm(W if a.qk_norm == "head" else H * W, cfg.rms_norm_eps)
            self.key_norm = RMSNorm(W if a.qk_norm == "head" else K * W, cfg.rms_norm_eps)
        self.joined_DJW: Array | None = None
        m = yarn_mscale(a.rope.factor, a.rope.mscale_all_dim) if a.rope.scaling == "yarn" else 1.0
        self.scale = W**-0.5 * m * m

    def absorb(self) -> None:
        """Joins the three projections for decoding, where one product with few rows is faster than three."""
        weights = [w for w in (self.query_DHW, self.key_DKW, self.value_DKW) if w is not None]
        mesh = jax.sharding.get_abstract_mesh()
        plain = not any(isinstance(w[...], Quantized) or w.get_metadata("quantization") for w in weights)
        if plain and (mesh.empty or mesh.size == 1):
            self.joined_DJW = nnx.data(jnp.concatenate([w[...] for w in weights], axis=1))
            self.query_DHW = self.key_DKW = self.value_DKW = None

    def entries(self, x_BSD: Array, rot: Rotation) -> Entries:
        key_BSKW, value_BSKW = self._project(x_BSD, slice(1, 3))
        if self.cfg.qkv_bias:
            key_BSKW += self.key_bias[...].reshape(key_BSKW.shape[2:]).astype(x_BSD.dtype)
            value_BSKW += self.value_bias[...].reshape(value_BSKW.shape[2:]).astype(x_BSD.dtype)
        if self.cfg.qk_norm != "none":
            key_BSKW = _norm_heads(self.key_norm, key_BSKW, self.cfg)
        return Entries(apply_rope(key_BSKW, rot, self.cfg.rope.layout), value_BSKW)

    def attend(self, x_BSD: Array, rot: Rotation, entries: Entries, tokens: Tokens | Branches) -> Array:
        def mix(queries: tuple[Array, Any], keys: tuple[Entries, Any], _: None) -> Array:
            return attention(queries[0], *keys[0], seen_by(queries[1], keys[1]), self.scale)

        return self._output(by_queries(mix, (self._queries(x_BSD, rot), tokens), (entries, tokens), None))

    def attend_cached(self, x_BSD: Array, rot: Rotation, entries: Entries, mask_BST: Array) -> Array:
        queries, (keys, values) = self._queries(x_BSD, rot), entries
        return self._output(cached_attention([queries], [keys], values, mask_BST, self.scale))

    def _project(self, x_BSD: Array, part: slice) -> list[Array]:
        """Of x's queries, keys and values a part. Joined, a layer asks twice for one and the same product, which the
        compiler makes once."""
        if self.joined_DJW is None:
            return [linear(x_BSD, w) for w in (self.query_DHW, self.key_DKW, self.value_DKW)[part] if w is not None]
        H, K = self.cfg.num_heads, self.cfg.num_kv_heads
        return jnp.split(product(x_BSD, self.joined_DJW), [H, H + K], axis=2)[part]

    def _queries(self, x_BSD: Array, rot: Rotation) -> Array:
        (query_BSHW,) = self._project(x_BSD, slice(1))
        if self.cfg.qkv_bias:
            query_BSHW += self.query_bias[...].reshape(query_BSHW.shape[2:]).astype(x_BSD.dtype)
        if self.cfg.qk_norm != "none":
            query_BSHW = _norm_heads(self.query_norm, query_BSHW, self.cfg)
        return apply_rope(query_BSHW, rot, self.cfg.rope.layout)

    def _output(self, mixed_BSHW: Array) -> Array:
        return linear(mixed_BSHW, self.output_HWD)


def _norm_heads(norm: RMSNorm, x_BSHW: Array, cfg: AttentionConfig) -> Array:
    if cfg.qk_norm == "head":
        return norm(x_BSHW)
    return norm(x_BSHW.reshape(*x_BSHW.shape[:2], -1)).reshape(x_BSHW.shape)


def entry_shapes(cfg: ModelConfig, batch: int, length: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of one layer's cache for `length` positions."""
    a = cfg.attention
    if a.kind == "mla":
        return (batch, length, a.kv_lora_rank), (batch, length, a.qk_rope_head_dim)
    shape = (batch, a.num_kv_heads, length, a.head_dim)
    return shape, shape


def make_attention(cfg: ModelConfig, init: Initializer) -> MLA | GQA:
    return MLA(cfg, init) if cfg.attention.kind == "mla" else GQA(cfg, init)


def rotary_dim(cfg: AttentionConfig) -> int:
    """Width of the rotated part of a head."""
    return cfg.qk_rope_head_dim if cfg.kind == "mla" else cfg.head_dim
