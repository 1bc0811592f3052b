"""Multi-token prediction: a causal chain of modules (DeepSeek-V3 §2.2, eq. 21-25), or heads in parallel.

B batch, S sequence, D model, N modules (depth).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moe_jax.config import ModelConfig
from moe_jax.model.attention import Entries
from moe_jax.model.block import Block, Context
from moe_jax.model.layers import Initializer, RMSNorm, linear, rematerialised
from moe_jax.model.router import RouterStats
from moe_jax.sharding import balanced, in_order


class MTPOutput(NamedTuple):
    hidden_NBSD: Array
    """Each module's hidden states after its own norm; module k (from 1) at position i predicts token i + k + 1."""
    router: RouterStats | None
    """Stacked over the modules; None in a dense model."""


class MTP(nnx.Module):
    """D modules in a causal chain: h^k = TRM_k(M_k [norm(h^{k-1}_i); norm(Emb(t_{i+k}))]).

    Embedding and head are the model's own. h^0 is the trunk's output after its final norm, as Hugging Face's
    implementation feeds it (the report leaves open whether before or after); later modules take their predecessor's
    output after its norm likewise.
    """

    def __init__(self, cfg: ModelConfig, blocks: Block, init: Initializer):
        depth, D = cfg.mtp.depth, cfg.hidden_size
        self.cfg = cfg
        self.blocks = blocks
        self.embedding_norms = _stacked_norm(cfg, depth)
        self.hidden_norms = _stacked_norm(cfg, depth)
        self.output_norms = _stacked_norm(cfg, depth)
        self.projection_N2DD = init.weight((depth, 2 * D, D), (None, None, "embed"), "bio")

    def __call__(self, hidden_BSD: Array, embedded_BSD: Array, segment_ids_BS: Array, ctx: Context) -> MTPOutput:
        """Positions whose token i + k lies outside the document compute on what is there: they count nowhere, neither
        as targets nor in the routers' statistics.

        No valid position sees them: whatever follows them in the document reaches outside it too.
        """

        def module(carry: tuple[Array, Array, Array], weights: tuple) -> tuple[tuple[Array, Array, Array], tuple]:
            hidden_BSD, ahead_BSD, segment_ahead_BS = carry
            layer, block, embedding_norm, hidden_norm, output_norm, projection = weights
            ahead_BSD = jnp.roll(ahead_BSD, -1, axis=1)
            segment_ahead_BS = jnp.pad(segment_ahead_BS[:, 1:], ((0, 0), (0, 1)))
            pair = [embedding_norm(ahead_BSD), hidden_norm(hidden_BSD)]
            if self.cfg.mtp.hidden_first:
                pair.reverse()
            joined = jnp.concatenate(pair, axis=-1)
            x_BSD = linear(joined, projection)
            inside_BS = (segment_ids_BS > 0) & (segment_ahead_BS == segment_ids_BS)
            x_BSD, stats, _ = block(balanced(x_BSD), ctx._replace(valid_BS=balanced(inside_BS)), layer=layer)
            hidden_BSD = output_norm(in_order(x_BSD))
            return (hidden_BSD, ahead_BSD, segment_ahead_BS), (hidden_BSD, stats)

        layers = self.cfg.num_moe_layers + jnp.arange(self.cfg.mtp.depth)  # the modules' come after the trunk's
        norms = (self.embedding_norms, self.hidden_norms, self.output_norms)
        weights = (layers, self.blocks, *norms, self.projection_N2DD)
        _, (hidden_NBSD, stats) = jax.lax.scan(
            rematerialised(module, self.cfg.remat), (hidden_BSD, embedded_BSD, segment_ids_BS), weights
        )
        return MTPOutput(hidden_NBSD, stats)

    def cached(
        self, hidden_BSD: Array, ahead_BSD: Array, ctx: Context, entries: Entries, layer: int
    ) -> tuple[Array, Entries]:
        """A chain of one module over its cache, of a stack of one or its own (`block.own_cache`), for drafting: its
        hidden states and the cache.

        `ahead_BSD` are the embeddings of the tokens that it reads ahead, `layer` is its number after the trunk's.
        """
        stacks = (self.blocks, self.embedding_norms, self.hidden_norms, self.output_norms, self.projection_N2DD)
        block, embedding_norm, hidden_norm, output_norm, projection = jax.tree.map(lambda x: x[0], stacks)
        pair = [embedding_norm(ahead_BSD), hidden_norm(hidden_BSD)]
        if self.cfg.mtp.hidden_first:
            pair.reverse()
        joined = jnp.concatenate(pair, axis=-1)
        x_BSD = linear(joined, projection)
        x_BSD, _, entries = block(x_BSD, ctx, entries, layer)
        return output_norm(x_BSD), entries


class ParallelHeads(nnx.Module):
    """D independent heads, each a block on the trunk's output, under the model's own output matrix (arXiv:2404.19737).

    Head k at position i predicts token i + k + 1 from the tokens up to i alone. The head of the next token is the trunk
    itself: where the paper takes its heads' layers from the trunk, these come on top, as V3's modules do. They read
    the trunk's output after its final norm.
    """

    def __init__(self, cfg: ModelConfig, blocks: Block):
        self.cfg = cfg
        self.blocks = blocks
        self.output_norms = _stacked_norm(cfg, cfg.mtp.depth)

    def __call__(self, hidden_BSD: Array, ctx: Context) -> MTPOutput:
        balanced_BSD = balanced(hidden_BSD)

        def head(carry: None, weights: tuple) -> tuple[None, tuple]:
            layer, block, output_norm = weights
            x_BSD, stats, _ = block(balanced_BSD, ctx, layer=layer)
            return carry, (output_norm(in_order(x_BSD)), stats)

        layers = self.cfg.num_moe_layers + jnp.arange(self.cfg.mtp.depth)  # the heads' come after the trunk's
        weights = (layers, self.blocks, self.output_norms)
        _, (hidden_NBSD, stats) = jax.lax.scan(rematerialised(head, self.cfg.remat), None, weights)
        return MTPOutput(hidden_NBSD, stats)


def make_mtp(cfg: ModelConfig, blocks: Block | None, init: Initializer) -> MTP | ParallelHeads | None:
    """What `cfg.mtp` asks for, of these stacked blocks; None for a depth of 0."""
    if blocks is None:
        return None
    return MTP(cfg, blocks, init) if cfg.mtp.kind == "causal" else ParallelHeads(cfg, blocks)


def _stacked_norm(cfg: ModelConfig, depth: int) -> RMSNorm:
    return jax.vmap(lambda _: RMSNorm(cfg.hidden_size, cfg.rms_norm_eps))(jnp.arange(depth))
