"""Log-probabilities of given tokens, from hidden states and the head, without the logits of all tokens at once.

Shapes: D model, V vocabulary, S positions along the last token axis, R shards, N rows of a shard, "..." leading axes.
"""

from __future__ import annotations

import functools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from moe_jax.sharding import constrain, sum_of_shards

# Logits per shard that may exist at once: 256 MiB in float32, 512 tokens of a vocabulary of 128k.
_BLOCK_ELEMENTS = 2**26


class TokenLogprobs(NamedTuple):
    logprobs: Array  # float32 [...], log-probability of each target, nats
    entropy: Array | None  # float32 [...], entropy of each distribution, nats; carries no gradient


def token_logprobs(
    hidden: Array,
    head_DV: Array,
    targets: Array,
    *,
    banned_ids: tuple[int, ...] = (),
    with_entropy: bool = False,
    chunk_size: int | None = None,
    shards: tuple[int, int] = (1, 1),
    implementation: Literal["chunked", "plain"] | None = None,
) -> TokenLogprobs:
    """log softmax(hidden · head)[target] in float32, in chunks that the backward pass computes anew.

    Only the last token axis is cut into chunks, for all leading axes together. With hidden states [B, S, D] and B
    spread over devices, every device therefore works on every chunk, and only the head's gradient is communicated. With
    `shards` it is accumulated over the chunks on each device and summed over devices once at the end; without, it is
    summed over devices in every chunk, and where S is spread too, devices take turns.

    A problem that fits in one chunk keeps its softmax for the backward pass and costs what the plain form does.

    Args:
        hidden: [..., D], float32 or bfloat16; the products run in this type and accumulate in float32.
        head_DV: [D, V].
        targets: [...], integers in [0, V).
        banned_ids: tokens that are never emitted (padding): left out of the normalisation, as the sampler does. A
            banned target has log-probability -inf and gives no gradient: select it away with `where`, a product with a
            mask would be NaN.
        with_entropy: also give the entropy of each distribution, as a metric.
        chunk_size: positions of the last token axis in a chunk; None takes what keeps a shard's logits within 256 MiB.
        shards: number of devices that the first axis of `hidden` and its last token axis are spread over.
        implementation: "chunked"; or "plain", which holds all logits and leaves the gradient to JAX. None: "chunked".

    Raises:
        ValueError: shapes that do not belong together, a banned id outside the vocabulary, or all of it banned.
    """
    vocab_size = head_DV.shape[1]
    if hidden.shape[:-1] != targets.shape or hidden.ndim < 2 or hidden.shape[-1] != head_DV.shape[0]:
        raise ValueError(
            f"hidden {hidden.shape}, head {head_DV.shape} and targets {targets.shape} do not belong together:"
            " they must be [..., D], [D, V] and [...]"
        )
    banned_ids = tuple(sorted(set(banned_ids)))
    if banned_ids and not (banned_ids[0] >= 0 and banned_ids[-1] < vocab_size and len(banned_ids) < vocab_size):
        raise ValueError(
            f"banned_ids = {banned_ids}: must be ids in [0, {vocab_size}), and leave at least one token to emit"
        )
    implementation = implementation or "chunked"
    if implementation == "plain":
        logprobs, entropy = _plain(hidden, head_DV, targets, banned_ids)
    elif implementation == "chunked":
        lead, length = targets.shape[:-1], targets.shape[-1]
        if (shards[0] > 1 and (not lead or lead[0] % shards[0])) or length % shards[1]:
            raise ValueError(
                f"shards = {shards}: must divide the first axis of hidden and its last token axis, whose shape is"
                f" {hidden.shape}"
            )
        rows, length = math.prod(lead) // shards[0], length // shards[1]
        if chunk_size is None:
            chunk_size = max(_BLOCK_ELEMENTS // (max(rows, 1) * vocab_size), 1)
        elif chunk_size < 1:
            raise ValueError(f"chunk_size = {chunk_size}: must be at least 1")
        # Chunks of nearly equal length waste the least padding.
        num_chunks = max(-(-length // chunk_size), 1)
        padding = -length % num_chunks
        hidden_RNSD, targets_RNS = (
            jnp.pad(x, [(0, 0), (0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 3))
            for x in (_by_shard(x, shards, rows, length) for x in (hidden, targets[..., None]))
        )
        targets_RNS = targets_RNS[..., 0]
        results: tuple[Array, Array] = _chunked(num_chunks, banned_ids, hidden_RNSD, head_DV, targets_RNS)
        # The inverse of `_by_shard`.
        parts = (x[..., :length].reshape(*shards, rows, length) for x in results)
        logprobs, entropy = (jnp.swapaxes(x, 1, 2).reshape(targets.shape) for x in parts)
    else:
        raise ValueError(f"implementation = {implementation!r}: must be 'chunked', 'plain' or None")
    return TokenLogprobs(logprobs, jax.lax.stop_gradient(entropy) if with_entropy else None)


def _by_shard(x: Array, shards: tuple[int, int], rows: int, length: int) -> Array:
    """[..., S, D] → [R, N, S of a shard, D]."""
    x = jnp.swapaxes(x.reshape(shards[0], rows, shards[1], length, x.shape[-1]), 1, 2)
    return x.reshape(-1, rows, length, x.shape[-1])


def _logits(hidden: Array, head_DV: Array, banned_ids: tuple[int, ...]) -> Array:
    logits = jnp.einsum(
        "...d,dv->...v", hidden, head_DV.astype(hidden.dtype), preferred_element_type=_accumulator(hidden)
    )
    if not banned_ids:
        return logits
    banned_V = jnp.zeros(head_DV.shape[1], bool).at[jnp.array(banned_ids)].set(True)
    return jnp.where(banned_V, -jnp.inf, logits)


def _accumulator(hidden: Array) -> jnp.dtype:
    return jnp.promote_types(hidden.dtype, jnp.float32)


def _plain(hidden: Array, head_DV: Array, targets: Array, banned_ids: tuple[int, ...]) -> tuple[Array, Array]:
    logprobs_V = jax.nn.log_softmax(_logits(hidden, head_DV, banned_ids), axis=-1)
    logprobs = jnp.take_along_axis(logprobs_V, targets[..., None], axis=-1)[..., 0]
    logprobs = jnp.where(jnp.isneginf(logprobs), -jnp.inf, logprobs)
    entropy = -jnp.sum(jnp.where(jnp.isneginf(logprobs_V), 0, jnp.exp(logprobs_V) * logprobs_V), axis=-1)
    return logprobs, entropy


class _Block(NamedTuple):
    """One chunk's results, and its softmax as numerator and denominator."""

    logprobs: Array
    entropy: Array
    exp_V: Array
    total: Array


def _block(hidden: Array, head_DV: Array, targets: Array, banned_ids: tuple[int, ...]) -> _Block:
    with jax.named_scope("token_logprobs"):
        logits_V = _logits(hidden, head_DV, banned_ids)
        shifted_V = logits_V - jnp.max(logits_V, axis=-1, keepdims=True)
        exp_V = jnp.exp(shifted_V)
        total = jnp.sum(exp_V, axis=-1)
        target = jnp.take_along_axis(shifted_V, targets[..., None], axis=-1)[..., 0]
        entropy = jnp.log(total) - jnp.sum(jnp.where(exp_V > 0, exp_V * shifted_V, 0), axis=-1) / total
        return _Block(target - jnp.log(total), entropy, exp_V, total)


def _block_gradient(
    grad: Array, block: _Block, hidden_RNSD: Array, head_DV: Array, targets_RNS: Array
) -> tuple[Array, Array]:
    """Gradients of one chunk: hidden states [R, N, S, D] and, per shard, the head [R, D, V]."""
    with jax.named_scope("token_logprobs_gradient"):
        grad = jnp.where(jnp.isneginf(block.logprobs), 0, grad)
        is_target_V = targets_RNS[..., None] == jnp.arange(head_DV.shape[1], dtype=targets_RNS.dtype)
        grad_V = jnp.where(is_target_V, grad[..., None], 0)
        grad_V = (grad_V - block.exp_V * (grad / block.total)[..., None]).astype(hidden_RNSD.dtype)
        accumulator = _accumulator(hidden_RNSD)
        grad_hidden = jnp.einsum(
            "rnsv,dv->rnsd", grad_V, head_DV.astype(hidden_RNSD.dtype), preferred_element_type=accumulator
        )
        grad_head = jnp.einsum("rnsd,rnsv->rdv", hidden_RNSD, grad_V, preferred_element_type=accumulator)
        return grad_hidden.astype(hidden_RNSD.dtype), grad_head


def _gathered(head_DV: Array, hidden: Array) -> Array:
    """The head as all chunks use it, gathered over fsdp once and not in each chunk."""
    return constrain(head_DV.astype(hidden.dtype), None, "vocab")


def _split(x: Array, num_chunks: int) -> Array:
    """[R, N, S, ...] → [chunks, R, N, S / chunks, ...]."""
    return jnp.moveaxis(x.reshape(*x.shape[:2], num_chunks, -1, *x.shape[3:]), 2, 0)


def _merge(x: Array) -> Array:
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked(
    num_chunks: int, banned_ids: tuple[int, ...], hidden_RNSD: Array, head_DV: Array, targets_RNS: Array
) -> tuple[Array, Array]:
    if num_chunks == 1:
        block = _block(hidden_RNSD, head_DV, targets_RNS, banned_ids)
        return block.logprobs, block.entropy

    head_DV = _gathered(head_DV, hidden_RNSD)

    def step(_: None, chunk: tuple[Array, Array]) -> tuple[None, tuple[Array, Array]]:
        block = _block(chunk[0], head_DV, chunk[1], banned_ids)
        return None, (block.logprobs, block.entropy)

    _, results = jax.lax.scan(step, None, (_split(hidden_RNSD, num_chunks), _split(targets_RNS, num_chunks)))
    return _merge(results[0]), _merge(results[1])


def _chunked_forward(num_chunks, banned_ids, hidden_RNSD, head_DV, targets_RNS):
    if num_chunks == 1:
        block = _block(hidden_RNSD, head_DV, targets_RNS, banned_ids)
        return (block.logprobs, block.entropy), (hidden_RNSD, head_DV, targets_RNS, block)
    results = _chunked(num_chunks, banned_ids, hidden_RNSD, head_DV, targets_RNS)
    return results, (hidden_RNSD, head_DV, targets_RNS, None)


def _chunked_backward(num_chunks, banned_ids, residuals, grads):
    hidden_RNSD, head_DV, targets_RNS, block = residuals
    dtype = head_DV.dtype
    grad_RNS = grads[0]
    if num_chunks == 1:
        grad_hidden, grad_head_RDV = _block_gradient(grad_RNS, block, hidden_RNSD, head_DV, targets_RNS)
    else:
        head_DV = _gathered(head_DV, hidden_RNSD)

        def step(grad_head_RDV: Array, chunk: tuple[Array, Array, Array]) -> tuple[Array, Array]:
            hidden, targets, grad = chunk
            block = _block(hidden, head_DV, targets, banned_ids)
            grad_hidden, grad_head = _block_gradient(grad, block, hidden, head_DV, targets)
            return grad_head_RDV + grad_head, grad_hidden

        zeros_RDV = jnp.zeros((hidden_RNSD.shape[0], *head_DV.shape), _accumulator(hidden_RNSD))
        chunks = (_split(hidden_RNSD, num_chunks), _split(targets_RNS, num_chunks), _split(grad_RNS, num_chunks))
        grad_head_RDV, grad_hidden = jax.lax.scan(step, zeros_RDV, chunks)
        grad_hidden = _merge(grad_hidden)
    return grad_hidden, sum_of_shards(grad_head_RDV, "embed", "vocab").astype(dtype), None


_chunked.defvjp(_chunked_forward, _chunked_backward)
