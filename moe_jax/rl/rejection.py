"""Rejection sampling: a model's own samples that are right and readable, as text to train on (DeepSeek-R1 §2.3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moe_jax.data import DataError
from moe_jax.data.problems import Document
from moe_jax.rl.environments import Environment
from moe_jax.rl.evaluation import Weights
from moe_jax.rl.grpo import rollout
from moe_jax.rl.train import PolicyTrainer
from moe_jax.rng import random_key
from moe_jax.training.experiment import Session
from moe_jax.training.run import Progress


def rejection_sample(
    session: Session,
    phase: str,
    trainer: PolicyTrainer,
    environment: Environment,
    model: Callable[[], Weights],
    *,
    wanted: int,
    max_batches: int,
    seed: int,
) -> list[Document]:
    """The first `wanted` samples that are right, well formed and readable, each text once.

    Batches of `trainer.cfg.num_prompts` problems are drawn until there are so many. Every sample goes to
    `rollouts/<phase>/<batch>.jsonl`, with `kept`; batches that an earlier session wrote are read, and `model` is asked
    for only if one is missing. The environment's parts have to have `readable`.

    Raises:
        DataError: `max_batches` do not have so many.
    """
    kept: dict[tuple[str, str], Document] = {}
    with Progress(phase, wanted) as progress:
        for batch in range(1, max_batches + 1):
            name = f"rollouts/{phase}/{batch:06d}.jsonl"
            rows = session.run.rows(name)
            if rows is None:
                session.guard.check()
                rows = _draw(session, phase, batch, trainer, environment, model(), seed)
                session.run.write_rows(name, rows)
            for row in rows:
                if row["kept"]:
                    completion = row["completion"] + "<eos>"
                    kept[row["prompt"], completion] = Document(row["prompt"], completion, bool(row["worked"]))
            progress.update(min(len(kept), wanted))
            if len(kept) >= wanted:
                return list(kept.values())[:wanted]
    raise DataError(
        f"{phase}: of {max_batches} batches of samples only {len(kept)} of {wanted} are right and readable: allow more"
        " batches, ask for fewer documents, or train the model longer before"
    )


def _draw(
    session: Session,
    phase: str,
    batch: int,
    trainer: PolicyTrainer,
    environment: Environment,
    model: Weights,
    seed: int,
) -> list[dict[str, Any]]:
    """A batch's samples as records; logged."""
    samples = rollout(
        environment,
        trainer.sample,
        model.params,
        model.rest,
        trainer.tokenizer,
        trainer.cfg,
        prompt_length=trainer.prompt_length,
        step=batch - 1,
        seed=seed,
        key=random_key(seed, f"rollout/{phase}", batch - 1),
    )
    rows = samples.rows(batch)
    for row in rows:
        row["kept"] = row["accuracy"] * row["format"] * row["readable"]
    shares = {name: sum(row[name] for row in rows) / len(rows) for name in ("accuracy", "readable", "kept")}
    session.run.rewind(phase, batch - 1)  # the batch was logged already if the run was killed just then
    session.run.log(phase, batch, {**shares, "completions/mean_length": samples.metrics["completions/mean_length"]})
    return rows
