"""Training a student on what a teacher says of the next token, stored or just computed; the teacher's part of it.

B batch, S sequence, T tokens, K tokens that a teacher names, J = K + 1 outcomes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from moe_jax.losses.balance import router_load
from moe_jax.losses.distillation import distillation_loss
from moe_jax.losses.language_model import next_token_targets
from moe_jax.model.definition import Arrays, Definition
from moe_jax.ops.token_divergence import TopK, top_k_logprobs
from moe_jax.sharding import replicate, token_shards
from moe_jax.training.state import Batch, Loss, LossOutput
from moe_jax.training.supervised import Totals, router_losses


def make_distillation_loss(
    definition: Definition, *, beta: float, temperature: float = 1.0, banned_ids: tuple[int, ...] = ()
) -> Loss:
    """Divergence from the teacher's top-k distributions, a mean over the batch's targets, nats × temperature².

    `beta` is 0 for the forward KL, 1 for the reverse KL, between them the generalised Jensen-Shannon divergence (GKD,
    arXiv:2306.13649 §2). Routers' losses of a sparse student are added; modules of multi-token prediction get nothing.

    Batches are those of `supervised.make_loss` (whose `make_totals` belongs to them), with `teacher_ids_BSK` and
    `teacher_logprobs_BSJ`: what the teacher says after each token. Only tokens in `loss_mask_BS` are learned.
    """

    def loss(params: Arrays, rest: Arrays, batch: Batch, totals: Totals) -> LossOutput:
        model = definition.merge(params, rest)
        tokens_BS, segments_BS = batch["tokens_BS"], batch["segment_ids_BS"]
        output = model(tokens_BS, segment_ids_BS=segments_BS, positions_BS=batch["positions_BS"])
        _, weights_BS = next_token_targets(tokens_BS, segments_BS, batch["loss_mask_BS"])
        divergence = distillation_loss(
            output.hidden_BSD,
            model.head(),
            TopK(batch["teacher_ids_BSK"], batch["teacher_logprobs_BSJ"]),
            weights_BS,
            beta=beta,
            temperature=temperature,
            banned_ids=banned_ids,
            shards=token_shards(tokens_BS.shape),
        )
        total, metrics, loads = divergence.sum / totals.targets[0], {"divergence": divergence}, {}
        if output.router is not None:
            loads["moe_blocks"] = router_load(output.router)
            counts_LE = totals.counts.get("moe_blocks")
            for name, part in router_losses(output.router, definition.cfg.moe, totals, counts_LE).items():
                metrics[f"{name}/moe_blocks"] = part.loss
                total += part.coef * part.loss.sum / part.divisor
        return LossOutput(total, metrics, loads, {})

    return loss


Scorer = Callable[[Arrays, Arrays, Batch], TopK]
"""(teacher's params, rest, batch) → its distribution after each token, [B, S, K] and [B, S, J]."""


def make_scorer(
    definition: Definition, k: int, *, temperature: float = 1.0, banned_ids: tuple[int, ...] = ()
) -> Scorer:
    """The jitted teacher; it has no gradient. Batches as those of the loss, without what the teacher says."""

    @jax.jit
    def score(params: Arrays, rest: Arrays, batch: Batch) -> TopK:
        model = definition.merge(params, rest)
        tokens_BS = batch["tokens_BS"]
        options: dict[str, Any] = {"segment_ids_BS": batch["segment_ids_BS"], "positions_BS": batch["positions_BS"]}
        hidden_BSD = model(tokens_BS, **options).hidden_BSD
        shards = token_shards(tokens_BS.shape)
        top = top_k_logprobs(hidden_BSD, model.head(), k, temperature=temperature, banned_ids=banned_ids, shards=shards)
        return replicate(top)

    return score
