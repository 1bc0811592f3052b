"""Embed → blocks (scanned) → head; the cache.

B batch, S sequence, T cached positions, D model, V vocabulary, L layers, E experts.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moe_jax.config import ModelConfig
from moe_jax.model.attention import Entries, causal_mask, entry_shapes, rotary_dim
from moe_jax.model.block import Context, run_blocks, stack_blocks
from moe_jax.model.layers import Initializer, RMSNorm, rotation
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
        drop_tokens: bool = False,
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
            drop_tokens: drop what exceeds the experts' capacity, if `moe.capacity_factor` sets one. For the training
                loss only: what is dropped depends on the other rows of the batch, which must not decide what a token
                means at evaluation, sampling or in RL, whose trainer has to route as its sampler did.
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
        ctx = Context(rot, mask, valid_BS, self._router_keys(tokens_BS, positions_BS), decode, column, drop_tokens)

        x_BSD = self.embed(tokens_BS)
        x_BSD, _, dense = run_blocks(self.dense_blocks, x_BSD, ctx, cache.dense if cache else None, cfg.remat)
        x_BSD, stats, moe = run_blocks(self.moe_blocks, x_BSD, ctx, cache.moe if cache else None, cfg.remat)
        if cache is not None and dense is not None and moe is not None:
            cache = cache._replace(dense=dense, moe=moe)
        return ModelOutput(self.norm(x_BSD), stats, cache)

    def _router_keys(self, tokens_BS: Array, positions_BS: Array) -> Array:
        return tokens_BS if self.cfg.moe.routing == "hash" else positions_BS

    def embed(self, tokens_BS: Array) -> Array:
        # Taken in float32: the gradient adds up a token's occurrences, which bfloat16 cannot count past 256.
        x_BSD = self.embed_VD[...][tokens_BS].astype(self.cfg.dtype)
        return constrain(x_BSD, "batch", "sequence", "activation")

    def head(self) -> Array:
        """The output matrix [D, V]: its own, or the embedding's transpose when tied."""
        return self.embed_VD[...].T if self.head_DV is None else self.head_DV[...]

    def logits(self, hidden_BSD: Array) -> Array:
        """float32 logits [B, S, V]; losses use `ops.token_logprobs`, which never holds them whole."""
        head = self.head().astype(hidden_BSD.dtype)
        return jnp.einsum("BSD,DV->BSV", hidden_BSD, head, preferred_element_type=jnp.float32)

    def predict_ahead(
        self,
        hidden_BSD: Array,
        tokens_BS: Array,
        segment_ids_BS: Array,
        positions_BS: Array,
        *,
        drop_tokens: bool = False,
    ) -> MTPOutput:
        """Runs the multi-token prediction modules on the trunk's output (DeepSeek-V3 §2.2)."""
        assert self.mtp is not None
        rot = rotation(positions_BS, self.cfg.attention.rope, rotary_dim(self.cfg.attention))
        keys_BS = self._router_keys(tokens_BS, positions_BS)
        ctx = Context(rot, causal_mask(segment_ids_BS), segment_ids_BS > 0, keys_BS, False, 0, drop_tokens)
        return self.mtp(hidden_BSD, self.embed(tokens_BS), segment_ids_BS, ctx)


def make_cache(cfg: ModelConfig, batch: int, length: int) -> Cache:
    """An empty cache for `length` columns, in the model's dtype."""
    shapes = entry_shapes(cfg, batch, length)

    def entries(layers: int) -> Entries:
        empty = (jnp.zeros((layers, *shape), cfg.dtype) for shape in shapes)
        return Entries(*(constrain(x, "batch", *[None] * (x.ndim - 2)) for x in empty))

    return Cache(
        entries(cfg.num_dense_layers),
        entries(cfg.num_moe_layers),
        jnp.zeros((batch, length), bool),
        jnp.zeros((), jnp.int32),
    )
