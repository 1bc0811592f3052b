"""Attention layers against numpy in float64, in their training and their cached form.

B batch, S sequence, D model, H heads, K key-value heads.
"""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.config import AttentionConfig, ModelConfig, RoPEConfig
from moe_jax.model.attention import GQA, MLA, entry_shapes, make_attention, rotary_dim
from moe_jax.model.layers import Initializer, rotation
from moe_jax.ops.attention import Causal, Tokens

B, S, D = 2, 7, 16
EPS = 1e-2  # large, so that a wrong eps shows
ROPE = RoPEConfig(theta=50.0, layout="interleaved")
YARN = RoPEConfig(
    theta=50.0, layout="interleaved", scaling="yarn", factor=8.0, original_max_position=16, mscale_all_dim=1.0
)
MLA_CONFIG = AttentionConfig(
    kind="mla",
    num_heads=3,
    kv_lora_rank=10,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=5,
    latent_norm_eps=0.5,
    rope=ROPE,
)
GQA_CONFIG = AttentionConfig(
    kind="gqa", num_heads=4, num_kv_heads=2, head_dim=6, rope=dataclasses.replace(ROPE, layout="half")
)


def abstract(attention_cfg):
    """The layer without numbers: shapes and settings only."""
    cfg = ModelConfig(hidden_size=D, attention=attention_cfg, rms_norm_eps=EPS)
    return jax.eval_shape(lambda: make_attention(cfg, Initializer(cfg, nnx.Rngs(0))))


def build(attention_cfg):
    """The layer with weights of order one, norms' scales and biases included."""
    rng = np.random.default_rng(1)
    layer = abstract(attention_cfg)
    return jax.tree.map(lambda x: jnp.asarray((x.ndim == 1) + 0.4 * rng.normal(size=x.shape), jnp.float32), layer)


def inputs():
    return np.random.default_rng(0).normal(size=(B, S, D)).astype(np.float32)


@functools.partial(jax.jit, static_argnames="cached")
def run(layer, x_BSD, segment_ids_BS=None, cached=False):
    rot = rotation(jnp.broadcast_to(jnp.arange(x_BSD.shape[1]), x_BSD.shape[:2]), layer.cfg.rope, rotary_dim(layer.cfg))
    segment_BS = jnp.ones(x_BSD.shape[:2], jnp.int32) if segment_ids_BS is None else segment_ids_BS
    tokens = Tokens(segment_BS, jnp.arange(x_BSD.shape[1])[None])
    entries = layer.entries(x_BSD, rot)
    if cached:
        if isinstance(layer, GQA):  # whose cache has heads before positions
            entries = jax.tree.map(lambda x_BSKW: x_BSKW.swapaxes(1, 2), entries)
        return layer.attend_cached(x_BSD, rot, entries, Causal(tokens, tokens).mask_BST())
    return layer.attend(x_BSD, rot, entries, tokens)


def float64(variable):
    return np.asarray(variable[...], np.float64)


def norm(x, weight, eps):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * weight


def rope(x_BSHR, cfg):
    angles = np.arange(x_BSHR.shape[1])[:, None] * cfg.theta ** (-np.arange(0, x_BSHR.shape[-1], 2) / x_BSHR.shape[-1])
    turn = np.exp(1j * angles)[None, :, None]
    if cfg.layout == "interleaved":
        z = (x_BSHR[..., ::2] + 1j * x_BSHR[..., 1::2]) * turn
        return np.stack([z.real, z.imag], axis=-1).reshape(x_BSHR.shape)
    z = np.split(x_BSHR, 2, axis=-1)
    z = (z[0] + 1j * z[1]) * turn
    return np.concatenate([z.real, z.imag], axis=-1)


def softmax_attention(q_BSHW, k_BSHW, v_BSHV, scale):
    """Head by head and position by position."""
    out = np.zeros((*q_BSHW.shape[:3], v_BSHV.shape[-1]))
    for b, s, h in np.ndindex(*q_BSHW.shape[:3]):
        scores = np.array([q_BSHW[b, s, h] @ k_BSHW[b, t, h] * scale for t in range(s + 1)])
        weights = np.exp(scores - scores.max())
        out[b, s, h] = weights / weights.sum() @ v_BSHV[b, : s + 1, h]
    return out


