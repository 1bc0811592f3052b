"""One transformer block, a stack of them, and the scan over the stack.

B batch, S sequence, T cached positions, D model, L layers.
"""

from __future__ import annotations

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
from moe_jax.sharding import constrain


class Context(NamedTuple):
    """What every block needs besides its input."""

    rot: Rotation
    mask: Array
    """[B, S, S], or [B, S, T] when decoding from a cache."""
    valid_BS: Array
    router_keys_BS: Array
    """What hash or uniform routing goes by (`router.fixed_experts`)."""
    decode: bool
    """Attend to the cache (True) or to the sequence itself (False: training, prefill)."""
    column: Array | int
    """Where in the cache the sequence is written."""
    drop_tokens: bool
    """Whether experts drop what exceeds their capacity, if they have one: in the training loss only."""


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

        `layer` is its number among the blocks of its kind: its place in the caches, and what hash routing is salted by.
        """
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
                y_BSD, stats = self.ffn(normed, ctx.valid_BS, ctx.router_keys_BS, layer, ctx.drop_tokens)
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
