"""Distillation: a student learns a teacher's distributions, hidden states or relations between positions.

On text (offline) and on the student's own samples (on-policy, GKD, arXiv:2306.13649) the losses are the same; what is
sampled differs. Distillation by sequences is `language_model.cross_entropy` on the teacher's samples.

Shapes: B batch, S sequence, T positions seen, D student's width, C teacher's width, H relation heads.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from moe_jax.losses import SumCount
from moe_jax.ops.token_divergence import Teacher, TopK, token_divergence


def distillation_loss(
    hidden_BSD: Array, head_DV: Array, teacher: Teacher | TopK, weights_BS: Array, **options: Any
) -> SumCount:
    """Weighted divergence between the teacher's and the student's next-token distributions, nats × temperature².

    Returns the sum over positions and the sum of the weights. Positions without weight (padding, prompts) count
    nowhere, even if they hold infinities or NaN. `options` are those of `token_divergence`: beta (0 forward KL, 1
    reverse KL, between them generalised Jensen-Shannon), temperature, banned ids, chunks, shards.
    """
    # Zeroed before, not after: a NaN in a hidden state would reach the head's gradient through a product with 0.
    counted_BS1 = (weights_BS > 0)[..., None]
    hidden_BSD = jnp.where(counted_BS1, hidden_BSD, 0)
    per_position: Any = teacher.hidden if isinstance(teacher, Teacher) else teacher
    per_position = jax.tree.map(lambda x: jnp.where(counted_BS1, x, 0), per_position)
    teacher = teacher._replace(hidden=per_position) if isinstance(teacher, Teacher) else per_position
    divergence_BS = token_divergence(hidden_BSD, head_DV, teacher, **options)
    return SumCount(jnp.sum(jnp.where(weights_BS > 0, weights_BS * divergence_BS, 0)), jnp.sum(weights_BS))


def hidden_state_loss(
    student_BSD: Array, teacher_BSC: Array, weights_BS: Array, projection_DC: Array | None = None
) -> SumCount:
    """Weighted mean squared difference per channel of hidden states (TinyBERT, arXiv:1909.10351 eq. 8).

    Gradients reach the student and the projection, which is learned with it and lets the widths differ.

    Raises:
        ValueError: widths differ and there is no projection between them.
    """
    if projection_DC is None and student_BSD.shape[-1] != teacher_BSC.shape[-1]:
        raise ValueError(
            f"student's width {student_BSD.shape[-1]} and teacher's {teacher_BSC.shape[-1]} differ: give projection_DC"
        )
    counted_BS1 = (weights_BS > 0)[..., None]
    student, teacher = (jnp.where(counted_BS1, x, 0).astype(jnp.float32) for x in (student_BSD, teacher_BSC))
    if projection_DC is not None:
        student = jnp.einsum("BSD,DC->BSC", student, projection_DC.astype(jnp.float32))
    error_BS = jnp.mean(jnp.square(student - jax.lax.stop_gradient(teacher)), axis=-1)
    return SumCount(jnp.sum(weights_BS * error_BS), jnp.sum(weights_BS))


def relation_loss(
    student_BSD: Array, teacher_BSC: Array, mask_BST: Array, weights_BS: Array, num_heads: int
) -> SumCount:
    """KL between the two models' relations among positions (MiniLM v2, arXiv:2012.15828 §3.1), nats.

    A relation is attention of vectors to themselves: softmax(A Aᵀ / sqrt(width)) over the positions that the mask lets
    a position see, per head. A may be any vectors of a layer: queries, keys, values or hidden states, heads side by
    side. The models' attention maps are not needed (the ops of attention do not keep them), and the two may differ in
    width and in their numbers of heads. Holds both relations, [B, H, S, S] each.

    Args:
        student_BSD, teacher_BSC: the vectors; both widths are cut into `num_heads` relation heads.
        mask_BST: True where position s sees position t; those with weight must see at least themselves.
        weights_BS: weight of each position's row.
        num_heads: relation heads H.

    Raises:
        ValueError: num_heads does not divide both widths.
    """
    widths = student_BSD.shape[-1], teacher_BSC.shape[-1]
    if any(width % num_heads for width in widths):
        raise ValueError(f"num_heads = {num_heads}: must divide the student's and the teacher's widths {widths}")
    counted_BS = weights_BS > 0
    rows_BHST = (mask_BST & counted_BS[:, :, None])[:, None]
    read_BS1 = (jnp.any(rows_BHST[:, 0], axis=1) | counted_BS)[..., None]

    def log_relation(x_BSX: Array) -> Array:
        x_BSX = jnp.where(read_BS1, x_BSX, 0).astype(jnp.float32)
        x_BSHX = x_BSX.reshape(*x_BSX.shape[:2], num_heads, -1)
        scores_BHST = jnp.einsum("BSHX,BTHX->BHST", x_BSHX, x_BSHX) * x_BSHX.shape[-1] ** -0.5
        # Finite, so that rows that see nothing have a gradient (of zero).
        return jax.nn.log_softmax(jnp.where(rows_BHST, scores_BHST, jnp.finfo(jnp.float32).min), axis=-1)

    teacher_BHST = jax.lax.stop_gradient(log_relation(teacher_BSC))
    terms_BHST = jnp.exp(teacher_BHST) * (teacher_BHST - log_relation(student_BSD))
    divergence_BS = jnp.mean(jnp.sum(jnp.where(rows_BHST, terms_BHST, 0), axis=-1), axis=1)
    return SumCount(jnp.sum(weights_BS * divergence_BS), jnp.sum(weights_BS))
