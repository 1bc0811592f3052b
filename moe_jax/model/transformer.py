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
from moe_jax.model.attention import Entries, entry_shapes, rotary_dim
from moe_jax.model.block import Context, own_cache, run_blocks, stack_blocks, unstack, write
from moe_jax.model.layers import Initializer, RMSNorm, constant, product, rotation
from moe_jax.model.mtp import MTP, MTPOutput, ParallelHeads, make_mtp
from moe_jax.model.router import RouterStats
from moe_jax.ops.attention import Branches, Tokens
from moe_jax.sharding import balanced, constrain, divides_sequences, in_order, table_rows, token_axes


class Cache(NamedTuple):
    """What decoding remembers. Columns are shared by all rows; a column that is padding in a row is not valid there."""

    dense: Entries | list[Entries]
    """The dense layers' entries, [L, B, ..., T, ·] each; for an unrolled model, layer by layer (`block.own_cache`)."""
    moe: Entries | list[Entries]
    """The sparse layers' entries."""
    valid_BT: Array
    """bool, which columns hold a token of the row."""
    length: Array
    """int32, columns written so far: the next token of every row goes to this column. One number, or one for each row,
    [B]."""


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

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs, value_head: bool = False):
        """With `value_head` there is a second head, a number per position that PPO's critic learns; it starts at 0."""
        self.cfg = cfg
        init = Initializer(cfg, rngs)
        self.embed_VD = init.weight((cfg.vocab_size, cfg.hidden_size), ("vocab", "embed"), "")
        self.dense_blocks = stack_blocks(cfg, cfg.num_dense_layers, False, rngs)
        self.moe_blocks = stack_blocks(cfg, cfg.num_moe_layers, True, rngs)
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        tied = cfg.tie_word_embeddings
        self.head_DV = None if tied else init.weight((cfg.hidden_size, cfg.vocab_size), ("embed", "vocab"), "")
        self.mtp = make_mtp(cfg, stack_blocks(cfg, cfg.mtp.depth, bool(cfg.moe.num_experts), rngs), init)
        self.value_head_D = constant(0.0, cfg.hidden_size, None) if value_head else None

    def __call__(
        self,
        tokens_BS: Array,
        *,
        segment_ids_BS: Array | None = None,
        positions_BS: Array | None = None,
        cache: Cache | None = None,
        prefill: bool = False,
        drop_tokens: bool = False,
        counted_BS: Array | None = None,
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
            counted_BS: bool, which tokens the router statistics count; by default all but padding, which never counts.
        """
        cfg = self.cfg
        valid_BS = jnp.ones(tokens_BS.shape, bool) if segment_ids_BS is None else segment_ids_BS > 0
        if positions_BS is None:
            positions_BS = jnp.maximum(jnp.cumsum(valid_BS, axis=1) - 1, 0)
            if cache is not None:
                positions_BS += jnp.sum(cache.valid_BT, axis=1, keepdims=True)
        place_1S = _places(tokens_BS)
        if cache is None:
            # The layers take a sequence's columns as the devices have them, whose order no result depends on.
            tokens_BS, positions_BS, valid_BS = balanced(tokens_BS), balanced(positions_BS), balanced(valid_BS)
            segment_ids_BS, place_1S, counted_BS = balanced((segment_ids_BS, place_1S, counted_BS))
        rot = rotation(positions_BS, cfg.attention.rope, rotary_dim(cfg.attention))
        column: Array | int = 0
        decode = cache is not None and not prefill
        if cache is not None:
            column = cache.length
            valid_BT = write(cache.valid_BT[..., None], valid_BS[..., None], None, column)[..., 0]
            cache = cache._replace(valid_BT=valid_BT, length=column + tokens_BS.shape[1])
        if cache is not None and decode:
            seen = cache.valid_BT[:, None, :]
            if tokens_BS.shape[1] > 1:  # a single token sees all that is valid, wherever it stands
                column_BS = jnp.reshape(column, (-1, 1)) + jnp.arange(tokens_BS.shape[1])
                seen &= jnp.arange(cache.valid_BT.shape[1]) <= column_BS[:, :, None]
            rows = len(cache.valid_BT)
            cache = cache._replace(dense=_by_rows(cache.dense, rows), moe=_by_rows(cache.moe, rows))
        else:
            seen = Tokens(valid_BS.astype(jnp.int32) if segment_ids_BS is None else segment_ids_BS, place_1S)
        keys_BS = self._router_keys(tokens_BS, positions_BS)
        ctx = Context(rot, seen, valid_BS, keys_BS, decode, column, drop_tokens, counted_BS)

        x_BSD = self.embed(tokens_BS)
        x_BSD, _, dense = run_blocks(self.dense_blocks, x_BSD, ctx, cache.dense if cache else None, cfg.remat)
        x_BSD, stats, moe = run_blocks(self.moe_blocks, x_BSD, ctx, cache.moe if cache else None, cfg.remat)
        if cache is not None and dense is not None and moe is not None:
            cache = cache._replace(dense=dense, moe=moe)
        if cache is None:
            x_BSD, stats = in_order(x_BSD), _in_order(stats)
        return ModelOutput(self.norm(x_BSD), stats, cache)

    def read_branches(self, tokens_BS: Array, branches: Branches) -> ModelOutput:
        """Hidden states of rows that are a stem and then branches, each segment of which goes on from the stem's
        positions: those that stem and segment would have in rows of their own, with the stem's work done once. Router
        statistics count the branches alone.

        Raises:
            ValueError: the mesh's axis `context` would divide a row, and with it the branches.
        """
        if divides_sequences(tokens_BS.shape[1]):
            raise ValueError("the mesh's axis context divides sequences: it cannot divide rows of branches")
        (B, P), stem_BP, branch_BCN = branches.stem_BP.shape, *branches
        stem_positions_BP = jnp.cumsum(stem_BP, axis=1) - 1
        column_N = jnp.arange(branch_BCN.shape[2])
        begins_BCN = branch_BCN != jnp.pad(branch_BCN, ((0, 0), (0, 0), (1, 0)))[:, :, :-1]
        begin_BCN = jax.lax.cummax(jnp.where(begins_BCN, column_N, 0), axis=2)
        positions_BCN = column_N - begin_BCN + 1 + stem_positions_BP[:, -1, None, None]
        valid_BS, positions_BS = (
            jnp.concatenate([stem, branch.reshape(B, tokens_BS.shape[1] - P)], axis=1)
            for stem, branch in ((stem_BP, branch_BCN > 0), (stem_positions_BP, positions_BCN))
        )
        positions_BS = jnp.maximum(positions_BS, 0)
        rot = rotation(positions_BS, self.cfg.attention.rope, rotary_dim(self.cfg.attention))
        counted_BS = jnp.arange(tokens_BS.shape[1]) >= P
        keys_BS = self._router_keys(tokens_BS, positions_BS)
        ctx = Context(rot, branches, valid_BS, keys_BS, False, 0, False, jnp.broadcast_to(counted_BS, valid_BS.shape))
        x_BSD = self.embed(tokens_BS)
        x_BSD, _, _ = run_blocks(self.dense_blocks, x_BSD, ctx, None, self.cfg.remat)
        x_BSD, stats, _ = run_blocks(self.moe_blocks, x_BSD, ctx, None, self.cfg.remat)
        return ModelOutput(self.norm(x_BSD), stats, None)

    def unrolled(self) -> Transformer:
        """This model with every layer's weights in arrays of their own: for decoding in a loop.

        CPUs copy each layer's slice of stacked weights at every step, which takes longer than the products with it.
        Needs a cache of `unrolled_cache`, and gives no router statistics.
        """
        model = nnx.merge(*nnx.split(self))
        model.dense_blocks, model.moe_blocks = (
            None if blocks is None else nnx.List(unstack(blocks)) for blocks in (self.dense_blocks, self.moe_blocks)
        )
        for block in (*(model.dense_blocks or ()), *(model.moe_blocks or ())):
            block.attention.absorb()
        return model

    def _router_keys(self, tokens_BS: Array, positions_BS: Array) -> Array:
        return tokens_BS if self.cfg.moe.routing == "hash" else positions_BS

    def embed(self, tokens_BS: Array) -> Array:
        # Of the float32 table: the gradient adds up a token's occurrences, which bfloat16 cannot count past 256.
        x_BSD = table_rows(self.embed_VD[...], tokens_BS, self.cfg.dtype)
        return constrain(x_BSD, *token_axes(x_BSD.shape), "activation")

    def head(self) -> Array:
        """The output matrix [D, V]: its own, or the embedding's transpose when tied."""
        return self.embed_VD[...].T if self.head_DV is None else self.head_DV[...]

    def logits(self, hidden_BSD: Array) -> Array:
        """float32 logits [B, S, V]; losses use `ops.token_logprobs`, which never holds them whole."""
        return product(hidden_BSD, self.head(), dtype=jnp.float32)

    def values(self, hidden_BSD: Array) -> Array:
        """float32 [B, S], what the value head makes of the hidden states."""
        assert self.value_head_D is not None
        return jnp.einsum("BSD,D->BS", hidden_BSD.astype(jnp.float32), self.value_head_D[...])

    def predict_ahead(
        self,
        hidden_BSD: Array,
        tokens_BS: Array,
        segment_ids_BS: Array,
        positions_BS: Array,
        *,
        drop_tokens: bool = False,
    ) -> MTPOutput:
        """Runs the multi-token prediction modules on the trunk's output (DeepSeek-V3 §2.2; arXiv:2404.19737)."""
        assert self.mtp is not None
        seen = Tokens(segment_ids_BS, _places(tokens_BS))
        seen, positions_BS, keys_BS = balanced((seen, positions_BS, self._router_keys(tokens_BS, positions_BS)))
        rot = rotation(positions_BS, self.cfg.attention.rope, rotary_dim(self.cfg.attention))
        ctx = Context(rot, seen, seen.segment_BS > 0, keys_BS, False, 0, drop_tokens)
        if isinstance(self.mtp, ParallelHeads):
            output = self.mtp(hidden_BSD, ctx)
        else:
            output = self.mtp(hidden_BSD, self.embed(tokens_BS), segment_ids_BS, ctx)
        return output._replace(router=_in_order(output.router))

    def draft(
        self,
        module: MTP,
        number: int,
        hidden_BSD: Array,
        tokens_BS: Array,
        ahead_BS: Array,
        column_B: Array,
        start_B: Array,
        entries: Entries,
        *,
        prefill: bool = False,
    ) -> tuple[Array, Entries]:
        """Hidden states of a multi-token prediction module at S successive positions of each row, and its cache.

        Args:
            module: a chain of one.
            number: its place in the whole chain, from 0.
            hidden_BSD: of the trunk, or of the module before.
            tokens_BS: the tokens at these positions.
            ahead_BS: the tokens number + 1 further.
            column_B: where in the cache a row's positions begin.
            start_B: where in the cache its text begins; all columns from there on are its own.
            entries: the module's cache, [1, B, ..., T, ·] or its own (`block.own_cache`).
            prefill: the cache is empty, as for a call of the model.
        """
        column_BS = column_B[:, None] + jnp.arange(tokens_BS.shape[1])
        valid_BS = column_BS >= start_B[:, None]
        if prefill:
            seen, column = Tokens(valid_BS.astype(jnp.int32), _places(tokens_BS)), 0
        else:
            column_T = jnp.arange(entries.first.shape[-2])
            seen = (column_T >= start_B[:, None, None]) & (column_T <= column_BS[:, :, None])
            column = column_B
        positions_BS = jnp.maximum(column_BS - start_B[:, None], 0)
        rot = rotation(positions_BS, self.cfg.attention.rope, rotary_dim(self.cfg.attention))
        keys_BS = self._router_keys(tokens_BS, positions_BS)
        ctx = Context(rot, seen, valid_BS, keys_BS, not prefill, column, False)
        return module.cached(hidden_BSD, self.embed(ahead_BS), ctx, entries, self.cfg.num_moe_layers + number)


def _places(tokens_BS: Array) -> Array | None:
    """`Tokens.place_1S`: given where devices share a sequence's columns, none of which has them all."""
    return jnp.arange(tokens_BS.shape[1])[None] if divides_sequences(tokens_BS.shape[1]) else None


def _in_order(stats: RouterStats | None) -> RouterStats | None:
    return stats and stats._replace(experts_BSK=in_order(stats.experts_BSK, axis=2))


def _by_rows(caches: Any, rows: int) -> Any:
    """Caches whose rows lie where those of one decoded position do."""
    axis = 0 if isinstance(caches, list) else 1

    def place(x: Array) -> Array:
        if token_axes((rows, 1))[0] != "rows":
            return x
        return constrain(x, "rows", *[None] * (x.ndim - axis - 1))

    return jax.tree.map(place, caches)


def unrolled_cache(cache: Cache) -> Cache:
    """The cache for an unrolled model."""

    def layers(stacked: Entries) -> list[Entries]:
        return [Entries(*(own_cache(x[n]) for x in stacked)) for n in range(len(stacked.first))]

    assert isinstance(cache.dense, Entries) and isinstance(cache.moe, Entries)
    return cache._replace(dense=layers(cache.dense), moe=layers(cache.moe))


def make_cache(cfg: ModelConfig, batch: int, length: int) -> Cache:
    """An empty cache for `length` columns, in the model's dtype."""
    return Cache(
        make_entries(cfg, cfg.num_dense_layers, batch, length),
        make_entries(cfg, cfg.num_moe_layers, batch, length),
        jnp.zeros((batch, length), bool),
        jnp.zeros((), jnp.int32),
    )


def make_entries(cfg: ModelConfig, layers: int, batch: int, length: int) -> Entries:
    """Empty entries of a stack of layers."""
    empty = (jnp.zeros((layers, *shape), cfg.dtype) for shape in entry_shapes(cfg, batch, length))
    return Entries(*(constrain(x, "batch", *[None] * (x.ndim - 2)) for x in empty))
