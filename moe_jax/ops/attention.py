"""Softmax attention with any number of key-value heads.

B batch, S queries, T keys, H query heads, K key-value heads, G query heads per key-value head, D key width,
E value width, R rows of queries that share a key-value head (G·S), N blocks; of branches: P stem, C branches,
N tokens.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

# Scores of a head that one product may hold: longer sequences go block by block.
_MOST_SCORES = 2048 * 2048
_BLOCK = 512
_LEAST_HALVED = 128
"""Queries from which on two products of a half and a whole are worth more than the one; 256 were measured."""
_UNSEEN = -1e30
_LAST = 2**31 - 1

EVERY_DOCUMENT = -1
"""The segment of keys that belong to all documents."""


class Tokens(NamedTuple):
    """Where the tokens of packed rows stand."""

    segment_BS: Array
    """int32, the document of each; 0 is padding, and of a key `EVERY_DOCUMENT` belongs to all."""
    place_1S: Array | None = None
    """int32, each column's place in the order of its row; None: as the columns stand, which saves work that is known
    beforehand to be of the future."""

    def places_1S(self) -> Array:
        return jnp.arange(self.segment_BS.shape[1])[None] if self.place_1S is None else self.place_1S


class Causal(NamedTuple):
    """A query sees the keys of its own document, and of `EVERY_DOCUMENT`, that do not come after it; no padding."""

    query: Tokens
    key: Tokens

    def mask_BST(self) -> Array:
        """bool, True where a query may see a key."""
        query_BS1, key_B1T = self.query.segment_BS[:, :, None], self.key.segment_BS[:, None, :]
        not_later_1ST = self.query.places_1S()[:, :, None] >= self.key.places_1S()[:, None, :]
        return ((query_BS1 == key_B1T) & (key_B1T > 0) | (key_B1T == EVERY_DOCUMENT)) & not_later_1ST


class Branches(NamedTuple):
    """Rows that are a stem and, after it, branches of equal length: a prompt and its completions.

    A branch's tokens see the stem and, of their own segment of their branch, what does not come after them; the stem's
    tokens see the stem. A row has P + C·N columns. Its work is that of the pairs that see each other, not of all
    columns.
    """

    stem_BP: Array
    """bool, True where a column is no padding."""
    branch_BCN: Array
    """int32, the segment of each column (one completion of several that share a branch); 0 is padding."""


def seen_by(query: Tokens | Branches, key: Tokens | Branches) -> Causal | Branches:
    """What tokens see, from where they stand."""
    if isinstance(query, Branches):
        return query
    assert isinstance(key, Tokens)
    return Causal(query, key)


def attention(
    q_BSHD: Array,
    k_BTKD: Array,
    v_BTKE: Array,
    seen: Array | Causal | Branches,
    scale: float,
    implementation: Literal["dense", "chunked"] | None = None,
) -> Array:
    """softmax(q·k · scale) v with the softmax in float32; returns [B, S, H, E] in q's dtype.

    Serves multi-head attention (K = H), grouped-query attention (K divides H) and absorbed MLA (K = 1). A query that
    may see no key gets a finite number, which the caller masks out.

    Whichever the implementation, the backward pass computes the scores anew: kept for all layers they are most of a
    model's memory, and writing them takes longer than computing them.

    Args:
        q_BSHD: queries.
        k_BTKD: keys.
        v_BTKE: values.
        seen: which keys a query may see: a mask [B, S, T], `Causal`, or `Branches`, of queries and keys alike.
        scale: of the products.
        implementation: "dense" holds the scores of all pairs at once; "chunked", for `Causal` and `Branches`, those of
            a block of queries with a block of keys (FlashAttention-2, arXiv:2307.08691, in plain XLA), so that memory
            grows with S + T, and leaves out the blocks that lie in the future. None: dense up to 2048 × 2048.
    """
    if isinstance(seen, Branches):
        return _branches(q_BSHD, k_BTKD, v_BTKE, seen, scale, implementation)
    if implementation is None:
        long = isinstance(seen, Causal) and q_BSHD.shape[1] * k_BTKD.shape[1] > _MOST_SCORES
        implementation = "chunked" if long else "dense"
    if implementation == "dense":
        with jax.named_scope("attention_scores"):
            return _dense(q_BSHD, k_BTKD, v_BTKE, seen, scale)
    if not isinstance(seen, Causal):
        raise ValueError("implementation = 'chunked': needs `seen` as Causal, not a mask of all pairs")
    B, S, H, _ = q_BSHD.shape
    K = k_BTKD.shape[2]
    q_BKGSD = q_BSHD.reshape(B, S, K, H // K, -1).transpose(0, 2, 3, 1, 4)
    k_BKTD, v_BKTE = k_BTKD.transpose(0, 2, 1, 3), v_BTKE.transpose(0, 2, 1, 3)
    seen = Causal(*(Tokens(tokens.segment_BS, tokens.places_1S()) for tokens in seen))
    mixed_BKGSE: Array = _chunked(scale, q_BKGSD, k_BKTD, v_BKTE, seen)
    return mixed_BKGSE.transpose(0, 3, 1, 2, 4).reshape(B, S, H, -1)


@partial(jax.checkpoint, static_argnums=(4,))
def _dense(q_BSHD: Array, k_BTKD: Array, v_BTKE: Array, seen: Array | Causal, scale: float) -> Array:
    """Heads lie outside and the sum of the weights is divided out last: on a CPU, two to three times faster with
    gradients than the plain order at a few dozen tokens. Where columns are known to be in order, the earlier half of
    the queries makes no scores with the later half of the keys."""
    B, S, H, D = q_BSHD.shape
    K = k_BTKD.shape[2]
    q_BKGSD = q_BSHD.reshape(B, S, K, H // K, D).transpose(0, 2, 3, 1, 4)
    k_BKTD, v_BKTE = k_BTKD.transpose(0, 2, 1, 3), v_BTKE.transpose(0, 2, 1, 3)

    def mix(start: int, stop: int, T: int, seen_BST: Array) -> Array:
        """[B, H, stop - start, E], of these queries with the first T keys."""
        q_BKRD = q_BKGSD[:, :, :, start:stop].reshape(B, K, -1, D)
        product = partial(jnp.einsum, preferred_element_type=jnp.float32)
        score_BKRT = product("BKRD,BKTD->BKRT", q_BKRD, k_BKTD[:, :, :T]) * scale
        score_BKRT += jnp.tile(jnp.where(seen_BST, 0.0, _UNSEEN), (1, H // K, 1))[:, None]
        largest_BKR1 = jax.lax.stop_gradient(jnp.max(score_BKRT, axis=-1, keepdims=True))
        weight_BKRT = jnp.exp(score_BKRT - largest_BKR1)
        total_BKR1 = jnp.sum(weight_BKRT, axis=-1, keepdims=True)
        mixed_BKRE = jnp.einsum("BKRT,BKTE->BKRE", weight_BKRT.astype(v_BTKE.dtype), v_BKTE[:, :, :T])
        return (mixed_BKRE / total_BKR1).astype(q_BSHD.dtype).reshape(B, H, stop - start, -1)

    mask_BST = seen.mask_BST() if isinstance(seen, Causal) else seen
    in_order = isinstance(seen, Causal) and seen.query.place_1S is None and seen.key.place_1S is None
    parts = _query_parts(S) if in_order else [(0, S, k_BKTD.shape[2])]
    mixed = [mix(start, stop, T, mask_BST[:, start:stop, :T]) for start, stop, T in parts]
    mixed_BHSE = mixed[0] if len(mixed) == 1 else jnp.concatenate(mixed, axis=2)
    return mixed_BHSE.transpose(0, 2, 1, 3)


def _query_parts(S: int) -> list[tuple[int, int, int]]:
    """Which queries, from and to, are multiplied with how many keys."""
    return [(0, S // 2, S // 2), (S // 2, S, S)] if S >= _LEAST_HALVED and S % 2 == 0 else [(0, S, S)]


def cached_attention(
    queries: Sequence[Array], keys: Sequence[Array], values: Array, seen_BST: Array, scale: float
) -> Array:
    """`attention` to a cache, for decoding, [B, S, H, E]; keys and queries may be in parts, whose products are added.

    Caches are read as they lie: positions last but one, and before them [B, K], [B·K], or nothing for one row and head.

    Args:
        queries: [B, S, H, D] each.
        keys: [..., T, D] each.
        values: [..., T, E].
        seen_BST: bool, which keys a query may see.
        scale: of the products.
    """
    (B, S, H, _), T = queries[0].shape, values.shape[-2]
    K = math.prod(values.shape[:-2]) // B
    lead = values.shape[:-2]

    def rows(q_BSHD: Array) -> Array:
        q_BKGSD = q_BSHD.reshape(B, S, K, H // K, -1).transpose(0, 2, 3, 1, 4)
        return q_BKGSD.reshape(*lead, H // K * S, -1)

    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    with jax.named_scope("attention_scores"):
        pairs = zip(map(rows, queries), keys, strict=True)
        score: Array = functools.reduce(jnp.add, (product("...RD,...TD->...RT", q, k) for q, k in pairs)) * scale
        penalty_BST = jnp.where(seen_BST, 0.0, _UNSEEN)
        score += jnp.broadcast_to(penalty_BST[:, None, None], (B, K, H // K, S, T)).reshape(score.shape)
        weight = jnp.exp(score - jnp.max(score, axis=-1, keepdims=True))
        total = jnp.sum(weight, axis=-1, keepdims=True)
        mixed = product("...RT,...TE->...RE", weight.astype(values.dtype), values)
        mixed = (mixed / total).astype(queries[0].dtype)
    return mixed.reshape(B, K, H // K, S, -1).transpose(0, 3, 1, 2, 4).reshape(B, S, H, -1)


def _branches(
    q_BSHD: Array,
    k_BSKD: Array,
    v_BSKE: Array,
    seen: Branches,
    scale: float,
    implementation: Literal["dense", "chunked"] | None,
) -> Array:
    """The stem by itself, then all branches, whose softmax runs over the stem's keys and their own."""
    (B, P), (_, C, N) = seen.stem_BP.shape, seen.branch_BCN.shape
    stem = Tokens(seen.stem_BP.astype(jnp.int32))
    q_BPHD, k_BPKD, v_BPKE = (x[:, :P] for x in (q_BSHD, k_BSKD, v_BSKE))
    q_BCNHD, k_BCNKD, v_BCNKE = (x[:, P:].reshape(B, C, N, *x.shape[2:]) for x in (q_BSHD, k_BSKD, v_BSKE))
    mixed_BPHE = attention(q_BPHD, k_BPKD, v_BPKE, Causal(stem, stem), scale, implementation)
    if implementation is None:
        implementation = "chunked" if N * (P + N) > _MOST_SCORES else "dense"
    if implementation == "dense":
        own = Tokens(seen.branch_BCN.reshape(B * C, N))
        seen_BCNN = Causal(own, own).mask_BST().reshape(B, C, N, N)
        mixed_BCNHE: Array = branch_attention(q_BCNHD, k_BCNKD, v_BCNKE, seen_BCNN, k_BPKD, v_BPKE, seen.stem_BP, scale)
    else:

        def whole(stem: Array, branch: Array) -> Array:
            """[B·C, P + N, ...]: every branch behind a copy of its stem, for this layer alone."""
            return jnp.concatenate([jnp.repeat(stem, C, axis=0), branch.reshape(B * C, *branch.shape[2:])], axis=1)

        own = Tokens(seen.branch_BCN.reshape(B * C, N), P + jnp.arange(N)[None])
        keys = Tokens(whole(jnp.where(seen.stem_BP, EVERY_DOCUMENT, 0), seen.branch_BCN))
        k, v = whole(k_BPKD, k_BCNKD), whole(v_BPKE, v_BCNKE)
        mixed_BCNHE = attention(q_BCNHD.reshape(B * C, *q_BCNHD.shape[2:]), k, v, Causal(own, keys), scale, "chunked")
    return jnp.concatenate([mixed_BPHE, mixed_BCNHE.reshape(B, C * N, *mixed_BPHE.shape[2:])], axis=1)


