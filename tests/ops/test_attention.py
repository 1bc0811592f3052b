"""Attention, dense and in blocks, against float64 with one row of scores at a time, gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops import attention as module
from moe_jax.ops.attention import EVERY_DOCUMENT, Causal, Tokens, attention

B, S, D, E, SCALE = 2, 14, 6, 4, 0.4
SEGMENTS = np.array([[1] * 5 + [2] * 6 + [0] * 3, [1] * S], np.int32)
IN_ORDER = np.arange(S, dtype=np.int32)[None]


def inputs(heads, kv_heads, dtype):
    rng = np.random.default_rng(0)
    shapes = (B, S, heads, D), (B, S, kv_heads, D), (B, S, kv_heads, E), (B, S, heads, E)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def reference(q, k, v, segments, places):
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    for b, s, h in np.ndindex(*q.shape[:3]):
        kv = h // (q.shape[2] // k.shape[2])
        seen = (segments[b] == segments[b, s]) & (places[0] <= places[0, s]) & (segments[b] > 0)
        if seen.any():
            scores = k[b, seen, kv] @ q[b, s, h] * SCALE
            weights = np.exp(scores - scores.max())
            out[b, s, h] = weights / weights.sum() @ v[b, seen, kv]
    return out


def run(q, k, v, dout, segments, places, implementation):
    """Output and gradients; outputs of padding count nowhere."""
    tokens = Tokens(jnp.asarray(segments), None if places is None else jnp.asarray(places))

    @jax.jit
    def f(q, k, v):
        out = attention(q, k, v, Causal(tokens, tokens), SCALE, implementation)
        counted = jnp.where(segments[:, :, None, None] > 0, out, 0)
        return jnp.sum(counted.astype(dout.dtype) * dout), counted

    gradients, out = jax.grad(f, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return out, gradients


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 5)  # 14 columns in 3 blocks, the last one padded


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize(("kv_heads", "order"), [(4, "in order"), (2, "shuffled"), (1, "in order")])
def test_blocks_are_the_whole_in_float64(small_blocks, float64, kv_heads, order):
    *qkv, dout = inputs(4, kv_heads, jnp.float64)
    places = IN_ORDER if order == "in order" else np.random.default_rng(1).permutation(S).astype(np.int32)[None]
    out, gradients = run(*qkv, dout, SEGMENTS, places, "chunked")
    expected = reference(*map(np.asarray, qkv), SEGMENTS, places)
    np.testing.assert_allclose(out, expected, rtol=1e-10, atol=1e-12)
    rng, step = np.random.default_rng(2), 1e-6
    for n, gradient in enumerate(gradients):
        direction = rng.normal(size=gradient.shape)

        def loss(sign, n=n, direction=direction):
            moved = [np.asarray(x) + sign * step * direction if i == n else np.asarray(x) for i, x in enumerate(qkv)]
            return np.sum(reference(*moved, SEGMENTS, places) * np.asarray(dout))

        np.testing.assert_allclose(np.sum(gradient * direction), (loss(1) - loss(-1)) / (2 * step), rtol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 3e-2)])
def test_both_implementations_give_the_same(small_blocks, dtype, tolerance):
    arguments = (*inputs(4, 2, dtype), SEGMENTS, IN_ORDER)
    for dense, chunked in zip(*(jax.tree.leaves(run(*arguments, name)) for name in ("dense", "chunked")), strict=True):
        assert chunked.dtype == dense.dtype == dtype
        dense, chunked = (np.asarray(x, np.float32) for x in (dense, chunked))
        np.testing.assert_allclose(chunked, dense, rtol=tolerance, atol=tolerance)
        assert np.abs(dense).max() > 0.1


@pytest.mark.parametrize(("implementation", "kv_heads"), [("dense", 4), ("dense", 2), ("chunked", 2)])
def test_columns_that_are_known_to_be_in_order(small_blocks, monkeypatch, implementation, kv_heads):
    """The same numbers, of fewer scores: those of half the queries with half the keys are not made."""
    arguments = (*inputs(4, kv_heads, jnp.float32), SEGMENTS)
    expected = jax.tree.leaves(run(*arguments, IN_ORDER, implementation))
    monkeypatch.setattr(module, "_LEAST_HALVED", 4)
    for known, told in zip(jax.tree.leaves(run(*arguments, None, implementation)), expected, strict=True):
        np.testing.assert_allclose(known, told, rtol=1e-5, atol=1e-6)
    if implementation == "dense":
        q, k, v, _ = arguments[:4]
        tokens = Tokens(jnp.asarray(SEGMENTS))
        jaxpr = jax.make_jaxpr(lambda *qkv: attention(*qkv, Causal(tokens, tokens), SCALE, "dense"))(q, k, v).jaxpr
        shapes = set(_shapes(jaxpr))
        rows = S // 2 * 4 // kv_heads
        assert {(B, kv_heads, rows, S // 2), (B, kv_heads, rows, S)} <= shapes
        assert (B, kv_heads, 2 * rows, S) not in shapes


def test_keys_of_every_document():
    segments = jnp.array([[EVERY_DOCUMENT, 0, 1, 1, 2]])
    query, key = Tokens(segments[:, 2:], jnp.arange(2, 5)[None]), Tokens(segments)
    seen = [set(np.flatnonzero(row)) for row in Causal(query, key).mask_BST()[0]]
    assert seen == [{0, 2}, {0, 2, 3}, {0, 4}]


def test_what_sees_nothing_is_finite(small_blocks):
    *qkv, _ = inputs(4, 2, jnp.float32)
    tokens = Tokens(jnp.zeros((B, S), jnp.int32), jnp.asarray(IN_ORDER))
    for implementation in ("dense", "chunked"):
        assert np.all(np.isfinite(attention(*qkv, Causal(tokens, tokens), SCALE, implementation)))


def test_which_keys_are_seen():
    tokens = Tokens(jnp.array([[0, 1, 1, 2, 2, 0]]), jnp.arange(6)[None])
    seen = [set(), {1}, {1, 2}, {3}, {3, 4}, set()]
    assert [set(np.flatnonzero(row)) for row in Causal(tokens, tokens).mask_BST()[0]] == seen


def test_memory_of_long_sequences_grows_with_their_length():
    def temporary_bytes(length):
        x = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
        tokens = Tokens(*(jax.ShapeDtypeStruct((1, length), jnp.int32) for _ in range(2)))

        def loss(q, k, v, tokens):
            return jnp.sum(attention(q, k, v, Causal(tokens, tokens), SCALE))

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x, tokens).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporary_bytes(4096), temporary_bytes(16384)
    assert long < 5 * short and long < 16384**2


@pytest.mark.parametrize("places", [IN_ORDER, None], ids=["places", "in order"])
@pytest.mark.parametrize("remat", [True, False])
def test_layers_hold_no_mask_of_all_pairs(small_blocks, remat, places):
    """What is the same in all layers, the gradient of a scan computes once: masks of all blocks, unless prevented."""
    q, k, v, _ = inputs(4, 4, jnp.float32)
    tokens = Tokens(jnp.asarray(SEGMENTS), places)

    def loss(w_L):
        def layer(v, w):
            mixed = attention(q * w, k, v, Causal(tokens, tokens), SCALE, "chunked")
            return v + mixed, None

        return jnp.sum(jax.lax.scan(jax.checkpoint(layer) if remat else layer, v, w_L)[0])

    shapes = set(_shapes(jax.make_jaxpr(jax.grad(loss))(jnp.ones(3)).jaxpr))
    assert (B, 4, 1, 5, 5) in shapes  # a block's scores
    assert not [shape for shape in shapes if shape[-2:] == (5, 5) and np.prod(shape) > B * 4 * 5 * 5]


def _shapes(jaxpr):
    """Of everything that a program computes."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars)
        for parameter in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from _shapes(inner)


def test_a_mask_of_all_pairs_has_no_blocks():
    q, k, v, _ = inputs(4, 2, jnp.float32)
    with pytest.raises(ValueError, match="needs `seen` as Causal"):
        attention(q, k, v, jnp.ones((B, S, S), bool), SCALE, "chunked")
