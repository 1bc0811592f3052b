"""Multi-token prediction modules (DeepSeek-V3 §2.2, eq. 21-25).

B batch, S sequence, D model, N modules (depth).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moe_jax.config import ModelConfig
from moe_jax.model.block import Block, Context
from moe_jax.model.layers import Initializer, RMSNorm, rematerialised
from moe_jax.model.router import RouterStats


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

    def __init__(self, cfg: ModelConfig, blocks: Block | None, init: Initializer):
        depth, D = cfg.mtp.depth, cfg.hidden_size
        assert blocks is not None
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
            x_BSD = jnp.einsum("BSJ,JD->BSD", joined, projection[...].astype(joined.dtype))
            inside_BS = ctx.valid_BS & (segment_ahead_BS == segment_ids_BS)
            x_BSD, stats, _ = block(x_BSD, ctx._replace(valid_BS=inside_BS), layer=layer)
            hidden_BSD = output_norm(x_BSD)
            return (hidden_BSD, ahead_BSD, segment_ahead_BS), (hidden_BSD, stats)

        layers = self.cfg.num_moe_layers + jnp.arange(self.cfg.mtp.depth)  # the modules' come after the trunk's
        norms = (self.embedding_norms, self.hidden_norms, self.output_norms)
        weights = (layers, self.blocks, *norms, self.projection_N2DD)
        _, (hidden_NBSD, stats) = jax.lax.scan(
            rematerialised(module, self.cfg.remat), (hidden_BSD, embedded_BSD, segment_ids_BS), weights
        )
        return MTPOutput(hidden_NBSD, stats)


def _stacked_norm(cfg: ModelConfig, depth: int) -> RMSNorm:
    return jax.vmap(lambda _: RMSNorm(cfg.hidden_size, cfg.rms_norm_eps))(jnp.arange(depth))
