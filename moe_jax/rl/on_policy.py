"""On-policy distillation: the student samples, the teacher says what it would have said (GKD, arXiv:2306.13649, λ = 1).

B rows, S tokens of prompt and completion, N of a completion, K tokens that the teacher names, J = K + 1 outcomes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from moe_jax.config import CheckpointConfig, RLConfig
from moe_jax.ops.token_divergence import TopK
from moe_jax.rl.grpo import Rollout, minibatches
from moe_jax.sharding import put_batch
from moe_jax.training.experiment import Session
from moe_jax.training.loop import run_phase
from moe_jax.training.state import Batch, TrainState, Update


def sampled_rows(samples: Rollout) -> dict[str, np.ndarray]:
    """Samples as rows of text [B, S], prompt and completion, of which the drawn tokens are to be learned."""
    batch = samples.batch(False)
    segment_ids_BS, drawn_BN = batch["segment_ids_BS"], batch["drawn_BN"].astype(np.int32)
    prompt = segment_ids_BS.shape[1] - drawn_BN.shape[1]
    return {
        "tokens_BS": batch["tokens_BS"].astype(np.int32),
        "segment_ids_BS": segment_ids_BS,
        "positions_BS": np.maximum(np.cumsum(segment_ids_BS, axis=1, dtype=np.int32) - 1, 0),
        "loss_mask_BS": np.pad(drawn_BN, ((0, 0), (prompt, 0))),
    }


def distill_on_policy(
    session: Session,
    phase: str,
    state: TrainState,
    draw: Callable[[TrainState, int], Rollout],
    score: Callable[[Batch], TopK],
    update: Update,
    cfg: RLConfig,
    rows_an_update: int,
    seed: int,
    checkpoint: CheckpointConfig,
) -> TrainState:
    """A phase of `cfg.steps` steps; every sample goes to `rollouts/<phase>/<step>.jsonl`.

    Args:
        state: the student's.
        draw: (state, step) → the student's samples, `cfg.num_prompts` x `cfg.group_size` rows.
        score: the teacher's distribution after each token of a batch, [B, S, K] and [B, S, J].
        update: of the student, by `training.distillation.make_distillation_loss`.
        rows_an_update: must divide the rows of a step, each of which is learned from once.
        seed: of the order of the rows.
    """
    size = cfg.num_prompts * cfg.group_size
    once = replace(cfg, num_iterations=1, num_minibatches=size // rows_an_update, accumulation_steps=1)

    def body(state: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
        samples = draw(state, step)
        session.guard.check()
        batch = sampled_rows(samples)
        top = score(put_batch(batch, session.mesh))
        batch["teacher_ids_BSK"], batch["teacher_logprobs_BSJ"] = np.asarray(top.ids), np.asarray(top.logprobs)
        parts = []
        for minibatch in minibatches(batch, once, seed, step):
            state, part = update(state, put_batch(minibatch, session.mesh))
            parts.append(part)
        means = {name: np.mean([np.asarray(part[name]) for part in parts], axis=0) for name in parts[0]}
        session.run.write_rows(f"rollouts/{phase}/{step + 1:06d}.jsonl", samples.rows(step + 1))
        return state, samples.metrics | means

    show = ("loss", "rewards/accuracy/mean")
    return run_phase(session.run, session.guard, phase, cfg.steps, state, body, checkpoint=checkpoint, show=show)
