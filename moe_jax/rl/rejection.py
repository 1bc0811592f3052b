"""Rejection sampling: a model's own samples that are right and readable, as text to train on (DeepSeek-R1 §2.3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moe_jax.data import DataError
from moe_jax.data.problems import Document
from moe_jax.rl.environments import Environment
from moe_jax.rl.evaluation import Weights
from moe_jax.rl.grpo import rollout
from moe_jax.rl.rewards import readable
from moe_jax.rl.train import PolicyTrainer
from moe_jax.rng import random_key
from moe_jax.training.experiment import Session
from moe_jax.training.run import Progress


class RejectionSampler:
    """Draws batches of `trainer.cfg.num_prompts` problems until enough samples have been kept.

    Kept is what is right, well formed, and readable in `language`, each text once. Every sample goes to
    `rollouts/<phase>/<batch>.jsonl`, with `kept`; batches that an earlier session wrote are read, and the model is not
    asked for.
    """

    def __init__(self, session: Session, trainer: PolicyTrainer, language: str, seed: int):
        self.session, self.trainer, self.language, self.seed = session, trainer, language, seed

    def __call__(
        self, phase: str, environment: Environment, model: Callable[[], Weights], wanted: int, max_batches: int
    ) -> list[Document]:
        """The first `wanted` samples kept.

        Raises:
            DataError: `max_batches` do not have so many.
        """
        run, kept = self.session.run, {}
        with Progress(phase, wanted) as progress:
            for batch in range(1, max_batches + 1):
                name = f"rollouts/{phase}/{batch:06d}.jsonl"
                rows = run.rows(name)
                if rows is None:
                    self.session.guard.check()
                    rows = self._draw(phase, batch, environment, model())
                    run.write_rows(name, rows)
                for row in rows:
                    if row["kept"]:
                        completion = row["completion"] + "<eos>"
                        kept[row["prompt"], completion] = Document(row["prompt"], completion, bool(row["worked"]))
                progress.update(min(len(kept), wanted))
                if len(kept) >= wanted:
                    return list(kept.values())[:wanted]
        raise DataError(
            f"{phase}: of {max_batches} batches of samples only {len(kept)} of {wanted} are right and readable"
            f" ({self.language}): allow more batches, ask for fewer documents, or train the model longer before"
        )

    def _draw(self, phase: str, batch: int, environment: Environment, model: Weights) -> list[dict[str, Any]]:
        trainer, run = self.trainer, self.session.run
        samples = rollout(
            environment,
            trainer.sample,
            model.params,
            model.rest,
            trainer.tokenizer,
            trainer.cfg,
            prompt_length=trainer.prompt_length,
            step=batch - 1,
            seed=self.seed,
            key=random_key(self.seed, f"rollout/{phase}", batch - 1),
        )
        rows = samples.rows(batch)
        for row in rows:
            row["readable"] = float(readable(row["completion"], self.language))
            row["kept"] = float(row["finished"] and row["accuracy"] == 1 and row["readable"])
        shares = {name: sum(row[name] for row in rows) / len(rows) for name in ("accuracy", "readable", "kept")}
        run.rewind(phase, batch - 1)  # the batch was logged already if the run was killed just then
        run.log(phase, batch, {**shares, "completions/mean_length": samples.metrics["completions/mean_length"]})
        return rows