@pytest.mark.parametrize("q_lora_rank", [0, 8])
def test_mla_follows_the_papers_equations(q_lora_rank):
    cfg = dataclasses.replace(MLA_CONFIG, q_lora_rank=q_lora_rank)
    layer, x = build(cfg), inputs().astype(np.float64)
    down = x @ float64(layer.key_value_a_DC)
    latent = norm(down[..., :10], float64(layer.key_value_norm.weight), cfg.latent_norm_eps)
    key_rope = rope(down[..., None, 10:], ROPE)
    expanded = np.einsum("bsc,chn->bshn", latent, float64(layer.key_value_b_CHN))
    keys = np.concatenate([expanded[..., :6], np.repeat(key_rope, 3, axis=2)], axis=-1)
    query_in = x
    if q_lora_rank:
        query_in = norm(x @ float64(layer.query_a_DQ), float64(layer.query_norm.weight), cfg.latent_norm_eps)
    queries = np.einsum("bsq,qhn->bshn", query_in, float64(layer.query_b))
    queries = np.concatenate([queries[..., :6], rope(queries[..., 6:], ROPE)], axis=-1)
    mixed = softmax_attention(queries, keys, expanded[..., 6:], (6 + 4) ** -0.5)
    expected = np.einsum("bshv,hvd->bsd", mixed, float64(layer.output_HVD))
    np.testing.assert_allclose(run(layer, inputs()), expected, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize(("q_lora_rank", "rope_cfg"), [(0, ROPE), (8, YARN)])
def test_absorbed_mla_equals_expanded(q_lora_rank, rope_cfg):
    layer, x = build(dataclasses.replace(MLA_CONFIG, q_lora_rank=q_lora_rank, rope=rope_cfg)), inputs()
    np.testing.assert_allclose(run(layer, x, cached=True), run(layer, x), rtol=1e-3, atol=2e-5)


def test_latent_norms_have_their_own_eps():
    layer = abstract(dataclasses.replace(MLA_CONFIG, q_lora_rank=8))
    assert isinstance(layer, MLA)
    assert (layer.query_norm.eps, layer.key_value_norm.eps) == (0.5, 0.5)
    assert AttentionConfig().latent_norm_eps == 1e-6


@pytest.mark.parametrize(("qkv_bias", "qk_norm"), [(False, "none"), (True, "head"), (True, "full")])
def test_gqa_with_biases_and_norms(qkv_bias, qk_norm):
    cfg = dataclasses.replace(GQA_CONFIG, qkv_bias=qkv_bias, qk_norm=qk_norm)
    layer, x = build(cfg), inputs().astype(np.float64)
    assert isinstance(layer, GQA)
    q = (x @ float64(layer.query_DHW).reshape(D, -1)).reshape(B, S, 24)
    k = (x @ float64(layer.key_DKW).reshape(D, -1)).reshape(B, S, 12)
    v = (x @ float64(layer.value_DKW).reshape(D, -1)).reshape(B, S, 12)
    if qkv_bias:
        q, k, v = q + float64(layer.query_bias), k + float64(layer.key_bias), v + float64(layer.value_bias)
    if qk_norm == "full":
        q, k = norm(q, float64(layer.query_norm.weight), EPS), norm(k, float64(layer.key_norm.weight), EPS)
    q, k, v = q.reshape(B, S, 4, 6), k.reshape(B, S, 2, 6), v.reshape(B, S, 2, 6)
    if qk_norm == "head":
        q, k = norm(q, float64(layer.query_norm.weight), EPS), norm(k, float64(layer.key_norm.weight), EPS)
    # query heads 0 and 1 share key head 0, heads 2 and 3 share head 1
    k, v = np.repeat(rope(k, cfg.rope), 2, axis=2), np.repeat(v, 2, axis=2)
    mixed = softmax_attention(rope(q, cfg.rope), k, v, 6**-0.5)
    expected = mixed.reshape(B, S, -1) @ float64(layer.output_HWD).reshape(24, D)
    np.testing.assert_allclose(run(layer, inputs()), expected, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize(
    ("factor", "mscale", "scale"),
    [(1, 1.0, 0.0721688), (40, 1.0, 0.1352338), (40, 0.707, 0.1147214), (32, 1.0, 0.1308608), (64, 1.0, 0.1446796)],
)
def test_softmax_scale_of_released_models(factor, mscale, scale):
    """No YaRN, DeepSeek-V3, V2, Kimi K2, K2.5: (128 + 64)^-½ · m(mscale_all_dim)²."""
    scaling = "none" if factor == 1 else "yarn"
    rope_cfg = RoPEConfig(scaling=scaling, factor=factor, mscale=mscale, mscale_all_dim=mscale)
    attention = AttentionConfig(num_heads=1, qk_nope_head_dim=128, qk_rope_head_dim=64, rope=rope_cfg)
    assert abstract(attention).scale == pytest.approx(scale, rel=2e-6)


@pytest.mark.parametrize("cfg", [MLA_CONFIG, GQA_CONFIG], ids=["mla", "gqa"])
def test_documents_and_padding_do_not_leak(cfg):
    layer, x = build(cfg), inputs()
    segments = np.array([[1, 1, 1, 2, 2, 2, 0], [0, 0, 1, 1, 1, 2, 2]])
    base = np.asarray(run(layer, x, segments))
    for other in (0, 1, 2):
        changed = np.where((segments == other)[:, :, None], x + 3, x)
        moved = np.abs(np.asarray(run(layer, changed, segments)) - base).max(axis=-1) > 1e-6
        assert not np.any(moved & (segments != other) & (segments > 0))
        assert np.any(moved & (segments == other))


@pytest.mark.parametrize("cfg", [MLA_CONFIG, GQA_CONFIG], ids=["mla", "gqa"])
def test_the_future_does_not_leak(cfg):
    layer, x = build(cfg), inputs()
    changed = x.copy()
    changed[:, 4:] += 3
    np.testing.assert_array_equal(np.asarray(run(layer, changed))[:, :4], np.asarray(run(layer, x))[:, :4])


@pytest.mark.parametrize("cfg", [MLA_CONFIG, GQA_CONFIG], ids=["mla", "gqa"])
def test_entries_have_the_caches_shapes(cfg):
    def entries_of(layer, x_BSD):
        entries = layer.entries(x_BSD, rotation(jnp.zeros((B, S)), cfg.rope, rotary_dim(cfg)))
        return [jnp.moveaxis(entry, 1, -2) for entry in entries[:2]]

    entries = jax.eval_shape(entries_of, abstract(cfg), inputs())
    assert tuple(e.shape for e in entries) == entry_shapes(ModelConfig(hidden_size=D, attention=cfg), B, S)


@pytest.mark.parametrize("rows", [B * S, 1], ids=["rows", "one row"])
def test_joined_projections_are_one_product_and_give_the_same(rows):
    """`entries` and `attend_cached` ask for it separately: made twice, decoding would read the weights twice."""
    layer, joined = build(GQA_CONFIG), build(GQA_CONFIG)
    joined.absorb()
    x_BSD = inputs() if rows > 1 else inputs()[:1, :1]
    for decoding in (layer, joined):
        np.testing.assert_allclose(run(decoding, x_BSD, cached=True), run(layer, x_BSD), rtol=1e-4, atol=1e-5)

    def widths(decoding):
        """Numbers that each product makes of a row; a single one's has two parts, which are added."""
        hlo = run.lower(decoding, x_BSD, cached=True).compile().as_text()
        shapes = re.findall(r"= f32\[([\d,]+)\]\S* dot\(", hlo)
        return [math.prod(map(int, shape.split(","))) // (rows if rows > 1 else 2) for shape in shapes]

    H, K, W = GQA_CONFIG.num_heads, GQA_CONFIG.num_kv_heads, GQA_CONFIG.head_dim
    assert widths(joined).count((H + 2 * K) * W) == 1
    assert widths(layer).count((H + 2 * K) * W) == 0 and widths(layer).count(K * W) >= 2


def test_mla_caches_the_latent_and_one_rotary_key_only():
    first, second = entry_shapes(ModelConfig(attention=MLA_CONFIG), B, S)
    assert first == (B, S, 10) and second == (B, S, 4)
