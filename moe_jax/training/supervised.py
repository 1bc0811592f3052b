"""Next-token training of a `Transformer`: main loss, multi-token prediction, router losses; and its evaluation.

B batch, S sequence, L layers, E experts, N groups of experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe_jax.config import CheckpointConfig, MoEConfig, MTPConfig, TrainConfig
from moe_jax.data import DataError
from moe_jax.losses import SumCount
from moe_jax.losses.balance import (
    communication_balance_loss,
    device_balance_loss,
    expert_balance_loss,
    global_balance_loss,
    router_load,
    router_z_loss,
    sequence_balance_loss,
)
from moe_jax.losses.language_model import cross_entropy, mtp_loss, next_token_targets
from moe_jax.model.definition import Arrays, Definition
from moe_jax.model.mtp import MTPOutput
from moe_jax.model.router import RouterStats
from moe_jax.model.transformer import ModelOutput, Transformer
from moe_jax.sharding import put_batch, replicate, token_shards
from moe_jax.training.experiment import Session
from moe_jax.training.loop import run_phase
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.state import (
    Batch,
    CountTotals,
    Loss,
    LossOutput,
    TrainState,
    Update,
    init_state,
    make_update,
    micro_batches,
    start_state,
)


class Totals(NamedTuple):
    """What a whole batch's sums are divided by."""

    targets: tuple[Array, ...]
    """Weight of the targets of the main head, then of each multi-token prediction module."""
    sequences: Array
    """Rows that hold at least one token."""
    tokens: Array
    """Tokens, without padding."""
    mtp_loss_coef: float | Array
    """λ of multi-token prediction at this step."""
    counts: dict[str, Array]
    """The routers' assignments [L, E], where a micro-batch cannot count them itself; else empty."""


def make_totals(definition: Definition) -> CountTotals:
    """The totals that `make_loss` needs.

    For the global-batch balance loss of several micro-batches they need the loads of all before the gradient of the
    first: a forward pass over each, which costs about a third of a step.
    """
    moe, mtp = definition.cfg.moe, definition.cfg.mtp

    def totals(params: Arrays, rest: Arrays, batch: Batch, accumulation_steps: int) -> Totals:
        weights = [
            next_token_targets(batch["tokens_BS"], batch["segment_ids_BS"], batch.get("loss_mask_BS"), offset)[1]
            for offset in range(1, mtp.depth + 2)
        ]
        valid_BS = batch["segment_ids_BS"] > 0
        sequences = jnp.sum(jnp.any(valid_BS, axis=1), dtype=jnp.float32)
        tokens = jnp.sum(valid_BS, dtype=jnp.float32)
        counts = {}
        if moe.num_experts and moe.global_balance_coef and accumulation_steps > 1:

            def micro_counts(micro: Batch) -> dict[str, Array]:
                _, _, _, routers = _forward(definition, params, rest, micro)
                return {name: jnp.sum(stats.counts_BE, axis=1) for name, stats in routers.items()}

            counts_MLE = jax.lax.map(micro_counts, micro_batches(batch, accumulation_steps))
            counts = {name: jnp.sum(counts, axis=0) for name, counts in counts_MLE.items()}
        targets = tuple(jnp.maximum(jnp.sum(w), 1) for w in weights)
        return Totals(targets, jnp.maximum(sequences, 1), jnp.maximum(tokens, 1), _mtp_loss_coef(mtp, batch), counts)

    return totals


def _mtp_loss_coef(mtp: MTPConfig, batch: Batch) -> float | Array:
    """λ at the step of a whole batch: of the tokens before it, and constant where it has no second value."""
    if not mtp.depth or not mtp.late_after_tokens:
        return mtp.loss_coef
    seen = batch["step_B"][0].astype(jnp.float32) * float(batch["tokens_BS"].size)  # 10T tokens are no int32
    return jnp.where(seen < float(mtp.late_after_tokens), mtp.loss_coef, mtp.late_loss_coef)


