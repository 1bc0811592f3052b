"""Embed → blocks (scanned) → head; the cache.

B batch, S sequence, T cached positions, D model, V vocabulary, L layers, E experts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moe_jax.config import ModelConfig
from moe_jax.model.attention import Entries, causal_mask, entry_shapes, make_attention, rotary_dim
from moe_jax.model.layers import Initializer, RMSNorm, Rotation, SwiGLU, rematerialised, rotation
from moe_jax.model.moe import MoE
from moe_jax.model.mtp import MTP, MTPOutput
from moe_jax.model.router import RouterStats
from moe_jax.sharding import constrain


class Cache(NamedTuple):
    """What decoding remembers. Columns are shared by all rows; a column that is padding in a row is not valid there."""

    dense: Entries
    """The dense layers' entries, [L, B, T, ...] each."""
    moe: Entries
    """The sparse layers' entries."""
    valid_BT: Array
    """bool, which columns hold a token of the row."""
    length: Array
    """int32, columns written so far; the next token of every row goes to this column."""


class ModelOutput(NamedTuple):
    hidden_BSD: Array
    """After the final norm: what the head reads."""
    router: RouterStats | None
    """Stacked over the sparse layers; None in a dense model."""
    cache: Cache | None


class Context(NamedTuple):
    """What every block needs besides its input."""

    rot: Rotation
    mask: Array
    """[B, S, S], or [B, S, T] when decoding from a cache."""
    valid_BS: Array
    decode: bool
    """Attend to the cache (True) or to the sequence itself (False: training, prefill)."""
    column: Array | int
    """Where in the cache the sequence is written."""


