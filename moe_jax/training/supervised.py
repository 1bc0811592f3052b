"""Next-token training of a `Transformer`: main loss, multi-token prediction, sequence balance; and its evaluation.

B batch, S sequence, L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe_jax.config import CheckpointConfig
from moe_jax.data import DataError
from moe_jax.losses import SumCount
from moe_jax.losses.balance import sequence_balance_loss
from moe_jax.losses.language_model import cross_entropy, mtp_loss, next_token_targets
from moe_jax.model.definition import Arrays, Definition
from moe_jax.sharding import batch_shards, put_batch
from moe_jax.training.experiment import Session
from moe_jax.training.loop import run_phase
from moe_jax.training.state import Batch, Loss, LossOutput, TrainState, Update


class Totals(NamedTuple):
    """What a whole batch's sums are divided by."""

    targets: tuple[Array, ...]
    """Weight of the targets of the main head, then of each multi-token prediction module."""
    sequences: Array
    """Rows that hold at least one token."""


def make_totals(definition: Definition) -> Callable[[Batch], Totals]:
    def totals(batch: Batch) -> Totals:
        weights = [
            next_token_targets(batch["tokens_BS"], batch["segment_ids_BS"], batch.get("loss_mask_BS"), offset)[1]
            for offset in range(1, definition.cfg.mtp.depth + 2)
        ]
        sequences = jnp.sum(jnp.any(batch["segment_ids_BS"] > 0, axis=1), dtype=jnp.float32)
        return Totals(tuple(jnp.maximum(jnp.sum(w), 1) for w in weights), jnp.maximum(sequences, 1))

    return totals


def make_loss(definition: Definition, banned_ids: tuple[int, ...] = ()) -> Loss:
    """The pre-training loss: L_main + λ/D Σ_k L_MTP^k + α Σ_layers L_balance (DeepSeek-V3 eq. 17, 24, 25).

    Batches hold `tokens_BS`, `segment_ids_BS`, `positions_BS` and, if only some tokens are to be predicted,
    `loss_mask_BS`.
    """
    cfg = definition.cfg

    def loss(params: Arrays, rest: Arrays, batch: Batch, totals: Totals) -> LossOutput:
        model = definition.merge(params, rest)
        tokens_BS, segments_BS, positions_BS = batch["tokens_BS"], batch["segment_ids_BS"], batch["positions_BS"]
        mask_BS = batch.get("loss_mask_BS")
        output = model(tokens_BS, segment_ids_BS=segments_BS, positions_BS=positions_BS)

        def predict(hidden_BSD: Array, offset: int) -> SumCount:
            targets_BS, weights_BS = next_token_targets(tokens_BS, segments_BS, mask_BS, offset)
            options = {"banned_ids": banned_ids, "shards": batch_shards(len(tokens_BS))}
            return cross_entropy(hidden_BSD, model.head(), targets_BS, weights_BS, **options)

        main = predict(output.hidden_BSD, 1)
        metrics = {"loss_main": main}
        total = main.sum / totals.targets[0]
        routers = {"moe_blocks": output.router}
        if cfg.mtp.depth:
            ahead = model.predict_ahead(output.hidden_BSD, tokens_BS, segments_BS, positions_BS)
            depths = [predict(ahead.hidden_NBSD[k], k + 2) for k in range(cfg.mtp.depth)]
            metrics |= {f"loss_mtp_{k + 1}": depth for k, depth in enumerate(depths)}
            parts = [SumCount(part.sum, whole) for part, whole in zip(depths, totals.targets[1:], strict=True)]
            total += mtp_loss(parts, cfg.mtp.loss_coef)
            routers["mtp.blocks"] = ahead.router
        counts = {}
        for name, stats in routers.items():
            if stats is None:
                continue
            # V3 counts the experts that the scores alone would choose, V2 (no bias) those that were chosen.
            counts_BE = stats.unbiased_counts_BE if cfg.moe.selection_bias else stats.counts_BE
            balance = sequence_balance_loss(counts_BE, stats.affinity_BE, stats.tokens_B, cfg.moe.num_experts_per_token)
            metrics[f"loss_balance/{name}"] = balance
            total += cfg.moe.sequence_balance_coef * balance.sum / totals.sequences
            counts[f"{name}.ffn.router.bias"] = jnp.sum(stats.counts_BE, axis=1)
        return LossOutput(total, metrics, counts, {})

    return loss


class BitsPerByte:
    """Validation loss of the main head: `loss` in nats per token, and `bits_per_byte`, comparable across tokenizers.

    `bytes_V` says how many bytes each token stands for.
    """

    def __init__(self, definition: Definition, bytes_V: np.ndarray, banned_ids: tuple[int, ...] = ()):
        @jax.jit
        def sums(params: Arrays, rest: Arrays, batch: Batch) -> tuple[Array, Array, Array]:
            model = definition.merge(params, rest)
            tokens_BS, segments_BS = batch["tokens_BS"], batch["segment_ids_BS"]
            output = model(tokens_BS, segment_ids_BS=segments_BS, positions_BS=batch["positions_BS"])
            targets_BS, weights_BS = next_token_targets(tokens_BS, segments_BS)
            options = {"banned_ids": banned_ids, "shards": batch_shards(len(tokens_BS))}
            nll = cross_entropy(output.hidden_BSD, model.head(), targets_BS, weights_BS, **options)
            return nll.sum, nll.count, jnp.sum(weights_BS * jnp.asarray(bytes_V)[targets_BS])

        self._sums = sums

    def __call__(
        self, params: Arrays, rest: Arrays, batches: Iterable[Batch], between: Callable[[], None] = lambda: None
    ) -> dict[str, float]:
        """Over all batches together; `between` is called after each.

        Raises:
            DataError: the text has no byte to predict.
        """
        totals: Any = np.zeros(3)
        for batch in batches:
            totals += np.array(jax.device_get(self._sums(params, rest, batch)), np.float64)
            between()
        nll, tokens, num_bytes = totals
        if num_bytes == 0:
            raise DataError("the validation text has no byte to predict: give a longer one")
        return {"loss": nll / tokens, "bits_per_byte": nll / np.log(2) / num_bytes}


def train_supervised(
    session: Session,
    phase: str,
    update: Update,
    state: TrainState,
    data: Any,
    steps: int,
    checkpoint: CheckpointConfig,
) -> TrainState:
    """Runs a phase of supervised training on `data`, an iterator of batches with `get_state` and `set_state`."""

    def body(state: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
        return update(state, put_batch(next(data), session.mesh))

    return run_phase(session.run, session.guard, phase, steps, state, body, checkpoint=checkpoint, data=data)