def _forward(
    definition: Definition, params: Arrays, rest: Arrays, batch: Batch
) -> tuple[Transformer, ModelOutput, MTPOutput | None, dict[str, RouterStats]]:
    """The model on a micro-batch as training runs it, and its routers' statistics by stack of blocks."""
    model = definition.merge(params, rest)
    tokens_BS, segments_BS, positions_BS = batch["tokens_BS"], batch["segment_ids_BS"], batch["positions_BS"]
    output = model(tokens_BS, segment_ids_BS=segments_BS, positions_BS=positions_BS, drop_tokens=True)
    routers, ahead = {"moe_blocks": output.router}, None
    if definition.cfg.mtp.depth:
        ahead = model.predict_ahead(output.hidden_BSD, tokens_BS, segments_BS, positions_BS, drop_tokens=True)
        routers["mtp.blocks"] = ahead.router
    return model, output, ahead, {name: stats for name, stats in routers.items() if stats is not None}


class RouterLoss(NamedTuple):
    """A part of the loss that routers have, summed over layers."""

    coef: float
    loss: SumCount
    divisor: Array
    """What the sum is divided by, of the whole batch; an MTP module, which sees fewer tokens, weighs in proportion."""


def router_losses(
    stats: RouterStats, moe: MoEConfig, totals: Totals, batch_counts_LE: Array | None = None
) -> dict[str, RouterLoss]:
    """The router losses whose coefficients are not 0, of a micro-batch's statistics [L, B, ...].

    The expert, device and communication losses take f and P of a micro-batch, over all devices, and weigh micro-batches
    by tokens; the global-batch loss takes f of `batch_counts_LE`, or of this micro-batch if there is no other.
    """
    sums = (stats.counts_BE, stats.affinity_BE, stats.tokens_B, stats.group_tokens_BN)
    counts_LE, affinity_LE, tokens_L, group_tokens_LN = (jnp.sum(x, axis=1) for x in sums)
    batch_counts_LE = counts_LE if batch_counts_LE is None else batch_counts_LE
    K, N, M = moe.num_experts_per_token, moe.num_groups, moe.num_groups_per_token
    # V3 counts the experts that the scores alone would choose; without a bias these statistics are of those chosen.
    sequence = sequence_balance_loss(stats.unbiased_counts_BE, stats.affinity_BE, stats.tokens_B, K)
    expert = expert_balance_loss(counts_LE, affinity_LE, tokens_L, K)
    device = device_balance_loss(counts_LE, affinity_LE, tokens_L, K, N)
    communication = communication_balance_loss(group_tokens_LN, affinity_LE, tokens_L, M)
    losses = {
        "loss_balance": RouterLoss(moe.sequence_balance_coef, sequence, totals.sequences),
        "loss_balance_expert": RouterLoss(moe.expert_balance_coef, expert, totals.tokens),
        "loss_balance_device": RouterLoss(moe.device_balance_coef, device, totals.tokens),
        "loss_balance_communication": RouterLoss(moe.communication_balance_coef, communication, totals.tokens),
        "loss_balance_global": RouterLoss(
            moe.global_balance_coef, global_balance_loss(batch_counts_LE, affinity_LE, tokens_L), totals.tokens
        ),
        "loss_z": RouterLoss(moe.z_loss_coef, router_z_loss(stats.z_B, stats.tokens_B), totals.tokens),
    }
    return {name: loss for name, loss in losses.items() if loss.coef}


