"""A phase of policy training: rollout, reference, updates, records; one step is one function.

P prompts, G samples per prompt, B rows (P·G), N tokens of a completion.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from moe_jax.config import CheckpointConfig, RLConfig
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.model.definition import Arrays, Definition
from moe_jax.rl.environments import Environment
from moe_jax.rl.grpo import completion_logprobs, make_generator, make_loss, minibatches, rollout, totals
from moe_jax.rng import random_key
from moe_jax.sharding import put_batch, replicate
from moe_jax.training.experiment import Session
from moe_jax.training.loop import run_phase
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.state import Batch, TrainState, make_update, start_state


class PolicyState(NamedTuple):
    """What a policy phase saves: a `TrainState`, under the same names, and the reference policy."""

    step: Array
    params: Arrays
    rest: Arrays
    opt_state: optax.OptState
    reference: Arrays
    """Parameters of the reference policy; empty when beta is 0."""

    @property
    def train(self) -> TrainState:
        return TrainState(self.step, self.params, self.rest, self.opt_state)


class PolicyTrainer:
    """The compiled parts of policy training, shared by phases that differ in start or environment only."""

    def __init__(self, definition: Definition, cfg: RLConfig, tokenizer: Tokenizer, prompt_length: int):
        self.definition, self.cfg, self.tokenizer, self.prompt_length = definition, cfg, tokenizer, prompt_length
        updates = cfg.steps * cfg.num_iterations * cfg.num_minibatches
        self.optimizer = make_optimizer(cfg.optimizer, updates, definition)
        loss = make_loss(definition, cfg, tokenizer.pad_id)
        self.update = make_update(loss, totals, self.optimizer, accumulation_steps=cfg.accumulation_steps)
        self.sample = make_generator(definition, cfg.sampling, tokenizer, cfg.group_size)

        @jax.jit
        def reference_logprobs(params: Arrays, rest: Arrays, batch: Batch) -> Array:
            return replicate(completion_logprobs(definition, params, rest, batch, tokenizer.pad_id)[0].logprobs)

        self.reference_logprobs = reference_logprobs

    def train(
        self,
        session: Session,
        phase: str,
        environment: Environment,
        params: Arrays,
        rest: Arrays,
        *,
        seed: int,
        checkpoint: CheckpointConfig,
    ) -> TrainState:
        """Trains a copy of `params` for `cfg.steps` steps; every sample goes to `rollouts/<phase>/<step>.jsonl`."""
        cfg = self.cfg
        train = start_state(self.definition, self.optimizer, params, rest, session.mesh)
        reference = jax.tree.map(jnp.copy, train.params) if cfg.loss.beta else {}

        def body(state: PolicyState, step: int) -> tuple[PolicyState, dict[str, Any]]:
            state, metrics, rows = self.step(
                environment, state, phase, step, seed, session.mesh, between=session.guard.check
            )
            session.run.write_rows(f"rollouts/{phase}/{step + 1:06d}.jsonl", rows)
            return state, metrics

        state = run_phase(
            session.run,
            session.guard,
            phase,
            cfg.steps,
            PolicyState(*train, reference),
            body,
            checkpoint=checkpoint,
            show=("reward", "rewards/accuracy/mean"),
        )
        return state.train

    def step(
        self,
        environment: Environment,
        state: PolicyState,
        phase: str,
        step: int,
        seed: int,
        mesh: Any,
        between: Callable[[], None] = lambda: None,
    ) -> tuple[PolicyState, dict[str, Any], list[dict[str, Any]]]:
        """Samples, scores and updates once; returns the new state, the metrics and the samples as records.

        `between` is called before the first update, which donates the state.
        """
        cfg, train, reference = self.cfg, state.train, state.reference
        if reference and cfg.reference_refresh_steps and step and step % cfg.reference_refresh_steps == 0:
            reference = jax.tree.map(jnp.copy, train.params)
        samples = rollout(
            environment,
            self.sample,
            train.params,
            train.rest,
            self.tokenizer,
            cfg,
            prompt_length=self.prompt_length,
            step=step,
            seed=seed,
            key=random_key(seed, f"rollout/{phase}", step),
        )
        between()
        started = time.perf_counter()
        metrics = dict(samples.metrics)
        active = 1 - metrics["frac_reward_zero_std"]
        metrics["update_skipped"] = float(active < cfg.min_active_groups)
        if not metrics["update_skipped"]:
            batch = samples.batch(cfg.mask_truncated_completions)
            if cfg.loss.beta:
                logprobs = self.reference_logprobs(reference, train.rest, put_batch(batch, mesh))
                batch["ref_logprobs_BN"] = np.asarray(logprobs)
            parts = []
            for minibatch in minibatches(batch, cfg, seed, step):
                train, part = self.update(train, put_batch(minibatch, mesh))
                parts.append(part)
            metrics |= _mean_over_updates(jax.device_get(parts))
        metrics["time/update"] = time.perf_counter() - started
        metrics["tokens_per_second"] = metrics["num_tokens"] / sum(
            metrics[f"time/{part}"] for part in ("generate", "score", "update")
        )
        return PolicyState(*train, reference), metrics, samples.rows(step + 1)


def _mean_over_updates(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Each metric's mean over a step's updates; what compares sampler and trainer is of the first update alone."""
    means = {name: np.mean([part[name] for part in parts], axis=0) for name in parts[0]}
    return means | {name: value for name, value in parts[0].items() if name.startswith("sampling/")}
