"""Divergence between a teacher's and a student's next-token distributions, without all logits of either at once.

Shapes: D student's width, C teacher's width, V vocabulary, S positions along the last token axis, R shards, N rows of a
shard, K tokens that a stored distribution names, J = K + 1 outcomes (those tokens, and all others together), "..."
leading axes.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from moe_jax.sharding import by_rows, constrain

# Logits per shard that may exist at once: 128 MiB in float32 for each of the two models.
_BLOCK_ELEMENTS = 2**25


class Teacher(NamedTuple):
    """A teacher at hand: what its head reads, and its head."""

    hidden: Array
    """[..., C]"""
    head_CV: Array


class TopK(NamedTuple):
    """A teacher's distributions cut down to the K most probable tokens, to be stored (`top_k_logprobs`).

    The other tokens are one outcome, whose probability the student is to match but may spread as it likes. By the data
    processing inequality, no divergence between such distributions is above that between the whole ones.
    """

    ids: Array
    """int32 [..., K], distinct tokens."""
    logprobs: Array
    """[..., J], at the temperature of the loss: of those tokens in order, then of all others together. Any constant
    may be missing from them, and so may the rounding to a narrow type: they are normalised when used."""


class _Spec(NamedTuple):
    beta: float
    temperature: float
    banned_ids: tuple[int, ...]
    num_chunks: int


def token_divergence(
    hidden: Array,
    head_DV: Array,
    teacher: Teacher | TopK,
    *,
    beta: float = 0.0,
    temperature: float = 1.0,
    banned_ids: tuple[int, ...] = (),
    chunk_size: int | None = None,
    shards: tuple[int, int] = (1, 1),
) -> Array:
    """Generalised Jensen-Shannon divergence of teacher P and student Q (GKD, arXiv:2306.13649 §2), float32 nats [...].

    β KL(P ‖ M) + (1 - β) KL(Q ‖ M), M = β P + (1 - β) Q, for 0 < β < 1. It vanishes at both ends; these stand for its
    limits divided by β and by 1 - β: β = 0 is the forward KL(P ‖ Q), β = 1 the reverse KL(Q ‖ P).

    P and Q are softmax(logits / temperature), and the result is times temperature², which keeps the gradient's size
    (Hinton et al., arXiv:1503.02531 §2). Gradients reach the student alone. As in `token_logprobs`, the last token
    axis is cut into chunks that the backward pass computes anew, one chunk is kept, `shards` sums the head's gradient
    over devices once at the end, and the softmax is float32 with products in the models' own types.

    Args:
        hidden: student's, [..., D].
        head_DV: student's head.
        teacher: its hidden states and head, or its K most probable tokens, for the same positions.
        beta: in [0, 1].
        temperature: above 0. With `TopK`, the one that its log-probabilities were taken at.
        banned_ids: tokens left out of both distributions (padding). A `TopK` must not name them.
        chunk_size: positions of the last token axis in a chunk; None takes what keeps each model's logits of a shard
            within 128 MiB.
        shards: number of devices that the first axis of `hidden` and its last token axis are spread over.

    Raises:
        ValueError: an argument outside its range, shapes that do not belong together, two vocabularies.
    """
    lead, V = hidden.shape[:-1], head_DV.shape[1]
    if hidden.ndim < 2 or hidden.shape[-1] != head_DV.shape[0]:
        raise ValueError(f"hidden {hidden.shape} and head {head_DV.shape} must be [..., D] and [D, V]")
    if not 0 <= beta <= 1:
        raise ValueError(f"beta = {beta}: must be between 0 (forward KL) and 1 (reverse KL)")
    _check(banned_ids, temperature, V)
    if isinstance(teacher, Teacher):
        if teacher.head_CV.shape[1] != V:
            raise ValueError(
                f"the student's vocabulary has {V} tokens, the teacher's {teacher.head_CV.shape[1]}: their tokens must"
                " be the same ones; models with different tokenizers can only be distilled by sequences, as text"
            )
        if teacher.hidden.shape != (*lead, teacher.head_CV.shape[0]):
            raise ValueError(
                f"teacher's hidden {teacher.hidden.shape} and head {teacher.head_CV.shape} must be {[*lead, 'C']}, as"
                " the student's hidden says, and [C, V]"
            )
        parts, teacher_head = (teacher.hidden,), teacher.head_CV
    else:
        K = teacher.ids.shape[-1]
        if teacher.ids.shape != (*lead, K) or teacher.logprobs.shape != (*lead, K + 1):
            raise ValueError(
                f"top-k ids {teacher.ids.shape} and logprobs {teacher.logprobs.shape} must be {[*lead, 'K']} and"
                f" {[*lead, 'K + 1']}, as hidden {hidden.shape} says"
            )
        parts, teacher_head = (teacher.ids, teacher.logprobs), None
    num_chunks = _num_chunks(lead, V, chunk_size, shards)
    spec = _Spec(float(beta), float(temperature), tuple(sorted(set(banned_ids))), num_chunks)
    parts = tuple(_fold(x, shards, num_chunks) for x in parts)
    loss_RNS: Array = _chunked(spec, _fold(hidden, shards, num_chunks), head_DV, parts, teacher_head)
    return _unfold(loss_RNS[..., None], lead, shards)[..., 0]


def top_k_logprobs(
    hidden: Array,
    head_DV: Array,
    k: int,
    *,
    temperature: float = 1.0,
    banned_ids: tuple[int, ...] = (),
    chunk_size: int | None = None,
    shards: tuple[int, int] = (1, 1),
) -> TopK:
    """A teacher's K most probable tokens at every position, in chunks as `token_divergence`; without a gradient.

    Raises:
        ValueError: an argument outside its range, or shapes that do not belong together.
    """
    lead, V = hidden.shape[:-1], head_DV.shape[1]
    if hidden.ndim < 2 or hidden.shape[-1] != head_DV.shape[0]:
        raise ValueError(f"hidden {hidden.shape} and head {head_DV.shape} must be [..., D] and [D, V]")
    _check(banned_ids, temperature, V)
    if not 0 < k <= V - len(set(banned_ids)):
        raise ValueError(f"k = {k}: must be at least 1 and at most the {V - len(set(banned_ids))} tokens not banned")
    num_chunks = _num_chunks(lead, V, chunk_size, shards)
    hidden, head_DV = jax.lax.stop_gradient((hidden, head_DV))
    head_DV = _gathered(head_DV, hidden.dtype)

    def chunk(hidden_RNSD: Array) -> TopK:
        logprobs_V = jax.nn.log_softmax(_logits(hidden_RNSD, head_DV, banned_ids) / temperature, axis=-1)
        ids = by_rows(lambda x_TV: jax.lax.top_k(x_TV, k)[1], logprobs_V.reshape(-1, V))
        ids = ids.reshape(*logprobs_V.shape[:-1], k)
        top = jnp.take_along_axis(logprobs_V, ids, axis=-1)
        rest = jax.nn.logsumexp(_without(logprobs_V, ids), axis=-1, keepdims=True)
        return TopK(ids, jnp.concatenate([top, rest], axis=-1))

    chunks = jax.lax.map(chunk, _split(_fold(hidden, shards, num_chunks), num_chunks))
    return TopK(*(_unfold(_merge(x), lead, shards) for x in chunks))


def _check(banned_ids: tuple[int, ...], temperature: float, V: int) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature = {temperature}: must be above 0")
    if any(not 0 <= token < V for token in banned_ids) or len(set(banned_ids)) == V:
        raise ValueError(f"banned_ids = {banned_ids}: must be ids in [0, {V}), and leave at least one token")


# ---------------------------------------------------------------------------------------------------------------------
# The divergence of one chunk and its gradient by the student's logits.
# ---------------------------------------------------------------------------------------------------------------------


def _divergence(teacher_V: Array, student_V: Array, beta: float) -> tuple[Array, Array]:
    """Divergence of two normalised log-probabilities [..., V], and its gradient by the student's.

    The gradient is that by logits which Q is the softmax of: Σ over V is 0. Outcomes that have no probability in the
    distribution that is averaged over give nothing, whatever their logarithms are.
    """
    p_V, q_V = jnp.exp(teacher_V), jnp.exp(student_V)
    if beta == 0:
        return jnp.sum(_times(p_V, teacher_V - student_V), axis=-1), q_V - p_V
    if beta == 1:
        gain_V = _times(q_V, student_V - teacher_V)
        loss = jnp.sum(gain_V, axis=-1)
        return loss, gain_V - q_V * loss[..., None]
    mixture_V = jnp.logaddexp(teacher_V + math.log(beta), student_V + math.log1p(-beta))
    gain_V = _times(q_V, student_V - mixture_V)
    student = jnp.sum(gain_V, axis=-1)
    teacher = jnp.sum(_times(p_V, teacher_V - mixture_V), axis=-1)
    return beta * teacher + (1 - beta) * student, (1 - beta) * (gain_V - q_V * student[..., None])


def _times(p_V: Array, log_ratio_V: Array) -> Array:
    return jnp.where(p_V > 0, p_V * log_ratio_V, 0)


def _block(
    spec: _Spec, hidden: Array, head_DV: Array, parts: tuple[Array, ...], teacher_head: Array | None
) -> tuple[Array, Array]:
    """One chunk's divergences and their gradients by the student's logits [..., V]."""
    T = spec.temperature
    with jax.named_scope("token_divergence"):
        student_V = jax.nn.log_softmax(_logits(hidden, head_DV, spec.banned_ids) / T, axis=-1)
        if teacher_head is not None:
            teacher_V = jax.nn.log_softmax(_logits(parts[0], teacher_head, spec.banned_ids) / T, axis=-1)
            loss, grad_V = _divergence(teacher_V, student_V, spec.beta)
        else:
            ids, teacher_J = parts
            teacher_J = jax.nn.log_softmax(teacher_J.astype(jnp.float32), axis=-1)
            others_V = _without(student_V, ids)
            rest = jax.nn.logsumexp(others_V, axis=-1, keepdims=True)
            student_J = jnp.concatenate([jnp.take_along_axis(student_V, ids, axis=-1), rest], axis=-1)
            loss, grad_J = _divergence(teacher_J, student_J, spec.beta)
            share_V = jnp.where(jnp.isneginf(others_V), 0, jnp.exp(others_V - rest))
            grad_V = jnp.put_along_axis(share_V * grad_J[..., -1:], ids, grad_J[..., :-1], axis=-1, inplace=False)
        return T * T * loss, T * grad_V


def _without(logprobs_V: Array, ids: Array) -> Array:
    return jnp.put_along_axis(logprobs_V, ids, -jnp.inf, axis=-1, inplace=False)


def _logits(hidden: Array, head_DV: Array, banned_ids: tuple[int, ...]) -> Array:
    logits_V = jnp.einsum(
        "...d,dv->...v", hidden, head_DV.astype(hidden.dtype), preferred_element_type=_accumulator(hidden)
    )
    return logits_V.at[..., list(banned_ids)].set(-jnp.inf) if banned_ids else logits_V


def _accumulator(hidden: Array) -> jnp.dtype:
    return jnp.promote_types(hidden.dtype, jnp.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Chunks.
# ---------------------------------------------------------------------------------------------------------------------


def _num_chunks(lead: tuple[int, ...], V: int, chunk_size: int | None, shards: tuple[int, int]) -> int:
    if (shards[0] > 1 and (len(lead) < 2 or lead[0] % shards[0])) or lead[-1] % shards[1]:
        raise ValueError(f"shards = {shards}: must divide the first and the last token axis, which are {lead}")
    rows, length = math.prod(lead[:-1]) // shards[0], lead[-1] // shards[1]
    if chunk_size is None:
        chunk_size = max(_BLOCK_ELEMENTS // (max(rows, 1) * V), 1)
    elif chunk_size < 1:
        raise ValueError(f"chunk_size = {chunk_size}: must be at least 1")
    return max(-(-length // chunk_size), 1)


def _fold(x: Array, shards: tuple[int, int], num_chunks: int) -> Array:
    """[..., S, X] → [R, N, S of a shard, X], padded so that chunks are of equal length."""
    length, X = x.shape[-2] // shards[1], x.shape[-1]
    x = jnp.swapaxes(x.reshape(shards[0], -1, shards[1], length, X), 1, 2).reshape(math.prod(shards), -1, length, X)
    return jnp.pad(x, ((0, 0), (0, 0), (0, -length % num_chunks), (0, 0)))


def _unfold(x_RNSX: Array, lead: tuple[int, ...], shards: tuple[int, int]) -> Array:
    """The inverse of `_fold`."""
    x = x_RNSX[:, :, : lead[-1] // shards[1]]
    return jnp.swapaxes(x.reshape(*shards, *x.shape[1:]), 1, 2).reshape(*lead, x.shape[-1])


def _split(x: Any, num_chunks: int) -> Any:
    """[R, N, S, ...] → [chunks, R, N, S / chunks, ...], for each array."""
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(*x.shape[:2], num_chunks, -1, *x.shape[3:]), 2, 0), x)


def _merge(x: Array) -> Array:
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _gathered(head_DV: Array, dtype: jnp.dtype) -> Array:
    """The head as all chunks use it, gathered over fsdp once and not in each chunk."""
    return constrain(head_DV.astype(dtype), None, "vocab")


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(
    spec: _Spec, hidden_RNSD: Array, head_DV: Array, parts: tuple[Array, ...], teacher_head: Array | None
) -> Array:
    return _forward(spec, hidden_RNSD, head_DV, parts, teacher_head)[0]


def _forward(spec: _Spec, hidden_RNSD: Array, head_DV: Array, parts: tuple[Array, ...], teacher_head: Array | None):
    residuals = hidden_RNSD, head_DV, parts, teacher_head
    if spec.num_chunks == 1:
        loss_RNS, grad_RNSV = _block(spec, *residuals)
        return loss_RNS, (*residuals, grad_RNSV)
    head_DV = _gathered(head_DV, hidden_RNSD.dtype)
    gathered = None if teacher_head is None else _gathered(teacher_head, parts[0].dtype)

    def step(chunk: tuple[Array, tuple[Array, ...]]) -> Array:
        return _block(spec, chunk[0], head_DV, chunk[1], gathered)[0]

    return _merge(jax.lax.map(step, _split((hidden_RNSD, parts), spec.num_chunks))), (*residuals, None)


def _backward(spec: _Spec, residuals: tuple, dloss_RNS: Array) -> tuple:
    hidden_RNSD, head_DV, parts, teacher_head, grad_RNSV = residuals
    head_dtype, accumulator = head_DV.dtype, _accumulator(hidden_RNSD)
    head_DV = _gathered(head_DV, hidden_RNSD.dtype)

    def gradients(dloss: Array, grad_V: Array, hidden: Array) -> tuple[Array, Array]:
        """Of one chunk: hidden states [R, N, S, D] and, per shard, the head [R, D, V]."""
        with jax.named_scope("token_divergence_gradient"):
            # A divergence that does not count may be infinite or NaN, and so may its gradient.
            grad_V = jnp.where(dloss[..., None] == 0, 0, grad_V * dloss[..., None]).astype(hidden.dtype)
            dhidden = jnp.einsum("rnsv,dv->rnsd", grad_V, head_DV, preferred_element_type=accumulator)
            dhead = jnp.einsum("rnsd,rnsv->rdv", hidden, grad_V, preferred_element_type=accumulator)
            return dhidden.astype(hidden.dtype), dhead

    if spec.num_chunks == 1:
        dhidden_RNSD, dhead_RDV = gradients(dloss_RNS, grad_RNSV, hidden_RNSD)
    else:
        gathered = None if teacher_head is None else _gathered(teacher_head, parts[0].dtype)

        def step(dhead_RDV: Array, chunk: tuple) -> tuple[Array, Array]:
            hidden, parts, dloss = chunk
            dhidden, dhead = gradients(dloss, _block(spec, hidden, head_DV, parts, gathered)[1], hidden)
            return dhead_RDV + dhead, dhidden

        zeros_RDV = jnp.zeros((hidden_RNSD.shape[0], *head_DV.shape), accumulator)
        chunks = _split((hidden_RNSD, parts, dloss_RNS), spec.num_chunks)
        dhead_RDV, dhidden_RNSD = jax.lax.scan(step, zeros_RDV, chunks)
        dhidden_RNSD = _merge(dhidden_RNSD)
    return dhidden_RNSD, jnp.sum(dhead_RDV, axis=0).astype(head_dtype), None, None


_chunked.defvjp(_forward, _backward)