def make_loss(definition: Definition, banned_ids: tuple[int, ...] = ()) -> Loss:
    """The pre-training loss: L_main + λ/D Σ_k L_MTP^k + Σ_layers Σ_j α_j L_j (DeepSeek-V3 eq. 17, 24, 25).

    λ is `mtp.loss_coef`, or late in training `mtp.late_loss_coef`. L_j are `router_losses`, of the trunk's layers and
    of the MTP modules'. Tokens beyond capacity are dropped.

    Batches hold `tokens_BS`, `segment_ids_BS`, `positions_BS` and, if only some tokens are to be predicted,
    `loss_mask_BS`.
    """
    cfg = definition.cfg

    def loss(params: Arrays, rest: Arrays, batch: Batch, totals: Totals) -> LossOutput:
        model, output, ahead, routers = _forward(definition, params, rest, batch)
        tokens_BS, segments_BS, mask_BS = batch["tokens_BS"], batch["segment_ids_BS"], batch.get("loss_mask_BS")

        def predict(hidden_BSD: Array, offset: int) -> SumCount:
            targets_BS, weights_BS = next_token_targets(tokens_BS, segments_BS, mask_BS, offset)
            options = {"banned_ids": banned_ids, "shards": token_shards(tokens_BS.shape)}
            return cross_entropy(hidden_BSD, model.head(), targets_BS, weights_BS, **options)

        main = predict(output.hidden_BSD, 1)
        metrics = {"loss_main": main}
        total = main.sum / totals.targets[0]
        if ahead is not None:
            depths = [predict(ahead.hidden_NBSD[k], k + 2) for k in range(cfg.mtp.depth)]
            metrics |= {f"loss_mtp_{k + 1}": depth for k, depth in enumerate(depths)}
            parts = [SumCount(part.sum, whole) for part, whole in zip(depths, totals.targets[1:], strict=True)]
            total += mtp_loss(parts, totals.mtp_loss_coef)
        for name, stats in routers.items():
            for kind, part in router_losses(stats, cfg.moe, totals, totals.counts.get(name)).items():
                metrics[f"{kind}/{name}"] = part.loss
                total += part.coef * part.loss.sum / part.divisor
        loads = {name: router_load(stats, cfg.moe.capacity_factor > 0) for name, stats in routers.items()}
        return LossOutput(total, metrics, loads, {})

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
            options = {"banned_ids": banned_ids, "shards": token_shards(tokens_BS.shape)}
            nll = cross_entropy(output.hidden_BSD, model.head(), targets_BS, weights_BS, **options)
            return replicate((nll.sum, nll.count, jnp.sum(weights_BS * jnp.asarray(bytes_V)[targets_BS])))

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
    num_rows: int | None = None,
) -> TrainState:
    """Runs a phase of supervised training on `data`, an iterator of batches with `get_state` and `set_state`.

    Its batches are whole, the same in every process; or, with `num_rows`, this process's rows of so many.
    """

    def body(state: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
        return update(state, put_batch(next(data), session.mesh, num_rows))

    return run_phase(session.run, session.guard, phase, steps, state, body, checkpoint=checkpoint, data=data)


class SupervisedTrainer:
    """The compiled parts of supervised training, shared by phases that differ in start or data only.

    Nothing in `banned_ids` (padding) is ever predicted.
    """

    def __init__(self, definition: Definition, cfg: TrainConfig, banned_ids: tuple[int, ...] = ()):
        self.definition, self.cfg = definition, cfg
        self.optimizer = make_optimizer(cfg.optimizer, cfg.steps, definition)
        computed = definition.at(cfg.precision)
        loss, totals = make_loss(computed, banned_ids), make_totals(computed)
        options: dict[str, Any] = {"accumulation_steps": cfg.accumulation_steps, "balance": definition.cfg.moe}
        self.update = make_update(loss, totals, self.optimizer, **options)

    def from_scratch(
        self, session: Session, phase: str, key: Array, data: Any, checkpoint: CheckpointConfig
    ) -> TrainState:
        """Trains new weights for `cfg.steps` steps on `data`, as `train_supervised` reads it."""
        state = init_state(self.definition, self.optimizer, key, session.mesh)
        return train_supervised(session, phase, self.update, state, data, self.cfg.steps, checkpoint)

    def fine_tune(
        self,
        session: Session,
        phase: str,
        params: Arrays,
        rest: Arrays,
        data: Any,
        checkpoint: CheckpointConfig,
        num_rows: int | None = None,
    ) -> TrainState:
        """The same with a copy of given weights, under a fresh optimizer; `data` and `num_rows` as `train_supervised`
        reads them."""
        state = start_state(self.definition, self.optimizer, params, rest, session.mesh)
        return train_supervised(session, phase, self.update, state, data, self.cfg.steps, checkpoint, num_rows)
