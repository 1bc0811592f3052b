"""One transformer block, a stack of them, and the scan over the stack.

B batch, S sequence, T cached positions, D model, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moe_jax.config import ModelConfig
from moe_jax.model.attention import Entries, make_attention
from moe_jax.model.layers import Initializer, RMSNorm, Rotation, SwiGLU, rematerialised
from moe_jax.model.moe import MoE
from moe_jax.model.router import RouterStats
from moe_jax.ops.attention import Branches, Tokens
from moe_jax.sharding import constrain, token_axes


class Context(NamedTuple):
    """What every block needs besides its input."""

    rot: Rotation
    seen: Array | Tokens | Branches
    """What decides which tokens see which: where they stand; or a mask [B, S, T] when decoding from a cache."""
    valid_BS: Array
    router_keys_BS: Array
    """What hash or uniform routing goes by (`router.fixed_experts`)."""
    decode: bool
    """Attend to the cache (True) or to the sequence itself (False: training, prefill)."""
    column: Array | int
    """Where in the cache the sequence is written: one number, or one for each row, [B]."""
    drop_tokens: bool
    """Whether experts drop what exceeds their capacity, if they have one: in the training loss only."""
    counted_BS: Array | None = None
    """Which tokens the router's statistics count; None: all that are valid."""


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
        """Returns the block's output, its router's statistics if it is sparse, and the caches with its entries.

        `layer` is its number among the blocks of its kind: its place in the caches, unless they are this block's alone,
        and what hash routing is salted by. Caches of one block alone are `own_cache`'s.
        """
        normed = self.attention_norm(x_BSD)
        with jax.named_scope("attention"):
            entries = self.attention.entries(normed, ctx.rot)
            slot = _slot(caches, layer)
            if caches is not None:
                caches = Entries(*(write(c, e, slot, ctx.column) for c, e in zip(caches, entries, strict=True)))
            if ctx.decode:
                assert caches is not None and isinstance(ctx.seen, jax.Array)
                cached = caches
                if slot is not None:
                    cached = Entries(*(jax.lax.dynamic_index_in_dim(c, slot, keepdims=False) for c in caches))
                x_BSD += self.attention.attend_cached(normed, ctx.rot, cached, ctx.seen)
            else:
                assert isinstance(ctx.seen, Tokens | Branches)
                x_BSD += self.attention.attend(normed, ctx.rot, entries, ctx.seen)
        normed = self.ffn_norm(x_BSD)
        with jax.named_scope("ffn"):
            if isinstance(self.ffn, MoE):
                y_BSD, stats = self.ffn(
                    normed, ctx.valid_BS, ctx.router_keys_BS, layer, ctx.drop_tokens, ctx.counted_BS
                )
            else:
                y_BSD, stats = self.ffn(normed), None
        return constrain(x_BSD + y_BSD, *token_axes(x_BSD.shape), "activation"), stats, caches


def own_cache(cache: Array) -> Array:
    """A layer's cache [B, ..., T, X] for decoding with caches layer by layer: [B·K, T, X], or [T, X] where that is one.

    XLA:CPU writes it in place. With an axis of length 1, or two that a product would merge into one, it writes a second
    one beside it, and copies both at every step.
    """
    cache = cache.reshape(-1, *cache.shape[-2:])
    return cache[0] if len(cache) == 1 else cache


def rows_of(cache: Array, rows: int) -> Array:
    """Of an `own_cache`, [B, K, T, X]."""
    return cache.reshape(rows, -1, *cache.shape[-2:])


def _slot(caches: Entries | None, layer: Array | int) -> Array | int | None:
    """A layer's place in the caches of a stack; None where they are this layer's alone."""
    if caches is None or caches.first.ndim <= 3:  # of a stack: 4 (MLA) or 5 (GQA); of one layer: 3 or 2
        return None
    return 0 if len(caches.first) == 1 else layer


def write(cache: Array, entry: Array, layer: Array | int | None, column: Array | int) -> Array:
    """The cache [L, B, ..., T, X] with a layer's entry [B, S, ..., X] from a column on, or from each row's own; of the
    cache of a single layer (`own_cache`) `layer` is None."""
    entry = jnp.moveaxis(entry.astype(cache.dtype), 1, -2)
    by_row = bool(jnp.ndim(column)) and len(entry) > 1
    if layer is None:
        if not by_row:
            entry = entry.reshape(*cache.shape[:-2], *entry.shape[-2:])
            begin = *[0] * (cache.ndim - 2), jnp.reshape(column, ()), 0
            return jax.lax.dynamic_update_slice(cache, entry, begin)
        rows = rows_of(cache, len(entry)), rows_of(entry, len(entry)), jnp.asarray(column)
        written = jax.vmap(lambda cache, entry, column: jax.lax.dynamic_update_slice(cache, entry, (0, column, 0)))
        return written(*rows).reshape(cache.shape)
    heads = [0] * (entry.ndim - 3)
    if by_row:

        def write_row(cache: Array, entry: Array, column: Array) -> Array:
            return jax.lax.dynamic_update_slice(cache, entry[None], (layer, *heads, column, 0))

        return jax.vmap(write_row, in_axes=(1, 0, 0), out_axes=1)(cache, entry, jnp.asarray(column))
    return jax.lax.dynamic_update_slice(cache, entry[None], (layer, 0, *heads, jnp.reshape(column, ()), 0))


def stack_blocks(cfg: ModelConfig, count: int, sparse: bool, rngs: nnx.Rngs) -> Block | None:
    """`count` blocks as one, each weight with a leading dimension of layers; None for no blocks."""
    if not count:
        return None
    return jax.vmap(lambda key: Block(cfg, sparse, nnx.Rngs(key)))(jax.random.split(rngs.params(), count))


def unstack(blocks: Block) -> list[Block]:
    """The blocks of a stack, one by one."""
    return [jax.tree.map(lambda x, n=n: x[n], blocks) for n in range(len(jax.tree.leaves(blocks)[0]))]


def run_blocks(
    blocks: Block | Sequence[Block] | None, x_BSD: Array, ctx: Context, caches: Any, remat: str
) -> tuple[Array, RouterStats | None, Any]:
    """Scans over stacked blocks, so that compile time does not grow with depth; runs a sequence of blocks, each with
    its own cache, one by one, without statistics."""
    if blocks is None:
        return x_BSD, None, caches
    if not isinstance(blocks, Block):
        caches = list(caches)
        for n, block in enumerate(blocks):
            x_BSD, _, caches[n] = block(x_BSD, ctx, caches[n], n)
        return x_BSD, None, caches

    def body(carry: tuple[Array, Any], layer_and_block: tuple[Array, Block]) -> tuple[tuple[Array, Any], Any]:
        layer, block = layer_and_block
        x_BSD, stats, caches = block(carry[0], ctx, carry[1], layer)
        return (x_BSD, caches), stats

    layers = jnp.arange(jax.tree.leaves(blocks)[0].shape[0])
    (x_BSD, caches), stats = jax.lax.scan(rematerialised(body, remat), (x_BSD, caches), (layers, blocks))
    return x_BSD, stats, caches