@partial(jax.checkpoint, static_argnums=(7,))
def branch_attention(
    q_BCNHD: Array,
    k_BCTKD: Array,
    v_BCTKE: Array,
    seen_BCNT: Array,
    stem_k_BPKD: Array,
    stem_v_BPKE: Array,
    stem_seen_BP: Array,
    scale: float,
) -> Array:
    """Attention of branches to their own keys and to their stem's, which are not repeated; [B, C, N, H, E].

    As `_dense`, with one softmax over both. Each `seen` is True where a key may be seen. Batches of the stem's products
    are rows and heads, the others' rows, branches and heads: the keys of neither have to be copied into another order.
    """
    B, C, N, H, D = q_BCNHD.shape
    K = k_BCTKD.shape[3]
    q_BCKRD = q_BCNHD.reshape(B, C, N, K, H // K, D).transpose(0, 1, 3, 4, 2, 5).reshape(B, C, K, -1, D)
    k_BCKTD, v_BCKTE = k_BCTKD.swapaxes(2, 3), v_BCTKE.swapaxes(2, 3)
    stem_k_BKPD, stem_v_BKPE = stem_k_BPKD.swapaxes(1, 2), stem_v_BPKE.swapaxes(1, 2)
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    score_BCKRT = product("BCKRD,BCKTD->BCKRT", q_BCKRD, k_BCKTD) * scale
    score_BCKRT += jnp.tile(jnp.where(seen_BCNT, 0.0, _UNSEEN), (1, 1, H // K, 1))[:, :, None]
    stem_score_BKCRP = product("BKCRD,BKPD->BKCRP", q_BCKRD.swapaxes(1, 2), stem_k_BKPD) * scale
    stem_score_BKCRP += jnp.where(stem_seen_BP, 0.0, _UNSEEN)[:, None, None, None]
    largest_BCKR1 = jnp.max(score_BCKRT, axis=-1, keepdims=True)
    stem_largest_BKCR1 = jnp.max(stem_score_BKCRP, axis=-1, keepdims=True)
    largest_BCKR1 = jax.lax.stop_gradient(jnp.maximum(largest_BCKR1, stem_largest_BKCR1.swapaxes(1, 2)))
    weight_BCKRT = jnp.exp(score_BCKRT - largest_BCKR1)
    stem_weight_BKCRP = jnp.exp(stem_score_BKCRP - largest_BCKR1.swapaxes(1, 2))
    total_BCKR1 = jnp.sum(weight_BCKRT, axis=-1, keepdims=True)
    total_BCKR1 += jnp.sum(stem_weight_BKCRP, axis=-1, keepdims=True).swapaxes(1, 2)
    mixed_BCKRE = product("BCKRT,BCKTE->BCKRE", weight_BCKRT.astype(v_BCKTE.dtype), v_BCKTE)
    stem_mixed_BKCRE = product("BKCRP,BKPE->BKCRE", stem_weight_BKCRP.astype(v_BCKTE.dtype), stem_v_BKPE)
    mixed_BCKRE = ((mixed_BCKRE + stem_mixed_BKCRE.swapaxes(1, 2)) / total_BCKR1).astype(q_BCNHD.dtype)
    return mixed_BCKRE.reshape(B, C, K, H // K, N, -1).transpose(0, 1, 4, 2, 3, 5).reshape(B, C, N, H, -1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(scale: float, q_BKGSD: Array, k_BKTD: Array, v_BKTE: Array, seen: Causal) -> Array:
    return _chunked_forward(scale, q_BKGSD, k_BKTD, v_BKTE, seen)[0]


def _chunked_forward(scale: float, q_BKGSD: Array, k_BKTD: Array, v_BKTE: Array, seen: Causal) -> tuple[Array, tuple]:
    # The blocks' masks are the same in every layer. Unless they seem to depend on the layer's queries, the gradient of
    # a scan over layers computes them once, before it, and holds those of all blocks and heads.
    q_BKGSD, seen = jax.lax.optimization_barrier((q_BKGSD, seen))
    dtype = jnp.promote_types(q_BKGSD.dtype, jnp.float32)
    queries = (_split(q_BKGSD, 3), _split_tokens(seen.query, -1))
    keys = (_split(k_BKTD, 2), _split(v_BKTE, 2), _split_tokens(seen.key, _LAST))

    def query_block(_: None, query: tuple) -> tuple[None, tuple[Array, Array]]:
        q_BKGSD, query_tokens = query

        def key_block(sums: tuple, key: tuple) -> tuple[tuple, None]:
            k_BKTD, v_BKTE, key_tokens = key

            def add(sums: tuple) -> tuple:
                largest_BKGS, total_BKGS, mixed_BKGSE = sums
                score_BKGST = _scores(scale, q_BKGSD, k_BKTD, Causal(query_tokens, key_tokens), dtype)
                new_BKGS = jnp.maximum(largest_BKGS, jnp.max(score_BKGST, axis=-1))
                weight_BKGST = jnp.exp(score_BKGST - new_BKGS[..., None])
                shrink_BKGS = jnp.exp(largest_BKGS - new_BKGS)
                mixed = jnp.einsum(
                    "BKGST,BKTE->BKGSE", weight_BKGST.astype(v_BKTE.dtype), v_BKTE, preferred_element_type=dtype
                )
                total_BKGS = total_BKGS * shrink_BKGS + jnp.sum(weight_BKGST, axis=-1)
                return new_BKGS, total_BKGS, mixed_BKGSE * shrink_BKGS[..., None] + mixed

            return jax.lax.cond(_meet(query_tokens, key_tokens), add, lambda sums: sums, sums), None

        rows = q_BKGSD.shape[:-1]
        nothing = jnp.full(rows, _UNSEEN, dtype), jnp.zeros(rows, dtype), jnp.zeros((*rows, v_BKTE.shape[-1]), dtype)
        (largest_BKGS, total_BKGS, mixed_BKGSE), _ = jax.lax.scan(key_block, nothing, keys)
        total_BKGS = jnp.where(total_BKGS == 0, 1, total_BKGS)  # a block of queries that are padding of the last one
        return None, (mixed_BKGSE / total_BKGS[..., None], largest_BKGS + jnp.log(total_BKGS))

    with jax.named_scope("attention_blocks"):
        _, (mixed_NBKGSE, logsum_NBKGS) = jax.lax.scan(query_block, None, queries)
    S = q_BKGSD.shape[3]
    mixed_BKGSE = _merge(mixed_NBKGSE, 3, S).astype(q_BKGSD.dtype)
    return mixed_BKGSE, (q_BKGSD, k_BKTD, v_BKTE, seen, mixed_BKGSE, _merge(logsum_NBKGS, 3, S))


def _chunked_backward(scale: float, residuals: tuple, dmixed_BKGSE: Array) -> tuple:
    q_BKGSD, k_BKTD, v_BKTE, seen, mixed_BKGSE, logsum_BKGS = residuals
    dtype = logsum_BKGS.dtype
    shared_BKGS = jnp.einsum("BKGSE,BKGSE->BKGS", dmixed_BKGSE, mixed_BKGSE, preferred_element_type=dtype)
    queries = tuple(_split(x, 3) for x in (q_BKGSD, dmixed_BKGSE, logsum_BKGS, shared_BKGS))
    query_tokens_N = _split_tokens(seen.query, -1)
    keys = (_split(k_BKTD, 2), _split(v_BKTE, 2), _split_tokens(seen.key, _LAST))

    def key_block(dq_NBKGSD: Array, key: tuple) -> tuple[Array, tuple[Array, Array]]:
        k_BKTD, v_BKTE, key_tokens = key

        def query_block(sums: tuple, query: tuple) -> tuple[tuple, Array]:
            (q_BKGSD, dmixed_BKGSE, logsum_BKGS, shared_BKGS), query_tokens, dq_BKGSD = query

            def add(dk_BKTD: Array, dv_BKTE: Array, dq_BKGSD: Array) -> tuple[Array, Array, Array]:
                score_BKGST = _scores(scale, q_BKGSD, k_BKTD, Causal(query_tokens, key_tokens), dtype)
                weight_BKGST = jnp.exp(score_BKGST - logsum_BKGS[..., None])
                product = partial(jnp.einsum, preferred_element_type=dtype)
                dv = product("BKGST,BKGSE->BKTE", weight_BKGST.astype(v_BKTE.dtype), dmixed_BKGSE)
                dweight_BKGST = product("BKGSE,BKTE->BKGST", dmixed_BKGSE, v_BKTE)
                dscore_BKGST = scale * weight_BKGST * (dweight_BKGST - shared_BKGS[..., None])
                dscore_BKGST = dscore_BKGST.astype(q_BKGSD.dtype)
                dk = product("BKGST,BKGSD->BKTD", dscore_BKGST, q_BKGSD)
                dq = product("BKGST,BKTD->BKGSD", dscore_BKGST, k_BKTD)
                return dk_BKTD + dk, dv_BKTE + dv, dq_BKGSD + dq

            reached = _meet(query_tokens, key_tokens)
            dk_BKTD, dv_BKTE, dq_BKGSD = jax.lax.cond(reached, add, lambda *operands: operands, *sums, dq_BKGSD)
            return (dk_BKTD, dv_BKTE), dq_BKGSD

        nothing = jnp.zeros(k_BKTD.shape, dtype), jnp.zeros(v_BKTE.shape, dtype)
        sums, dq_NBKGSD = jax.lax.scan(query_block, nothing, (queries, query_tokens_N, dq_NBKGSD))
        return dq_NBKGSD, sums

    with jax.named_scope("attention_blocks_gradient"):
        dq_NBKGSD, (dk_NBKTD, dv_NBKTE) = jax.lax.scan(key_block, jnp.zeros(queries[0].shape, dtype), keys)
    gradients = zip((dq_NBKGSD, dk_NBKTD, dv_NBKTE), (q_BKGSD, k_BKTD, v_BKTE), (3, 2, 2), strict=True)
    return *(_merge(dx, axis, x.shape[axis]).astype(x.dtype) for dx, x, axis in gradients), None


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _scores(scale: float, q_BKGSD: Array, k_BKTD: Array, seen: Causal, dtype: jnp.dtype) -> Array:
    score_BKGST = jnp.einsum("BKGSD,BKTD->BKGST", q_BKGSD, k_BKTD, preferred_element_type=dtype) * scale
    return jnp.where(seen.mask_BST()[:, None, None], score_BKGST, _UNSEEN)


def _meet(query: Tokens, key: Tokens) -> Array:
    """Whether any key of a block comes before any query. Of places alone: documents differ between rows, and rows lie
    on different devices, which would have to agree first."""
    return jnp.min(key.places_1S()) <= jnp.max(query.places_1S())


def _split(x: Array, axis: int, fill: int = 0) -> Array:
    """[..., S, ...] → [N, ..., S / N, ...]; blocks of nearly equal length waste the least padding."""
    size = x.shape[axis]
    blocks = -(-size // _BLOCK)
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -size % blocks)
    x = jnp.pad(x, padding, constant_values=fill)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], blocks, -1, *x.shape[axis + 1 :]), axis, 0)


def _split_tokens(tokens: Tokens, fill_place: int) -> Tokens:
    return Tokens(_split(tokens.segment_BS, 1), _split(tokens.places_1S(), 1, fill_place))


def _merge(x: Array, axis: int, size: int) -> Array:
    x = jnp.moveaxis(x, 0, axis)
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return jax.lax.slice_in_dim(x, 0, size, axis=axis)