class Block(nnx.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)); the feed-forward is a SwiGLU or a sparse MoE."""

    def __init__(self, cfg: ModelConfig, sparse: bool, rngs: nnx.Rngs):
        init = Initializer(cfg, rngs)
        self.attention_norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.attention = make_attention(cfg, init)
        self.ffn_norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.ffn = MoE(cfg, init) if sparse else SwiGLU(cfg.hidden_size, cfg.intermediate_size, init)

    def __call__(
        self, x_BSD: Array, ctx: Context, caches: Entries | None = None, layer: Array | int = 0
    ) -> tuple[Array, RouterStats | None, Entries | None]:
        """Returns the block's output, its router's statistics if it is sparse, and the caches with its entries."""
        normed = self.attention_norm(x_BSD)
        with jax.named_scope("attention"):
            entries = self.attention.entries(normed, ctx.rot)
            if caches is not None:
                caches = Entries(*(_write(c, e, layer, ctx.column) for c, e in zip(caches, entries, strict=True)))
            if ctx.decode:
                assert caches is not None
                cached = Entries(*(jax.lax.dynamic_index_in_dim(c, layer, keepdims=False) for c in caches))
                x_BSD += self.attention.attend_cached(normed, ctx.rot, cached, ctx.mask)
            else:
                x_BSD += self.attention.attend(normed, ctx.rot, entries, ctx.mask)
        normed = self.ffn_norm(x_BSD)
        with jax.named_scope("ffn"):
            if isinstance(self.ffn, MoE):
                y_BSD, stats = self.ffn(normed, ctx.valid_BS)
            else:
                y_BSD, stats = self.ffn(normed), None
        return constrain(x_BSD + y_BSD, "batch", "sequence", "activation"), stats, caches


def _write(cache: Array, entry: Array, layer: Array | int, column: Array | int) -> Array:
    start = (layer, 0, column, *[0] * (entry.ndim - 2))
    return jax.lax.dynamic_update_slice(cache, entry[None].astype(cache.dtype), start)


def stack_blocks(cfg: ModelConfig, count: int, sparse: bool, rngs: nnx.Rngs) -> Block | None:
    """`count` blocks as one, each weight with a leading dimension of layers; None for no blocks."""
    if not count:
        return None
    return jax.vmap(lambda key: Block(cfg, sparse, nnx.Rngs(key)))(jax.random.split(rngs.params(), count))


def run_blocks(
    blocks: Block | None, x_BSD: Array, ctx: Context, caches: Entries | None, remat: str
) -> tuple[Array, RouterStats | None, Entries | None]:
    """Scans over stacked blocks, so that compile time does not grow with depth."""
    if blocks is None:
        return x_BSD, None, caches

    def body(carry: tuple[Array, Any], layer_and_block: tuple[Array, Block]) -> tuple[tuple[Array, Any], Any]:
        layer, block = layer_and_block
        x_BSD, stats, caches = block(carry[0], ctx, carry[1], layer)
        return (x_BSD, caches), stats

    layers = jnp.arange(jax.tree.leaves(blocks)[0].shape[0])
    (x_BSD, caches), stats = jax.lax.scan(rematerialised(body, remat), (x_BSD, caches), (layers, blocks))
    return x_BSD, stats, caches


class Transformer(nnx.Module):
    """A decoder-only transformer, dense or sparse, as the config says.

    A plain pytree of weights: use `jax.jit`, `jax.grad` and `nnx.split(model, nnx.Param, ...)` on it directly.
    """

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        self.cfg = cfg
        init = Initializer(cfg, rngs)
        self.embed_VD = init.weight((cfg.vocab_size, cfg.hidden_size), ("vocab", "embed"), "")
        self.dense_blocks = stack_blocks(cfg, cfg.num_dense_layers, False, rngs)
        self.moe_blocks = stack_blocks(cfg, cfg.num_moe_layers, True, rngs)
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        tied = cfg.tie_word_embeddings
        self.head_DV = None if tied else init.weight((cfg.hidden_size, cfg.vocab_size), ("embed", "vocab"), "")
        depth = cfg.mtp.depth
        self.mtp = MTP(cfg, stack_blocks(cfg, depth, bool(cfg.moe.num_experts), rngs), init) if depth else None

    def __call__(
        self,
        tokens_BS: Array,
        *,
        segment_ids_BS: Array | None = None,
        positions_BS: Array | None = None,
        cache: Cache | None = None,
        prefill: bool = False,
    ) -> ModelOutput:
        """Hidden states of each position; `logits` makes logits of them.

        Args:
            tokens_BS: int32 token ids.
            segment_ids_BS: int32; tokens see only their own segment, 0 is padding. Without it, all is one document.
                With a cache, only whether it is 0 counts.
            positions_BS: int32 positions for the rotary embedding; by default they count each row's valid tokens (or
                continue the cache's). Packed documents need their own.
            cache: entries of earlier columns; the output's cache has this sequence's appended.
            prefill: the cache is empty: attend among the given tokens only, in the form that is cheaper for many.
        """
        cfg = self.cfg
        valid_BS = jnp.ones(tokens_BS.shape, bool) if segment_ids_BS is None else segment_ids_BS > 0
        if positions_BS is None:
            positions_BS = jnp.maximum(jnp.cumsum(valid_BS, axis=1) - 1, 0)
            if cache is not None:
                positions_BS += jnp.sum(cache.valid_BT, axis=1, keepdims=True)
        rot = rotation(positions_BS, cfg.attention.rope, rotary_dim(cfg.attention))
        column: Array | int = 0
        decode = cache is not None and not prefill
        if cache is not None:
            column = cache.length
            valid_BT = jax.lax.dynamic_update_slice(cache.valid_BT, valid_BS, (0, column))
            cache = cache._replace(valid_BT=valid_BT, length=column + tokens_BS.shape[1])
        if cache is not None and decode:
            column_S = column + jnp.arange(tokens_BS.shape[1])
            seen_ST = jnp.arange(cache.valid_BT.shape[1])[None, :] <= column_S[:, None]
            mask = cache.valid_BT[:, None, :] & seen_ST
        else:
            mask = causal_mask(valid_BS.astype(jnp.int32) if segment_ids_BS is None else segment_ids_BS)
        ctx = Context(rot, mask, valid_BS, decode, column)

        x_BSD = self.embed(tokens_BS)
        x_BSD, _, dense = run_blocks(self.dense_blocks, x_BSD, ctx, cache.dense if cache else None, cfg.remat)
        x_BSD, stats, moe = run_blocks(self.moe_blocks, x_BSD, ctx, cache.moe if cache else None, cfg.remat)
        if cache is not None and dense is not None and moe is not None:
            cache = cache._replace(dense=dense, moe=moe)
        return ModelOutput(self.norm(x_BSD), stats, cache)

    def embed(self, tokens_BS: Array) -> Array:
        x_BSD = self.embed_VD[...].astype(self.cfg.dtype)[tokens_BS]
        return constrain(x_BSD, "batch", "sequence", "activation")

    def head(self) -> Array:
        """The output matrix [D, V]: its own, or the embedding's transpose when tied."""
        return self.embed_VD[...].T if self.head_DV is None else self.head_DV[...]

    def logits(self, hidden_BSD: Array) -> Array:
        """float32 logits [B, S, V]; losses use `ops.token_logprobs`, which never holds them whole."""
        head = self.head().astype(hidden_BSD.dtype)
        return jnp.einsum("BSD,DV->BSV", hidden_BSD, head, preferred_element_type=jnp.float32)

    def predict_ahead(
        self, hidden_BSD: Array, tokens_BS: Array, segment_ids_BS: Array, positions_BS: Array
    ) -> MTPOutput:
        """Runs the multi-token prediction modules on the trunk's output (DeepSeek-V3 §2.2)."""
        assert self.mtp is not None
        rot = rotation(positions_BS, self.cfg.attention.rope, rotary_dim(self.cfg.attention))
        ctx = Context(rot, causal_mask(segment_ids_BS), segment_ids_BS > 0, False, 0)
        return self.mtp(hidden_BSD, self.embed(tokens_BS), segment_ids_BS, ctx)


def make_cache(cfg: ModelConfig, batch: int, length: int) -> Cache:
    """An empty cache for `length` columns, in the model's dtype."""
    shapes = entry_shapes(cfg, batch, length)

    def entries(layers: int) -> Entries:
        return Entries(*(jnp.zeros((layers, *shape), cfg.dtype) for shape in shapes))

    return Cache(
        entries(cfg.num_dense_layers),
        entries(cfg.num_moe_layers),
        jnp.zeros((batch, length), bool),
        jnp.zeros((), jnp.int32),
    )
